// total = sum over the rows of weight * loss, with the gradient written in the same pass.
//
// One reading of the logits writes losses and weight * dL/dlogits, which backward only multiplies
// by the incoming gradient of total; the gradient for weight is losses. Equations: loss_math.h.
#pragma once

#include "sample_loss/sample_loss.h"

namespace als {

struct WeightedOutputs {
  Tensor total;   // [batch], each the sum over B / prod(batch) consecutive rows
  Tensor losses;  // [B]
  Tensor grad;    // [B, C], or [0, C] where no gradient is wanted
};

// float16 would lose small gradients before a GradScaler's factor arrives with backward, so they
// are kept in float32; backward rounds them once.
inline ScalarType kept_gradient_dtype(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

inline int64_t number_of_totals(const std::vector<int64_t>& batch) {
  int64_t totals = 1;
  for (const int64_t size : batch) totals *= size;
  return totals;
}

inline WeightedOutputs weighted_outputs(const LossArguments& a, const std::vector<int64_t>& batch,
                                        bool need_grad) {
  const int64_t rows = a.logits.size(0);
  const int64_t totals = number_of_totals(batch);
  ALS_CHECK(totals > 0 ? rows % totals == 0 : rows == 0, "batch: expected sizes that divide ", rows,
            " rows");
  const ScalarType dtype = accumulation_dtype(a.logits);
  return {
      empty_on(a.logits, batch, dtype), empty_on(a.logits, {rows}, dtype),
      empty_on(a.logits, {need_grad ? rows : 0, a.logits.size(1)}, kept_gradient_dtype(a.logits))};
}

}  // namespace als
