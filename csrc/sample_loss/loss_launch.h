// The CUDA loss kernels, which sample_loss and weighted_loss share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda.h"
#include "sample_loss/sample_loss.h"

namespace als {

// Enqueues a job; nothing is waited for. Returns whether it writes `total`, the sum of scale * loss
// ([], or null), as well: a batch that one cluster takes, which spares a kernel.
template <typename scalar_t, typename grad_t>
bool launch_loss_job(const LossJob<scalar_t, grad_t>& job, accumulate_t<scalar_t>* total,
                     cudaStream_t stream);

// Where the templates of sample_loss.h and weighted_loss.h run. No look at classes: that would wait
// for the device.
class CudaLosses {
 public:
  using BFloat16 = __nv_bfloat16;
  using Half = __half;

  explicit CudaLosses(const LossArguments& a) : scope_(a.logits) {}
  template <typename scalar_t, typename grad_t>
  void run(const LossJob<scalar_t, grad_t>& job) const {
    launch_loss_job(job, nullptr, scope_.stream());
  }
  cudaStream_t stream() const { return scope_.stream(); }

 private:
  CudaScope scope_;
};

}  // namespace als
