// Huge pages for large fresh memory. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace als {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugePagesFrom = 2 * kHugePage;  // bytes; below, malloc mostly reuses what it has

// Asks the kernel to back the inside of a large buffer that has not been written yet by huge pages.
// Fresh memory is handed out page by page at the first write, and 4096 bytes at a time that costs
// more than a softmax of what the page holds. A hint: no content changes, and where it is not known
// or not allowed nothing happens. torch does the same under THP_MEM_ALLOC_ENABLE=1.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePagesFrom) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace als
