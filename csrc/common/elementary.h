// exp, log and their kin for the formulas of *_math.h. Torch-free.
//
// float and exp_of on the host: polynomials without branches or tables, so that GCC vectorises a
// loop over them at any instruction set; relative error below 2e-7 (double: 4e-16) where the result
// is a normal number. On the device, and otherwise for double: the library's own functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace als {

ALS_HOST_DEVICE double exp_of_nonpositive(double x) { return ::exp(x); }
ALS_HOST_DEVICE double expm1_of_nonpositive(double x) { return ::expm1(x); }
ALS_HOST_DEVICE double log_of_nonnegative(double x) { return ::log(x); }
ALS_HOST_DEVICE double log1p_of_fraction(double x) { return ::log1p(x); }

#ifdef __CUDACC__

template <typename T>
ALS_HOST_DEVICE T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

ALS_HOST_DEVICE double exp_of(double x) { return ::exp(x); }
ALS_HOST_DEVICE float exp_of_nonpositive(float x) { return ::expf(x); }
ALS_HOST_DEVICE float expm1_of_nonpositive(float x) { return ::expm1f(x); }
ALS_HOST_DEVICE float log_of_nonnegative(float x) { return ::logf(x); }
ALS_HOST_DEVICE float log1p_of_fraction(float x) { return ::log1pf(x); }

#else

// condition ? yes : no with both sides computed. GCC moves the work of a conditional operator
// behind a branch, and then cannot vectorise it: floating-point work may trap.
ALS_HOST_DEVICE double select(bool condition, double yes, double no) {
  return condition ? yes : no;
}

// e^x; 0 below -708, infinity above 709.
ALS_HOST_DEVICE double exp_of(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double inside = select(x < -708.0, -708.0, select(x > 709.0, 709.0, x));
  const double shifted = inside * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  double r = inside - n * 0.69314718036912382;  // ln 2 in two parts: n times the first is exact
  r = r - n * 1.9082149292705877e-10;
  // Taylor's series for |r| <= ln(2)/2: remainder 4e-18
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;  // the low bits of `shifted` hold n
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return select(x < -708.0, 0.0, select(x > 709.0, static_cast<double>(INFINITY), p * power));
}

namespace detail {

ALS_HOST_DEVICE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

ALS_HOST_DEVICE float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace detail

ALS_HOST_DEVICE float select(bool condition, float yes, float no) {
  const int32_t mask = -static_cast<int32_t>(condition);
  return detail::float_of((detail::bits_of(yes) & mask) | (detail::bits_of(no) & ~mask));
}

namespace detail {

// e^x = 2^n (1 + fraction) with |log(1 + fraction)| <= ln(2)/2, for kExpLowest <= x <= 0.
struct ExpParts {
  float power;     // 2^n, 0 for n = -127
  float fraction;  // e^r - 1, r = x - n ln 2
};

ALS_HOST_DEVICE ExpParts exp_parts(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693145752f;  // ln 2 in two parts: n times the first is exact
  r = r - n * 1.42860677e-6f;
  // (e^r - 1 - r) / r^2, minimax on |r| <= ln(2)/2: 8e-9
  float q = 0.00139261836f;
  q = q * r + 0.00836317905f;
  q = q * r + 0.0416665546f;
  q = q * r + 0.166665770f;
  q = q * r + 0.5f;
  const int32_t exponent = bits_of(shifted) - bits_of(kRound);
  const auto power = static_cast<uint32_t>(exponent + 127) << 23;  // unsigned: NaN overflows it
  return {float_of(static_cast<int32_t>(power)), r + r * r * q};
}

// There n = -127, whose power is written as 0: what is below needs no case of its own.
constexpr float kExpLowest = -88.0f;

// NaN compares false and passes through.
ALS_HOST_DEVICE float at_least_lowest(float x) { return select(x < kExpLowest, kExpLowest, x); }

}  // namespace detail

// e^x for x <= 0; 0 where it is below the normal numbers (from -87.68 at the latest).
ALS_HOST_DEVICE float exp_of_nonpositive(float x) {
  const detail::ExpParts e = detail::exp_parts(detail::at_least_lowest(x));
  return e.power + e.power * e.fraction;
}

// e^x - 1 for x <= 0, without cancellation near 0.
ALS_HOST_DEVICE float expm1_of_nonpositive(float x) {
  const detail::ExpParts e = detail::exp_parts(detail::at_least_lowest(x));
  return e.power * e.fraction + (e.power - 1.0f);
}

// log x for x >= 0; -inf at 0.
ALS_HOST_DEVICE float log_of_nonnegative(float x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2)
  const int32_t bits = detail::bits_of(x);
  const int32_t exponent = (bits - kSqrtHalf) >> 23;
  const float f =
      detail::float_of(bits - exponent * (1 << 23)) - 1.0f;  // in [sqrt(1/2) - 1, sqrt(2) - 1)
  // log(1 + f) = 2 artanh s = 2 s + 2/3 s^3 + ..., s = f / (2 + f), |s| <= 0.172
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float series =
      s * (z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * 0.222222222f))));
  // 2 s = f - s f, which keeps the leading term exact
  const auto n = static_cast<float>(exponent);
  const float value = n * 0.693145752f + (f + (series - s * f + n * 1.42860677e-6f));
  return select(x == 0.0f, -INFINITY, select(x < INFINITY, value, x));
}

// log(1 + x) for 0 <= x <= 1, without cancellation near 0.
ALS_HOST_DEVICE float log1p_of_fraction(float x) {
  const float y = 1.0f + x;
  const float lost = x - (y - 1.0f);  // what rounding y has dropped
  return log_of_nonnegative(y) + lost / y;
}

#endif

// x^a for 0 <= x <= 1 and a >= 0, with 0^0 = 1.
template <typename T>
ALS_HOST_DEVICE T pow_of_fraction(T x, T a) {
  const T value = exp_of_nonpositive(a * log_of_nonnegative(select(x > 0, x, T(1))));
  const T at_zero = a == 0 ? T(1) : T(0);
  return select(x != x, x, select(x > 0, value, at_zero));
}

}  // namespace als
