// knn on the CPU.
//
//   1. mean of some rows of the database, extent of all (float64)
//   2. a block of queries x the whole database, bf16 or float32 scores (knn_tile_kernel.h); a row
//      whose score may belong to the k best goes to the query's list. A full list is cut back to
//      what the error bound cannot exclude, or, where that is too much (ties), to the k best by
//      float64.
//   3. what is left is measured in float64 and sorted
//
// So a row is only ever dropped when the bound, or its float64 distance, proves that k others come
// first: the result does not depend on the order of the work, on threads or instruction sets.
//
// bf16 scores are twice as fast and 2^15 times less exact. A task (a block of queries and a part of
// the database) begins with them and goes on in float32 when its lists have cost too much float64
// work: entries carry their own error, so a list may hold both.
//
// Where the rows lie in clusters, most panels of the database are out of reach of most queries.
// Then database and queries are put in an order that makes panels and blocks compact (knn_order.h),
// float32 scores begin with the nearest panels, and a panel is left out when the triangle
// inequality over its centre proves that no row of it can come before the k best so far.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>

#include "common/counters.h"
#include "common/cpu_level.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "knn/knn.h"
#include "knn/knn_list.h"
#include "knn/knn_order.h"
#include "knn/knn_rows.h"
#include "knn/knn_scan.h"
#include "knn/knn_sums.h"
#include "knn/knn_tile.h"

namespace als {
namespace {

constexpr int64_t kPackedBytes = int64_t{96} << 20;  // packed database chunk
constexpr int64_t kStateBytes = int64_t{64} << 20;   // packed queries and candidate lists
constexpr int64_t kBlockBytes = int64_t{256} << 10;  // packed query block of a task: half of L2
constexpr int64_t kBlockQueries = 192;
constexpr int64_t kMinBlockQueries = 48;  // fewer would stream the panels too often
// Up to here a scan of the rows as they lie beats packing the database: in float64, or in float32
// where differences are all that is wanted (kQuickScanQueries).
constexpr int64_t kScanQueries = 8;
constexpr int64_t kQuickScanQueries = 48;
constexpr int64_t kQuickScanFeatures = 32;  // below, rows of whole vectors only
constexpr int64_t kScanEntries = 1 << 18;   // 4 MiB of lists a thread
constexpr int64_t kScanRows = 64;           // scanned at a time
constexpr int64_t kMinTasks =
    32;  // smaller query blocks, then parts of the database, to have these
constexpr double kNever = 3.4e38;  // above any score: the scoring kernel leaves the query alone
constexpr float kMaxFloat = 3.4028235e38f;
constexpr int64_t kBf16Features = 32;  // below, bf16 saves too little of a score
constexpr int64_t kMeanRows = 4096;    // any centre is right; the mean of this many is a good one
constexpr int64_t kMeasured = 4;       // rows measured at a time
// Rows measured in float64 to make room, as a share of all: one costs about 15 float32 scores, so
// what bf16 can lose on float32 is an eighth.
constexpr int64_t kBf16Patience = 128;

// Leaving out panels: for at least so many queries and rows, and rows in clusters: the k-th
// neighbour nearer than this share of a row picked at random, estimated on some queries. Whether it
// pays is seen on the first blocks: with the share of the panels that they visit.
constexpr int64_t kReachQueries = 4096, kReachRows = 8192;
constexpr int64_t kReachMostRows = 3 << 20;  // coordinates of 16 floats: 192 MiB
constexpr int64_t kProbes = 32;
constexpr double kNear = 0.4;
constexpr int64_t kTrialBlocks = 4;
constexpr double kReachShare = 0.6, kReachShareBf16 = 0.35;  // bf16 halves the cost of all panels
constexpr int64_t kReachQueriesAtOnce = 48;                  // fewer reach less, but stream more
constexpr int64_t kDirectionSamples = 1024;

// Uninitialised. On large pages where it is large: fewer of them to fault in and to look up.
template <typename V>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) {
    const size_t bytes = size * sizeof(V);
    const std::align_val_t align{bytes < kHugePage ? 64 : kHugePage};
    data_ = {static_cast<V*>(::operator new(bytes, align)), Free{align}};
    advise_huge_pages(data_.get(), bytes);
  }
  V* get() const { return data_.get(); }
  V& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    std::align_val_t align{64};
    void operator()(V* p) const { ::operator delete(p, align); }
  };
  std::unique_ptr<V, Free> data_;
};

const KnnTileKernel& float_tile(CpuLevel level) {
#if defined(__x86_64__)
  if (level == CpuLevel::kAvx512) return knn_tile_avx512;
  if (level == CpuLevel::kAvx2) return knn_tile_avx2;
#endif
  return knn_tile_baseline;
}

// Forced by a test: for rows of any length.
bool use_bf16(int64_t dim) {
  return cpu_has_bf16() &&
         (dim >= kBf16Features || forced_cpu_level().load() == CpuLevel::kAvx512Bf16);
}

Counter given_up("knn_bf16_given_up");  // tasks that began with bf16 scores and went on in float32
Counter in_order("knn_in_order");       // searches that left out panels out of reach
Counter order_given_up("knn_in_order_given_up");  // those that tried, and went on with all panels

const KnnTileKernel& bf16_tile() {
#if defined(__x86_64__)
  return knn_tile_bf16;
#else
  return knn_tile_baseline;  // not reached
#endif
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
  // No neighbour of a larger distance can enter any more.
  float largest() const { return full_ ? key_distance(last_.key) : INFINITY; }
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
    std::vector<Value> row;      // kMeasured widened rows
    std::vector<double> query;   // one query row as distance() wants it, or a centred row
    Buffer<float> units;         // packed rows, row by row
    Buffer<float> sums;          // of the scoring kernel
    std::vector<int32_t> order;  // scratch of the list operations
    std::vector<float> score;    // lists of all segments of a query
    std::vector<float> error;
    std::vector<int64_t> index;
    std::vector<Neighbour> near, scratch;
    std::vector<int32_t> visits;
    Buffer<float> products, best, tau, cut;  // of reach()
    int64_t first_slot = 0;
    int64_t task = 0;
  };

  // One way of scoring, and the operands packed for it.
  struct Scorer {
    const KnnTileKernel* tile = nullptr;
    int64_t depth = 0;  // units of a row
    bool bf16 = false;
    Buffer<float> query;                      // [groups][depth][rows]
    Buffer<float> radius, spread;             // [span]
    Buffer<float> packed;                     // [panels of a chunk][depth][columns]
    Buffer<float> half_norm, norm, residual;  // of panels
    int64_t packed_panel = -1;                // first panel of what is packed
    Buffer<float> centres;                    // [panels of centres][depth][columns]
    Buffer<float> centre_half, centre_radius;
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
        exact_(exact),
        sums_(knn_sums<Value>(cpu_level())),
        row_ops_(knn_rows<Value>(cpu_level())),
        list_ops_(knn_list_ops(cpu_level())),
        scan_(knn_scan(cpu_level())) {
    set_tile(float_, float_tile(cpu_level()));
    if (use_bf16(dim)) set_tile(bf16_, bf16_tile());
    error_ = exact ? score_error(knn_tile_chain(float_.depth, 1)) : KnnError{0.0, 0.0};
  }

  void run(float* distance, int64_t* index) {
    if (queries_ <= (quick_scan() ? kQuickScanQueries : kScanQueries) &&
        queries_ * (2 * k_ + 64) <= kScanEntries) {
      scan_few(distance, index);
      return;
    }
    measure();
    plan();
    if (may_leave_out()) put_in_order();
    for (int64_t first = 0; first < queries_; first += span_) {
      const int64_t count = std::min(span_, queries_ - first);
      pack_queries(first, count);
      for (int64_t panel = 0; panel < panels_; panel += chunk_) score_chunk(panel, count);
      parallel_tasks(count, [&](int64_t i, Worker& w) {
        const int64_t q = query_row(first + i);
        finish(i, q, w, distance + q * k_, index + q * k_);
      });
    }
  }

 private:
  // Tasks go to whichever thread is free; each call of the body drains the queue.
  template <typename Body>
  void parallel_tasks(int64_t tasks, const Body& body) {
    std::atomic<int64_t> next{0};
    parallel_for(tasks, 1, [&](int64_t, int64_t) {
      Worker w = worker();
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, w);
    });
  }

  Worker worker() {
    Worker w{};
    w.search = this;
    w.row.resize(kMeasured * dim_);
    w.query.resize(dim_);
    return w;
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

  // 1 / |x| for cosine, else 1.
  double scale_of(const Value* x) const {
    if (metric_ != KnnMetric::kCosine) return 1.0;
    double square;
    sums_.square(&x, 1, dim_, &square);
    return inverse_norm(square);
  }

  // The query as distance() takes it: normalised for cosine. False: all zero under cosine.
  bool load_query(int64_t q, Worker& w) const {
    const Value* x = widened(query_, q, w.row.data());
    const double scale = scale_of(x);
    for (int64_t j = 0; j < dim_; ++j) w.query[j] = static_cast<double>(x[j]) * scale;
    return scale != 0.0;
  }

  // Candidates lie all over the database; a row of a few cache lines arrives in time.
  void prefetch(int64_t row) const {
    const char* p = reinterpret_cast<const char*>(database_ + row * dim_);
    const int64_t bytes = std::min<int64_t>(dim_ * sizeof(T), 1024);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
  }

  // The distances of n rows to the loaded query.
  void measure_rows(const int64_t* rows, int64_t n, bool nonzero, Worker& w, Neighbour* out) const {
    const double* q = w.query.data();
    const Value* at[kMeasured];
    double sum[kMeasured], scale[kMeasured];
    for (int64_t begin = 0; begin < n; begin += kMeasured) {
      const int64_t count = std::min(kMeasured, n - begin);
      for (int64_t r = 0; r < count; ++r) {
        if (begin + kMeasured + r < n) prefetch(rows[begin + kMeasured + r]);
        at[r] = widened(database_, rows[begin + r], w.row.data() + r * dim_);
      }
      if (metric_ == KnnMetric::kIp) {
        sums_.product(q, at, count, dim_, sum);
      } else if (metric_ == KnnMetric::kL2) {
        sums_.difference(q, at, count, dim_, sum);
      } else {
        sums_.square(at, count, dim_, sum);
        for (int64_t r = 0; r < count; ++r) scale[r] = inverse_norm(sum[r]);
        sums_.scaled_difference(q, at, scale, count, dim_, sum);
      }
      for (int64_t r = 0; r < count; ++r) {
        float d = finish_distance(metric_, sum[r]);
        if (metric_ == KnnMetric::kCosine && (!nonzero || scale[r] == 0.0) &&
            !std::isnan(scale[r])) {
          d = 1.0f;
        }
        out[begin + r] = {distance_key(d), rows[begin + r]};
      }
    }
  }

  int64_t self_of(int64_t q) const { return exclude_self_ ? q : -1; }

  // All rows [begin, end) in float64.
  void scan(int64_t q, int64_t begin, int64_t end, Worker& w, Smallest& best) const {
    const bool nonzero = load_query(q, w);
    const int64_t self = self_of(q);
    int64_t rows[kMeasured];
    Neighbour near[kMeasured];
    for (int64_t first = begin; first < end; first += kMeasured) {
      const int64_t count = std::min(kMeasured, end - first);
      for (int64_t r = 0; r < count; ++r) rows[r] = first + r;
      measure_rows(rows, count, nonzero, w, near);
      for (int64_t r = 0; r < count; ++r) {
        if (rows[r] != self) best.offer(near[r]);
      }
    }
  }

  void write(const std::vector<Neighbour>& sorted, float* distance, int64_t* index) const {
    for (int64_t j = 0; j < k_; ++j) {
      distance[j] = key_distance(sorted[j].key);
      index[j] = sorted[j].index;
    }
  }

  bool quick_scan() const {
    return std::is_same_v<T, float> && metric_ == KnnMetric::kL2 &&
           (dim_ >= kQuickScanFeatures || dim_ == 8 || dim_ == 16);
  }

  // Rows [begin, end) for kKnnScanQueries queries from `first` on: float32 distances choose the
  // rows to measure.
  void scan_quickly(int64_t first, int64_t begin, int64_t end, Worker& w, Smallest* best) const {
    if constexpr (std::is_same_v<T, float>) {
      const int64_t count = std::min<int64_t>(kKnnScanQueries, queries_ - first);
      std::vector<float> queries(kKnnScanQueries * dim_, 0.0f);
      std::copy_n(query_ + first * dim_, count * dim_, queries.data());
      float d[kScanRows * kKnnScanQueries];
      int64_t rows[kScanRows];
      Neighbour near[kScanRows];
      for (int64_t row = begin; row < end; row += kScanRows) {
        const int64_t n = std::min(kScanRows, end - row);
        scan_(queries.data(), database_ + row * dim_, n, dim_, d);
        float limit[kKnnScanQueries] = {};
        int32_t any[kKnnScanQueries] = {};
        for (int64_t i = 0; i < count; ++i) limit[i] = knn_scan_limit(best[i].largest(), dim_);
        for (int64_t r = 0; r < n; ++r) {
          for (int i = 0; i < kKnnScanQueries; ++i) {
            any[i] |= !(d[r * kKnnScanQueries + i] > limit[i]);
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          if (!any[i]) continue;
          const int64_t self = self_of(first + i);
          int64_t chosen = 0;
          for (int64_t r = 0; r < n; ++r) {
            rows[chosen] = row + r;
            chosen += !(d[r * kKnnScanQueries + i] > limit[i]) && row + r != self;
          }
          measure_rows(rows, chosen, load_query(first + i, w), w, near);
          for (int64_t r = 0; r < chosen; ++r) best[i].offer(near[r]);
        }
      }
    }
  }

  void scan_few(float* distance, int64_t* index) {
    const int64_t part = std::clamp<int64_t>(ceil_div(rows_, 64), 512, 16384);
    std::vector<Smallest> best(queries_, Smallest(k_));
    std::mutex merging;
    std::atomic<int64_t> next{0};
    const int64_t parts = ceil_div(rows_, part);
    // Each thread keeps its own best of the parts it gets: which parts, does not show in the end.
    parallel_for(parts, 1, [&](int64_t, int64_t) {
      Worker w = worker();
      std::vector<Smallest> own;
      for (int64_t p; (p = next.fetch_add(1)) < parts;) {
        own.resize(queries_, Smallest(k_));
        const int64_t begin = p * part, end = std::min(begin + part, rows_);
        if (quick_scan()) {
          for (int64_t q = 0; q < queries_; q += kKnnScanQueries) {
            scan_quickly(q, begin, end, w, &own[q]);
          }
        } else {
          for (int64_t q = 0; q < queries_; ++q) scan(q, begin, end, w, own[q]);
        }
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t q = 0; q < own.size(); ++q) {
        for (const Neighbour& n : own[q].sorted()) best[q].offer(n);
      }
    });
    for (int64_t q = 0; q < queries_; ++q) {
      write(best[q].sorted(), distance + q * k_, index + q * k_);
    }
  }

  // ---- centring ----

  // Normalised (cosine) row minus `mean`, unscaled, to w.query; returns the sum of squares, not
  // finite where the row is not.
  double centred(const T* base, int64_t row, const std::vector<double>& mean, Worker& w,
                 bool* zero) const {
    const Value* x = widened(base, row, w.row.data());
    const double scale = scale_of(x);
    *zero = scale == 0.0;
    return row_ops_.centre(x, scale, mean.data(), dim_, w.query.data());
  }

  // Mean, scale, largest norms. A row that is not finite counts nowhere: no score can choose it.
  void measure() {
    zero_.assign(dim_, 0.0);
    mean_.assign(dim_, 0.0);
    const int64_t samples = std::min(rows_, kMeanRows);
    const int64_t parts = std::min<int64_t>(64, ceil_div(rows_, 256));
    std::vector<double> total(parts * dim_, 0.0), norm(parts, 0.0);
    std::vector<int64_t> finite(parts, 0);
    std::atomic<bool> zeros{false};
    parallel_tasks(parts, [&](int64_t p, Worker& w) {
      bool zero = false;
      for (int64_t s = p * samples / parts; s < (p + 1) * samples / parts; ++s) {
        if (!is_finite(centred(database_, s * rows_ / samples, zero_, w, &zero))) continue;
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
      for (int64_t row = p * rows_ / parts; row < (p + 1) * rows_ / parts; ++row) {
        const double square = centred(database_, row, mean_, w, &zero);
        if (!is_finite(square)) continue;
        if (zero) zeros = true;
        norm[p] = std::max(norm[p], square);
      }
    });
    const double largest = sqrt(*std::max_element(norm.begin(), norm.end()));
    double mean = 0.0;
    for (double m : mean_) mean += m * m;
    // An element is no larger than its row, a row no longer than its distance from the mean and
    // the mean; 1e-6 for the arithmetic.
    frame_ = KnnFrame::of(largest, largest, (1.0 + 1e-6) * (largest + sqrt(mean)), zeros);
  }

  // ---- order ----

  // Worth an order, for the cost of some distances: an m-th part of the rows has its nearest about
  // where the whole has its m-th.
  bool may_leave_out() {
    if (metric_ == KnnMetric::kIp || segments_ > 1 || queries_ < kReachQueries ||
        rows_ < kReachRows || std::max(rows_, queries_) > kReachMostRows || !frame_.scorable) {
      return false;
    }
    const int64_t some = std::clamp<int64_t>(rows_ / k_, 64, 4096);
    std::vector<double> nearest(kProbes), typical(kProbes);
    parallel_tasks(kProbes, [&](int64_t p, Worker& w) {
      const int64_t q = p * queries_ / kProbes;
      std::vector<int64_t> rows;
      for (int64_t s = 0; s < some; ++s) {
        const int64_t row = (2 * s + 1) * rows_ / (2 * some);
        if (row != self_of(q)) rows.push_back(row);
      }
      std::vector<Neighbour> near(rows.size());
      measure_rows(rows.data(), static_cast<int64_t>(rows.size()), load_query(q, w), w,
                   near.data());
      double sum = 0.0;
      for (const Neighbour& n : near) sum += sqrt(std::max(0.0f, key_distance(n.key)));
      typical[p] = sum / static_cast<double>(near.size());
      nearest[p] =
          sqrt(std::max(0.0f, key_distance(std::min_element(near.begin(), near.end())->key)));
    });
    double near_sum = 0.0, typical_sum = 0.0;
    for (int64_t p = 0; p < kProbes; ++p) {
      if (!is_finite(typical[p])) continue;
      near_sum += nearest[p];
      typical_sum += typical[p];
    }
    return near_sum < kNear * typical_sum;
  }

  void put_in_order() {
    const int64_t samples = std::min(rows_, kDirectionSamples);
    std::vector<float> sample(samples * dim_);
    const auto load = [&](const T* base, int64_t row, Worker& w, float* out) {
      bool zero = false;
      if (!is_finite(centred(base, row, mean_, w, &zero))) {
        std::fill_n(out, dim_, 0.0f);
      } else {
        row_ops_.pack_float(w.query.data(), frame_.scale, dim_, out);
      }
    };
    parallel_tasks(samples, [&](int64_t s, Worker& w) {
      load(database_, s * rows_ / samples, w, &sample[s * dim_]);
    });
    const int64_t count = std::min<int64_t>(kKnnCoordinates, dim_);
    const std::vector<float> directions = knn_directions(sample.data(), samples, dim_, count);
    const auto order_of = [&](const T* base, int64_t rows, int64_t leaf) {
      const Buffer<float> points(rows * kKnnCoordinates);
      constexpr int64_t kRun = 1024;
      parallel_tasks(ceil_div(rows, kRun), [&](int64_t run, Worker& w) {
        std::vector<float> row(dim_);
        for (int64_t r = run * kRun; r < std::min(rows, (run + 1) * kRun); ++r) {
          load(base, r, w, row.data());
          knn_project(row.data(), directions.data(), dim_, count, &points[r * kKnnCoordinates]);
        }
      });
      return sorted_by_place(points.get(), rows, leaf);
    };
    row_of_ = order_of(database_, rows_, columns_);
    const bool same = query_ == database_ && queries_ == rows_;
    query_of_position_ = same ? row_of_ : order_of(query_, queries_, kReachQueriesAtOnce);
    leave_out_ = true;
  }

  std::vector<int32_t> sorted_by_place(const float* points, int64_t rows, int64_t leaf) {
    std::vector<int32_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    std::vector<std::pair<int64_t, int64_t>> parts{{0, rows}}, next;
    while (!parts.empty()) {
      next.assign(2 * parts.size(), {0, 0});
      parallel_tasks(static_cast<int64_t>(parts.size()), [&](int64_t p, Worker&) {
        const auto [begin, end] = parts[p];
        const int64_t middle = begin + knn_middle(end - begin, leaf);
        if (middle == begin) return;
        knn_split(points, order.data(), begin, middle, end);
        next[2 * p] = {begin, middle};
        next[2 * p + 1] = {middle, end};
      });
      next.erase(std::remove(next.begin(), next.end(), std::pair<int64_t, int64_t>{0, 0}),
                 next.end());
      parts.swap(next);
    }
    return order;
  }

  // The row at a position of the order.
  int64_t database_row(int64_t position) const {
    return row_of_.empty() ? position : row_of_[position];
  }
  int64_t query_row(int64_t position) const {
    return query_of_position_.empty() ? position : query_of_position_[position];
  }

  // ---- sizes ----

  void set_tile(Scorer& s, const KnnTileKernel& tile) {
    s.tile = &tile;
    s.bf16 = tile.features == 2;
    s.depth = ceil_div(dim_, tile.features);
  }

  void plan() {
    rows_at_once_ = float_.tile->rows;  // of both ways of scoring
    columns_ = float_.tile->columns;
    const Scorer& first = bf16_.bf16 ? bf16_ : float_;
    panels_ = ceil_div(rows_, columns_);
    const int64_t units = float_.depth + bf16_.depth;
    chunk_ = std::clamp<int64_t>(kPackedBytes / (columns_ * units * 4), 1, panels_);
    capacity_ = std::min(2 * k_ + 256, rows_ + kKnnMaxColumns);
    const int64_t entries = capacity_ * (sizeof(float) * 2 + sizeof(int64_t));
    const int64_t fit =
        std::min({kBlockBytes / (4 * first.depth), kBlockQueries, queries_ / kMinTasks});
    block_ = std::min({std::max<int64_t>(fit, kMinBlockQueries), kStateBytes / entries,
                       queries_ + rows_at_once_ - 1});
    block_ = std::max<int64_t>(block_ / rows_at_once_, 1) * rows_at_once_;
    const int64_t blocks = ceil_div(queries_, block_);
    segments_ = std::min(
        {ceil_div(kMinTasks, blocks), kStateBytes / (block_ * entries), ceil_div(chunk_, 8)});
    segments_ = std::max<int64_t>(segments_, 1);
    span_ = kStateBytes / (segments_ * entries + 4 * units) / block_ * block_;
    span_ = std::clamp(span_, block_, blocks * block_);
    const int64_t slots = span_ * segments_;
    relation_ = Buffer<KnnRelation>(span_);
    self_ = Buffer<int64_t>(span_);
    lower_ = Buffer<double>(slots);
    limit_ = Buffer<float>(slots);
    count_ = Buffer<int64_t>(slots);
    entry_score_ = Buffer<float>(slots * capacity_);
    entry_error_ = Buffer<float>(slots * capacity_);
    entry_index_ = Buffer<int64_t>(slots * capacity_);
    const int64_t tasks = slots / block_;
    visits_.assign(tasks, 0);
    measured_.assign(tasks, 0);
    stop_ = Buffer<bool>(tasks);
    for (Scorer* s : {&float_, &bf16_}) {
      if (s->tile == nullptr) continue;
      s->query = Buffer<float>(span_ * s->depth);
      s->radius = Buffer<float>(span_);
      s->spread = Buffer<float>(span_);
    }
  }

  // ---- packing ----

  // Slots are laid out as [block][segment][query of the block].
  int64_t slot_of(int64_t i, int64_t segment) const {
    return (i / block_ * segments_ + segment) * block_ + i % block_;
  }
  int64_t query_of(int64_t slot) const {
    return slot / (block_ * segments_) * block_ + slot % block_;
  }

  // The row in w.query as row `r` of w.units, for transpose().
  KnnPackedSquares pack_row(const Scorer& s, int64_t r, double scale, Worker& w) const {
    const int64_t width = s.depth + 16;  // so that rows do not share their cache sets
    if (w.units.get() == nullptr) w.units = Buffer<float>(kKnnMaxColumns * (float_.depth + 16));
    float* out = w.units.get() + r * width;
    if (s.bf16) return row_ops_.pack_bf16(w.query.data(), scale, dim_, out);
    row_ops_.pack_float(w.query.data(), scale, dim_, out);
    return {};
  }

  void transpose(const Scorer& s, int64_t rows, const Worker& w, float* out) const {
    const int64_t width = s.depth + 16;
    for (int64_t u = 0; u < s.depth; ++u, out += rows) {
      for (int64_t r = 0; r < rows; ++r) out[r] = w.units[r * width + u];
    }
  }

  void pack_queries(int64_t first, int64_t count) {
    first_query_ = first;
    const int64_t padded = ceil_div(count, block_) * block_;
    const int64_t tasks = padded / block_ * segments_;
    std::fill_n(measured_.begin(), tasks, 0);
    std::fill_n(stop_.get(), tasks, bf16_.tile == nullptr || leave_out_);
    parallel_tasks(padded / rows_at_once_, [&](int64_t group, Worker& w) {
      for (Scorer* s : {&float_, &bf16_}) {
        if (s->tile == nullptr) continue;
        for (int64_t i = 0; i < rows_at_once_; ++i) {
          const int64_t at = group * rows_at_once_ + i;
          pack_query(*s, at, i, at < count, w);
        }
        transpose(*s, rows_at_once_, w, s->query.get() + group * rows_at_once_ * s->depth);
      }
    });
  }

  void pack_query(const Scorer& s, int64_t at, int64_t r, bool exists, Worker& w) {
    KnnQuery query{};  // padding: not usable
    double square = 0.0;
    if (exists) {
      const bool ip = metric_ == KnnMetric::kIp;
      bool zero = false;
      square = centred(query_, query_row(first_query_ + at), ip ? zero_ : mean_, w, &zero);
      double extent = 0.0, mean_product = 0.0;
      for (int64_t j = 0; ip && j < dim_; ++j) {
        extent = std::max(extent, fabs(w.query[j]));
        mean_product += w.query[j] * mean_[j];
      }
      query = make_query(metric_, frame_, error_, dim_, square, extent, mean_product, zero);
    }
    if (!query.usable) std::fill(w.query.begin(), w.query.end(), 0.0);
    const KnnPackedSquares packed = pack_row(s, r, query.scale, w);
    relation_[at] = query.relation;
    self_[at] = exists ? self_of(query_row(first_query_ + at)) : -1;
    KnnBf16Error error{query.radius, 0.0};
    if (s.bf16 && query.usable) {
      error = bf16_error(exact_ ? knn_tile_chain(s.depth, 2) : 0, query.scale * sqrt(square),
                         sqrt(packed.packed), sqrt(packed.residual));
    }
    s.radius[at] = knn_coefficient(error.radius);
    s.spread[at] = knn_coefficient(error.spread);
    for (int64_t segment = 0; segment < segments_; ++segment) {
      const int64_t slot = slot_of(at, segment);
      count_[slot] = 0;
      raise(slot, query.usable ? -INFINITY : kNever);
    }
  }

  void raise(int64_t slot, double lower) {
    lower_[slot] = lower;
    limit_[slot] = knn_limit(lower);
  }

  void pack_database(Scorer& s, int64_t first, int64_t count) {
    if (s.packed_panel == first) return;
    s.packed_panel = first;
    if (s.packed.get() == nullptr) {
      s.packed = Buffer<float>(chunk_ * s.depth * columns_);
      s.half_norm = Buffer<float>(chunk_ * columns_);
      s.norm = Buffer<float>(chunk_);
      s.residual = Buffer<float>(chunk_);
      if (leave_out_) {
        const int64_t centres = ceil_div(chunk_, columns_) * columns_;
        s.centres = Buffer<float>(centres * s.depth);
        s.centre_half = Buffer<float>(centres);
        s.centre_radius = Buffer<float>(centres);
        std::fill_n(s.centres.get(), centres * s.depth, 0.0f);
        std::fill_n(s.centre_half.get(), centres, 0.0f);
        std::fill_n(s.centre_radius.get(), centres, 0.0f);
      }
    }
    const double scale = frame_.scale;
    parallel_tasks(count, [&](int64_t p, Worker& w) {
      double largest = 0.0, residual = 0.0;
      for (int64_t c = 0; c < columns_; ++c) {
        const int64_t at = (first + p) * columns_ + c;
        bool zero = false;
        const double square =
            at < rows_ ? scale * scale * centred(database_, database_row(at), mean_, w, &zero)
                       : NAN;
        const bool usable = is_finite(square) && frame_.scorable;
        if (!usable) std::fill(w.query.begin(), w.query.end(), 0.0);
        const KnnPackedSquares packed = pack_row(s, c, scale, w);
        double h = metric_ == KnnMetric::kIp ? 0.0 : 0.5 * square;
        if (zero) h += frame_.zero_offset();
        s.half_norm[p * columns_ + c] = usable ? static_cast<float>(h) : INFINITY;
        // max(square, packed): h is bounded by the norm too
        if (usable) largest = std::max({largest, square, packed.packed});
        residual = std::max(residual, packed.residual);
      }
      transpose(s, columns_, w, s.packed.get() + p * s.depth * columns_);
      s.norm[p] = round_up(sqrt(largest));
      s.residual[p] = round_up((1.0 + 1e-6) * sqrt(residual));
      if (leave_out_) pack_centre(s, p, w);
    });
  }

  // Centre and radius of packed panel p, from the rows in w.units.
  void pack_centre(Scorer& s, int64_t p, const Worker& w) {
    const int64_t width = s.depth + 16;
    const float* half_norm = s.half_norm.get() + p * columns_;
    float* centre = s.centres.get() + p / columns_ * s.depth * columns_ + p % columns_;
    double usable = 0.0, square = 0.0;
    for (int64_t c = 0; c < columns_; ++c) usable += half_norm[c] < INFINITY;
    double away[kKnnMaxColumns] = {};
    for (int64_t u = 0; u < s.depth; ++u) {
      double sum = 0.0;
      for (int64_t c = 0; c < columns_; ++c) {
        if (half_norm[c] < INFINITY) sum += w.units[c * width + u];
      }
      const auto m = static_cast<float>(sum / std::max(usable, 1.0));
      centre[u * columns_] = m;
      square += double{m} * m;
      for (int64_t c = 0; c < columns_; ++c) {
        const double off = double{w.units[c * width + u]} - m;
        away[c] += off * off;
      }
    }
    double radius = 0.0;
    for (int64_t c = 0; c < columns_; ++c) {
      if (half_norm[c] < INFINITY) radius = std::max(radius, away[c]);
    }
    // What packing rounded away belongs to the distance from the centre too.
    radius = (1.0 + 1e-6) * sqrt(radius) + 2.0 * kFloatUnit * s.norm[p];
    s.centre_radius[p] = round_up(radius);
    s.centre_half[p] = static_cast<float>(0.5 * (square - radius * radius) -
                                          reach_error() * (square + radius * radius));
  }

  // ---- scoring ----

  void score_chunk(int64_t panel, int64_t count) {
    const int64_t panels = std::min(chunk_, panels_ - panel);
    const int64_t tasks = ceil_div(count, block_) * segments_;
    std::fill_n(visits_.begin(), tasks, 0);
    if (leave_out_) {
      score_in_reach(panel, panels, count);
      if (leave_out_) return;
    }
    if (!std::all_of(stop_.get(), stop_.get() + tasks, [](bool stop) { return stop; })) {
      score(bf16_, panel, panels, count);
    }
    if (std::any_of(stop_.get(), stop_.get() + tasks, [](bool stop) { return stop; })) {
      score(float_, panel, panels, count);
    }
  }

  // bf16: the tasks that have not stopped; float32: what those that have left undone.
  void score(Scorer& s, int64_t first, int64_t count, int64_t queries) {
    static constexpr bool kGoOn = false;
    pack_database(s, first, count);
    parallel_tasks(ceil_div(queries, block_) * segments_, [&](int64_t task, Worker& w) {
      if (stop_[task] == s.bf16) return;
      const int64_t block = task / segments_;
      const int64_t segment = task % segments_;
      const int64_t begin = count * segment / segments_;
      const int64_t end = count * (segment + 1) / segments_;
      const int64_t panels = end - begin;
      if (visits_[task] == panels) return;
      if (s.depth > kKnnDepth && w.sums.get() == nullptr) {
        w.sums = Buffer<float>(block_ * columns_);
      }
      const int64_t slot = task * block_;
      w.first_slot = slot;
      w.task = task;
      const int64_t groups = ceil_div(std::min(block_, queries - block * block_), rows_at_once_);
      KnnTileTask t = tile_task(s, first, begin, block * block_, slot, groups, w);
      // Scattered order: rows sorted by distance would otherwise all pass the cut of their time.
      int64_t stride = std::max<int64_t>(1, panels * 618 / 1000);
      while (std::gcd(stride, panels) != 1) ++stride;
      w.visits.resize(panels);
      for (int64_t i = 0, at = 0; i < panels; ++i, at = (at + stride) % panels) {
        w.visits[i] = static_cast<int32_t>(at);
      }
      t.visits = w.visits.data();
      t.begin = visits_[task];
      t.end = panels;
      t.stop = s.bf16 ? &stop_[task] : &kGoOn;
      visits_[task] = s.tile->run(t);
    });
  }

  // `groups` query groups from the query at `at` (their lists from `slot` on) against the packed
  // panels from `begin` on; the visits are up to the caller.
  KnnTileTask tile_task(const Scorer& s, int64_t first, int64_t begin, int64_t at, int64_t slot,
                        int64_t groups, Worker& w) {
    static constexpr bool kGoOn = false;
    KnnTileTask t{};
    t.depth = s.depth;
    t.groups = groups;
    t.query = s.query.get() + at * s.depth;
    t.database = s.packed.get() + begin * s.depth * columns_;
    t.half_norm = s.half_norm.get() + begin * columns_;
    t.norm = s.norm.get() + begin;
    t.residual = s.residual.get() + begin;
    t.first_row = (first + begin) * columns_;
    t.row_of = row_of_.empty() ? nullptr : row_of_.data();
    t.lower = limit_.get() + slot;
    t.radius = s.radius.get() + at;
    t.spread = s.spread.get() + at;
    t.square = metric_ == KnnMetric::kIp ? 0.0 : error_.square * (1.0 + kKnnMargin);
    t.offset = frame_.has_zeros ? frame_.zero_offset() : 0.0;
    t.capacity = capacity_;
    t.count = count_.get() + slot;
    t.self = self_.get() + at;
    t.entry_score = entry_score_.get() + slot * capacity_;
    t.entry_error = entry_error_.get() + slot * capacity_;
    t.entry_index = entry_index_.get() + slot * capacity_;
    t.scratch = w.sums.get();
    t.owner = &w;
    t.make_room = [](void* owner, int64_t i) {
      auto* worker = static_cast<Worker*>(owner);
      worker->search->make_room(worker->first_slot + i, *worker);
    };
    t.stop = &kGoOn;
    return t;
  }

  // Float32 scores of the panels within reach of some query of a block; nearest panels first. The
  // first blocks show whether that pays: where it does not, leave_out_ ends and the other blocks
  // are left to score().
  void score_in_reach(int64_t first, int64_t count, int64_t queries) {
    pack_database(float_, first, count);
    const int64_t blocks = ceil_div(queries, block_);
    const int64_t trial = tried_ ? 0 : std::min(blocks, kTrialBlocks);
    if (trial > 0) {
      std::atomic<int64_t> visits{0};
      parallel_tasks(trial, [&](int64_t i, Worker& w) {
        visits += score_block_in_reach(first, count, i * blocks / trial, queries, w);
      });
      const int64_t all = trial * ceil_div(block_, kReachQueriesAtOnce) * count;
      const double limit = bf16_.tile == nullptr ? kReachShare : kReachShareBf16;
      tried_ = true;
      if (static_cast<double>(visits) > limit * static_cast<double>(all)) {
        leave_out_ = false;
        order_given_up.add();
        for (int64_t i = 0; bf16_.tile != nullptr && i < blocks; ++i) {
          stop_[i] = visits_[i] == count;
        }
        return;
      }
      in_order.add();
    }
    parallel_tasks(blocks, [&](int64_t block, Worker& w) {
      if (visits_[block] < count) score_block_in_reach(first, count, block, queries, w);
    });
  }

  int64_t score_block_in_reach(int64_t first, int64_t count, int64_t block, int64_t queries,
                               Worker& w) {
    const int64_t end = std::min(queries, (block + 1) * block_);
    int64_t visits = 0;
    w.task = block;
    if (float_.depth > kKnnDepth && w.sums.get() == nullptr) {
      w.sums = Buffer<float>(block_ * columns_);
    }
    for (int64_t at = block * block_; at < end; at += kReachQueriesAtOnce) {
      const int64_t here = std::min(kReachQueriesAtOnce, end - at);
      visits += score_queries_in_reach(first, count, at, ceil_div(here, rows_at_once_), w);
    }
    visits_[block] = count;
    return visits;
  }

  // One segment: the slot of a query is its place in the span.
  int64_t score_queries_in_reach(int64_t first, int64_t count, int64_t at, int64_t groups,
                                 Worker& w) {
    const Scorer& s = float_;
    const int64_t queries = groups * rows_at_once_;
    const int64_t centres = ceil_div(count, columns_);
    if (w.products.get() == nullptr) {
      w.products = Buffer<float>(kReachQueriesAtOnce * ceil_div(chunk_, columns_) * columns_);
      w.best = Buffer<float>(ceil_div(chunk_, columns_) * columns_);
      w.tau = Buffer<float>(kReachQueriesAtOnce);
      w.cut = Buffer<float>(kReachQueriesAtOnce);
    }
    w.first_slot = at;
    s.tile->products(s.query.get() + at * s.depth, groups, s.centres.get(), centres, s.depth,
                     w.products.get());
    const KnnReachTask reach{
        queries,     centres,    w.products.get(), s.centre_half.get(), s.centre_radius.get(),
        w.tau.get(), w.cut.get()};
    for (int64_t i = 0; i < queries; ++i) {
      w.tau[i] = 0.0f;
      w.cut[i] = lower_[at + i] < kNever ? static_cast<float>(0.5 * square_of(at + i)) : kMaxFloat;
    }
    s.tile->reach(reach, w.best.get());
    w.visits.resize(count);
    std::iota(w.visits.begin(), w.visits.end(), 0);
    std::sort(w.visits.begin(), w.visits.end(), [&](int32_t a, int32_t b) {
      return w.best[a] > w.best[b] || (w.best[a] == w.best[b] && a < b);
    });
    KnnTileTask t = tile_task(s, first, 0, at, at, groups, w);
    int64_t visits = 0;
    // As many panels as fill the lists; then four times as many each time, of those still in reach.
    for (int64_t round = ceil_div(capacity_, columns_);; round *= 4) {
      t.visits = w.visits.data();
      t.begin = 0;
      t.end = std::min<int64_t>(round, w.visits.size());
      visits += s.tile->run(t);
      w.visits.erase(w.visits.begin(), w.visits.begin() + t.end);
      if (w.visits.empty()) return visits;
      for (int64_t i = 0; i < queries; ++i) {
        if (count_[at + i] >= k_) cut_by_bound(at + i, w);
        look_for(at + i, &w.tau[i], &w.cut[i]);
      }
      s.tile->reach(reach, w.best.get());
      w.visits.erase(std::remove_if(w.visits.begin(), w.visits.end(),
                                    [&](int32_t panel) { return w.best[panel] < 0.0f; }),
                     w.visits.end());
      if (w.visits.empty()) return visits;
    }
  }

  // |q|^2 of a packed query; 0 where it has no scores.
  double square_of(int64_t i) const {
    const KnnRelation& r = relation_[i];
    return r.beta > 0.0 ? 2.0 * r.alpha / r.beta : 0.0;
  }

  // What reach() computes is off by at most product |q||m| of score_error, and a few roundings of
  // terms of the size of |q|^2, tau^2, |m|^2 and radius^2: at most this times their sum. The panel
  // pays for its terms and the query for its own, so that no far row costs the others.
  double reach_error() const {
    return 0.5 * score_error(knn_tile_chain(float_.depth, 1)).product + 16.0 * kFloatUnit;
  }

  // tau and cut of KnnReachTask for a query: rows of true scores >= lower lie within tau,
  //   |q - c|^2 = |q|^2 - 2 <q, c> + |c|^2 <= |q|^2 - 2 lower,
  // and no row is farther away than |q| + the largest |c|.
  void look_for(int64_t i, float* tau, float* cut) const {
    const double lower = lower_[i], square = square_of(i);
    const double reach = square - 2.0 * lower + 1e-14 * (square + 2.0 * fabs(lower));
    const double farthest = sqrt(square) + frame_.max_norm;
    const double within = std::min(sqrt(std::max(0.0, reach)), farthest);
    *tau = round_up((1.0 + 1e-6) * within);
    const double error = reach_error() * (square + within * within) + relation_[i].slack;
    *cut = nextafterf(static_cast<float>(lower - error), -INFINITY);
  }

  // A row of the result of query i has at least this true score: k rows reach `bound`.
  double lowest(int64_t i, float bound) const {
    return relation_[i].lowest_score(relation_[i].distance_of(bound));
  }

  // Drops what the error bound excludes.
  void cut_by_bound(int64_t slot, Worker& w) {
    float* score = entry_score_.get() + slot * capacity_;
    float* error = entry_error_.get() + slot * capacity_;
    const int64_t n = count_[slot];
    w.order.resize(capacity_);
    const float bound = list_ops_.kth(score, error, n, k_, w.order.data());
    raise(slot, std::max(lower_[slot], lowest(query_of(slot), bound)));
    count_[slot] =
        list_ops_.keep(score, error, entry_index_.get() + slot * capacity_, n, limit_[slot]);
  }

  // Drops all but the k best by float64 distance, and notes what that says of their scores.
  void cut_by_distance(int64_t slot, Worker& w) {
    const int64_t count = count_[slot];
    const int64_t i = query_of(slot);
    const int64_t base = slot * capacity_;
    const KnnRelation& relation = relation_[i];
    w.near.resize(count);
    measure_rows(&entry_index_[base], count, load_query(query_row(first_query_ + i), w), w,
                 w.near.data());
    std::nth_element(w.near.begin(), w.near.begin() + (k_ - 1), w.near.end());
    const float kth = key_distance(w.near[k_ - 1].key);
    for (int64_t e = 0; e < k_; ++e) {
      const float d = key_distance(w.near[e].key);
      const double score = relation.score_of(d);
      entry_index_[base + e] = w.near[e].index;
      entry_score_[base + e] = static_cast<float>(score);
      entry_error_[base + e] =
          fabs(d) < 3.4e38 ? knn_coefficient(relation.error_of_score(d) + fabs(score) * kFloatUnit)
                           : kMaxFloat;
    }
    raise(slot, std::max(lower_[slot], relation.lowest_score(kth)));
    count_[slot] = k_;
    measured_[w.task] += count;
    if (!stop_[w.task] && measured_[w.task] > block_ * rows_ / segments_ / kBf16Patience) {
      stop_[w.task] = true;
      given_up.add();
    }
  }

  void make_room(int64_t slot, Worker& w) {
    cut_by_bound(slot, w);
    // Less than a quarter freed: near-ties. Float64 decides them, or the list would soon be full.
    if (4 * (capacity_ - count_[slot]) < capacity_ - k_) cut_by_distance(slot, w);
  }

  void finish(int64_t i, int64_t q, Worker& w, float* distance, int64_t* index) {
    w.score.clear();
    w.error.clear();
    w.index.clear();
    double lower = -INFINITY;
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t slot = slot_of(i, s);
      const int64_t begin = slot * capacity_, end = begin + count_[slot];
      w.score.insert(w.score.end(), &entry_score_[begin], &entry_score_[end]);
      w.error.insert(w.error.end(), &entry_error_[begin], &entry_error_[end]);
      w.index.insert(w.index.end(), &entry_index_[begin], &entry_index_[end]);
      lower = std::max(lower, lower_[slot]);
    }
    auto n = static_cast<int64_t>(w.index.size());
    if (n < k_) {  // no scores for this query, or fewer than k finite rows
      Smallest best(k_);
      scan(q, 0, rows_, w, best);
      write(best.sorted(), distance, index);
      return;
    }
    w.order.resize(n);
    const float bound = list_ops_.kth(w.score.data(), w.error.data(), n, k_, w.order.data());
    lower = std::max(lower, lowest(i, bound));
    n = list_ops_.keep(w.score.data(), w.error.data(), w.index.data(), n, knn_limit(lower));
    w.near.resize(n);
    measure_rows(w.index.data(), n, load_query(q, w), w, w.near.data());
    if (n > 2 * k_) {
      std::nth_element(w.near.begin(), w.near.begin() + (k_ - 1), w.near.end());
      w.near.resize(k_);
    }
    sort_neighbours(w.near, w.scratch);
    write(w.near, distance, index);
  }

  const T* query_;     // [Q, D]
  const T* database_;  // [M, D]
  int64_t queries_, rows_, dim_, k_;
  KnnMetric metric_;
  bool exclude_self_, exact_;
  KnnSums<Value> sums_;
  KnnRowOps<Value> row_ops_;
  KnnListOps list_ops_;
  KnnScan scan_;
  Scorer float_, bf16_;  // bf16_ without a tile: not used
  KnnError error_{};

  std::vector<double> mean_, zero_;
  KnnFrame frame_{};

  int64_t rows_at_once_ = 0, columns_ = 0;  // of a tile
  int64_t panels_ = 0, chunk_ = 0;          // of the database; per packed chunk
  int64_t block_ = 0, span_ = 0;            // queries per task; per round
  int64_t segments_ = 1, capacity_ = 0;     // database parts per query; list entries
  int64_t first_query_ = 0;
  std::vector<int32_t> row_of_, query_of_position_;  // the order; empty: as they come
  bool leave_out_ = false, tried_ = false;           // panels out of reach; whether it has paid
  Buffer<KnnRelation> relation_;                     // [span]
  Buffer<int64_t> self_;                             // [span]
  Buffer<double> lower_;                             // [slots]: of the true scores of the result
  Buffer<float> limit_;                              // [slots]: the same, rounded down
  Buffer<int64_t> count_, entry_index_;              // [slots], [slots][capacity]
  Buffer<float> entry_score_, entry_error_;          // [slots][capacity]
  std::vector<int64_t> visits_, measured_;           // [tasks]: panels scored; rows measured
  Buffer<bool> stop_;                                // [tasks]: no more bf16
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
