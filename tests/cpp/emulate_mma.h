// The instructions of common/mma.cuh on the CPU, lane by lane. Include before it, after
// emulate_cuda.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <set>
#include <vector>

#include "emulate_cuda.h"

namespace emulated {

// When an asynchronous copy happens: as soon or as late as the hardware may. The first shows a
// stage that is overwritten while others read it, the second one that is read before the wait.
inline bool copies_are_late = false;

struct Copy {
  void* to;
  const void* from;
};
struct Copies {
  unsigned long launch = 0;
  std::vector<Copy> open;                 // not in a group yet
  std::deque<std::vector<Copy>> pending;  // groups, oldest first
};

// Those of the running thread. A thread begins without any.
inline Copies& copies() {
  static std::vector<Copies> of_thread;
  if (of_thread.size() <= thread_number) of_thread.resize(thread_number + 1);
  Copies& mine = of_thread[thread_number];
  if (mine.launch != launch_number) mine = {launch_number, {}, {}};
  return mine;
}

// Where late copies of all threads have yet to land: two to one place have no order.
inline std::set<const void*>& landings() {
  static std::set<const void*> places;
  static unsigned long launch = 0;
  if (launch != launch_number) places.clear();
  launch = launch_number;
  return places;
}

inline float bf16_value(uint32_t word, int half) {
  const uint32_t bits = (half ? word >> 16 : word & 0xFFFFu) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float toward_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// sum + the products of a block, the way tensor cores were found to add: all terms aligned to the
// largest and cut off below its 24th bit, and the sum cut to float32. Without a guard bit, the
// worst of what was found (knn_math.h, tensor_error).
template <int kProducts>
float add_block(float sum, const double (&product)[kProducts]) {
  double largest = std::fabs(sum);
  for (double p : product) largest = std::max(largest, std::fabs(p));
  if (largest == 0.0) return 0.0f;
  const int last_bit = std::ilogb(largest) - 23;
  const double unit = std::ldexp(1.0, last_bit), units = std::ldexp(1.0, -last_bit);
  double total = std::trunc(sum * units);
  for (double p : product) total += std::trunc(p * units);
  return toward_zero(total * unit);
}

}  // namespace emulated

namespace als {

inline void copy16(void* shared, const void* global) {
  const auto places = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (places % 16 != 0) {
    std::fprintf(stderr, "emulated copy16: not aligned to 16 bytes\n");
    std::abort();
  }
  if (emulated::copies_are_late) {
    if (!emulated::landings().insert(shared).second) {
      std::fprintf(stderr, "emulated copy16: to where another copy is under way\n");
      std::abort();
    }
    emulated::copies().open.push_back({shared, global});
  } else {
    std::memcpy(shared, global, 16);
  }
}

inline void commit_copies() {
  emulated::Copies& copies = emulated::copies();
  copies.pending.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int kPending>
void wait_copies() {
  auto& pending = emulated::copies().pending;
  for (; pending.size() > kPending; pending.pop_front()) {
    for (const emulated::Copy& copy : pending.front()) {
      std::memcpy(copy.to, copy.from, 16);
      emulated::landings().erase(copy.to);
    }
  }
}

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  const auto rows = emulated::exchange(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const void* source = rows[8 * i + lane / 4];
    std::memcpy(&m[i], static_cast<const unsigned char*>(source) + 4 * (lane % 4), 4);
  }
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const auto lanes = emulated::exchange(Fragment{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  Fragment warp[32];
  for (unsigned l = 0; l < 32; ++l) warp[l] = lanes[l];
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k += 8) {
      double product[8];
      for (int l = 0; l < 8; ++l) {  // feature k + l: half l % 2 of a register of lane ... + l / 2
        const Fragment& left = warp[row % 8 * 4 + l / 2];
        const Fragment& right = warp[column * 4 + l / 2];
        product[l] = static_cast<double>(emulated::bf16_value(left.a[k / 8 * 2 + row / 8], l % 2)) *
                     emulated::bf16_value(right.b[k / 8], l % 2);
      }
      d[i] = emulated::add_block(d[i], product);
    }
  }
}

}  // namespace als
