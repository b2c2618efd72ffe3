#include "common/parallel.h"
#include "knn_vote/knn_vote.h"

namespace als {
namespace {

// A thread's counters and the row it works on.
struct VoteScratch {
  std::vector<int64_t> votes;   // [num_classes], all zero between rows: a row costs O(k)
  std::vector<int64_t> voter;   // [k] class of each neighbour that votes
  std::vector<float> distance;  // [k] its distance
};

VoteResult vote_row(const float* distance, const int64_t* index, int64_t k, const int64_t* label,
                    int64_t num_labels, int64_t num_classes, int64_t ignore_label,
                    VoteWeighting weighting, float inverse_temperature, VoteScratch& scratch) {
  int64_t voters = 0;
  float d_min = INFINITY;
  for (int64_t j = 0; j < k; ++j) {  // the one random read of a neighbour: its label
    if (index[j] < 0 || index[j] >= num_labels) continue;
    const int64_t c = label[index[j]];
    if (c == ignore_label || c < 0 || c >= num_classes) continue;
    if (distance[j] < d_min) d_min = distance[j];
    scratch.voter[voters] = c;
    scratch.distance[voters++] = distance[j];
  }
  int64_t* votes = scratch.votes.data();
  VoteResult result;
  for (int64_t v = 0; v < voters; ++v) {
    const int64_t weight = vote_weight(scratch.distance[v], d_min, weighting, inverse_temperature);
    votes[scratch.voter[v]] += weight;
    result.total += weight;
  }
  for (int64_t v = 0; v < voters; ++v) {
    const int64_t c = scratch.voter[v];
    if (votes[c] == 0) continue;
    result.offer(c, votes[c]);
    votes[c] = 0;
  }
  return result;
}

VoteOutputs knn_vote_cpu(const Tensor& distance, const Tensor& index, const Tensor& label,
                         int64_t num_classes, int64_t weighting, double temperature,
                         int64_t ignore_label) {
  check_knn_vote(distance, index, label, num_classes, weighting, temperature);
  VoteOutputs outputs = empty_vote_outputs(distance);
  const int64_t rows = distance.size(0);
  if (rows == 0) return outputs;
  const Tensor d = torch::stable::contiguous(distance);
  const Tensor i = torch::stable::contiguous(index);
  const Tensor l = torch::stable::contiguous(label);
  const int64_t k = d.size(1);
  const int64_t num_labels = l.size(0);
  const float* d_ptr = d.const_data_ptr<float>();
  const int64_t* i_ptr = i.const_data_ptr<int64_t>();
  const int64_t* l_ptr = l.const_data_ptr<int64_t>();
  auto* winner = std::get<0>(outputs).mutable_data_ptr<int64_t>();
  auto* share = std::get<1>(outputs).mutable_data_ptr<float>();
  auto* margin = std::get<2>(outputs).mutable_data_ptr<float>();
  const auto inverse_temperature = static_cast<float>(1.0 / temperature);
  // A thread zeroes num_classes counters once: its share of rows should outweigh that.
  const int64_t grain = std::max<int64_t>(256, num_classes / std::max<int64_t>(k, 1));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    VoteScratch scratch{std::vector<int64_t>(num_classes, 0), std::vector<int64_t>(k),
                        std::vector<float>(k)};
    for (int64_t q = begin; q < end; ++q) {
      const VoteResult result =
          vote_row(d_ptr + q * k, i_ptr + q * k, k, l_ptr, num_labels, num_classes, ignore_label,
                   static_cast<VoteWeighting>(weighting), inverse_temperature, scratch);
      winner[q] = result.best > 0 ? result.winner : ignore_label;
      share[q] = result.share();
      margin[q] = result.margin();
    }
  });
  return outputs;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) { m.impl("knn_vote", TORCH_BOX(&als::knn_vote_cpu)); }
