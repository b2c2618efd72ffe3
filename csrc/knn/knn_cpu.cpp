// knn on the CPU.
//
//   1. mean and extent of the database (float64)
//   2. a block of queries x the whole database, float32 scores (knn_tile_kernel.h); a row whose
//      score may belong to the k best goes to the query's list. A full list is cut back to what the
//      error bound cannot exclude, or, where that is too much (ties), to the k best by float64.
//   3. what is left is measured in float64 and sorted
//
// So a row is only ever dropped when the bound, or its float64 distance, proves that k others come
// first: the result does not depend on the order of the work, on threads or instruction sets.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <numeric>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "knn/knn.h"
#include "knn/knn_sums.h"
#include "knn/knn_tile.h"

namespace als {
namespace {

constexpr int64_t kPackedBytes = int64_t{96} << 20;  // packed database chunk
constexpr int64_t kStateBytes = int64_t{64} << 20;   // packed queries and candidate lists
constexpr int64_t kBlockBytes = int64_t{256} << 10;  // packed query block of a task: half of L2
constexpr int64_t kBlockQueries = 192;
constexpr int64_t kMinBlockQueries = 48;  // fewer would stream the panels too often
constexpr int64_t kScanQueries = 16;      // up to here a float64 scan beats packing the database
constexpr int64_t kMinTasks =
    32;  // smaller query blocks, then parts of the database, to have these
constexpr double kNever = 3.4e38;  // above any score: the scoring kernel leaves the query alone

// Uninitialised, aligned for the vectors of the scoring kernel.
template <typename V>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<V*>(::operator new(size * sizeof(V), std::align_val_t{64}))) {}
  V* get() const { return data_.get(); }
  V& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(V* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<V, Free> data_;
};

const KnnTileKernel& tile_kernel(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAvx512) return knn_tile_avx512;
  if (level == CpuLevel::kAvx2) return knn_tile_avx2;
#endif
  return knn_tile_baseline;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float round_up(double x) { return nextafterf(static_cast<float>(x), INFINITY); }

// Keeps the k smallest of the neighbours offered.
class Smallest {
 public:
  explicit Smallest(int64_t k) : k_(k), size_(2 * k + 64) { kept_.reserve(size_); }
  void offer(const Neighbour& n) {
    if (full_ && !(n < last_)) return;
    kept_.push_back(n);
    if (static_cast<int64_t>(kept_.size()) == size_) cut();
  }
  // At most k, ascending.
  std::vector<Neighbour>& sorted() {
    if (static_cast<int64_t>(kept_.size()) > k_) cut();
    std::sort(kept_.begin(), kept_.end());
    return kept_;
  }

 private:
  void cut() {
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end());
    kept_.resize(k_);
    last_ = kept_[k_ - 1];
    full_ = true;
  }
  int64_t k_, size_;
  std::vector<Neighbour> kept_;
  Neighbour last_{};
  bool full_ = false;
};

template <typename T>
class Search {
  // Elements are widened to Value row by row: 16-bit rows to float32.
  using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;

  struct Worker {
    Search* search;
    std::vector<Value> row;      // one widened row
    std::vector<double> query;   // one query row as distance() wants it
    std::vector<double> bounds;  // lower bounds of the true scores in a list
    std::vector<int64_t> rows;   // to be measured
    Buffer<float> sums;
    int64_t first_slot = 0;
  };

 public:
  Search(const T* query, const T* database, int64_t queries, int64_t rows, int64_t dim, int64_t k,
         KnnMetric metric, bool exclude_self, bool exact)
      : query_(query),
        database_(database),
        queries_(queries),
        rows_(rows),
        dim_(dim),
        k_(k),
        metric_(metric),
        exclude_self_(exclude_self),
        level_(cpu_level()),
        tile_(tile_kernel(level_)),
        sums_(knn_sums<Value>(level_)),
        double_sums_(knn_sums<double>(level_)),
        error_(exact ? score_error(knn_tile_chain(dim)) : KnnError{0.0, 0.0}) {}

  void run(float* distance, int64_t* index) {
    if (queries_ <= kScanQueries) {
      scan_few(distance, index);
      return;
    }
    measure();
    plan();
    for (int64_t first = 0; first < queries_; first += span_) {
      const int64_t count = std::min(span_, queries_ - first);
      pack_queries(first, count);
      for (int64_t panel = 0; panel < panels_; panel += chunk_) {
        pack_database(panel, std::min(chunk_, panels_ - panel));
        score_chunk(count);
      }
      parallel_tasks(count, [&](int64_t i, Worker& w) {
        finish(i, first + i, w, distance + (first + i) * k_, index + (first + i) * k_);
      });
    }
  }

 private:
  // Tasks go to whichever thread is free; each call of the body drains the queue.
  template <typename Body>
  void parallel_tasks(int64_t tasks, const Body& body) {
    std::atomic<int64_t> next{0};
    parallel_for(tasks, 1, [&](int64_t, int64_t) {
      Worker worker{this, std::vector<Value>(dim_), std::vector<double>(dim_), {}, {}, {}};
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, worker);
    });
  }

  // ---- rows and float64 distances ----

  const Value* widened(const T* base, int64_t row, Value* scratch) const {
    const T* p = base + row * dim_;
    if constexpr (std::is_same_v<T, Value>) {
      return p;
    } else {
      for (int64_t j = 0; j < dim_; ++j) scratch[j] = static_cast<float>(p[j]);
      return scratch;
    }
  }

  // The query as distance() takes it: normalised for cosine. False: all zero under cosine.
  bool load_query(int64_t q, Worker& w) const {
    const Value* x = widened(query_, q, w.row.data());
    double scale = 1.0;
    if (metric_ == KnnMetric::kCosine) scale = inverse_norm(sums_.sum_of_squares(x, dim_));
    for (int64_t j = 0; j < dim_; ++j) w.query[j] = static_cast<double>(x[j]) * scale;
    return scale != 0.0;
  }

  // Candidates lie all over the database; a row of a few cache lines arrives in time.
  void prefetch(int64_t row) const {
    const char* p = reinterpret_cast<const char*>(database_ + row * dim_);
    const int64_t bytes = std::min<int64_t>(dim_ * sizeof(T), 1024);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
  }

  Neighbour neighbour(int64_t row, bool nonzero, Worker& w) const {
    const Value* y = widened(database_, row, w.row.data());
    const double* q = w.query.data();
    float d;
    if (metric_ == KnnMetric::kIp) {
      d = finish_distance(metric_, sums_.product(q, y, dim_));
    } else if (metric_ == KnnMetric::kL2) {
      d = finish_distance(metric_, sums_.squared_difference(q, y, dim_, 1.0));
    } else {
      const double scale = inverse_norm(sums_.sum_of_squares(y, dim_));
      const bool defined = nonzero && scale != 0.0;
      d = defined || std::isnan(scale)
              ? finish_distance(metric_, sums_.squared_difference(q, y, dim_, scale))
              : 1.0f;
    }
    return {distance_key(d), row};
  }

  int64_t self_of(int64_t q) const { return exclude_self_ ? q : -1; }

  // All rows [begin, end) in float64.
  void scan(int64_t q, int64_t begin, int64_t end, Worker& w, Smallest& best) const {
    const bool nonzero = load_query(q, w);
    const int64_t self = self_of(q);
    for (int64_t row = begin; row < end; ++row) {
      if (row != self) best.offer(neighbour(row, nonzero, w));
    }
  }

  void write(const std::vector<Neighbour>& sorted, float* distance, int64_t* index) const {
    for (int64_t j = 0; j < k_; ++j) {
      distance[j] = key_distance(sorted[j].key);
      index[j] = sorted[j].index;
    }
  }

  void scan_few(float* distance, int64_t* index) {
    const int64_t part = std::max<int64_t>(2048, ceil_div(rows_, 64));
    const int64_t parts = ceil_div(rows_, part);
    std::vector<std::vector<Neighbour>> lists(queries_ * parts);
    parallel_tasks(queries_ * parts, [&](int64_t task, Worker& w) {
      const int64_t begin = task / queries_ * part;  // all queries while a part is in the cache
      Smallest best(std::min(k_, part));
      scan(task % queries_, begin, std::min(begin + part, rows_), w, best);
      lists[task] = std::move(best.sorted());
    });
    for (int64_t q = 0; q < queries_; ++q) {
      Smallest best(k_);
      for (int64_t p = 0; p < parts; ++p) {
        for (const Neighbour& n : lists[p * queries_ + q]) best.offer(n);
      }
      write(best.sorted(), distance + q * k_, index + q * k_);
    }
  }

  // ---- centring ----

  // Normalised (cosine) row minus the mean, unscaled; returns the sum of squares, not finite where
  // the row is not.
  double centred(const T* base, int64_t row, bool centre, Value* scratch, double* out,
                 bool* zero) const {
    const Value* x = widened(base, row, scratch);
    double scale = 1.0;
    if (metric_ == KnnMetric::kCosine) scale = inverse_norm(sums_.sum_of_squares(x, dim_));
    *zero = scale == 0.0;
    for (int64_t j = 0; j < dim_; ++j) out[j] = static_cast<double>(x[j]) * scale;
    for (int64_t j = 0; centre && j < dim_; ++j) out[j] -= mean_[j];
    return double_sums_.sum_of_squares(out, dim_);
  }

  // Mean, scale, largest norms. A row that is not finite counts nowhere: no score can choose it.
  void measure() {
    const int64_t parts = std::min<int64_t>(64, ceil_div(rows_, 256));
    const int64_t part = ceil_div(rows_, parts);
    mean_.assign(dim_, 0.0);
    std::vector<double> total(parts * dim_, 0.0), extent(parts, 0.0), norm(parts, 0.0);
    std::vector<double> raw(parts, 0.0);
    std::vector<int64_t> finite(parts, 0);
    std::atomic<bool> zeros{false};
    parallel_tasks(parts, [&](int64_t p, Worker& w) {
      bool zero = false;
      for (int64_t row = p * part; row < std::min(rows_, (p + 1) * part); ++row) {
        const double square = centred(database_, row, false, w.row.data(), w.query.data(), &zero);
        if (!is_finite(square)) continue;
        if (zero) zeros = true;
        raw[p] = std::max(raw[p], square);
        finite[p] += 1;
        for (int64_t j = 0; j < dim_; ++j) total[p * dim_ + j] += w.query[j];
      }
    });
    const auto rows = static_cast<double>(
        std::max<int64_t>(1, std::accumulate(finite.begin(), finite.end(), int64_t{0})));
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t j = 0; j < dim_; ++j) mean_[j] += total[p * dim_ + j] / rows;
    }
    parallel_tasks(parts, [&](int64_t p, Worker& w) {
      bool zero = false;
      for (int64_t row = p * part; row < std::min(rows_, (p + 1) * part); ++row) {
        const double square = centred(database_, row, true, w.row.data(), w.query.data(), &zero);
        if (!is_finite(square)) continue;
        norm[p] = std::max(norm[p], square);
        for (int64_t j = 0; j < dim_; ++j) extent[p] = std::max(extent[p], fabs(w.query[j]));
      }
    });
    const auto largest = [](const std::vector<double>& v) {
      return *std::max_element(v.begin(), v.end());
    };
    frame_ = KnnFrame::of(largest(extent), sqrt(largest(norm)), sqrt(largest(raw)), zeros);
  }

  // ---- sizes ----

  void plan() {
    panels_ = ceil_div(rows_, tile_.columns);
    chunk_ = std::clamp<int64_t>(kPackedBytes / (tile_.columns * dim_ * 4), 1, panels_);
    capacity_ = std::min(4 * k_ + 256, rows_ + kKnnMaxColumns);
    const int64_t entries = capacity_ * (sizeof(float) * 2 + sizeof(int64_t));
    const int64_t fit = std::min({kBlockBytes / (4 * dim_), kBlockQueries, queries_ / kMinTasks});
    block_ = std::min({std::max<int64_t>(fit, kMinBlockQueries), kStateBytes / entries,
                       queries_ + tile_.rows - 1});
    block_ = std::max<int64_t>(block_ / tile_.rows, 1) * tile_.rows;
    const int64_t blocks = ceil_div(queries_, block_);
    segments_ = std::min(
        {ceil_div(kMinTasks, blocks), kStateBytes / (block_ * entries), ceil_div(chunk_, 8)});
    segments_ = std::max<int64_t>(segments_, 1);
    span_ = kStateBytes / (segments_ * entries + 4 * dim_) / block_ * block_;
    span_ = std::clamp(span_, block_, blocks * block_);
    const int64_t slots = span_ * segments_;
    packed_query_ = Buffer<float>(span_ * dim_);
    relation_ = Buffer<KnnRelation>(span_);
    radius_ = Buffer<double>(slots);
    lower_ = Buffer<double>(slots);
    self_ = Buffer<int64_t>(slots);
    count_ = Buffer<int64_t>(slots);
    entry_score_ = Buffer<float>(slots * capacity_);
    entry_norm_ = Buffer<float>(slots * capacity_);
    entry_index_ = Buffer<int64_t>(slots * capacity_);
    packed_ = Buffer<float>(chunk_ * dim_ * tile_.columns);
    half_norm_ = Buffer<float>(chunk_ * tile_.columns);
    norm_ = Buffer<float>(chunk_);
    packed_panel_ = -1;
  }

  // ---- packing ----

  // Slots are laid out as [block][segment][query of the block].
  int64_t slot_of(int64_t i, int64_t segment) const {
    return (i / block_ * segments_ + segment) * block_ + i % block_;
  }
  int64_t query_of(int64_t slot) const {
    return slot / (block_ * segments_) * block_ + slot % block_;
  }

  void pack_queries(int64_t first, int64_t count) {
    first_query_ = first;
    const int64_t rows = tile_.rows;
    const int64_t padded = ceil_div(count, block_) * block_;
    parallel_tasks(padded / rows, [&](int64_t group, Worker& w) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = group * rows + i;
        float* out = packed_query_.get() + group * rows * dim_ + i;
        KnnQuery query{};  // padding: not usable
        if (at < count) {
          query = pack_query(first + at, out, w);
        } else {
          for (int64_t j = 0; j < dim_; ++j) out[j * rows] = 0.0f;
        }
        relation_[at] = query.relation;
        for (int64_t s = 0; s < segments_; ++s) {
          const int64_t slot = slot_of(at, s);
          count_[slot] = 0;
          self_[slot] = self_of(first + at);
          lower_[slot] = query.usable ? -INFINITY : kNever;
          radius_[slot] = query.radius;
        }
      }
    });
  }

  KnnQuery pack_query(int64_t q, float* out, Worker& w) const {
    const bool ip = metric_ == KnnMetric::kIp;
    bool zero = false;
    const double square = centred(query_, q, !ip, w.row.data(), w.query.data(), &zero);
    double extent = 0.0, mean_product = 0.0;
    for (int64_t j = 0; ip && j < dim_; ++j) {
      extent = std::max(extent, fabs(w.query[j]));
      mean_product += w.query[j] * mean_[j];
    }
    const KnnQuery result =
        make_query(metric_, frame_, error_, dim_, square, extent, mean_product, zero);
    for (int64_t j = 0; j < dim_; ++j) {
      out[j * tile_.rows] = result.usable ? static_cast<float>(w.query[j] * result.scale) : 0.0f;
    }
    return result;
  }

  void pack_database(int64_t first, int64_t count) {
    if (packed_panel_ == first && packed_count_ == count) return;
    packed_panel_ = first;
    packed_count_ = count;
    const int64_t columns = tile_.columns;
    const double scale = frame_.scale;
    parallel_tasks(count, [&](int64_t p, Worker& w) {
      double largest = 0.0;
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t row = (first + p) * columns + c;
        float* out = packed_.get() + p * dim_ * columns + c;
        bool zero = false;
        const double square =
            row < rows_
                ? scale * scale * centred(database_, row, true, w.row.data(), w.query.data(), &zero)
                : NAN;
        const bool usable = is_finite(square) && frame_.scorable;
        for (int64_t j = 0; j < dim_; ++j) {
          out[j * columns] = usable ? static_cast<float>(w.query[j] * scale) : 0.0f;
        }
        double h = metric_ == KnnMetric::kIp ? 0.0 : 0.5 * square;
        if (zero) h += frame_.zero_offset();
        half_norm_[p * columns + c] = usable ? static_cast<float>(h) : INFINITY;
        if (usable) largest = std::max(largest, square);
      }
      norm_[p] = round_up(sqrt(largest));
    });
  }

  // ---- scoring ----

  double offset() const { return frame_.has_zeros ? frame_.zero_offset() : 0.0; }
  double square_error() const { return metric_ == KnnMetric::kIp ? 0.0 : error_.square; }

  void score_chunk(int64_t count) {
    const int64_t blocks = ceil_div(count, block_);
    parallel_tasks(blocks * segments_, [&](int64_t task, Worker& w) {
      const int64_t block = task / segments_;
      const int64_t segment = task % segments_;
      const int64_t begin = packed_count_ * segment / segments_;
      const int64_t end = packed_count_ * (segment + 1) / segments_;
      if (begin == end) return;
      const int64_t slot = task * block_;
      const int64_t queries = std::min(block_, count - block * block_);
      if (dim_ > kKnnDepth && w.sums.get() == nullptr) {
        w.sums = Buffer<float>(block_ * tile_.columns);
      }
      w.first_slot = slot;
      // Scattered order: rows sorted by distance would otherwise all pass the cut of their time.
      const int64_t panels = end - begin;
      int64_t stride = std::max<int64_t>(1, panels * 618 / 1000);
      while (std::gcd(stride, panels) != 1) ++stride;
      KnnTileTask t{};
      t.dim = dim_;
      t.groups = ceil_div(queries, tile_.rows);
      t.query = packed_query_.get() + block * block_ * dim_;
      t.panels = panels;
      t.stride = stride;
      t.database = packed_.get() + begin * dim_ * tile_.columns;
      t.half_norm = half_norm_.get() + begin * tile_.columns;
      t.norm = norm_.get() + begin;
      t.first_row = (packed_panel_ + begin) * tile_.columns;
      t.lower = lower_.get() + slot;
      t.radius = radius_.get() + slot;
      t.square = square_error();
      t.offset = offset();
      t.capacity = capacity_;
      t.count = count_.get() + slot;
      t.self = self_.get() + slot;
      t.entry_score = entry_score_.get() + slot * capacity_;
      t.entry_norm = entry_norm_.get() + slot * capacity_;
      t.entry_index = entry_index_.get() + slot * capacity_;
      t.scratch = w.sums.get();
      t.owner = &w;
      t.make_room = [](void* owner, int64_t at) {
        auto* worker = static_cast<Worker*>(owner);
        worker->search->make_room(worker->first_slot + at, *worker);
      };
      tile_.run(t);
    });
  }

  // Error of a score of a slot, as a function of the norm of its row.
  auto error_of(int64_t slot) const {
    return [radius = radius_[slot], square = square_error(), extra = offset()](double norm) {
      return radius * norm + square * (0.5 * norm * norm + extra);
    };
  }

  // Appends what the true scores of a slot's entries are at least.
  void append_bounds(int64_t slot, std::vector<double>& bounds) const {
    const float* score = entry_score_.get() + slot * capacity_;
    const float* norm = entry_norm_.get() + slot * capacity_;
    const auto error = error_of(slot);
    const auto start = static_cast<int64_t>(bounds.size());
    bounds.resize(start + count_[slot]);
    double* out = bounds.data() + start;
    for (int64_t e = 0; e < count_[slot]; ++e) out[e] = score[e] - error(norm[e]);
  }

  // A row of the result has at least this true score, given lower bounds of some rows' scores.
  double lowest(int64_t i, std::vector<double>& bounds) const {
    if (static_cast<int64_t>(bounds.size()) < k_) return -INFINITY;
    std::nth_element(bounds.begin(), bounds.begin() + (k_ - 1), bounds.end(),
                     std::greater<double>());
    return relation_[i].lowest_score(relation_[i].distance_of(bounds[k_ - 1]));
  }

  // Drops what the error bound excludes.
  void cut_by_bound(int64_t slot, Worker& w) {
    w.bounds.clear();
    append_bounds(slot, w.bounds);
    const double lower = std::max(lower_[slot], lowest(query_of(slot), w.bounds));
    const auto error = error_of(slot);
    float* score = entry_score_.get() + slot * capacity_;
    float* norm = entry_norm_.get() + slot * capacity_;
    int64_t* index = entry_index_.get() + slot * capacity_;
    const int64_t count = count_[slot];
    int64_t kept = 0;
    for (int64_t e = 0; e < count; ++e) {  // no branch: every second one would be mispredicted
      const float s = score[e], n = norm[e];
      score[kept] = s;
      norm[kept] = n;
      index[kept] = index[e];
      kept += s + error(n) >= lower;
    }
    lower_[slot] = lower;
    count_[slot] = kept;
  }

  // Drops all but the k best by float64 distance.
  void cut_by_distance(int64_t slot, Worker& w) {
    const int64_t count = count_[slot];
    const int64_t i = query_of(slot);
    const bool nonzero = load_query(first_query_ + i, w);
    const int64_t base = slot * capacity_;
    // The pair keeps an entry's place, so that its score and norm move with it.
    std::vector<std::pair<Neighbour, int64_t>> order(count);
    for (int64_t e = 0; e < count; ++e) {
      order[e] = {neighbour(entry_index_[base + e], nonzero, w), e};
    }
    const auto less = [](const auto& a, const auto& b) { return a.first < b.first; };
    std::nth_element(order.begin(), order.begin() + (k_ - 1), order.end(), less);
    const float kth = key_distance(order[k_ - 1].first.key);
    lower_[slot] = std::max(lower_[slot], relation_[i].lowest_score(kth));
    std::sort(order.begin(), order.begin() + k_,
              [](const auto& a, const auto& b) { return a.second < b.second; });
    for (int64_t e = 0; e < k_; ++e) {
      const int64_t from = base + order[e].second;
      entry_score_[base + e] = entry_score_[from];
      entry_norm_[base + e] = entry_norm_[from];
      entry_index_[base + e] = entry_index_[from];
    }
    count_[slot] = k_;
  }

  void make_room(int64_t slot, Worker& w) {
    cut_by_bound(slot, w);
    // Less than a quarter freed: near-ties. Float64 decides them, or the list would soon be full.
    if (4 * (capacity_ - count_[slot]) < capacity_ - k_) cut_by_distance(slot, w);
  }

  void finish(int64_t i, int64_t q, Worker& w, float* distance, int64_t* index) {
    w.bounds.clear();
    double lower = -INFINITY;
    for (int64_t s = 0; s < segments_; ++s) {
      append_bounds(slot_of(i, s), w.bounds);
      lower = std::max(lower, lower_[slot_of(i, s)]);
    }
    Smallest best(k_);
    if (static_cast<int64_t>(w.bounds.size()) >= k_) {
      lower = std::max(lower, lowest(i, w.bounds));
      w.rows.clear();
      for (int64_t s = 0; s < segments_; ++s) {
        const int64_t slot = slot_of(i, s);
        const auto error = error_of(slot);
        for (int64_t e = slot * capacity_; e < slot * capacity_ + count_[slot]; ++e) {
          if (entry_score_[e] + error(entry_norm_[e]) >= lower) w.rows.push_back(entry_index_[e]);
        }
      }
      const bool nonzero = load_query(q, w);
      for (size_t r = 0; r < w.rows.size(); ++r) {
        if (r + 2 < w.rows.size()) prefetch(w.rows[r + 2]);
        best.offer(neighbour(w.rows[r], nonzero, w));
      }
    } else {  // no scores for this query, or fewer than k finite rows
      scan(q, 0, rows_, w, best);
    }
    write(best.sorted(), distance, index);
  }

  const T* query_;     // [Q, D]
  const T* database_;  // [M, D]
  int64_t queries_, rows_, dim_, k_;
  KnnMetric metric_;
  bool exclude_self_;
  CpuLevel level_;
  KnnTileKernel tile_;
  KnnSums<Value> sums_;
  KnnSums<double> double_sums_;
  KnnError error_;

  std::vector<double> mean_;
  KnnFrame frame_{};

  int64_t panels_ = 0, chunk_ = 0;       // of the database; per packed chunk
  int64_t block_ = 0, span_ = 0;         // queries per task; per round
  int64_t segments_ = 1, capacity_ = 0;  // database parts per query; list entries
  int64_t first_query_ = 0, packed_panel_ = -1, packed_count_ = 0;
  Buffer<float> packed_query_, packed_, half_norm_, norm_, entry_score_, entry_norm_;
  Buffer<double> radius_, lower_;
  Buffer<int64_t> self_, count_, entry_index_;
  Buffer<KnnRelation> relation_;
};

KnnOutputs knn_cpu(const Tensor& query, const Tensor& database, int64_t k, int64_t metric,
                   bool exclude_self, bool exact) {
  check_knn(query, database, k, metric, exclude_self);
  KnnOutputs outputs = empty_knn_outputs(query, k);
  if (query.size(0) == 0) return outputs;
  const Tensor q = torch::stable::contiguous(query);
  const Tensor y = torch::stable::contiguous(database);
  const auto search = [&](auto zero) {
    using T = decltype(zero);
    Search<T>(q.const_data_ptr<T>(), y.const_data_ptr<T>(), q.size(0), y.size(0), q.size(1), k,
              static_cast<KnnMetric>(metric), exclude_self, exact)
        .run(std::get<0>(outputs).mutable_data_ptr<float>(),
             std::get<1>(outputs).mutable_data_ptr<int64_t>());
  };
  switch (query.scalar_type()) {
    case ScalarType::Double:
      search(double{});
      break;
    case ScalarType::BFloat16:
      search(torch::headeronly::BFloat16{});
      break;
    case ScalarType::Half:
      search(torch::headeronly::Half{});
      break;
    default:
      search(float{});
  }
  return outputs;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) { m.impl("knn", TORCH_BOX(&als::knn_cpu)); }
