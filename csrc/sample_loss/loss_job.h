// One call of the loss kernels, as both devices take it. Torch-free.
#pragma once

#include <cstdint>
#include <type_traits>

#include "sample_loss/loss_math.h"

namespace als {

// Losses and sums are float32, or float64 for float64 logits.
template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t, typename grad_t = scalar_t>
struct LossJob {
  using T = accumulate_t<scalar_t>;

  const scalar_t* logits;  // [B, C], unit stride along C
  int64_t rows, classes;   // B, C
  int64_t row_stride;      // of logits, in elements; 0 for one row repeated
  const int64_t* index;    // [B] class indices, or null
  const T* dense;          // [B, C] class probabilities or regression target, or null
  const T* class_weight;   // [C] or null
  const T* scale;          // [B] factor of each row's gradient; read when grad is written
  const T* state_in;       // [B, 3] max, rest, extra of an earlier call, or null: computed
  LossSpec<T> spec;
  int64_t ignore_index;
  // Outputs; those that are null are not computed.
  T* losses;     // [B]
  T* state_out;  // [B, 3]
  grad_t* grad;  // [B, C] contiguous

  ALS_HOST_DEVICE const scalar_t* row(int64_t r) const { return logits + r * row_stride; }
};

// What becomes of a row: its loss, 0 for an ignored one, NaN for a class outside [0, C), which must
// never be used as an index.
enum class RowFate { kLoss, kIgnored, kInvalid };

ALS_HOST_DEVICE RowFate fate_of(int64_t index, int64_t classes, int64_t ignore_index) {
  if (index == ignore_index) return RowFate::kIgnored;
  return index >= 0 && index < classes ? RowFate::kLoss : RowFate::kInvalid;
}

}  // namespace als
