// The Adam step and the fused double step of ALSO, for one element. Torch-free; one copy for CPU
// and CUDA. S is the arithmetic and state type: float, or double for float64 parameters.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace als {

// What all elements of a call share. `decoupled` selects AdamW's weight decay.
struct AlsoOptions {
  double beta1, beta2, eps, weight_decay, alpha;
  bool decoupled;
};

// The bias corrections of the t-th moment advance: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t).
template <typename S>
struct AdamCorrection {
  S step_size;
  S inverse_root;
};

// 1 - beta^t as -expm1(t log beta): exact for any t, where 1 - pow cancels for beta near 1.
// log_beta = -inf (beta = 0) gives 1.
template <typename S>
ALS_HOST_DEVICE AdamCorrection<S> adam_correction(double lr, double log_beta1, double log_beta2,
                                                  int64_t t) {
  const auto advances = static_cast<double>(t);
  return {static_cast<S>(lr / -expm1(advances * log_beta1)),
          static_cast<S>(1.0 / sqrt(-expm1(advances * log_beta2)))};
}

// a b + c. On a device always fused: left to the compiler, it is fused in one place and not in
// another, and an element's bits depend on how its tensor is aligned.
template <typename S>
ALS_HOST_DEVICE S mul_add(S a, S b, S c) {
#ifdef __CUDA_ARCH__
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Everything an element needs that its tensor's other elements need as well.
template <typename S>
struct AlsoCoefficients {
  S gradient_factor;  // 1 / grad_scale
  S l2;               // weight decay inside the gradient; 0 when decoupled
  S keep;             // 1 - lr * weight_decay when decoupled, otherwise 1
  S beta2, one_minus_beta1, one_minus_beta2, eps, alpha;
  AdamCorrection<S> main;  // moment advance number step + 1
  AdamCorrection<S> half;  // moment advance number step + 2
};

// `step` counts the moment advances made before this call.
template <typename S>
ALS_HOST_DEVICE AlsoCoefficients<S> also_coefficients(const AlsoOptions& o, double lr,
                                                      double grad_scale, int64_t step) {
  const double log_beta1 = log(o.beta1);
  const double log_beta2 = log(o.beta2);
  return {static_cast<S>(1.0 / grad_scale),
          static_cast<S>(o.decoupled ? 0.0 : o.weight_decay),
          static_cast<S>(o.decoupled ? 1.0 - lr * o.weight_decay : 1.0),
          static_cast<S>(o.beta2),
          static_cast<S>(1.0 - o.beta1),
          static_cast<S>(1.0 - o.beta2),
          static_cast<S>(o.eps),
          static_cast<S>(o.alpha),
          adam_correction<S>(lr, log_beta1, log_beta2, step + 1),
          adam_correction<S>(lr, log_beta1, log_beta2, step + 2)};
}

// Advances the moments of one element with gradient g; returns what Adam subtracts:
//   m <- m + (1 - beta1)(g - m),  v <- beta2 v + (1 - beta2) g^2,
//   lr m^ / (sqrt(v^) + eps)   with m^, v^ corrected for bias (AMSGrad: the largest v so far)
template <bool kAmsgrad, typename S>
ALS_HOST_DEVICE S adam_move(S g, S& m, S& v, S& v_max, const AlsoCoefficients<S>& c,
                            const AdamCorrection<S>& correction) {
  m = mul_add(g - m, c.one_minus_beta1, m);
  v = mul_add(c.beta2, v, c.one_minus_beta2 * g * g);
  S second_moment = v;
  if (kAmsgrad) {
    v_max = v <= v_max ? v_max : v;  // a NaN in v comes through
    second_moment = v_max;
  }
  return correction.step_size * m /
         mul_add(static_cast<S>(std::sqrt(second_moment)), correction.inverse_root, c.eps);
}

// One element of one call. theta is what the model holds: the half point if kHalf.
//   g = gradient + l2 theta
//   main step:            base  <- AdamStep(base, g)
//   half step (if kHalf): theta <- AdamStep(base, alpha g), the half point of the next iteration
template <bool kAmsgrad, bool kHalf, typename S>
ALS_HOST_DEVICE void also_element(S& theta, S gradient, S& base, S& m, S& v, S& v_max,
                                  const AlsoCoefficients<S>& c) {
  const S g = mul_add(gradient, c.gradient_factor, c.l2 * theta);
  const S start = kHalf ? base : theta;
  const S moved = mul_add(start, c.keep, -adam_move<kAmsgrad>(g, m, v, v_max, c, c.main));
  if (kHalf) {
    base = moved;
    theta = mul_add(moved, c.keep, -adam_move<kAmsgrad>(c.alpha * g, m, v, v_max, c, c.half));
  } else {
    theta = moved;
  }
}

// Raw pointers of one tensor of the lists. P is the parameter type, S the state type.
template <typename P, typename S>
struct AlsoPointers {
  P* param;
  const P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;  // null without AMSGrad
  S* base;            // null without the half step
  int64_t* step;
  int64_t numel;
};

}  // namespace als
