"""Adaptive loss scaling and embedding-based label correction for PyTorch."""

from als_ext import ops
from als_ext._library import __version__, build_info

__all__ = ["__version__", "build_info", "ops"]
