// Whether knn on CUDA may read the database as it lies where queries or rows are few. For tests,
// which see the other path too. Torch-free.
#pragma once

#include <atomic>

namespace als {

inline std::atomic<bool>& knn_few_allowed() {
  static std::atomic<bool> allowed{true};
  return allowed;
}

}  // namespace als
