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
    a.class_weight = torch::stable::contiguous(*a.class_weight);
  }
  a.target = torch::stable::contiguous(a.target);
  if (a.logits.size(1) > 1 && a.logits.stride(1) != 1)
    a.logits = torch::stable::contiguous(a.logits);
}

// Names the first class outside [0, C). CPU only: on CUDA looking would wait for the device, and
// the row gets loss NaN.
inline void check_classes(const LossArguments& a) {
  if (a.target.scalar_type() != ScalarType::Long) return;
  const int64_t* index = a.target.const_data_ptr<int64_t>();
  const int64_t classes = a.logits.size(1);
  for (int64_t i = 0; i < a.target.size(0); ++i) {
    ALS_CHECK(fate_of(index[i], classes, a.ignore_index) != RowFate::kInvalid,
              "target: expected values in [0, ", classes, ") or ignore_index=", a.ignore_index,
              ", got ", index[i], " at position ", i);
  }
}

// A tensor [B] (or [B, 3]) of the accumulation dtype, such as weights, gradients or the state.
inline Tensor check_row_values(const Tensor& values, const LossArguments& a, const char* name) {
  check_dtype(values, accumulation_dtype(a.logits), name);
  ALS_CHECK(values.dim() >= 1, name, ": expected at least one dimension");
  check_size(values, 0, a.logits.size(0), name);
  check_same_device(values, a.logits, name);
  return torch::stable::contiguous(values);
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

}  // namespace als
