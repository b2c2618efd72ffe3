#include "sample_loss/loss_launch.h"
#include "sample_loss/sample_loss_kernels.cuh"

namespace als {
namespace {

constexpr int64_t kMaxBlocks = 1 << 20;  // grid-stride beyond

unsigned grid_of(int64_t rows, int64_t rows_per_block) {
  return static_cast<unsigned>(
      std::min<int64_t>(kMaxBlocks, (rows + rows_per_block - 1) / rows_per_block));
}

// The smallest power of two of lanes, at most a warp, with `elements` each that hold a row.
int lanes_of(int64_t classes, int elements) {
  int lanes = 1;
  while (lanes < 32 && lanes * elements < classes) lanes *= 2;
  return lanes;
}

template <bool kGeneral, typename scalar_t, typename grad_t>
void launch_block(const LossJob<scalar_t, grad_t>& job, cudaStream_t stream) {
  const auto kernel = loss_rows_by_block<kGeneral, scalar_t, grad_t>;
  constexpr int64_t kSize = sizeof(scalar_t), kSums = sizeof(BlockShared<accumulate_t<scalar_t>>);
  const int limit = allow_all_shared_memory(kernel);
  LossPlan plan{};
  for (int most = knows_clusters(kernel) ? kMostLossBlocks : 1;; most = plan.blocks / 2) {
    plan = plan_loss(job.classes, kSize, limit - kSums, most);
    const unsigned grid = grid_of(job.rows, 1) * plan.blocks;
    const ClusterLaunch launch(grid, kBlockThreads, kSums + plan.bytes(kSize), stream, plan.blocks);
    if (plan.blocks > 1 && !launch.fits(kernel)) continue;  // a part of a device, say
    return launch(kernel, job, plan);
  }
}

template <int kVec, bool kGeneral, typename scalar_t, typename grad_t>
void launch_rows(const LossJob<scalar_t, grad_t>& job, cudaStream_t stream) {
  constexpr int kFew = 8, kMany = 32;  // elements a thread
  if (job.classes > 32 * kMany) return launch_block<kGeneral>(job, stream);
  const bool few = job.classes <= 32 * kFew;
  const int lanes = lanes_of(job.classes, few ? kFew : kMany);
  const unsigned grid = grid_of(job.rows, kRegisterThreads / lanes);
  if (few) {
    loss_rows_in_registers<kVec, kFew, kGeneral><<<grid, kRegisterThreads, 0, stream>>>(job, lanes);
  } else {
    loss_rows_in_registers<kVec, kMany, kGeneral>
        <<<grid, kRegisterThreads, 0, stream>>>(job, lanes);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

template <typename scalar_t, typename grad_t>
void launch_loss_job(const LossJob<scalar_t, grad_t>& job, cudaStream_t stream) {
  if (job.rows == 0) return;
  if (job.spec.kind == LossKind::kSquaredError) {
    const int lanes = lanes_of(job.classes, 1);
    const unsigned grid = grid_of(job.rows, kRegisterThreads / lanes);
    squared_error_rows<<<grid, kRegisterThreads, 0, stream>>>(job, lanes);
  } else if constexpr (std::is_same_v<scalar_t, double>) {  // for checks: one kernel is enough
    launch_rows<1, true>(job, stream);
  } else {
    constexpr int kVec = 16 / sizeof(scalar_t);
    const bool packs = aligned(job.logits) && aligned(job.grad) && job.classes % kVec == 0 &&
                       job.row_stride % kVec == 0;
    const bool general = job.spec.side() != SideTarget::kNone || job.spec.needs_entropy();
    if (packs) {
      general ? launch_rows<kVec, true>(job, stream) : launch_rows<kVec, false>(job, stream);
    } else {
      general ? launch_rows<1, true>(job, stream) : launch_rows<1, false>(job, stream);
    }
  }
  ALS_LAUNCH_CHECK();
}

template void launch_loss_job(const LossJob<float, float>&, cudaStream_t);
template void launch_loss_job(const LossJob<double, double>&, cudaStream_t);
template void launch_loss_job(const LossJob<__nv_bfloat16, __nv_bfloat16>&, cudaStream_t);
template void launch_loss_job(const LossJob<__half, __half>&, cudaStream_t);
template void launch_loss_job(const LossJob<__half, float>&, cudaStream_t);

}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) {
  m.impl("sample_loss", TORCH_BOX(&als::sample_loss<als::CudaLosses>));
  m.impl("sample_loss_backward", TORCH_BOX(&als::sample_loss_backward<als::CudaLosses>));
}
