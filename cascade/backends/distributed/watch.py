"""Watches the exchanges of a plan on GPUs: says which one did not end in time, and who has not come to it.

The host does not wait for the exchanges that it launches, so no call of it fails where a rank is gone: the device
waits. A thread looks at the events behind them. Of one that takes too long it prints an error that names the rank, the
collective and who is missing, shortly before torch's own watchdog ends the process, which knows neither. What a
captured graph replays no host sees: replays are not watched. While another thread captures one, the driver refuses to
say what has ended, and spoils the capture; the thread tells it that it asks for no such thing.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARE = 0.8
"""Of the time that an exchange has, after which its error is printed: before torch ends the process."""

LOOK_S = 0.25
"""Between two looks at what has ended."""

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@dataclass(slots=True, eq=False)
class Watch:
    """What was launched and has not ended yet, and since when; `tell` gets what did not end in time, once."""

    timeout_s: float
    tell: Callable[[str], object] = field(default=lambda text: sys.stderr.write(f"{text}\n"))
    pending: deque[tuple[float, Any, Callable[[], str]]] = field(init=False, default_factory=deque)
    thread: threading.Thread | None = field(init=False, default=None)

    def add(self, event: Any, text: Callable[[], str]) -> None:
        """An exchange that has ended when an event has; `text` is called where it does not."""
        self.pending.append((time.monotonic(), event, text))
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="exchanges of a plan", daemon=True)
            self.thread.start()

    def _watch(self) -> None:
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))
        while self.look():
            time.sleep(LOOK_S)

    def look(self) -> bool:
        """Drops what has ended; False once something is told."""
        while self.pending and self.pending[0][1].query():
            self.pending.popleft()
        if not self.pending or time.monotonic() - self.pending[0][0] < SHARE * self.timeout_s:
            return True
        self.tell(self.pending[0][2]())
        return False
