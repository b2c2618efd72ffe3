// The launches of a search on CUDA for few queries, or few rows. Host code for nvcc; nothing in it
// waits for the device.
#pragma once

#include "knn/knn_cuda_search.h"
#include "knn/knn_few_plan.h"

namespace als {

// `x` and `y` are on the device; `plan` serves them. Into distance and index [Q, k].
template <typename T>
void search_few(const KnnFewPlan& plan, const KnnRows<T>& x, const KnnRows<T>& y, int64_t k,
                bool exclude_self, float* distance, int64_t* index, const Tensor& like,
                cudaStream_t stream) {
  // Freed to the stream-ordered allocator at the end of the call.
  const Tensor workspace = empty_on(like, {plan.bytes(x.rows)}, ScalarType::Byte);
  auto* const group_max = static_cast<float*>(workspace.mutable_data_ptr());
  float* const group_norm = group_max + x.rows * plan.grouping.count;
  const KnnFewParams<T> few{x, y, plan.grouping, group_max, group_norm};
  const auto scores = x.metric == KnnMetric::kL2 ? knn_few<T, false> : knn_few<T, true>;
  scores<<<static_cast<unsigned>(plan.blocks(x.rows)), kKnnFewThreads, 0, stream>>>(few);
  ALS_LAUNCH_CHECK();
  const float* norm = x.metric == KnnMetric::kIp ? group_norm : nullptr;
  const KnnSelectParams<T> select{x,
                                  y,
                                  0,
                                  k,
                                  exclude_self,
                                  plan.grouping,
                                  KnnSelectSizes::of(k, kKnnSelectFewThreads),
                                  group_max,
                                  norm,
                                  norm,
                                  nullptr,
                                  nullptr,
                                  INT32_MAX,
                                  false,
                                  {},
                                  distance,
                                  index};
  launch_select<kKnnSelectFewThreads>(select, x.rows, stream);
}

}  // namespace als
