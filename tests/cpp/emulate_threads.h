// The threads of an emulated block: fibers of one real thread, so that a barrier costs no system's
// scheduler. Whoever can run runs as far as it gets, warp after warp, in alternating order: what
// needs a barrier and has none is then read too early or overwritten too late.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {

struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  const unsigned* cell;  // what it waits for: a change of *cell from `seen`; null: can run
  unsigned seen;
  bool done;
};

inline Fiber* running = nullptr;
inline ucontext_t scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline const std::function<void()>* body = nullptr;

// AddressSanitizer has to know on which stack it is.
inline void leave(void** fake, const void* stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, stack, size);
#else
  (void)fake, (void)stack, (void)size;
#endif
}
inline void arrive(void* fake, const void** stack, size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, stack, size);
#else
  (void)fake, (void)stack, (void)size;
#endif
}

// Called on a fiber: lets others run until *cell is no longer `seen`.
inline void wait_for_change(const unsigned& cell, unsigned seen) {
  if (cell != seen) return;
  Fiber& self = *running;
  self.cell = &cell;
  self.seen = seen;
  void* fake = nullptr;
  leave(&fake, scheduler_stack, scheduler_stack_size);
  swapcontext(&self.context, &scheduler);
  arrive(fake, nullptr, nullptr);
}

// Called on a fiber: lets all others run as far as they get. One sweep over the warps is not
// enough: the next one goes the other way.
inline unsigned sweeps = 0;
inline void let_others_run() {
  for (int i = 0; i < 2; ++i) wait_for_change(sweeps, sweeps);
}

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    const unsigned seen = generation_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++generation_;
    }
    wait_for_change(generation_, seen);
  }

 private:
  unsigned count_, arrived_ = 0, generation_ = 0;
};

inline void start_fiber() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  running->done = true;
  leave(nullptr, scheduler_stack, scheduler_stack_size);
  setcontext(&scheduler);
}

// Runs `thread` on `threads` fibers; enter(t) is called before the t-th one goes on.
inline void run_fibers(unsigned threads, const std::function<void()>& thread,
                       const std::function<void(unsigned)>& enter) {
  static std::vector<Fiber> fibers;
  if (fibers.size() < threads) fibers.resize(threads);
  body = &thread;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.stack) fiber.stack.reset(new unsigned char[Fiber::kStack]);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack.get(), Fiber::kStack);
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start_fiber, 0);
    fiber.context.uc_stack.ss_size = 0;  // else AddressSanitizer clears the stack at every switch
    fiber.cell = nullptr;
    fiber.done = false;
  }

  const auto run = [&](unsigned t) {  // whether it could
    Fiber& fiber = fibers[t];
    if (fiber.done || (fiber.cell != nullptr && *fiber.cell == fiber.seen)) return false;
    fiber.cell = nullptr;
    running = &fiber;
    enter(t);
    void* fake = nullptr;
    leave(&fake, fiber.stack.get(), Fiber::kStack);
    swapcontext(&scheduler, &fiber.context);
    arrive(fake, nullptr, nullptr);
    return true;
  };
  const unsigned warps = (threads + 31) / 32;
  bool progress = true;
  for (bool backward = false; progress; backward = !backward) {
    progress = false;
    ++sweeps;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = (backward ? warps - 1 - w : w) * 32;
      for (bool again = true; again;) {
        again = false;
        for (unsigned l = 0; l < 32 && first + l < threads; ++l) {
          again |= run(first + (backward ? 31 - l : l));
        }
        progress |= again;
      }
    }
  }
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].done) continue;
    std::fprintf(stderr, "emulated thread %u waits for others that do not come\n", t);
    std::abort();
  }
}

}  // namespace emulated
