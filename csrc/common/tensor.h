// The stable-ABI names that operators use, and the checks that protect memory.
// User errors are raised in Python (ValueError/TypeError); what stands here is the second line of
// defence for callers of torch.ops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/huge_pages.h"

namespace als {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define ALS_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline void check_dim(const Tensor& t, int64_t dim, const char* name) {
  ALS_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  ALS_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype),
            ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline void check_size(const Tensor& t, int64_t dim, int64_t size, const char* name) {
  ALS_CHECK(t.size(dim) == size, name, ": expected size ", size, " in dimension ", dim, ", got ",
            t.size(dim));
}

inline void check_same_device(const Tensor& t, const Tensor& other, const char* name) {
  ALS_CHECK(t.device() == other.device(), name, ": expected the device of the first argument");
}

// The tensor itself where it is contiguous: a call of the dispatcher less.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// An uninitialised contiguous tensor on the device of `like`: straight from the allocator, which is
// several microseconds less than aten::new_empty through the dispatcher. A large one on the CPU
// asks for huge pages.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  Tensor result(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    advise_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  }
  return result;
}

}  // namespace als
