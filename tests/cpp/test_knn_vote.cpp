#include <gtest/gtest.h>

#include "knn_vote/knn_vote_math.h"

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

}  // namespace
