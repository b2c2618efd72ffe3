// The scores of a round of queries: who is scored against what, in which way, until when.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "common/counters.h"
#include "common/parallel.h"
#include "knn/knn_buffers.h"
#include "knn/knn_candidates.h"
#include "knn/knn_centring.h"
#include "knn/knn_measure.h"
#include "knn/knn_pack.h"
#include "knn/knn_place.h"
#include "knn/knn_plan.h"
#include "knn/knn_reach.h"
#include "knn/knn_tile.h"

namespace als {

// Tasks that began with bf16 scores and went on in float32.
inline Counter knn_bf16_given_up("knn_bf16_given_up");
// Searches that left out panels out of reach; those that tried, and went on with all panels.
inline Counter knn_in_order("knn_in_order");
inline Counter knn_in_order_given_up("knn_in_order_given_up");

// The ways of scoring. Without bf16 there is one.
struct KnnScorers {
  KnnOperands float32, bf16;
};

template <typename T>
class KnnScoring {
  // Rows measured in float64 to make room, as a share of all: one costs about 15 float32 scores,
  // so what bf16 can lose on float32 is an eighth.
  static constexpr int64_t kBf16Patience = 128;

  // Whether leaving out panels pays is seen on the first blocks: by the share of the panels that
  // they visit. bf16 halves the cost of all panels.
  static constexpr int64_t kTrialBlocks = 4;
  static constexpr double kReachShare = 0.6, kReachShareBf16 = 0.35;

  static constexpr bool kGoOn = false;  // for KnnTileTask::stop

  struct Task {
    int64_t visits = 0;    // panels of the chunk that have been scored
    int64_t measured = 0;  // rows measured to make room
    bool float32 = false;  // no bf16, or no more of it
  };

  // Of one thread.
  struct Worker {
    KnnScoring* scoring;
    typename KnnMeasure<T>::Scratch row;
    KnnBuffer<float> sums;       // of the scoring kernel
    std::vector<int32_t> order;  // scratch of the list operations
    std::vector<Neighbour> near;
    std::vector<int32_t> visits;
    KnnReach::Panels reach;
    int64_t first_slot = 0;
    int64_t task = 0;
  };

 public:
  KnnScoring(const KnnMeasure<T>& measure, const KnnCentring& centring, const KnnPlan& plan,
             const KnnPlaces& places, KnnScorers& scorers)
      : lists(plan, measure.in.k, knn_list_ops(cpu_level())),
        measure_(measure),
        in_(measure.in),
        frame_(centring.frame),
        plan_(plan),
        places_(places),
        float_(scorers.float32),
        bf16_(scorers.bf16),
        error_(in_.exact ? score_error(knn_tile_chain(float_.depth, 1)) : KnnError{0.0, 0.0}),
        packer_(measure, centring, plan, places, error_),
        tasks_(plan.tasks_of(plan.span)) {
    round.relation = KnnBuffer<KnnRelation>(plan.span);
    round.self = KnnBuffer<int64_t>(plan.span);
    if (places.in_order()) reach_.emplace(*float_.tile, float_.depth, plan.chunk);
  }

  // The lists of the queries at positions first, ..., first + count - 1.
  void run(int64_t first, int64_t count) {
    round.first = first;
    round.count = count;
    for (Task& task : tasks_) task = {0, 0, !bf16_.used() || reach_.has_value()};
    packer_.pack_queries(float_, round, lists);
    if (bf16_.used()) packer_.pack_queries(bf16_, round, lists);
    for (int64_t panel = 0; panel < plan_.panels; panel += plan_.chunk) {
      score_chunk(panel, std::min(plan_.chunk, plan_.panels - panel));
    }
  }

  KnnRound round;
  KnnCandidates lists;

 private:
  Worker worker() {
    Worker w{};
    w.scoring = this;
    w.row = measure_.scratch();
    if (float_.depth > kKnnDepth) w.sums = KnnBuffer<float>(plan_.block * plan_.columns);
    return w;
  }
  template <typename Body>
  void parallel(int64_t tasks, const Body& body) {
    parallel_tasks(tasks, [&] { return worker(); }, body);
  }

  int64_t tasks() const { return plan_.tasks_of(round.count); }
  bool any_task(bool float32) const {
    return std::any_of(tasks_.begin(), tasks_.begin() + tasks(),
                       [float32](const Task& task) { return task.float32 == float32; });
  }

  void score_chunk(int64_t first, int64_t count) {
    for (Task& task : tasks_) task.visits = 0;
    if (reach_.has_value()) {
      score_in_reach(first, count);
      if (reach_.has_value()) return;
    }
    if (any_task(false)) score(bf16_, first, count);
    if (any_task(true)) score(float_, first, count);
  }

  // ---- all panels ----

  // bf16: the tasks that have not stopped; float32: what those that have left undone.
  void score(KnnOperands& s, int64_t first, int64_t count) {
    packer_.pack_database(s, first, count, nullptr);
    parallel(tasks(), [&](int64_t task, Worker& w) {
      if (tasks_[task].float32 == s.bf16()) return;
      const int64_t block = task / plan_.segments;
      const int64_t segment = task % plan_.segments;
      const int64_t begin = count * segment / plan_.segments;
      const int64_t end = count * (segment + 1) / plan_.segments;
      const int64_t panels = end - begin;
      if (tasks_[task].visits == panels) return;
      const int64_t at = block * plan_.block;
      const int64_t queries = std::min(plan_.block, round.count - at);
      w.task = task;
      w.first_slot = task * plan_.block;
      KnnTileTask t = tile_task(s, first, begin, at, ceil_div(queries, plan_.rows_at_once), w);
      scatter(panels, w.visits);
      t.visits = w.visits.data();
      t.begin = tasks_[task].visits;
      t.end = panels;
      t.stop = s.bf16() ? &tasks_[task].float32 : &kGoOn;
      tasks_[task].visits = s.tile->run(t);
    });
  }

  // Scattered order: rows sorted by distance would otherwise all pass the cut of their time.
  static void scatter(int64_t panels, std::vector<int32_t>& visits) {
    int64_t stride = std::max<int64_t>(1, panels * 618 / 1000);
    while (std::gcd(stride, panels) != 1) ++stride;
    visits.resize(panels);
    for (int64_t i = 0, at = 0; i < panels; ++i, at = (at + stride) % panels) {
      visits[i] = static_cast<int32_t>(at);
    }
  }

  // `groups` query groups from the query at `at` (their lists from w.first_slot on) against the
  // packed panels from `begin` on; the visits are up to the caller.
  KnnTileTask tile_task(const KnnOperands& s, int64_t first, int64_t begin, int64_t at,
                        int64_t groups, Worker& w) {
    const int64_t slot = w.first_slot, entry = slot * plan_.capacity;
    KnnTileTask t{};
    t.depth = s.depth;
    t.groups = groups;
    t.query = s.query.get() + at * s.depth;
    t.database = s.database.get() + begin * s.depth * plan_.columns;
    t.half_norm = s.half_norm.get() + begin * plan_.columns;
    t.norm = s.norm.get() + begin;
    t.residual = s.residual.get() + begin;
    t.first_row = (first + begin) * plan_.columns;
    t.row_of = places_.in_order() ? places_.rows.data() : nullptr;
    t.lower = lists.limit.get() + slot;
    t.radius = s.radius.get() + at;
    t.spread = s.spread.get() + at;
    t.square = in_.metric == KnnMetric::kIp ? 0.0 : error_.square * (1.0 + kKnnMargin);
    t.offset = frame_.has_zeros ? frame_.zero_offset() : 0.0;
    t.capacity = plan_.capacity;
    t.count = lists.count.get() + slot;
    t.self = round.self.get() + at;
    t.entry_score = lists.score.get() + entry;
    t.entry_error = lists.error.get() + entry;
    t.entry_index = lists.index.get() + entry;
    t.scratch = w.sums.get();
    t.owner = &w;
    t.make_room = [](void* owner, int64_t i) {
      auto* worker = static_cast<Worker*>(owner);
      worker->scoring->make_room(worker->first_slot + i, *worker);
    };
    t.stop = &kGoOn;
    return t;
  }

  // ---- panels in reach ----

  // Float32 scores of the panels within reach of some query of a block; nearest panels first. Where
  // the first blocks show that it does not pay, the other blocks are left to score().
  void score_in_reach(int64_t first, int64_t count) {
    packer_.pack_database(float_, first, count, &*reach_);
    const int64_t blocks = plan_.blocks_of(round.count);
    if (!reach_tried_) {
      reach_tried_ = true;
      if (!reach_pays(first, count)) {
        reach_.reset();
        knn_in_order_given_up.add();
        for (int64_t i = 0; bf16_.used() && i < blocks; ++i) {
          tasks_[i].float32 = tasks_[i].visits == count;
        }
        return;
      }
      knn_in_order.add();
    }
    parallel(blocks, [&](int64_t block, Worker& w) {
      if (tasks_[block].visits < count) score_block_in_reach(first, count, block, w);
    });
  }

  bool reach_pays(int64_t first, int64_t count) {
    const int64_t blocks = plan_.blocks_of(round.count);
    const int64_t trial = std::min(blocks, kTrialBlocks);
    std::atomic<int64_t> visits{0};
    parallel(trial, [&](int64_t i, Worker& w) {
      visits += score_block_in_reach(first, count, i * blocks / trial, w);
    });
    const int64_t all = trial * ceil_div(plan_.block, KnnReach::kQueries) * count;
    const double share = bf16_.used() ? kReachShareBf16 : kReachShare;
    return static_cast<double>(visits) <= share * static_cast<double>(all);
  }

  int64_t score_block_in_reach(int64_t first, int64_t count, int64_t block, Worker& w) {
    const int64_t end = std::min(round.count, (block + 1) * plan_.block);
    int64_t visits = 0;
    w.task = block;
    for (int64_t at = block * plan_.block; at < end; at += KnnReach::kQueries) {
      const int64_t here = std::min(KnnReach::kQueries, end - at);
      visits += score_queries_in_reach(first, count, at, ceil_div(here, plan_.rows_at_once), w);
    }
    tasks_[block].visits = count;
    return visits;
  }

  // One segment: the slot of a query is its place in the round.
  int64_t score_queries_in_reach(int64_t first, int64_t count, int64_t at, int64_t groups,
                                 Worker& w) {
    const int64_t queries = groups * plan_.rows_at_once;
    std::vector<int32_t>& left = w.reach.left;
    reach_->face(float_.query.get() + at * float_.depth, groups, count, w.reach);
    for (int64_t i = 0; i < queries; ++i) {
      const bool scored = lists.lower[at + i] < kKnnNever;
      reach_->by_distance(i, scored, round.square_of(at + i), w.reach);
    }
    reach_->sort_nearest_first(w.reach);
    w.first_slot = at;
    KnnTileTask t = tile_task(float_, first, 0, at, groups, w);
    int64_t visits = 0;
    // As many panels as fill the lists; then four times as many each time, of those still in reach.
    for (int64_t some = ceil_div(plan_.capacity, plan_.columns);; some *= 4) {
      t.visits = left.data();
      t.begin = 0;
      t.end = std::min<int64_t>(some, left.size());
      visits += float_.tile->run(t);
      left.erase(left.begin(), left.begin() + t.end);
      if (left.empty()) return visits;
      for (int64_t i = 0; i < queries; ++i) look_for(at + i, i, w);
      reach_->drop_unreachable(w.reach);
      if (left.empty()) return visits;
    }
  }

  void look_for(int64_t slot, int64_t i, Worker& w) {
    if (lists.holds_k(slot)) lists.cut_by_bound(slot, round.relation[slot], w.order);
    reach_->look_for(i, lists.lower[slot], round.square_of(slot), round.relation[slot].slack,
                     frame_.max_norm, w.reach);
  }

  // ---- full lists ----

  void make_room(int64_t slot, Worker& w) {
    lists.cut_by_bound(slot, round.relation[plan_.query_of(slot)], w.order);
    // Near-ties. Float64 decides them, or the list would soon be full.
    if (lists.crowded(slot)) cut_by_distance(slot, w);
  }

  // Drops all but the k best by float64 distance.
  void cut_by_distance(int64_t slot, Worker& w) {
    const int64_t i = plan_.query_of(slot);
    const int64_t count = lists.count[slot];
    const bool nonzero = measure_.load_query(places_.query_at(round.first + i), w.row);
    w.near.resize(count);
    measure_.measure_rows(lists.rows(slot), count, nonzero, w.row, w.near.data());
    lists.keep_nearest(slot, round.relation[i], w.near);
    Task& task = tasks_[w.task];
    task.measured += count;
    const int64_t share = plan_.block * in_.rows / plan_.segments / kBf16Patience;
    if (!task.float32 && task.measured > share) {
      task.float32 = true;
      knn_bf16_given_up.add();
    }
  }

  const KnnMeasure<T>& measure_;
  const KnnInput<T>& in_;
  const KnnFrame& frame_;
  const KnnPlan& plan_;
  const KnnPlaces& places_;
  KnnOperands& float_;
  KnnOperands& bf16_;
  const KnnError error_;
  const KnnPacker<T> packer_;
  std::vector<Task> tasks_;
  std::optional<KnnReach> reach_;  // none: no panel is left out
  bool reach_tried_ = false;       // whether it pays has been seen
};

}  // namespace als
