"""Where a measurement was made: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import als_ext
from bench.gpu_host import files_key
from bench.gpu_parts import ROOT

GPU_PACKAGES = ("triton", "nvidia-cutlass-dsl", "liger-kernel", "quack-kernels", "flashlib")
PACKAGES = ("torch", "numpy", "scikit-learn", "faiss-cpu", "cleanlab", "threadpoolctl")


def set_threads(count: int) -> None:
    """The same number of threads for torch, OpenMP, BLAS and faiss."""
    torch.set_num_threads(count)
    try:
        import faiss

        faiss.omp_set_num_threads(count)
    except ImportError:
        pass
    try:  # comes with scikit-learn; knows the libraries that are loaded, so import it first
        import sklearn.neighbors  # noqa: F401
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)
    except ImportError:
        pass


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_name() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(folder / name)) for name in ("level", "type", "size"))
        if size:
            letter = {"Data": "d", "Instruction": "i"}.get(kind or "", "")
            found[f"L{level}{letter}"] = size
    return found


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _huge_pages() -> str | None:
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return None if text is None else text[text.find("[") + 1 : text.find("]")]


def _versions() -> dict[str, str | None]:
    packages = PACKAGES + (GPU_PACKAGES if torch.cuda.is_available() else ())
    found = {"python": platform.python_version(), **{name: _version(name) for name in packages}}
    if torch.cuda.is_available():
        found["cuda of torch"] = torch.version.cuda
    return found


def _gpu() -> dict[str, Any]:
    about = torch.cuda.get_device_properties()
    return {
        "gpu": about.name,
        "gpu_memory_gib": round(about.total_memory / 2**30, 1),
        "gpu_l2_mib": round(getattr(about, "L2_cache_size", 0) / 2**20, 1),
        "gpu_multiprocessors": about.multi_processor_count,
        "gpu_capability": f"{about.major}.{about.minor}",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """Hash, and whether tracked files other than results and pages differ from it; and a digest of
    the files, from which the hash of a copy without git can be found (gpu_gate.sh --list)."""
    code = ("--untracked-files=no", "--", ".", ":!bench/results", ":!docs", ":!*.md")
    changed = _git("status", "--porcelain", *code)
    dirty = None if changed is None else bool(changed)
    return {"hash": _git("rev-parse", "HEAD"), "dirty": dirty, "files": files_key()}


def facts() -> dict[str, Any]:
    """All of it, for the head of a result."""
    where = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "transparent_huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        where |= _gpu()
    return {
        "machine": where,
        "versions": _versions(),
        "als_ext": als_ext.build_info(),
        "from_checkout": Path(als_ext.__file__).resolve().is_relative_to(ROOT),
        "commit": commit(),
    }
