// The float64 sums of knn_math.h at vector speed on the host. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace als {

// T is float or double. Every level adds in the order of combine_lanes, without fused
// multiply-adds: same bits everywhere.
template <typename T>
struct KnnSums {
  // Of n rows each: several at a time hide the latency of the additions.
  void (*difference)(const double* q, const T* const* rows, int64_t n, int64_t dim, double* sums);
  void (*scaled_difference)(const double* q, const T* const* rows, const double* scales, int64_t n,
                            int64_t dim, double* sums);
  void (*product)(const double* q, const T* const* rows, int64_t n, int64_t dim, double* sums);
  void (*square)(const T* const* rows, int64_t n, int64_t dim, double* sums);
};

template <typename T>
KnnSums<T> knn_sums(CpuLevel level);

}  // namespace als
