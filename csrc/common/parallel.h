// Threads of the CPU kernels: torch's own pool, so torch.set_num_threads holds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#if defined(ALS_STD_THREADS)
#include <algorithm>
#include <thread>
#include <vector>
#endif

namespace als {

// Calls body(begin, end) over [0, n) in parallel. The body must not throw: it runs behind a C
// boundary.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
#if defined(ALS_STD_THREADS)
  // For ThreadSanitizer, which does not see the barriers of an OpenMP runtime built without it.
  const int64_t parts = std::clamp<int64_t>(n / std::max<int64_t>(grain, 1), 1, 4);
  std::vector<std::thread> threads;
  for (int64_t p = 0; p < parts && n > 0; ++p) {
    threads.emplace_back([&body, n, p, parts] { body(n * p / parts, n * (p + 1) / parts); });
  }
  for (std::thread& thread : threads) thread.join();
#else
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
#endif
}

// Tasks 0, 1, ... go to whichever thread is free: body(task, scratch), with a scratch of each
// thread's own.
template <typename Make, typename Body>
void parallel_tasks(int64_t tasks, const Make& make_scratch, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(tasks, 1, [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, scratch);
  });
}

}  // namespace als
