// The CPU loss kernels, which sample_loss and weighted_loss share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "sample_loss/sample_loss.h"

namespace als {

// Runs a job on torch's threads, with the widest vectors of this processor. Rows are independent:
// the result does not depend on the number of threads.
template <typename scalar_t, typename grad_t>
void run_loss_job(const LossJob<scalar_t, grad_t>& job);

// Where the templates of sample_loss.h and weighted_loss.h run. Names the first class outside [0,
// C).
class CpuLosses {
 public:
  using BFloat16 = torch::headeronly::BFloat16;
  using Half = torch::headeronly::Half;

  explicit CpuLosses(const LossArguments& a) {
    if (a.target.scalar_type() != ScalarType::Long) return;
    const int64_t* index = a.target.const_data_ptr<int64_t>();
    const int64_t classes = a.logits.size(1);
    for (int64_t i = 0; i < a.target.size(0); ++i) {
      ALS_CHECK(fate_of(index[i], classes, a.ignore_index) != RowFate::kInvalid,
                "target: expected values in [0, ", classes, ") or ignore_index=", a.ignore_index,
                ", got ", index[i], " at position ", i);
    }
  }
  template <typename scalar_t, typename grad_t>
  void run(const LossJob<scalar_t, grad_t>& job) const {
    run_loss_job(job);
  }
};

}  // namespace als
