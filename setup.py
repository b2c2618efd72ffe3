"""Wheel builder: compiles csrc/ (see csrc/sources.txt) into als_ext._C and, with CUDA, _cuda.

Environment: ALS_CUDA=0|1|auto (default auto), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CFLAGS.
"""

import os
import platform
import re
import shutil
import subprocess
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
        if cuda_headers(home) and shutil.which("nvcc", path=str(Path(home) / "bin")):
            return str(home)
    return None


def cuda_headers(home):
    """The folder of cuda_runtime.h; some distributions keep one for each target."""
    machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    folders = [Path(home) / "include", Path(home) / "targets" / f"{machine}-linux" / "include"]
    return next((str(f) for f in folders if (f / "cuda_runtime.h").exists()), None)


def toolkit_version(home):
    """As nvcc says, "13.0"."""
    nvcc = str(Path(home) / "bin" / "nvcc")
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    except OSError:  # of another machine
        return "unknown"
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else "unknown"


def want_cuda(cuda_home, torch_cuda):
    """Whether to compile the CUDA kernels; says why not, and fails if they were asked for."""
    mode = os.environ.get("ALS_CUDA", "auto").lower()
    if mode not in {"0", "1", "auto"}:
        sys.exit(f"ALS_CUDA: expected 0, 1 or auto, got {mode!r}")
    if mode == "0":
        return False
    version = None if cuda_home is None else toolkit_version(cuda_home)
    # torch refuses to compile with a toolkit of another major version.
    if version and torch_cuda and version.split(".")[0] == torch_cuda.split(".")[0]:
        return True
    toolkit = "none" if version is None else f"{version} in {cuda_home}"
    reason = (
        f"they need a CUDA toolkit (found: {toolkit}) and a torch built with the same major "
        f"version of CUDA (torch.version.cuda: {torch_cuda}). Set CUDA_HOME to the toolkit's "
        "folder and run 'pip install --no-build-isolation .' in an environment with that torch."
    )
    if mode == "1":
        sys.exit(f"ALS_CUDA=1: cannot compile the CUDA kernels: {reason}")
    print(f"als_ext: without CUDA kernels: {reason}", file=sys.stderr)
    return False


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
# Sums that are exact by promise forbid fused products. On x86-64 the sources see to that where
# they are compiled for FMA; elsewhere every target has it.
if platform.machine().lower() not in {"x86_64", "amd64"}:
    host.append("-ffp-contract=off")


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
            include_dirs=[*includes, cuda_headers(cuda_home)],
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
