// The loss of every row of a batch, and its gradient. Equations: loss_math.h.
#pragma once

#include "common/tensor.h"
#include "sample_loss/loss_job.h"

namespace als {

// What sample_loss, its backward and weighted_loss are given alike.
struct LossArguments {
  Tensor logits;                       // [B, C] any stride
  Tensor target;                       // [B] int64, or [B, C] of the accumulation dtype
  std::optional<Tensor> class_weight;  // [C] of the accumulation dtype
  int64_t loss;                        // LossKind
  std::vector<double> parameters;      // as many as the loss has, at most 3
  double label_smoothing;
  int64_t ignore_index;
};

// float64 for float64 logits, else float32.
inline ScalarType accumulation_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The checks that protect memory (inline: _C and _cuda are two libraries), and the layouts that the
// kernels read: rows of unit stride, a row stride of any size. An expanded row is not copied.
inline void check_loss_arguments(LossArguments& a) {
  check_dim(a.logits, 2, "logits");
  ALS_CHECK(a.logits.size(1) >= 1, "logits: expected at least one class");
  ALS_CHECK(a.loss >= 0 && a.loss < kLossKinds, "loss: expected 0 to 7, got ", a.loss);
  ALS_CHECK(a.parameters.size() <= 3, "parameters: expected at most 3");
  const ScalarType accumulation = accumulation_dtype(a.logits);
  const bool indices = a.target.scalar_type() == ScalarType::Long;
  check_dim(a.target, indices ? 1 : 2, "target");
  check_size(a.target, 0, a.logits.size(0), "target");
  check_same_device(a.target, a.logits, "target");
  if (!indices) {
    check_dtype(a.target, accumulation, "target");
    check_size(a.target, 1, a.logits.size(1), "target");
  }
  const auto kind = static_cast<LossKind>(a.loss);
  ALS_CHECK(kind == LossKind::kCrossEntropy || indices == (kind != LossKind::kSquaredError),
            "target: of the wrong dtype for the loss");
  if (a.class_weight) {
    check_dim(*a.class_weight, 1, "class_weight");
    check_dtype(*a.class_weight, accumulation, "class_weight");
    check_size(*a.class_weight, 0, a.logits.size(1), "class_weight");
    check_same_device(*a.class_weight, a.logits, "class_weight");
    a.class_weight = as_contiguous(*a.class_weight);
  }
  a.target = as_contiguous(a.target);
  if (a.logits.size(1) > 1 && a.logits.stride(1) != 1)
    a.logits = torch::stable::contiguous(a.logits);
}

// Row weights, gradients [B] or the state [B, 3], in the accumulation dtype.
inline Tensor check_row_values(const Tensor& values, const LossArguments& a,
                               std::vector<int64_t> row_sizes, const char* name) {
  check_dtype(values, accumulation_dtype(a.logits), name);
  check_dim(values, 1 + static_cast<int64_t>(row_sizes.size()), name);
  check_size(values, 0, a.logits.size(0), name);
  for (size_t i = 0; i < row_sizes.size(); ++i) check_size(values, i + 1, row_sizes[i], name);
  check_same_device(values, a.logits, name);
  return as_contiguous(values);
}

// Whether sample_loss has a state to keep for its backward: [B, 3] max, rest, extra of RowSums.
inline bool has_state(const LossArguments& a) {
  return static_cast<LossKind>(a.loss) != LossKind::kSquaredError;
}

// The job without its scale, state and outputs.
template <typename scalar_t, typename grad_t = scalar_t>
LossJob<scalar_t, grad_t> loss_job(const LossArguments& a) {
  using T = accumulate_t<scalar_t>;
  LossJob<scalar_t, grad_t> job{};
  job.logits = static_cast<const scalar_t*>(a.logits.const_data_ptr());
  job.rows = a.logits.size(0);
  job.classes = a.logits.size(1);
  job.row_stride = a.logits.stride(0);
  if (a.target.scalar_type() == ScalarType::Long) {
    job.index = a.target.const_data_ptr<int64_t>();
  } else {
    job.dense = a.target.const_data_ptr<T>();
  }
  if (a.class_weight) job.class_weight = a.class_weight->const_data_ptr<T>();
  job.spec.kind = static_cast<LossKind>(a.loss);
  for (size_t i = 0; i < a.parameters.size(); ++i) {
    job.spec.parameters[i] = static_cast<T>(a.parameters[i]);
  }
  job.spec.label_smoothing = static_cast<T>(a.label_smoothing);
  job.spec.probabilities = job.dense != nullptr && job.spec.kind != LossKind::kSquaredError;
  job.ignore_index = a.ignore_index;
  return job;
}

// Calls body with a null pointer of the logits' element type.
template <typename BFloat16, typename Half, class Body>
void dispatch_logits(const Tensor& logits, const Body& body) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<Half*>(nullptr));
    default:
      ALS_CHECK(false, "logits: expected dtype float32, float64, bfloat16 or float16, got ",
                torch::headeronly::toString(logits.scalar_type()));
  }
}

// The two operators, for a Device with the types BFloat16 and Half, a constructor from arguments
// that have passed the checks (device guard, further checks), and run(job).
template <class Device>
std::tuple<Tensor, Tensor> sample_loss(const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& class_weight, int64_t loss,
                                       std::vector<double> parameters, double label_smoothing,
                                       int64_t ignore_index) {
  LossArguments a{logits,          target,      class_weight, loss, std::move(parameters),
                  label_smoothing, ignore_index};
  check_loss_arguments(a);
  const Device device(a);
  const int64_t rows = a.logits.size(0);
  const ScalarType dtype = accumulation_dtype(a.logits);
  const Tensor losses = empty_on(a.logits, {rows}, dtype);
  const Tensor state = empty_on(a.logits, {has_state(a) ? rows : 0, 3}, dtype);
  dispatch_logits<typename Device::BFloat16, typename Device::Half>(a.logits, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using T = accumulate_t<scalar_t>;
    auto job = loss_job<scalar_t>(a);
    job.losses = losses.mutable_data_ptr<T>();
    if (has_state(a)) job.state_out = state.mutable_data_ptr<T>();
    device.run(job);
  });
  return {losses, state};
}

template <class Device>
Tensor sample_loss_backward(const Tensor& grad_losses, const Tensor& logits, const Tensor& target,
                            const std::optional<Tensor>& class_weight, const Tensor& state,
                            int64_t loss, std::vector<double> parameters, double label_smoothing,
                            int64_t ignore_index) {
  LossArguments a{logits,          target,      class_weight, loss, std::move(parameters),
                  label_smoothing, ignore_index};
  check_loss_arguments(a);
  const Device device(a);
  const Tensor scale = check_row_values(grad_losses, a, {}, "grad_losses");
  const Tensor sums = has_state(a) ? check_row_values(state, a, {3}, "state") : state;
  const Tensor grad =
      empty_on(a.logits, {a.logits.size(0), a.logits.size(1)}, a.logits.scalar_type());
  dispatch_logits<typename Device::BFloat16, typename Device::Half>(a.logits, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using T = accumulate_t<scalar_t>;
    auto job = loss_job<scalar_t>(a);
    job.scale = scale.const_data_ptr<T>();
    if (has_state(a)) job.state_in = sums.const_data_ptr<T>();
    job.grad = static_cast<scalar_t*>(grad.mutable_data_ptr());
    device.run(job);
  });
  return grad;
}

}  // namespace als
