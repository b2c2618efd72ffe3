// When a search on CUDA reads the database as it lies (knn_few.cuh), and in which groups. Host
// code, torch-free.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/small_inputs.h"
#include "knn/knn_few.cuh"

namespace als {

struct KnnFewPlan {
  // Up to so many queries float32 arithmetic keeps up with HBM, by count: 2 lane instructions for a
  // query and a feature. Packing the database costs more than 16 queries do.
  static constexpr int64_t kQueries = kKnnFewQueries;
  // Up to so many products (7 us of arithmetic on an H100, by count) the launches count for more.
  static constexpr double kProducts = 1 << 26;
  static constexpr int64_t kBytes = int64_t{64} << 20;  // of group maxima
  static constexpr int64_t kBlocks = 1024;              // to fill the device

  KnnGrouping grouping;
  bool serves;  // false: the tensor cores are the better choice

  // `row_bytes`: of a row of the database.
  static KnnFewPlan of(int64_t queries, int64_t rows, int64_t dim, int64_t row_bytes, int64_t k) {
    // One block reads, for a query, 8 bytes a group (twice its maximum) and the rows of k groups,
    // where a row counts for 32 bytes more than it has.
    const double best =
        std::sqrt(8.0 * static_cast<double>(rows) / static_cast<double>(k * (row_bytes + 32)));
    KnnFewPlan plan{{0, 3, kKnnFewStrideBits}, false};
    do {
      const int64_t rows_of_block = int64_t{kKnnFewGroups} << ++plan.grouping.row_bits;
      plan.grouping.count = (rows + rows_of_block - 1) / rows_of_block * kKnnFewGroups;
      // A larger group: closer to the best size, and still enough blocks; or all groups fit
    } while ((std::ldexp(1.4, plan.grouping.row_bits) < best &&
              plan.grouping.count > 2 * kBlocks * kKnnFewGroups) ||
             (plan.bytes(queries) > kBytes && plan.grouping.count > kKnnFewGroups));
    const double products =
        static_cast<double>(queries) * static_cast<double>(rows) * static_cast<double>(dim);
    plan.serves = small_input_paths() && (queries <= kQueries || products <= kProducts) &&
                  plan.bytes(queries) <= kBytes;
    return plan;
  }

  int64_t bytes(int64_t queries) const { return 4 * grouping.count * (queries + 1); }
  int64_t blocks(int64_t queries) const {
    return grouping.count / kKnnFewGroups * ((queries + kKnnFewQueries - 1) / kKnnFewQueries);
  }
};

}  // namespace als
