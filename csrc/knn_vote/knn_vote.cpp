#include "knn_vote/knn_vote.h"

STABLE_TORCH_LIBRARY_FRAGMENT(als_ext, m) {
  m.def(
      "knn_vote(Tensor distance, Tensor index, Tensor label, int num_classes, int weighting, "
      "float temperature, int ignore_label) -> (Tensor winner, Tensor share, Tensor margin)");
}
