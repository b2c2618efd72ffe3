// A database in pinned host memory, part by part on the device. Host code.
#pragma once

#include <algorithm>

#include "common/cuda.h"

namespace als {

// Copies parts in order into two buffers in turn, on a stream of its own: part i + 1 while part i
// is searched. Nothing waits for the device.
class KnnUpload {
 public:
  // Parts of `part` rows; `stream` is the one that searches, on the device of `query`.
  KnnUpload(const Tensor& database, const Tensor& query, int64_t part, cudaStream_t stream)
      : database_(database),
        part_(part),
        slots_{Slot(database, query, part), Slot(database, query, part)},
        search_(stream),
        device_(query.get_device_index()),
        copy_(stream, device_) {}

  // torch's copy, not CUDA's: it tells the allocator of pinned memory that the stream reads it, so
  // that a caller may drop the database as soon as the call returns.
  void start(int64_t i) {
    Slot& slot = slots_[i % 2];
    if (i >= 2) slot.searched.block(copy_.get());
    const int64_t first = i * part_, rows = std::min(part_, database_.size(0) - first);
    Tensor from = torch::stable::narrow(database_, 0, first, rows);
    Tensor to = torch::stable::narrow(slot.buffer, 0, 0, rows);
    {
      const CudaStreamScope scope(copy_.get(), device_);
      torch::stable::copy_(to, from, /*non_blocking=*/true);
    }
    slot.copied.record(copy_.get());
  }

  // Where part i is for what the search stream is given from now on, until done(i).
  const void* get(int64_t i) const {
    const Slot& slot = slots_[i % 2];
    slot.copied.block(search_);
    return slot.buffer.const_data_ptr();
  }
  void done(int64_t i) const { slots_[i % 2].searched.record(search_); }

 private:
  struct Slot {
    Slot(const Tensor& database, const Tensor& query, int64_t rows)
        : buffer(empty_on(query, {rows, database.size(1)}, database.scalar_type())) {}
    Tensor buffer;
    CudaEvent copied, searched;
  };

  Tensor database_;
  int64_t part_;
  Slot slots_[2];
  cudaStream_t search_;
  int32_t device_;
  CudaSideStream copy_;  // the last member: it ends before the buffers are freed
};

}  // namespace als
