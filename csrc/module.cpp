// als_ext._C: the CPU half of the extension. Tensors go through torch.ops.als_ext; this module
// holds the host-side functions that an operator schema cannot express.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <map>
#include <stdexcept>
#include <string>

#include "common/built_from.h"
#include "common/counters.h"
#include "common/cpu_level.h"
#include "common/huge_pages.h"

#define ALS_QUOTE_(x) #x
#define ALS_QUOTE(x) ALS_QUOTE_(x)

namespace {

std::map<std::string, bool> cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0}};
#else
  return {};
#endif
}

std::map<std::string, std::string> build_info() {
  return {{"version", ALS_QUOTE(ALS_VERSION)},
          {"compiler", __VERSION__},
          {"built_with_torch", TORCH_VERSION},
          {"sources", ALS_SOURCES}};
}

void set_cpu_level(const std::string& name) {
  static const std::map<std::string, als::CpuLevel> levels = {
      {"auto", als::CpuLevel::kAuto},
      {"baseline", als::CpuLevel::kBaseline},
      {"avx2", als::CpuLevel::kAvx2},
      {"avx512", als::CpuLevel::kAvx512},
      {"avx512_bf16", als::CpuLevel::kAvx512Bf16}};
  const auto level = levels.find(name);
  if (level == levels.end()) {
    throw std::invalid_argument(
        "level: expected 'auto', 'baseline', 'avx2', 'avx512' or 'avx512_bf16', got '" + name +
        "'");
  }
  als::forced_cpu_level() = level->second;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "als_ext: CPU kernels, operator schemas and host-side functions";
  m.def(
      "advise_huge_pages",
      [](uintptr_t data, size_t bytes) {
        als::advise_huge_pages(reinterpret_cast<void*>(data), bytes);
      },
      "Asks for huge pages behind large memory that has not been written yet.");
  m.def("build_info", &build_info,
        "Version, compiler, the torch whose headers were used, digest of the sources.");
  m.def("cpu_capability", &cpu_capability,
        "Instruction sets of this processor that kernels can use.");
  m.def(
      "counters",
      [] {
        std::map<std::string, int64_t> values;
        for (const auto& [name, counter] : als::Counter::all()) values[name] = counter->value();
        return values;
      },
      "Counts of events that results do not show, since the library was loaded.");
  m.def("set_cpu_level", &set_cpu_level,
        "Caps the instruction set of the CPU kernels, for tests: 'auto', 'baseline', 'avx2', "
        "'avx512' "
        "or 'avx512_bf16'.");
}
