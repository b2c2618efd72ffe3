"""Where the GPU gate runs: GPU and versions, code, tools. Needs neither als_ext nor a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.gpu_parts import ROOT

FACTS = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__}
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    found |= {"gpu": about.name, "capability": [about.major, about.minor],
              "memory_gib": round(about.total_memory / 2**30, 1), "cuda": torch.version.cuda}
print(json.dumps(found))
"""


def facts() -> dict[str, Any]:
    """GPU and versions, no matter what CPU is beside them.

    Asked of another process, so that this one holds no memory of the GPU.
    """
    done = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def code_key() -> str:
    """Commit, with a digest of what differs from it; without git that of the files."""

    def git(*words: str) -> bytes:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, check=True, timeout=60
        ).stdout

    try:
        changed = git("diff", "HEAD", "--", ".", ":!bench/results", ":!docs", ":!*.md")
        commit = git("rev-parse", "--short=8", "HEAD").decode().strip()
        return commit + (f"-{hashlib.sha256(changed).hexdigest()[:6]}" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"tree-{files_key()}"


def files_key() -> str:
    """A digest of the files that count: tells of which commit a copy without git is."""
    digest = hashlib.sha256()
    for folder in ("csrc", "als_ext", "bench", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".txt"}:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def architecture(capability: Sequence[int] | None) -> str | None:
    """TORCH_CUDA_ARCH_LIST for one GPU: only its own code is built. None: setup.py decides."""
    if capability is None:
        return None
    return {(8, 0): "8.0", (9, 0): "9.0a"}.get((capability[0], capability[1]))


def find_tool(name: str) -> str | None:
    """A program on the PATH or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [None, f"{home}/bin", f"{home}/compute-sanitizer"]
    return next(filter(None, (shutil.which(name, path=place) for place in places)), None)
