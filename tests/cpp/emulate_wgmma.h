// The instructions of common/wgmma.cuh on the CPU. Include before it, after emulate_mma.h. What
// the hardware leaves undefined ends the test with a message, or gives wrong numbers:
//   * a copy lands, and a product reads its operands, as early or as late as it may
//     (copies_are_late): early copies go with late products, late copies with early products;
//   * an accumulator of a product that was not waited for holds kInFlight;
//   * products without a fence, barriers with more arrivals than they count, misaligned copies and
//     unknown descriptors abort, as does a block that ends with copies or products in flight;
//   * a wait for what never comes (bytes that do not add up, a wrong phase) ends in the report of
//     run_fibers.
#pragma once

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "emulate_mma.h"

namespace emulated {

[[noreturn]] inline void misuse(const char* what) {
  std::fprintf(stderr, "emulated thread %u of block %u: %s\n", threadIdx.x, blockIdx.x, what);
  std::abort();
}
inline void require(bool holds, const char* what) {
  if (!holds) misuse(what);
}

// ---- addresses in shared memory ----

// The first byte has the worst address that 16 bytes of alignment allow, and is not 0.
constexpr unsigned kSharedBase = 1024 + 16;

inline unsigned char* shared_pointer(unsigned address) {
  require(address >= kSharedBase && address - kSharedBase < block->bytes,
          "an address outside of dynamic shared memory");
  return block->shared.get() + (address - kSharedBase);
}

// ---- barriers and bulk copies ----

struct BulkCopy {
  void* to;
  const void* from;
  unsigned bytes;
};

struct Mbarrier {
  explicit Mbarrier(unsigned arrivals) : count(arrivals), missing(arrivals) {}

  unsigned count, missing;  // arrivals of a phase, and those that did not come yet
  int64_t bytes = 0;        // announced and not copied; below 0 if copied and not announced
  unsigned phase = 0;       // that is not over
  unsigned events = 0;      // changes with everything that happens to the barrier
  bool fenced = false;      // whether copies see it
  std::vector<BulkCopy> copies;

  void happened() {
    if (missing == 0 && bytes == 0) {
      ++phase;
      missing = count;
    }
    ++events;
  }
  void land() {
    for (const BulkCopy& copy : copies) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      bytes -= copy.bytes;
    }
    if (copies.empty()) return;
    copies.clear();
    happened();
  }
};

inline std::map<const uint64_t*, Mbarrier> mbarriers;  // of the running block

inline Mbarrier& mbarrier(const uint64_t* barrier) {
  const auto found = mbarriers.find(barrier);
  require(found != mbarriers.end(), "a barrier that was not initialised");
  return found->second;
}

// ---- products ----

constexpr float kInFlight = 2.9e38f;  // large: fmaxf passes over a NaN
using Accumulator = std::array<float, 64>;

struct Product {
  float (*d)[64];
  uint64_t a, b;
  bool accumulate;
};

struct Products {  // of a thread
  unsigned long block = 0;
  std::vector<Product> open;                 // not in a group yet
  std::deque<std::vector<Product>> pending;  // groups, oldest first
  std::map<float (*)[64], Accumulator> flying;
  unsigned fences = 0;
  std::map<float (*)[64], unsigned> given_back;  // and how many fences there were before
};

inline Products& products_of(unsigned thread) {
  static Products of_thread[1024];
  return of_thread[thread];
}
inline Products& products() {
  Products& mine = products_of(threadIdx.x);
  if (mine.block != launch_number) mine = {launch_number, {}, {}, {}, 0, {}};
  return mine;
}

// 16 numbers of a row of an operand. PTX ISA, matrix descriptor, K-major, 64-byte swizzle.
inline void operand_row(uint64_t descriptor, int row, float (&values)[16]) {
  require(descriptor >> 62 == 2, "a descriptor with another swizzle than that of 64 bytes");
  require((descriptor >> 49 & 7) == 0, "a descriptor with a base offset");
  const auto start = static_cast<unsigned>(descriptor & 0x3FFF) << 4;
  const auto stride = static_cast<unsigned>(descriptor >> 32 & 0x3FFF) << 4;
  require(stride % 512 == 0 && (start & 0x1C0) == 0, "rows that do not begin a pattern");
  for (int k = 0; k < 16; ++k) {
    unsigned address = start + row / 8 * stride + row % 8 * 64 + 2 * k;
    address ^= (address >> 7 & 3) << 4;
    uint16_t bits;
    std::memcpy(&bits, shared_pointer(address), sizeof bits);
    values[k] = bf16_value(bits, 0);
  }
}

inline void multiply(const Product& p, Accumulator& d) {
  const int lane = static_cast<int>(threadIdx.x % 32),
            warp = static_cast<int>(threadIdx.x / 32 % 4);
  float a[2][16], b[32][16];
  for (int i = 0; i < 2; ++i) operand_row(p.a, 16 * warp + lane / 4 + 8 * i, a[i]);
  for (int j = 0; j < 32; ++j) operand_row(p.b, j / 2 * 8 + lane % 4 * 2 + j % 2, b[j]);
  for (int i = 0; i < 64; ++i) {
    double product[16];
    for (int k = 0; k < 16; ++k) {
      product[k] = static_cast<double>(a[i / 2 % 2][k]) * b[i / 4 * 2 + i % 2][k];
    }
    d[i] = add_block(p.accumulate ? d[i] : 0.0f, product);
  }
}

// Completes the oldest group.
inline void complete_group(Products& mine) {
  const std::vector<Product> group = std::move(mine.pending.front());
  mine.pending.pop_front();
  for (const Product& p : group) {
    if (!copies_are_late) multiply(p, mine.flying.at(p.d));
  }
  for (const Product& p : group) {
    const auto uses = [&p](const Product& other) { return other.d == p.d; };
    bool again = std::any_of(mine.open.begin(), mine.open.end(), uses);
    for (const auto& later : mine.pending) again |= std::any_of(later.begin(), later.end(), uses);
    const auto flying = mine.flying.find(p.d);
    if (again || flying == mine.flying.end()) continue;
    for (int i = 0; i < 64; ++i) {
      require((*p.d)[i] == kInFlight, "an accumulator was written while a product used it");
      (*p.d)[i] = flying->second[i];
    }
    mine.flying.erase(flying);
    mine.given_back[p.d] = mine.fences;
  }
}

// Whether a thread of the block has a product in flight that reads the bytes.
inline bool is_operand(unsigned address, unsigned bytes) {
  const auto reads = [=](const Product& p) {
    const auto overlaps = [=](uint64_t descriptor, unsigned rows) {
      const auto begin = static_cast<unsigned>(descriptor & 0x3FFF) / 4 * 64;  // of the first row
      return begin < address + bytes && address < begin + rows * 64;
    };
    return overlaps(p.a, 64) || overlaps(p.b, 128);
  };
  for (unsigned t = 0; t < 1024; ++t) {
    const Products& of_thread = products_of(t);
    if (of_thread.block != launch_number) continue;
    if (std::any_of(of_thread.open.begin(), of_thread.open.end(), reads)) return true;
    for (const auto& group : of_thread.pending) {
      if (std::any_of(group.begin(), group.end(), reads)) return true;
    }
  }
  return false;
}

// Nothing may be in flight when a block ends.
inline void check_asynchronous() {
  for (const auto& [address, barrier] : mbarriers) {
    require(barrier.copies.empty(), "the block ends before a copy was waited for");
  }
  mbarriers.clear();
  for (unsigned t = 0; t < 1024; ++t) {
    const Products& of_thread = products_of(t);
    require(
        of_thread.block != launch_number || (of_thread.open.empty() && of_thread.pending.empty()),
        "the block ends before a product was waited for");
  }
}
inline const bool checks_asynchronous = (at_end_of_launch.push_back(check_asynchronous), true);

}  // namespace emulated

namespace als {

inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(shared) -
                               emulated::block->shared.get()) +
         emulated::kSharedBase;
}

inline void barrier_init(uint64_t* barrier, unsigned arrivals) {
  emulated::require(shared_address(barrier) % 8 == 0, "a barrier that is not aligned");
  const bool fresh = emulated::mbarriers.emplace(barrier, arrivals).second;
  emulated::require(fresh, "a barrier is initialised twice");
}

inline void barrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  emulated::Mbarrier& b = emulated::mbarrier(barrier);
  emulated::require(b.missing > 0, "more arrivals than the barrier counts");
  --b.missing;
  b.bytes += bytes;
  b.happened();
}
// Others go on first: what this thread should have done before it arrived comes too late.
inline void barrier_arrive(uint64_t* barrier) {
  barrier_arrive_expect(barrier, 0);
  emulated::let_others_run();
}

// Never says no: it waits.
inline bool barrier_try_wait(uint64_t* barrier, unsigned parity) {
  emulated::Mbarrier& b = emulated::mbarrier(barrier);
  for (;;) {
    b.land();
    if ((b.phase & 1) != parity) return true;
    emulated::wait_for_change(b.events, b.events);
  }
}

inline void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  emulated::require(shared_address(shared) % 16 == 0 && bytes % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(global) % 16 == 0,
                    "a bulk copy that is not aligned to 16 bytes");
  emulated::shared_pointer(shared_address(shared) + bytes - 1);
  emulated::require(!emulated::is_operand(shared_address(shared), bytes),
                    "a copy into an operand of a product that was not waited for");
  emulated::Mbarrier& b = emulated::mbarrier(barrier);
  emulated::require(b.fenced, "no fence_async between a barrier's initialisation and a copy");
  b.copies.push_back({shared, global, bytes});
  if (emulated::copies_are_late) {
    ++b.events;  // whoever waits makes it land
  } else {
    b.land();
  }
}

inline void fence_async() {
  for (auto& barrier : emulated::mbarriers) barrier.second.fenced = true;
}
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline void wgmma_fence() { ++emulated::products().fences; }

inline void wgmma_commit() {
  emulated::Products& mine = emulated::products();
  mine.pending.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int kPending>
void wgmma_wait() {
  emulated::Products& mine = emulated::products();
  while (mine.pending.size() > kPending) emulated::complete_group(mine);
  emulated::exchange(0);  // a warp waits as one
}

inline void wgmma_done(float (&d)[64]) {
  emulated::require(!emulated::products().flying.count(&d),
                    "an accumulator taken for done whose products are in flight");
}

inline void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  struct Operands {
    uint64_t a, b;
    bool accumulate;
  };
  const auto lanes = emulated::exchange(Operands{a, b, accumulate});
  emulated::require(lanes[0].a == a && lanes[0].b == b && lanes[0].accumulate == accumulate,
                    "lanes with different operands");
  emulated::Products& mine = emulated::products();
  const emulated::Product product{&d, a, b, accumulate};
  auto flying = mine.flying.find(&d);
  if (flying == mine.flying.end()) {
    emulated::require(mine.fences > mine.given_back[&d],
                      "no fence since the accumulator was given back");
    flying = mine.flying.emplace(&d, emulated::Accumulator{}).first;
    std::copy(d, d + 64, flying->second.begin());
    std::fill(d, d + 64, emulated::kInFlight);
  }
  if (emulated::copies_are_late) emulated::multiply(product, flying->second);
  mine.open.push_back(product);
}

}  // namespace als
