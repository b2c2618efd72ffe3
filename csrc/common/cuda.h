// Host-side helpers of the *_cuda.cu files: current stream, device guard, launch check, events, a
// stream beside the current one.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensor.h"

namespace als {

// Makes the tensor's device current for a scope and gives its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Whether a kernel can be launched in clusters of blocks on the current device: whether the code
// that runs there was compiled for 9.0 or later. Code of 8.0 that a newer device translates is not.
template <class Kernel>
bool knows_clusters(Kernel* kernel) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

// Lets a kernel have more dynamic shared memory than the default of 48 KiB; returns how much.
// Always the same value, so that threads may set it at a time.
template <class Kernel>
int allow_all_shared_memory(Kernel* kernel) {
  int device = 0, bytes = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  return bytes;
}

// A launch in clusters of `cluster` blocks, or a plain one for 1.
class ClusterLaunch {
 public:
  ClusterLaunch(unsigned grid, int threads, int64_t shared, cudaStream_t stream, int cluster) {
    config_.gridDim = dim3(grid);
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = static_cast<size_t>(shared);
    config_.stream = stream;
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config_.attrs = &attribute_;
    config_.numAttrs = cluster > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  // Whether the device has room for one cluster.
  template <class Kernel>
  bool fits(Kernel* kernel) const {
    int clusters = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config_));
    return clusters > 0;
  }
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const Arguments&... arguments) const {
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config_, kernel, Parameters(arguments)...));
  }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

// Makes a stream current for a scope: operations of torch go to it.
class CudaStreamScope {
 public:
  CudaStreamScope(cudaStream_t stream, int32_t device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_stream_guard(stream, device, &guard_));
  }
  ~CudaStreamScope() { static_cast<void>(aoti_torch_delete_cuda_stream_guard(guard_)); }
  CudaStreamScope(const CudaStreamScope&) = delete;
  CudaStreamScope& operator=(const CudaStreamScope&) = delete;

 private:
  CUDAStreamGuardHandle guard_ = nullptr;
};

// A point of one stream that others wait for, on the current device. It may be destroyed before
// the device gets there.
class CudaEvent {
 public:
  CudaEvent() { STD_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~CudaEvent() { static_cast<void>(cudaEventDestroy(event_)); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  void record(cudaStream_t stream) const { STD_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  void block(cudaStream_t stream) const { STD_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }

 private:
  cudaEvent_t event_ = nullptr;
};

// A stream of torch's pool beside `main`, for a scope. Its work begins after what `main` was given
// before the scope, and what `main` is given after the scope comes after it, an error in between or
// not. So both may use memory that was allocated for `main` before the scope and is freed after it,
// and a CUDA graph that captures one captures the other.
class CudaSideStream {
 public:
  CudaSideStream(cudaStream_t main, int32_t device) : main_(main) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_cuda_stream_from_pool(false, device, &stream));
    side_ = static_cast<cudaStream_t>(stream);
    join_.record(main_);
    join_.block(side_);
  }
  ~CudaSideStream() {
    try {
      join_.record(side_);
      join_.block(main_);
    } catch (...) {  // the device is lost: whoever uses it next is told
    }
  }
  CudaSideStream(const CudaSideStream&) = delete;
  CudaSideStream& operator=(const CudaSideStream&) = delete;
  cudaStream_t get() const { return side_; }

 private:
  cudaStream_t main_, side_ = nullptr;
  CudaEvent join_;
};

#define ALS_LAUNCH_CHECK() STD_CUDA_KERNEL_LAUNCH_CHECK()

}  // namespace als
