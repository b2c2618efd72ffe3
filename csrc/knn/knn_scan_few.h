// Few queries: a scan of the rows as they lie beats packing the database.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "knn/knn_buffers.h"
#include "knn/knn_measure.h"
#include "knn/knn_scan.h"
#include "knn/knn_smallest.h"

namespace als {

// In float64, or in float32 where differences are all that is wanted: these choose the rows that
// float64 measures.
template <typename T>
class KnnScanFew {
  static constexpr int64_t kQueries = 8;
  static constexpr int64_t kQuickQueries = 48;
  static constexpr int64_t kQuickFeatures = 32;  // below, rows of whole vectors only
  static constexpr int64_t kEntries = 1 << 18;   // 4 MiB of lists a thread
  static constexpr int64_t kRows = 64;           // scanned at a time
  using Scratch = typename KnnMeasure<T>::Scratch;

 public:
  explicit KnnScanFew(const KnnMeasure<T>& measure)
      : measure_(measure), in_(measure.in), scan_(knn_scan(cpu_level())) {}

  bool beats_packing() const {
    return in_.queries <= (quick() ? kQuickQueries : kQueries) &&
           in_.queries * KnnSmallest::entries(in_.k) <= kEntries;
  }

  void run(float* distance, int64_t* index) const {
    const int64_t part = std::clamp<int64_t>(ceil_div(in_.rows, 64), 512, 16384);
    std::vector<KnnSmallest> best(in_.queries, KnnSmallest(in_.k));
    std::mutex merging;
    std::atomic<int64_t> next{0};
    const int64_t parts = ceil_div(in_.rows, part);
    // Each thread keeps its own best of the parts it gets: which parts, does not show in the end.
    parallel_for(parts, 1, [&](int64_t, int64_t) {
      Scratch w = measure_.scratch();
      std::vector<KnnSmallest> own;
      for (int64_t p; (p = next.fetch_add(1)) < parts;) {
        own.resize(in_.queries, KnnSmallest(in_.k));
        scan_part(p * part, std::min((p + 1) * part, in_.rows), w, own);
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t q = 0; q < own.size(); ++q) {
        for (const Neighbour& n : own[q].sorted()) best[q].offer(n);
      }
    });
    for (int64_t q = 0; q < in_.queries; ++q) {
      write_neighbours(best[q].sorted(), in_.k, distance + q * in_.k, index + q * in_.k);
    }
  }

 private:
  bool quick() const {
    return std::is_same_v<T, float> && in_.metric == KnnMetric::kL2 &&
           (in_.dim >= kQuickFeatures || in_.dim == 8 || in_.dim == 16);
  }

  void scan_part(int64_t begin, int64_t end, Scratch& w, std::vector<KnnSmallest>& best) const {
    if (quick()) {
      for (int64_t q = 0; q < in_.queries; q += kKnnScanQueries) {
        scan_quickly(q, begin, end, w, &best[q]);
      }
    } else {
      for (int64_t q = 0; q < in_.queries; ++q) measure_.scan(q, begin, end, w, best[q]);
    }
  }

  // Rows [begin, end) for kKnnScanQueries queries from `first` on.
  void scan_quickly(int64_t first, int64_t begin, int64_t end, Scratch& w,
                    KnnSmallest* best) const {
    if constexpr (std::is_same_v<T, float>) {
      const int64_t count = std::min<int64_t>(kKnnScanQueries, in_.queries - first);
      std::vector<float> queries(kKnnScanQueries * in_.dim, 0.0f);
      std::copy_n(in_.query + first * in_.dim, count * in_.dim, queries.data());
      float d[kRows * kKnnScanQueries];
      for (int64_t row = begin; row < end; row += kRows) {
        const int64_t n = std::min(kRows, end - row);
        scan_(queries.data(), in_.database + row * in_.dim, n, in_.dim, d);
        offer_rows(first, count, row, n, d, w, best);
      }
    }
  }

  // Measures and offers the rows row, ..., row + n - 1 whose float32 distances d are small enough.
  void offer_rows(int64_t first, int64_t count, int64_t row, int64_t n, const float* d, Scratch& w,
                  KnnSmallest* best) const {
    float limit[kKnnScanQueries] = {};
    int32_t any[kKnnScanQueries] = {};
    for (int64_t i = 0; i < count; ++i) limit[i] = knn_scan_limit(best[i].largest(), in_.dim);
    for (int64_t r = 0; r < n; ++r) {
      for (int i = 0; i < kKnnScanQueries; ++i) {
        any[i] |= !(d[r * kKnnScanQueries + i] > limit[i]);
      }
    }
    int64_t rows[kRows];
    Neighbour near[kRows];
    for (int64_t i = 0; i < count; ++i) {
      if (!any[i]) continue;
      const int64_t self = in_.self_of(first + i);
      int64_t chosen = 0;
      for (int64_t r = 0; r < n; ++r) {
        rows[chosen] = row + r;
        chosen += !(d[r * kKnnScanQueries + i] > limit[i]) && row + r != self;
      }
      measure_.measure_rows(rows, chosen, measure_.load_query(first + i, w), w, near);
      for (int64_t r = 0; r < chosen; ++r) best[i].offer(near[r]);
    }
  }

  const KnnMeasure<T>& measure_;
  const KnnInput<T>& in_;
  const KnnScan scan_;
};

}  // namespace als
