// What happens to a query's list of candidates. Torch-free.
//
// An entry is a row whose true score is known up to an error: in [score - error, score + error].
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu_level.h"
#include "knn/knn_math.h"

namespace als {

// Float32 decisions stay on the safe side: a limit is lowered, a coefficient of the error raised by
// this share of itself, 16 roundings' worth; a decision takes five.
constexpr double kKnnMargin = 9.5367431640625e-07;  // 2^-20

inline float knn_limit(double lower) {
  return static_cast<float>(lower - fabs(lower) * kKnnMargin);
}
inline float knn_coefficient(double x) { return static_cast<float>(x * (1.0 + kKnnMargin)); }

struct KnnListOps {
  // At least k of n entries have true scores of this or more: the k-th largest score - error,
  // rounded down. `scratch` holds n.
  float (*kth)(const float* score, const float* error, int64_t n, int64_t k, int32_t* scratch);
  // Keeps, in order, the entries with score + error >= limit; returns how many.
  int64_t (*keep)(float* score, float* error, int64_t* index, int64_t n, float limit);
};

KnnListOps knn_list_ops(CpuLevel level);

// Ascending.
void sort_neighbours(std::vector<Neighbour>& list, std::vector<Neighbour>& scratch);

}  // namespace als
