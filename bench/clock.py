"""How long a call takes on a GPU: device time by CUDA events, and wall time of the Python call.

Both start from an L2 cache that holds nothing of the call: a buffer of twice its size is read
before every call, so that a peer that runs second does not find its inputs there. Read, not
written: a cache full of written lines would make the call pay for writing them back.

Device time must not contain gaps in which the device waits for the host to launch. So the device
is kept busy while the host enqueues the call, and it is seen whether that was long enough: if the
call had begun on the device before the host had enqueued all of it, the time does not count, and
the next try keeps the device busy for longer. A call that waits for the device inside (``.item()``,
more launches than a queue holds) is never enqueued ahead; it is named in ``waits``, and its time
holds such gaps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

FIRST_S, LONGER, MOST_S = 1e-3, 4.0, 0.1  # the device is kept busy: at first, factor, at most
CYCLES_A_SECOND = 2_000_000_000  # no GPU's clock is faster by much
LEAST_FLUSH = 64 << 20


class CudaClock:
    """Times calls on the current device.

    Args:
        cuda: ``torch.cuda``, or what stands for it in a test.
        flush: empties the L2 cache; made for the device by default.
    """

    def __init__(self, cuda: Any = torch.cuda, flush: Callable[[], Any] | None = None) -> None:
        self.cuda = cuda
        self.flush = flush or self._flush()
        self.busy_s: dict[int, float] = {}  # by the identity of the call
        self.waits: set[int] = set()  # calls that wait for the device

    def _flush(self) -> Callable[[], Any]:
        size = max(LEAST_FLUSH, 2 * self.cuda.get_device_properties().L2_cache_size)
        return torch.zeros(size // 4, device="cuda").amax

    def device_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds between an event before the first kernel of a call and one behind the last."""
        while True:
            busy = self.busy_s.get(id(call), FIRST_S)
            seconds, ahead = self._between_events(call, busy)
            if ahead or id(call) in self.waits:
                return seconds
            if busy >= MOST_S:
                self.waits.add(id(call))
            self.busy_s[id(call)] = FIRST_S if busy >= MOST_S else min(MOST_S, LONGER * busy)

    def _between_events(self, call: Callable[[], Any], busy: float) -> tuple[float, bool]:
        """Seconds, and whether the whole call was enqueued before it began on the device."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        self.cuda._sleep(int(busy * CYCLES_A_SECOND))
        start.record()
        call()
        end.record()
        ahead = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, ahead

    def wall_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds until a call has returned and the device is done."""
        self.flush()
        self.cuda.synchronize()
        begun = time.perf_counter()
        call()
        self.cuda.synchronize()
        return time.perf_counter() - begun
