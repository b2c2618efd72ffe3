"""Wheel builder: compiles csrc/ (see csrc/sources.txt) into als_ext._C and, with CUDA, _cuda.

Environment: ALS_CUDA=0|1|auto (default auto), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CFLAGS.
"""

import os
import shutil
import sys
from pathlib import Path
from runpy import run_path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # LibTorch stable ABI of torch 2.11: loads on 2.11 and later


def find_cuda_home():
    """The toolkit's folder; an nvcc on PATH may be a wrapper script outside it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parents[1]] if nvcc else []
    candidates += ["/usr/local/cuda", "/opt/cuda"]
    for home in filter(None, candidates):
        if (Path(home) / "include" / "cuda_runtime.h").exists() and shutil.which(
            "nvcc", path=str(Path(home) / "bin")
        ):
            return str(home)
    return None


def want_cuda(cuda_home, torch_cuda):
    mode = os.environ.get("ALS_CUDA", "auto").lower()
    if mode not in {"0", "1", "auto"}:
        sys.exit(f"ALS_CUDA: expected 0, 1 or auto, got {mode!r}")
    if mode == "1" and (cuda_home is None or torch_cuda is None):
        sys.exit(
            f"ALS_CUDA=1 needs a CUDA toolkit (found: {cuda_home}) and a CUDA build of torch "
            f"(torch.version.cuda: {torch_cuda}). Set CUDA_HOME to the toolkit's folder and run "
            "'pip install --no-build-isolation .' in an environment with a CUDA torch."
        )
    return mode != "0" and cuda_home is not None and torch_cuda is not None


cuda_home = find_cuda_home()
if cuda_home is not None:
    os.environ["CUDA_HOME"] = cuda_home  # read by torch.utils.cpp_extension at import

import pybind11  # noqa: E402
import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

lines = (ROOT / "csrc" / "sources.txt").read_text().split("\n")
sources = [f"csrc/{line}" for line in map(str.strip, lines) if line and not line.startswith("#")]
cuda_sources = [s for s in sources if s.endswith(("_cuda.cu", "module_cuda.cpp"))]
common = [
    "-O3",
    "-std=c++17",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
# Nobody reads errno or the floating-point flags; setting them as scalar code would keep loops with
# sqrt or comparisons from being vectorised.
host = [
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    f"-fmacro-prefix-map={ROOT}/=",
]


class Build(BuildExtension):
    """Hands the version of pyproject.toml and the digest of the sources to C++, and links only what
    the stable ABI needs."""

    def build_extensions(self):
        written = Path(self.build_temp).resolve() / "als_sources.h"
        digest = run_path(str(ROOT / "csrc" / "digest.py"))["digest"](ROOT)
        text = f'#define ALS_SOURCES "{digest}"\n'
        if not written.exists() or written.read_text() != text:
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(text)
        for ext in self.extensions:
            ext.include_dirs.append(str(written.parent))
            ext.define_macros.append(("ALS_VERSION", self.distribution.get_version()))
            ext.libraries = [
                x for x in ext.libraries if x not in {"torch_python", "c10", "c10_cuda"}
            ]
        super().build_extensions()


includes = [str(ROOT / "csrc"), pybind11.get_include()]
extensions = [
    CppExtension(
        "als_ext._C",
        [s for s in sources if s not in cuda_sources],
        include_dirs=list(includes),
        extra_compile_args={"cxx": common + host},
    )
]
if want_cuda(cuda_home, torch.version.cuda):
    # sm_80 code runs on every 8.x device, its PTX on newer ones; 9.0a is Hopper with instructions
    # of its own, which 9.0 does not have.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    extensions.append(
        CUDAExtension(
            "als_ext._cuda",
            cuda_sources,
            include_dirs=list(includes),
            extra_compile_args={
                "cxx": [*common, *host, "-DUSE_CUDA"],
                "nvcc": [
                    *common,
                    "-DUSE_CUDA",
                    "--expt-relaxed-constexpr",
                    "-lineinfo",
                    *(f"-Xcompiler={flag}" for flag in host),
                ],
            },
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
