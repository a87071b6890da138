"""SIGTERM and SIGINT: finish the step, save, leave. A second signal stops at once."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)
_CAUGHT = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Context in which the first SIGTERM or SIGINT only sets `received`.

    Outside the main thread signals cannot be caught; the context then does nothing.

    Attributes:
        received: name of the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in _CAUGHT:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            raise KeyboardInterrupt(name)
        self.received = name
        logger.warning("%s: finishing this step, then saving; once more stops at once", name)
