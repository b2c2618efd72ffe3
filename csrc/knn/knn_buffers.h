// Memory of the kNN of the CPU. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "common/huge_pages.h"

namespace als {

// Uninitialised. On large pages where it is large: fewer of them to fault in and to look up.
template <typename V>
class KnnBuffer {
 public:
  KnnBuffer() = default;
  explicit KnnBuffer(int64_t size) {
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

inline float round_up(double x) { return nextafterf(static_cast<float>(x), INFINITY); }

}  // namespace als
