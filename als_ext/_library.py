"""Loads the compiled libraries, once, and says what they can do."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from types import ModuleType

import torch

try:
    _C: ModuleType = importlib.import_module("als_ext._C")
except ModuleNotFoundError as error:
    if error.name != "als_ext._C":
        raise
    raise ImportError(
        "als_ext is imported from a folder without its compiled library als_ext._C. "
        "In a source checkout run 'pip install -e .', or import the installed package from "
        "another folder."
    ) from error

_cuda: ModuleType | None = None
_cuda_missing = "this build of als_ext holds no CUDA kernels"
if torch.version.cuda is None:
    _cuda_missing = f"torch {torch.__version__} is a CPU build"
else:
    try:
        _cuda = importlib.import_module("als_ext._cuda")
    except ModuleNotFoundError:
        pass  # a CPU build of als_ext: said by require_device when a CUDA tensor comes
    except ImportError as error:
        _cuda_missing = f"als_ext._cuda does not load: {error}"


def has_cuda_kernels() -> bool:
    """Whether CUDA kernels are registered (no GPU needed to know)."""
    return _cuda is not None


def require_device(tensor: torch.Tensor, name: str) -> None:
    """Raise a clear error where no kernel can run on the tensor's device."""
    kind = tensor.device.type
    if kind in {"cpu", "meta"} or (kind == "cuda" and _cuda is not None):
        return
    hint = (
        f": {_cuda_missing}. Build it with 'pip install --no-build-isolation .' where nvcc and "
        "a CUDA torch are"
        if kind == "cuda"
        else ""
    )
    expected = "cpu or cuda" if _cuda is not None else "cpu"
    raise ValueError(f"{name}: expected a tensor on {expected}, got device '{tensor.device}'{hint}")


def build_info() -> dict[str, object]:
    """Return what this installation is: versions, instruction sets, CUDA.

    Returns:
        dict with the keys ``version``, ``compiler``, ``built_with_torch``, ``sources`` (digest of
        what was compiled, "unknown" for a developer build), ``torch``, ``cpu`` (instruction set ->
        bool), ``cuda_kernels`` (bool), ``cuda_version`` (int as CUDART_VERSION, -1 without CUDA
        kernels), ``cuda_sources`` (as ``sources``, or None), ``cuda_missing`` (why there are no
        CUDA kernels, or None), ``threads``.

    Example:
        >>> import als_ext
        >>> als_ext.build_info()["version"] == als_ext.__version__
        True
    """
    info: dict[str, object] = dict(_C.build_info())
    info["torch"] = torch.__version__
    info["cpu"] = dict(_C.cpu_capability())
    info["cuda_kernels"] = has_cuda_kernels()
    info["cuda_version"] = -1 if _cuda is None else _cuda.cuda_version
    info["cuda_sources"] = None if _cuda is None else _cuda.sources
    info["cuda_missing"] = _cuda_missing if _cuda is None else None
    info["threads"] = torch.get_num_threads()
    return info


__version__ = version("als_ext")
