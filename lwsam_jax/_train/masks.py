"""The masks of the steps to come, which the host reads between steps."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from .._loops.state import read_mask
from .state import TrainState


class Masks:
    """The masks of the state that a step returned last.

    They are copies that earlier steps made, on each device, whatever hosts these have: so
    they can be read without waiting for the last step.
    """

    def __init__(self) -> None:
        """Knows no state yet."""
        self._due: collections.deque[Any] = collections.deque()
        self._latest: Any = None

    def of(self, state: TrainState, known: np.ndarray | None, is_plain: bool) -> Any:
        """Returns the mask of the next step.

        Args:
          state: What the step gets; may be of another run, or from a checkpoint.
          known: The mask of every step, if that is known; then nothing is waited for.
          is_plain: Whether no step perturbs anything.
        """
        if state.method_state is not self._latest:
            # Read now: the step donates them. Their masks may be others than the known.
            queue = (state.method_state.mask, *state.method_state.pending)
            self._due = collections.deque(map(read_mask, queue))
            self._latest = state.method_state
            known = known if is_plain else None
        return np.asarray(self._due[0]) if known is None else known

    def took(self, decided: Any, state: TrainState) -> None:
        """Takes what a step decided on, and the state that it returned.

        Called after it only: one that raises, for its batch say, leaves all as it was.
        """
        self._due.popleft()
        self._due.append(decided)
        self._latest = state.method_state
