// The dense pi step (method: KL-regularised ascent on the simplex, in the log domain).
//
//   log pi_i <- (log pi_i + lambda gamma log prior_i + s gamma g_i) / (1 + lambda gamma),
//   then softmax(. / T);   g_i = sum of the batch's losses of i
//
// With log pi_i = c log prior_i + r_i + const, kappa = 1 / (1 + lambda gamma), rho = kappa / T and
// c = kappa lambda gamma / (T - kappa) this is  r_i <- rho (r_i + s gamma g_i).
//
// r_i = A u_i: an entry that the batch does not hold only shrinks by rho, so A records it and u_i
// stays as it is, neither read-modify-written nor rounded (a float32 r would lose the decay
// altogether once 1 - rho < 2^-25). The pass over all entries reads u and adds up the two
// normalisers: of pi, and of pi after the half step rho (r_i + s gamma g_i) with the same g. Now
// and then (A small, or entries far from their level) the pass rewrites u so that A = 1 and the
// entries are centred.
//
// The batch's entries are lifted out of u before the pass (u_i = -inf adds nothing), added exactly
// in float64 and put back: nothing is ever subtracted from a sum.
//
// A lazy state has power sums besides, which give both normalisers without that pass:
// pi_step_lazy_math.h.
#pragma once

#include "common/tensor.h"
#include "pi_step/pi_step_lazy_math.h"

namespace als {

// The checks that both devices share (inline: _C and _cuda are two libraries).
inline void check_pi_tensor(const Tensor& t, ScalarType dtype, const Tensor& u, const char* name) {
  check_dim(t, 1, name);
  check_dtype(t, dtype, name);
  check_same_device(t, u, name);
  ALS_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline PiRule check_pi_state(const Tensor& u, const Tensor& scalars, const Tensor& pending_index,
                             const Tensor& pending_grad, const std::optional<Tensor>& log_prior,
                             const std::optional<Tensor>& sums, double rho, double step,
                             double prior) {
  check_pi_tensor(u, sums ? ScalarType::Double : ScalarType::Float, u, "u");
  ALS_CHECK(u.size(0) >= 1, "u: expected at least one entry, got 0");
  check_pi_tensor(scalars, ScalarType::Double, u, "scalars");
  check_size(scalars, 0, kPiScalars, "scalars");
  check_pi_tensor(pending_index, ScalarType::Long, u, "pending_index");
  check_pi_tensor(pending_grad, ScalarType::Double, u, "pending_grad");
  check_size(pending_grad, 0, pending_index.size(0), "pending_grad");
  if (log_prior) {
    check_pi_tensor(*log_prior, ScalarType::Float, u, "log_prior");
    check_size(*log_prior, 0, u.size(0), "log_prior");
  }
  if (sums) {
    check_pi_tensor(*sums, ScalarType::Double, u, "sums");
    check_size(*sums, 0, kPiSumsSize, "sums");
  }
  ALS_CHECK(rho > 0 && rho <= 1, "rho: expected in (0, 1], got ", rho);
  ALS_CHECK(std::isfinite(step), "step: expected a finite number, got ", step);
  ALS_CHECK(std::isfinite(prior), "prior: expected a finite number, got ", prior);
  return {rho, step, prior};
}

inline void check_pi_batch(const Tensor& u, const Tensor& skipped, const Tensor& pending_index,
                           const Tensor& index, const Tensor& loss,
                           const std::optional<Tensor>& found_inf) {
  check_dtype(skipped, ScalarType::Long, "skipped");
  check_same_device(skipped, u, "skipped");
  ALS_CHECK(skipped.numel() == 1, "skipped: expected one element, got ", skipped.numel());
  check_pi_tensor(index, ScalarType::Long, u, "index");
  const bool single = loss.scalar_type() == ScalarType::Float;
  check_pi_tensor(loss, single ? ScalarType::Float : ScalarType::Double, u, "loss");
  check_size(loss, 0, index.size(0), "loss");
  ALS_CHECK(pending_index.size(0) >= index.size(0), "pending_index: expected at least ",
            index.size(0), " entries, got ", pending_index.size(0));
  if (found_inf) {
    check_dtype(*found_inf, ScalarType::Float, "found_inf");
    check_same_device(*found_inf, u, "found_inf");
    ALS_CHECK(found_inf->numel() == 1, "found_inf: expected one element, got ", found_inf->numel());
  }
}

// The entries to read: `index`, or u itself where None asks for all of them.
inline Tensor check_pi_index(const Tensor& u, const std::optional<Tensor>& index) {
  if (!index) return u;
  check_dim(*index, 1, "index");
  check_dtype(*index, ScalarType::Long, "index");
  check_same_device(*index, u, "index");
  return index->is_contiguous() ? *index : torch::stable::contiguous(*index);
}

// The losses of a batch, in float32 or float64.
inline PiLosses losses_of(const Tensor& loss) {
  const bool single = loss.scalar_type() == ScalarType::Float;
  return {single ? loss.const_data_ptr<float>() : nullptr,
          single ? nullptr : loss.const_data_ptr<double>()};
}

inline PiView view_of(const Tensor& u, const Tensor& scalars, const Tensor& pending_index,
                      const Tensor& pending_grad, const std::optional<Tensor>& log_prior,
                      const PiRule& rule) {
  const bool lazy = u.scalar_type() == ScalarType::Double;
  return {lazy ? nullptr : u.const_data_ptr<float>(),
          lazy ? u.const_data_ptr<double>() : nullptr,
          log_prior ? log_prior->const_data_ptr<float>() : nullptr,
          scalars.const_data_ptr<double>(),
          pending_index.const_data_ptr<int64_t>(),
          pending_grad.const_data_ptr<double>(),
          u.size(0),
          pending_index.size(0),
          rule};
}

}  // namespace als
