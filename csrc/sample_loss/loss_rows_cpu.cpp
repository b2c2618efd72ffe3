#include "sample_loss/loss_rows_cpu.h"

#include "common/parallel.h"

namespace als {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
}  // namespace als

#include "sample_loss/loss_rows_isa.h"

namespace als {

constexpr int64_t kGrainElements = 16384;  // a thread's least share: about 10 us

template <typename scalar_t, typename grad_t>
void run_loss_job(const LossJob<scalar_t, grad_t>& job) {
  const CpuLevel level = cpu_level();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / job.classes);
  parallel_for(job.rows, grain,
               [&](int64_t begin, int64_t end) { loss_rows(job, begin, end, level); });
}

template void run_loss_job(const LossJob<float, float>&);
template void run_loss_job(const LossJob<double, double>&);
template void run_loss_job(const LossJob<BFloat16, BFloat16>&);
template void run_loss_job(const LossJob<Half, Half>&);
template void run_loss_job(const LossJob<Half, float>&);  // weighted_loss: see weighted_loss.h

}  // namespace als
