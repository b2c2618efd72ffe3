"""Builds the extension in place, unless the libraries that are there fit: step of the GPU gate.

    python -m bench.gpu_build

Libraries that were built on another machine and carried here are used when they load, were made
from these sources (csrc/digest.py) and have code for this GPU.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib import metadata

from bench.gpu_parts import ROOT

# In a process of its own: a library that is loaded cannot be replaced by a fresh one.
LOAD = """
import sys
import torch, als_ext
from als_ext.ops import knn_vote
info, want = als_ext.build_info(), sys.argv[1]
print(info)
if not info["cuda_kernels"]:
    sys.exit(f"no CUDA kernels: {info['cuda_missing']}")
for key in ("sources", "cuda_sources"):
    if info[key] != want:
        sys.exit(f"{key} {info[key]}, those here are {want}")
label = torch.arange(3, device="cuda")  # raises where the library has no code for this GPU
winner = knn_vote(torch.zeros(3, 1, device="cuda"), label[:, None], label, 3)[0]
if winner.tolist() != [0, 1, 2]:
    sys.exit(f"a kernel gives {winner.tolist()}, expected [0, 1, 2]")
"""


def why_not() -> str | None:
    """Why the libraries that are here cannot be used, or None."""
    digest = runpy.run_path(str(ROOT / "csrc" / "digest.py"))["digest"](ROOT)
    words = [sys.executable, "-c", LOAD, digest]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit {done.returncode}"


def setup(*words: str) -> int:
    """Exit status of a command of setup.py."""
    command = [sys.executable, "setup.py", "-q", *words]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def has_metadata() -> bool:
    """Whether the package's version can be read: a copy of the sources alone holds none."""
    try:
        metadata.version("als_ext")
    except metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    """0: libraries that fit are there now."""
    if not has_metadata() and setup("egg_info") != 0:
        return 1
    reason = why_not()
    if reason is None:
        print("the libraries fit: nothing is built")
        return 0
    print(f"building, since what is here does not fit: {reason}", flush=True)
    if setup("build_ext", "--inplace") != 0:
        return 1
    reason = why_not()
    if reason is not None:
        print(f"after the build: {reason}")
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
