"""Columns of numbers as base64, in the least bytes: what report.js reads back."""

from __future__ import annotations

import base64
from typing import Any

from numpy.typing import NDArray

_UNSIGNED = (("u1", 2**8), ("u2", 2**16), ("u4", 2**32))


def pack(values: NDArray[Any]) -> dict[str, str]:
    """Numbers as {"type": u1, u2, u4 or f4, "data": base64, little-endian}.

    Args:
        values: integers in [0, 2^32), or floats, which are kept as float32.

    Raises:
        ValueError: an integer out of range.

    Example:
        >>> import numpy as np
        >>> pack(np.array([1, 2]))
        {'type': 'u1', 'data': 'AQI='}
    """
    kind = "f4"
    if values.dtype.kind != "f":
        least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
        fits = [name for name, limit in _UNSIGNED if least >= 0 and most < limit]
        if not fits:
            raise ValueError(f"values: expected integers in [0, 2^32), got {least} to {most}")
        kind = fits[0]
    data = values.astype(f"<{kind}").tobytes()
    return {"type": kind, "data": base64.b64encode(data).decode("ascii")}
