"""How long a call takes on a GPU: device time by CUDA events, and wall time of the Python call.

Both start from a cold L2 cache: a buffer twice its size is overwritten before every call, so that a
peer that runs second does not find its inputs there. Device time must not contain the gaps in which
the device waits for the host to launch: the device is kept busy for longer than the host needed to
enqueue the call the last time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

FIRST_S = 1e-3  # a call is taken to need this much of the host before it was seen
MOST_S = 0.1
CYCLES_A_SECOND = 2_000_000_000  # no GPU's clock is faster by much
LEAST_FLUSH = 64 << 20


class CudaClock:
    """Times calls on the current device.

    Args:
        cuda: ``torch.cuda``, or what stands for it in a test.
        flush: overwrites the L2 cache; made for the device by default.
    """

    def __init__(self, cuda: Any = torch.cuda, flush: Callable[[], Any] | None = None) -> None:
        self.cuda = cuda
        self.flush = flush or self._flush()
        self.host_s: dict[int, float] = {}  # by the identity of the call

    def _flush(self) -> Callable[[], Any]:
        size = max(LEAST_FLUSH, 2 * getattr(self.cuda.get_device_properties(), "L2_cache_size", 0))
        return torch.empty(size, dtype=torch.uint8, device="cuda").zero_

    def device_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds between an event before the first kernel of a call and one behind the last."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        hide = min(MOST_S, 1.5 * self.host_s.get(id(call), FIRST_S))
        self.flush()
        self.cuda._sleep(int(hide * CYCLES_A_SECOND))
        start.record()
        begun = time.perf_counter()
        call()
        self.host_s[id(call)] = time.perf_counter() - begun
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds until a call has returned and the device is done."""
        self.flush()
        self.cuda.synchronize()
        begun = time.perf_counter()
        call()
        self.cuda.synchronize()
        return time.perf_counter() - begun
