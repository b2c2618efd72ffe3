// Weighted plurality of the labels of each query's neighbours.
//
//   votes[q, c] = sum over j with label[index[q, j]] = c of w(distance[q, j])
//   winner = argmax_c votes (ties: smaller c), share = votes[winner] / sum_c votes,
//   margin = (votes[winner] - second best) / sum_c votes
#pragma once

#include "common/tensor.h"
#include "knn_vote/knn_vote_math.h"

namespace als {

using VoteOutputs =
    std::tuple<Tensor, Tensor, Tensor>;  // winner [Q] i64, share [Q] f32, margin [Q] f32

// The checks that both devices share (inline: _C and _cuda are two libraries). A label outside [0,
// num_classes) is refused on the CPU and has no vote on CUDA.
inline void check_knn_vote(const Tensor& distance, const Tensor& index, const Tensor& label,
                           int64_t num_classes, int64_t weighting, double temperature) {
  check_dim(distance, 2, "distance");
  check_dtype(distance, ScalarType::Float, "distance");
  check_dim(index, 2, "index");
  check_dtype(index, ScalarType::Long, "index");
  check_size(index, 0, distance.size(0), "index");
  check_size(index, 1, distance.size(1), "index");
  check_same_device(index, distance, "index");
  check_dim(label, 1, "label");
  check_dtype(label, ScalarType::Long, "label");
  check_same_device(label, distance, "label");
  ALS_CHECK(num_classes >= 1, "num_classes: expected >= 1, got ", num_classes);
  ALS_CHECK(weighting >= 0 && weighting <= 2, "weighting: expected 0, 1 or 2, got ", weighting);
  ALS_CHECK(temperature > 0, "temperature: expected > 0, got ", temperature);
}

inline VoteOutputs empty_vote_outputs(const Tensor& distance) {
  const int64_t rows = distance.size(0);
  return {empty_on(distance, {rows}, ScalarType::Long),
          empty_on(distance, {rows}, ScalarType::Float),
          empty_on(distance, {rows}, ScalarType::Float)};
}

}  // namespace als
