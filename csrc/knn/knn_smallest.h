// The k smallest of a stream of neighbours. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "knn/knn_math.h"

namespace als {

class KnnSmallest {
 public:
  explicit KnnSmallest(int64_t k) : k_(k), size_(entries(k)) { kept_.reserve(size_); }

  // Neighbours held for k, at most.
  static int64_t entries(int64_t k) { return 2 * k + 64; }

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

}  // namespace als
