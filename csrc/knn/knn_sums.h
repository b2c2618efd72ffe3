// The float64 sums of knn_math.h at vector speed on the host. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace als {

// T is float or double. Every level adds in the order of combine_lanes, without fused
// multiply-adds: same bits everywhere.
template <typename T>
struct KnnSums {
  double (*squared_difference)(const double* q, const T* c, int64_t dim, double scale);
  double (*product)(const double* q, const T* c, int64_t dim);
  double (*sum_of_squares)(const T* c, int64_t dim);
};

template <typename T>
KnnSums<T> knn_sums(CpuLevel level);

}  // namespace als
