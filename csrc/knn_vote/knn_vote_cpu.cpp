#include <algorithm>
#include <atomic>
#include <limits>

#include "common/parallel.h"
#include "knn_vote/knn_vote.h"

namespace als {
namespace {

constexpr int64_t kGrainSteps = 16384;  // a thread's least share, in neighbours and classes

struct VoteInput {
  const float* distance;  // [Q, k]
  const int64_t* index;   // [Q, k]
  int64_t k;
  const int64_t* label;     // [N]
  const int32_t* class_of;  // [N] label, or num_classes for a sample that must not vote; or null
  int64_t num_labels;       // N
  int64_t num_classes;
  int64_t ignore_label;
  VoteWeighting weighting;
  float inverse_temperature;

  // The class of neighbour j, num_classes if it has no vote: no branch depends on the data.
  int64_t voter_class(const float* d, const int64_t* i, int64_t j) const {
    const bool votes =
        static_cast<uint64_t>(i[j]) < static_cast<uint64_t>(num_labels) && d[j] == d[j];
    const int64_t at = votes ? i[j] : 0;
    const int64_t c = class_of != nullptr         ? class_of[at]
                      : label[at] == ignore_label ? num_classes
                                                  : label[at];
    return votes ? c : num_classes;
  }
};

// A thread's counters; all zero between rows. Class num_classes collects what has no vote.
struct VoteScratch {
  std::vector<int64_t> votes;   // [num_classes + 1]
  std::vector<int32_t> counts;  // [num_classes + 1]
  std::vector<int64_t> voter;   // [k] class of each neighbour
};

// Uniform votes are counts. Count and class of a candidate make one number, the larger count first
// and the smaller class on a tie, so that best and second come without a branch.
VoteResult count_row(const VoteInput& in, const float* distance, const int64_t* index,
                     VoteScratch& scratch) {
  int32_t* counts = scratch.counts.data();
  const bool scan = in.num_classes <= std::max<int64_t>(16, in.k);
  int64_t* voter = scratch.voter.data();
  for (int64_t j = 0; j < in.k; ++j) {
    const int64_t c = in.voter_class(distance, index, j);
    ++counts[c];
    if (!scan) voter[j] = c;
  }
  const int32_t total = in.k - std::exchange(counts[in.num_classes], 0);
  int64_t best = 0, second = 0;
  const auto offer = [&](int64_t c) {
    const int64_t key = (static_cast<int64_t>(counts[c]) << 32) | (0xffffffff - c);
    second = std::max(second, std::min(best, key));
    best = std::max(best, key);
    counts[c] = 0;
  };
  if (scan) {
    for (int64_t c = 0; c < in.num_classes; ++c) offer(c);
  } else {
    for (int64_t j = 0; j < in.k; ++j) offer(voter[j]);
  }
  return {0xffffffff - (best & 0xffffffff), best >> 32, second >> 32, total};
}

VoteResult weigh_row(const VoteInput& in, const float* distance, const int64_t* index,
                     VoteScratch& scratch) {
  float d_min = INFINITY;
  for (int64_t j = 0; j < in.k; ++j) {
    scratch.voter[j] = in.voter_class(distance, index, j);
    if (scratch.voter[j] != in.num_classes && distance[j] < d_min) d_min = distance[j];
  }
  int64_t* votes = scratch.votes.data();
  VoteResult result;
  for (int64_t j = 0; j < in.k; ++j) {
    const int64_t c = scratch.voter[j];
    if (c == in.num_classes) continue;
    const int64_t weight = vote_weight(distance[j], d_min, in.weighting, in.inverse_temperature);
    votes[c] += weight;
    result.total += weight;
  }
  for (int64_t j = 0; j < in.k; ++j) {
    const int64_t c = scratch.voter[j];
    if (votes[c] == 0) continue;
    result.offer(c, votes[c]);
    votes[c] = 0;
  }
  return result;
}

// Names the first label outside [0, num_classes), and turns labels into classes where `class_of`
// is not null.
void check_labels(const int64_t* label, int64_t n, int64_t num_classes, int64_t ignore_label,
                  int32_t* class_of) {
  std::atomic<bool> wrong{false};
  const auto fits = [=](int64_t c) {
    return static_cast<uint64_t>(c) < static_cast<uint64_t>(num_classes);
  };
  parallel_for(n, 2 * kGrainSteps, [&](int64_t begin, int64_t end) {
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) bad |= !fits(label[i]) && label[i] != ignore_label;
    if (bad) wrong = true;
    for (int64_t i = begin; i < end && class_of != nullptr; ++i) {
      class_of[i] = static_cast<int32_t>(label[i] == ignore_label ? num_classes : label[i]);
    }
  });
  for (int64_t i = 0; i < n && wrong; ++i) {
    ALS_CHECK(fits(label[i]) || label[i] == ignore_label, "label: expected values in [0, ",
              num_classes, ") or ignore_label=", ignore_label, ", got ", label[i], " at position ",
              i);
  }
}

VoteOutputs knn_vote_cpu(const Tensor& distance, const Tensor& index, const Tensor& label,
                         int64_t num_classes, int64_t weighting, double temperature,
                         int64_t ignore_label) {
  check_knn_vote(distance, index, label, num_classes, weighting, temperature);
  VoteOutputs outputs = empty_vote_outputs(distance);
  const Tensor d = as_contiguous(distance);
  const Tensor i = as_contiguous(index);
  const Tensor l = as_contiguous(label);
  const int64_t rows = d.size(0), k = d.size(1), n = l.size(0);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  // Four bytes a label instead of eight, and no label looked at twice, where the rows read enough.
  const bool narrow = num_classes < kMost && rows >= n / std::max<int64_t>(k, 1);
  std::vector<int32_t> class_of(narrow ? n : 0);
  const int64_t* labels = l.const_data_ptr<int64_t>();
  check_labels(labels, n, num_classes, ignore_label, narrow ? class_of.data() : nullptr);
  const int64_t no_label = ignore_label;  // read in place of labels[0] where there are none
  const VoteInput in{d.const_data_ptr<float>(),
                     i.const_data_ptr<int64_t>(),
                     k,
                     n > 0 ? labels : &no_label,
                     narrow && n > 0 ? class_of.data() : nullptr,
                     n,
                     num_classes,
                     ignore_label,
                     static_cast<VoteWeighting>(weighting),
                     static_cast<float>(1.0 / temperature)};
  const bool counted = in.weighting == VoteWeighting::kUniform && k <= kMost && num_classes < kMost;
  auto* winner = std::get<0>(outputs).mutable_data_ptr<int64_t>();
  auto* share = std::get<1>(outputs).mutable_data_ptr<float>();
  auto* margin = std::get<2>(outputs).mutable_data_ptr<float>();
  // A thread zeroes its counters once: its share of rows should outweigh that.
  const int64_t grain = std::max<int64_t>({1, kGrainSteps / (k + 16), num_classes / (k + 1)});
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    VoteScratch scratch;
    if (counted) {
      scratch.counts.resize(num_classes + 1);
    } else {
      scratch.votes.resize(num_classes + 1);
    }
    scratch.voter.resize(k);
    for (int64_t q = begin; q < end; ++q) {
      const VoteResult result = counted
                                    ? count_row(in, in.distance + q * k, in.index + q * k, scratch)
                                    : weigh_row(in, in.distance + q * k, in.index + q * k, scratch);
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
