// The CPU loss kernels, which sample_loss and weighted_loss share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "sample_loss/loss_job.h"

namespace als {

// Runs a job on torch's threads, with the widest vectors of this processor. Rows are independent:
// the result does not depend on the number of threads.
template <typename scalar_t, typename grad_t>
void run_loss_job(const LossJob<scalar_t, grad_t>& job);

}  // namespace als
