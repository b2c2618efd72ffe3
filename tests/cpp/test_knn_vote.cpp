#include <gtest/gtest.h>

#include <map>
#include <random>
#include <utility>
#include <vector>

// clang-format off: the emulation comes before the kernels
#include "emulate_cuda.h"
#include "knn_vote/knn_vote_kernels.cuh"
// clang-format on

namespace {

using als::vote_weight;
using als::VoteResult;
using als::VoteWeighting;

constexpr auto kOne = static_cast<int64_t>(als::kVoteScale);

TEST(VoteWeight, UniformCountsEveryVoterOnce) {
  EXPECT_EQ(vote_weight(3.0f, 0.0f, VoteWeighting::kUniform, 1.0f), kOne);
}

TEST(VoteWeight, NanHasNoVote) {
  for (auto weighting :
       {VoteWeighting::kUniform, VoteWeighting::kDistance, VoteWeighting::kSoftmax})
    EXPECT_EQ(vote_weight(NAN, 0.0f, weighting, 1.0f), 0);
}

TEST(VoteWeight, DistanceIsTheRatioToTheNearest) {
  EXPECT_EQ(vote_weight(4.0f, 1.0f, VoteWeighting::kDistance, 1.0f), kOne / 4);
  EXPECT_EQ(vote_weight(4.0f, 0.0f, VoteWeighting::kDistance, 1.0f), 0);
  EXPECT_EQ(vote_weight(0.0f, 0.0f, VoteWeighting::kDistance, 1.0f), kOne);
}

TEST(VoteWeight, SoftmaxOfInfinityIsZero) {
  EXPECT_EQ(vote_weight(INFINITY, 1.0f, VoteWeighting::kSoftmax, 10.0f), 0);
  EXPECT_NEAR(vote_weight(1.1f, 1.0f, VoteWeighting::kSoftmax, 10.0f) / als::kVoteScale,
              std::exp(-1.0), 1e-6);
}

TEST(VoteResult, TiesGoToTheSmallerClassInAnyOrder) {
  VoteResult up, down;
  up.offer(1, 5), up.offer(2, 5), up.offer(3, 1);
  down.offer(3, 1), down.offer(2, 5), down.offer(1, 5);
  for (const auto& result : {up, down}) {
    EXPECT_EQ(result.winner, 1);
    EXPECT_EQ(result.best, 5);
    EXPECT_EQ(result.second, 5);
  }
}

TEST(VoteResult, NoVotesGiveZeroShare) {
  const VoteResult none;
  EXPECT_EQ(none.winner, -1);
  EXPECT_EQ(none.share(), 0.0f);
  EXPECT_EQ(none.margin(), 0.0f);
}

// ---- the device code on the CPU ----

// Rows of the kernel against votes counted one after the other. Every tenth neighbour has a NaN
// distance, an index outside the labels or a label without a vote; row 0 has no votes at all.
void expect_same_votes(int64_t rows, int64_t k, int64_t num_classes, VoteWeighting weighting) {
  constexpr int64_t kIgnore = -7;
  std::mt19937 random(static_cast<unsigned>(k));
  std::vector<int64_t> label(997);
  for (auto& c : label) c = static_cast<int64_t>(random() % num_classes);
  for (size_t i = 0; i < label.size(); i += 50) label[i] = kIgnore;
  for (size_t i = 1; i < label.size(); i += 50) label[i] = i % 100 == 1 ? -1 : num_classes;
  std::vector<float> distance(rows * k);
  std::vector<int64_t> index(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) {
    distance[i] = random() % 40 == 0 ? NAN : static_cast<float>(random() % 64) / 16;
    index[i] = static_cast<int64_t>(random() % 1010) - 5;
    if (i < k) index[i] = -1;
  }
  std::vector<int64_t> winner(rows, 99);
  std::vector<float> share(rows, 99), margin(rows, 99);
  int slots = 32;
  while (slots < 2 * k) slots *= 2;
  const als::VoteParams p{distance.data(),
                          index.data(),
                          label.data(),
                          winner.data(),
                          share.data(),
                          margin.data(),
                          rows,
                          k,
                          997,
                          num_classes,
                          kIgnore,
                          weighting,
                          2.0f,
                          slots};
  emulated::launch(2, als::kVoteThreads, [&] { als::knn_vote_kernel(p); });

  for (int64_t q = 0; q < rows; ++q) {
    std::vector<std::pair<int64_t, float>> voters;
    float d_min = INFINITY;
    for (int64_t i = q * k; i < (q + 1) * k; ++i) {
      if (index[i] < 0 || index[i] >= 997) continue;
      const int64_t c = label[index[i]];
      if (c < 0 || c >= num_classes) continue;
      voters.emplace_back(c, distance[i]);
      if (distance[i] < d_min) d_min = distance[i];
    }
    std::map<int64_t, int64_t> votes;
    VoteResult want;
    for (const auto& [c, d] : voters) votes[c] += vote_weight(d, d_min, weighting, 2.0f);
    for (const auto& [c, weight] : votes) {
      want.offer(c, weight);
      want.total += weight;
    }
    EXPECT_EQ(winner[q], want.best > 0 ? want.winner : kIgnore) << "row " << q << " of k " << k;
    EXPECT_EQ(share[q], want.share()) << "row " << q << " of k " << k;
    EXPECT_EQ(margin[q], want.margin()) << "row " << q << " of k " << k;
  }
}

TEST(KnnVoteKernel, CountsWhatTheDefinitionCounts) {
  expect_same_votes(5, 10, 3, VoteWeighting::kUniform);  // ties, and more rows than blocks
  expect_same_votes(3, 10, 1000000, VoteWeighting::kDistance);
  expect_same_votes(3, 300, 1, VoteWeighting::kSoftmax);  // more neighbours than threads
  expect_same_votes(3, 300, 500, VoteWeighting::kUniform);
  expect_same_votes(2, 0, 4, VoteWeighting::kUniform);
}

}  // namespace
