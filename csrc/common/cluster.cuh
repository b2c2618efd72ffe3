// Clusters of thread blocks and their distributed shared memory: every function here is one
// instruction and nothing else. Torch-free. The C++ tests put plain code in their place
// (tests/cpp/emulate_cluster.h). Compute capability 9.0 has clusters; code that is compiled for an
// older one, whatever device its PTX ends up on, sees a cluster of one block.
#pragma once

#ifdef __CUDACC__

namespace als {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Blocks of this cluster, and which of them this one is.
__device__ __forceinline__ unsigned cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The barrier of all threads of a cluster, in two halves: what a thread did before it arrives is
// seen by all after they have waited. Every arrival has its wait; warps come as a whole.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where block `rank` of the cluster has what this block has at `shared`. That block must have
// started, which a barrier tells, and must not have returned.
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* shared, unsigned rank) {
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
}

#else

__device__ __forceinline__ unsigned cluster_blocks() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* shared, unsigned) {
  return shared;
}

#endif

}  // namespace als

#endif
