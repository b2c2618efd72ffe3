// Exact k nearest neighbours: for each query row the k database rows of smallest (distance, index).
// knn_math.h says what the distance is and how rows are found without computing all of them in
// float64.
#pragma once

#include "common/tensor.h"
#include "knn/knn_math.h"

namespace als {

using KnnOutputs = std::tuple<Tensor, Tensor>;  // distance [Q, k] f32, index [Q, k] i64

inline bool knn_supports(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The checks that both devices share (inline: _C and _cuda are two libraries).
inline void check_knn(const Tensor& query, const Tensor& database, int64_t k, int64_t metric,
                      bool exclude_self) {
  check_dim(query, 2, "query");
  ALS_CHECK(knn_supports(query.scalar_type()), "query: expected a floating-point dtype, got ",
            torch::headeronly::toString(query.scalar_type()));
  check_dim(database, 2, "database");
  check_dtype(database, query.scalar_type(), "database");
  if (!(query.is_cuda() && database.is_cpu())) {  // which the CUDA operator takes in pinned memory
    check_same_device(database, query, "database");
  }
  check_size(database, 1, query.size(1), "database");
  ALS_CHECK(query.size(1) >= 1, "query: expected at least one column, got ", query.size(1));
  if (exclude_self) check_size(query, 0, database.size(0), "query");
  const int64_t available = database.size(0) - (exclude_self ? 1 : 0);
  ALS_CHECK(k >= 1 && k <= available, "k: expected in [1, ", available, "], got ", k);
  ALS_CHECK(metric >= 0 && metric <= 2, "metric: expected 0, 1 or 2, got ", metric);
}

inline KnnOutputs empty_knn_outputs(const Tensor& query, int64_t k) {
  return {empty_on(query, {query.size(0), k}, ScalarType::Float),
          empty_on(query, {query.size(0), k}, ScalarType::Long)};
}

}  // namespace als
