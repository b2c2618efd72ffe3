// als_ext._cuda: the CUDA half of the extension; importing it registers the CUDA kernels.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "common/built_from.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "als_ext: CUDA kernels";
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("sources") = ALS_SOURCES;
}
