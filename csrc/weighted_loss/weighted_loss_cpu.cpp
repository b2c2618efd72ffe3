#include "sample_loss/loss_rows_cpu.h"
#include "weighted_loss/weighted_loss.h"
#include "weighted_loss/weighted_loss_math.h"

namespace als {
namespace {

struct CpuWeightedLosses : CpuLosses {
  using CpuLosses::CpuLosses;

  template <typename T>
  void sum(const T* weight, const T* losses, T* total, int64_t totals, int64_t rows) const {
    for (int64_t i = 0; i < totals; ++i) {
      WeightedTotal all;
      all.add_all(weight + i * rows, losses + i * rows, rows);
      total[i] = static_cast<T>(all.sum());
    }
  }
};

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) {
  m.impl("weighted_loss", TORCH_BOX(&als::weighted_loss<als::CpuWeightedLosses>));
}
