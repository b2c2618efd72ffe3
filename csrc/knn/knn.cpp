#include "knn/knn.h"

STABLE_TORCH_LIBRARY_FRAGMENT(als_ext, m) {
  m.def(
      "knn(Tensor query, Tensor database, int k, int metric, bool exclude_self, bool exact) -> "
      "(Tensor distance, Tensor index)");
}
