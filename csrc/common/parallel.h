// Threads of the CPU kernels: torch's own pool, so torch.set_num_threads holds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace als {

// Calls body(begin, end) over [0, n) in parallel. The body must not throw: it runs behind a C
// boundary.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace als
