// Rows on their way to the scoring kernels: centred in float64, then packed. Torch-free.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace als {

// Squared lengths of a row packed in bf16, and of what the rounding took away.
struct KnnPackedSquares {
  double packed;
  double residual;
};

// T is float or double.
template <typename T>
struct KnnRowOps {
  // out = x * scale - mean; returns the sum of squares.
  double (*centre)(const T* x, double scale, const double* mean, int64_t dim, double* out);
  // units = row * scale in float32.
  void (*pack_float)(const double* row, double scale, int64_t dim, float* units);
  // units = row * scale in bf16, two features a unit, the last one filled up with 0. Values below
  // the smallest normal number become 0: the dot product would take them for 0 as well.
  KnnPackedSquares (*pack_bf16)(const double* row, double scale, int64_t dim, float* units);
};

template <typename T>
KnnRowOps<T> knn_rows(CpuLevel level);

}  // namespace als
