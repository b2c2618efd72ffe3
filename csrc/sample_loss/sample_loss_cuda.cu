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

// A batch of few elements that one cluster takes in two turns at most, and its total with it: more
// turns would take longer than another kernel.
template <class Kernel, typename scalar_t, typename grad_t>
bool launch_with_total(Kernel* kernel, const LossJob<scalar_t, grad_t>& job, int lanes,
                       accumulate_t<scalar_t>* total, cudaStream_t stream) {
  const int64_t block_rows = kTotalRowThreads / lanes;
  if (job.rows > 2 * kMostLossBlocks * block_rows) return false;
  int blocks = 1;
  if (job.rows > block_rows && knows_clusters(kernel)) {
    while (blocks < kMostLossBlocks && blocks * block_rows < job.rows) blocks *= 2;
  }
  if (job.rows > 2 * blocks * block_rows) return false;
  ClusterLaunch(blocks, kTotalRowThreads, kTotalLanes * sizeof(double), stream, blocks)(
      kernel, job, lanes, total);
  return true;
}

template <int kVec, bool kGeneral, typename scalar_t, typename grad_t>
bool launch_rows(const LossJob<scalar_t, grad_t>& job, accumulate_t<scalar_t>* total,
                 cudaStream_t stream) {
  if (job.classes > 32 * kManyElements) {
    launch_block<kGeneral>(job, stream);
    return false;
  }
  const bool few = job.classes <= 32 * kFewElements;
  const int lanes = lanes_of(job.classes, few ? kFewElements : kManyElements);
  const unsigned grid = grid_of(job.rows, kRegisterThreads / lanes);
  if (few) {
    const auto kernel = loss_rows_in_registers<kVec, kFewElements, kGeneral, scalar_t, grad_t>;
    if (total && launch_with_total(kernel, job, lanes, total, stream)) return true;
    kernel<<<grid, kRegisterThreads, 0, stream>>>(job, lanes, nullptr);
  } else {
    loss_rows_in_registers<kVec, kManyElements, kGeneral>
        <<<grid, kRegisterThreads, 0, stream>>>(job, lanes, nullptr);
  }
  return false;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

template <typename scalar_t, typename grad_t>
bool launch_loss_job(const LossJob<scalar_t, grad_t>& job, accumulate_t<scalar_t>* total,
                     cudaStream_t stream) {
  if (job.rows == 0) return false;
  bool summed = false;
  if (job.spec.kind == LossKind::kSquaredError) {
    const int lanes = lanes_of(job.classes, 1);
    const unsigned grid = grid_of(job.rows, kRegisterThreads / lanes);
    squared_error_rows<<<grid, kRegisterThreads, 0, stream>>>(job, lanes);
  } else if constexpr (std::is_same_v<scalar_t, double>) {  // for checks: one kernel is enough
    summed = launch_rows<1, true>(job, total, stream);
  } else {
    constexpr int kVec = 16 / sizeof(scalar_t);
    const bool packs = aligned(job.logits) && aligned(job.grad) && job.classes % kVec == 0 &&
                       job.row_stride % kVec == 0;
    const bool general = job.spec.side() != SideTarget::kNone || job.spec.needs_entropy();
    if (packs) {
      summed = general ? launch_rows<kVec, true>(job, total, stream)
                       : launch_rows<kVec, false>(job, total, stream);
    } else {
      summed = general ? launch_rows<1, true>(job, total, stream)
                       : launch_rows<1, false>(job, total, stream);
    }
  }
  ALS_LAUNCH_CHECK();
  return summed;
}

template bool launch_loss_job(const LossJob<float, float>&, float*, cudaStream_t);
template bool launch_loss_job(const LossJob<double, double>&, double*, cudaStream_t);
template bool launch_loss_job(const LossJob<__nv_bfloat16, __nv_bfloat16>&, float*, cudaStream_t);
template bool launch_loss_job(const LossJob<__half, __half>&, float*, cudaStream_t);
template bool launch_loss_job(const LossJob<__half, float>&, float*, cudaStream_t);

}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) {
  m.impl("sample_loss", TORCH_BOX(&als::sample_loss<als::CudaLosses>));
  m.impl("sample_loss_backward", TORCH_BOX(&als::sample_loss_backward<als::CudaLosses>));
}
