// The instructions of common/cluster.cuh on the CPU. Include before it, after emulate_cuda.h. A
// kernel that touches another block's shared memory before a barrier has told that it is there, or
// that may be gone, is stopped; so is one whose arrivals and waits do not alternate.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "emulate_cuda.h"

namespace emulated {

[[noreturn]] inline void stop(const char* reason) {
  std::fprintf(stderr, "emulated cluster, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x,
               reason);
  std::abort();
}

}  // namespace emulated

namespace als {

inline unsigned cluster_blocks() { return static_cast<unsigned>(emulated::cluster.blocks.size()); }

inline unsigned cluster_rank() { return blockIdx.x % cluster_blocks(); }

inline void cluster_arrive() {
  emulated::Cluster& cluster = emulated::cluster;
  const unsigned me = emulated::thread_number;
  if (cluster.arrivals[me]++ != cluster.waits[me]) emulated::stop("arrives without having waited");
  if (++cluster.arrived == cluster.arrivals.size()) {
    cluster.arrived = 0;
    ++cluster.generation;
  }
}

inline void cluster_wait() {
  emulated::Cluster& cluster = emulated::cluster;
  const unsigned me = emulated::thread_number;
  if (cluster.waits[me] + 1 != cluster.arrivals[me]) emulated::stop("waits without having arrived");
  emulated::wait_for_change(cluster.generation, cluster.waits[me]);
  ++cluster.waits[me];
}

template <typename T>
T* map_shared_rank(T* shared, unsigned rank) {
  const emulated::Cluster& cluster = emulated::cluster;
  if (rank >= cluster.blocks.size()) emulated::stop("asks for a block that is not in its cluster");
  const auto offset = reinterpret_cast<unsigned char*>(shared) - emulated::block->shared.get();
  const auto bytes = static_cast<std::ptrdiff_t>(emulated::block->bytes);
  if (offset < 0 || offset + static_cast<std::ptrdiff_t>(sizeof(T)) > bytes) {
    emulated::stop("maps what is not in dynamic shared memory");
  }
  emulated::Block& there = *cluster.blocks[rank];
  if (&there != emulated::block) {
    if (cluster.waits[emulated::thread_number] == 0) {
      emulated::stop("touches a block that may not have started");
    }
    if (there.returned > 0) emulated::stop("touches a block that may have returned");
  }
  return reinterpret_cast<T*>(there.shared.get() + offset);
}

}  // namespace als
