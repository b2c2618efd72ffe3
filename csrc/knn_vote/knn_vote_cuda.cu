#include "common/cuda.h"
#include "knn_vote/knn_vote.h"
#include "knn_vote/knn_vote_kernels.cuh"

namespace als {
namespace {

VoteOutputs knn_vote_cuda(const Tensor& distance, const Tensor& index, const Tensor& label,
                          int64_t num_classes, int64_t weighting, double temperature,
                          int64_t ignore_label) {
  check_knn_vote(distance, index, label, num_classes, weighting, temperature);
  // num_classes fits an int32 slot of the kernel's table; k fits its shared memory.
  ALS_CHECK(num_classes <= INT32_MAX, "num_classes: expected <= 2^31 - 1, got ", num_classes);
  ALS_CHECK(distance.size(1) <= kVoteMaxK, "distance: expected at most ", kVoteMaxK,
            " neighbours a row on CUDA, got ", distance.size(1));
  VoteOutputs outputs = empty_vote_outputs(distance);
  const int64_t rows = distance.size(0);
  if (rows == 0) return outputs;
  const CudaScope scope(distance);
  const Tensor d = torch::stable::contiguous(distance);
  const Tensor i = torch::stable::contiguous(index);
  const Tensor l = torch::stable::contiguous(label);
  int slots = 32;
  while (slots < 2 * d.size(1)) slots *= 2;
  VoteParams params{d.const_data_ptr<float>(),
                    i.const_data_ptr<int64_t>(),
                    l.const_data_ptr<int64_t>(),
                    std::get<0>(outputs).mutable_data_ptr<int64_t>(),
                    std::get<1>(outputs).mutable_data_ptr<float>(),
                    std::get<2>(outputs).mutable_data_ptr<float>(),
                    rows,
                    d.size(1),
                    l.size(0),
                    num_classes,
                    ignore_label,
                    static_cast<VoteWeighting>(weighting),
                    static_cast<float>(1.0 / temperature),
                    slots};
  constexpr int kSlot = sizeof(unsigned long long) + sizeof(int);
  const int shared = slots * kSlot;
  if (shared + kVoteStaticShared > 48 * 1024) {   // beyond the default limit
    constexpr int kMost = 2 * kVoteMaxK * kSlot;  // the same value in every thread
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(knn_vote_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost));
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(rows, 1 << 20));
  knn_vote_kernel<<<blocks, kVoteThreads, shared, scope.stream()>>>(params);
  ALS_LAUNCH_CHECK();
  return outputs;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) { m.impl("knn_vote", TORCH_BOX(&als::knn_vote_cuda)); }
