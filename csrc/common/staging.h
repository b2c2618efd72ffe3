// The buffers through which host memory reaches a device. Torch-free.
#pragma once

#include <atomic>
#include <cstdint>

namespace als {

constexpr int64_t kStagingBytes = int64_t{24} << 20;  // of one of the two buffers

// Fewer where a test asks for them through als_ext._cuda.set_staging_bytes.
inline std::atomic<int64_t>& staging_bytes() {
  static std::atomic<int64_t> bytes{kStagingBytes};
  return bytes;
}

}  // namespace als
