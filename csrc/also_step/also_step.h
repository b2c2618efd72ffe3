// The optimizer step of ALSO (arXiv 2508.16734) over a list of tensors.
//
// With bases, a parameter holds the half point and one pass makes the main step of iteration t and
// the half step of iteration t + 1, which use the same gradient:
//   g = grad / grad_scale + weight_decay * param          (L2; none when decoupled)
//   base  <- AdamStep(base, g)                            moment advance step + 1
//   param <- AdamStep(base, alpha * g)                    moment advance step + 2
// Without bases it is Adam or AdamW: param <- AdamStep(param, g).
// found_inf != 0 leaves every tensor as it is. 36 bytes of traffic a float32 parameter (28 without
// bases).
#pragma once

#include <vector>

#include "also_step/also_step_math.h"
#include "common/tensor.h"

namespace als {

using TensorList = std::vector<Tensor>;

// Every list holds one tensor a parameter, in the same order; an empty max_exp_avg_sqs or bases
// switches its part off. State is float32, or float64 for float64 parameters.
struct AlsoLists {
  const TensorList& params;           // any shape, float32, float64, bfloat16 or float16
  const TensorList& grads;            // dtype of params
  const TensorList& exp_avgs;         // state
  const TensorList& exp_avg_sqs;      // state
  const TensorList& max_exp_avg_sqs;  // state, or empty: no AMSGrad
  const TensorList& bases;            // state, or empty: no half step
  const TensorList& steps;            // [] int64, moment advances so far
};

// Dense and without gaps or overlap is the caller's promise; here: the memory that it spans is its
// own.
inline bool spans_its_elements(const Tensor& t) {
  int64_t extent = 1;
  for (int64_t d = 0; d < t.dim(); ++d) extent += (t.size(d) - 1) * t.stride(d);
  return t.numel() == 0 || extent == t.numel();
}

inline bool same_memory_order(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  }
  return true;
}

inline void check_state_list(const TensorList& list, const AlsoLists& lists, ScalarType dtype,
                             const char* name) {
  ALS_CHECK(list.size() == lists.params.size(), name, ": expected ", lists.params.size(),
            " tensors, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_dtype(list[i], dtype, name);
    check_same_device(list[i], lists.params[0], name);
    ALS_CHECK(same_memory_order(list[i], lists.params[i]), name, "[", i,
              "]: expected the sizes and strides of its parameter");
  }
}

inline void check_also_scalar(const std::optional<Tensor>& scalar, const Tensor& like,
                              ScalarType dtype, const char* name) {
  if (!scalar.has_value()) return;
  ALS_CHECK(scalar->numel() == 1, name, ": expected one element, got ", scalar->numel());
  check_dtype(*scalar, dtype, name);
  check_same_device(*scalar, like, name);
}

// The checks that both devices share (inline: _C and _cuda are two libraries).
inline void check_also_step(const AlsoLists& lists, const std::optional<Tensor>& lr_tensor,
                            const std::optional<Tensor>& grad_scale,
                            const std::optional<Tensor>& found_inf) {
  const Tensor& first = lists.params[0];
  const ScalarType dtype = first.scalar_type();
  const ScalarType state = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor& param : lists.params) {
    check_dtype(param, dtype, "params");
    check_same_device(param, first, "params");
    ALS_CHECK(spans_its_elements(param), "params: expected dense tensors without overlap");
  }
  check_state_list(lists.grads, lists, dtype, "grads");
  check_state_list(lists.exp_avgs, lists, state, "exp_avgs");
  check_state_list(lists.exp_avg_sqs, lists, state, "exp_avg_sqs");
  if (!lists.max_exp_avg_sqs.empty())
    check_state_list(lists.max_exp_avg_sqs, lists, state, "max_exp_avg_sqs");
  if (!lists.bases.empty()) check_state_list(lists.bases, lists, state, "bases");
  ALS_CHECK(lists.steps.size() == lists.params.size(), "steps: expected ", lists.params.size(),
            " tensors, got ", lists.steps.size());
  for (const Tensor& step : lists.steps) {
    ALS_CHECK(step.numel() == 1, "steps: expected one element, got ", step.numel());
    check_dtype(step, ScalarType::Long, "steps");
    check_same_device(step, first, "steps");
  }
  check_also_scalar(lr_tensor, first, ScalarType::Double, "lr_tensor");
  check_also_scalar(grad_scale, first, ScalarType::Float, "grad_scale");
  check_also_scalar(found_inf, first, ScalarType::Float, "found_inf");
}

template <typename T>
const T* scalar_pointer(const std::optional<Tensor>& scalar) {
  return scalar.has_value() ? scalar->const_data_ptr<T>() : nullptr;
}

template <typename P, typename S>
AlsoPointers<P, S> also_pointers(const AlsoLists& lists, size_t i) {
  const auto state = [i](const TensorList& list) -> S* {
    return list.empty() ? nullptr : static_cast<S*>(list[i].mutable_data_ptr());
  };
  return {static_cast<P*>(lists.params[i].mutable_data_ptr()),
          static_cast<const P*>(lists.grads[i].const_data_ptr()),
          state(lists.exp_avgs),
          state(lists.exp_avg_sqs),
          state(lists.max_exp_avg_sqs),
          state(lists.bases),
          static_cast<int64_t*>(lists.steps[i].mutable_data_ptr()),
          lists.params[i].numel()};
}

}  // namespace als
