"""Signals that end a run between two steps."""

import signal


class Stop:
    """Notes the first SIGINT or SIGTERM, so that the step under way can end.

    The second one acts as it always does.
    """

    def __enter__(self) -> "Stop":
        self.signal = 0
        self._old = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
