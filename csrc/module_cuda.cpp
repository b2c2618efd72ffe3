// als_ext._cuda: the CUDA half of the extension; importing it registers the CUDA kernels.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/built_from.h"
#include "common/small_inputs.h"
#include "common/staging.h"

namespace {

int64_t set_staging_bytes(int64_t bytes) {
  if (bytes < 1 || bytes > als::kStagingBytes) {
    throw std::invalid_argument("bytes: expected in [1, " + std::to_string(als::kStagingBytes) +
                                "], got " + std::to_string(bytes));
  }
  return als::staging_bytes().exchange(bytes);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "als_ext: CUDA kernels";
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("sources") = ALS_SOURCES;
  m.def(
      "set_staging_bytes", &set_staging_bytes,
      "Caps the buffers through which host memory reaches the device, for tests: then little data "
      "is several parts. Returns what it was.");
  m.def(
      "allow_small_input_paths",
      [](bool allowed) { return als::small_input_paths().exchange(allowed); },
      "Whether operations may take the ways that they have for small inputs, for tests. Returns "
      "what it was.");
}
