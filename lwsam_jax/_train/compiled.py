"""What a step is compiled to; each form when it is first used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .._devices.local import OneDevice
from .._engine.cover import Cover
from .._loops import state as _state
from .executables import Executables, Menu
from .one_step import OneStep


_COVERS_OF_A_SCAN = 4


class Compiled:
    """The jitted forms of the step of one loss.

    Attributes:
      executables: Those of single steps.
    """

    def __init__(
        self, one: OneStep, menu: Menu, devices: OneDevice, charges_menu: bool
    ) -> None:
        """Takes the step and where it runs; compiles nothing.

        Args:
          one: The step.
          menu: What it may run on.
          devices: Where it runs.
          charges_menu: Whether selections are charged the prices of the whole menu.
        """
        self._one, self._menu, self._devices = one, menu, devices
        self._charges_menu = charges_menu
        self.executables = Executables(menu, self.single)
        self._scans: dict[int, Callable[..., Any]] = {}

    def single(self, selection: tuple[str, ...] | Cover) -> Any:
        """Returns the step of a selection."""
        step = functools.partial(self._one.run, selection)
        return self._devices.compile(step, name=selection)

    def lower(self, selection: Any, state: Any, batch: Any, constants: Any) -> Any:
        """Returns the lowered step of a selection, None for that of the state."""
        if selection is None:
            selected: Any = _state.selection(state)
            selection = self._menu.fitting(self._menu.bits(selected))
        return self.single(selection).lower(state, batch, constants)

    def scan(self, covers: int | None) -> Callable[..., Any]:
        """Returns many steps in one, over so many covers beside the plain step."""
        if self._charges_menu:
            covers = len(self._menu.covers)
        elif covers is None:
            covers = _COVERS_OF_A_SCAN
        if covers not in self._scans:
            many = self._one.many(self._menu.few(covers))
            self._scans[covers] = self._devices.compile(
                many, lead=1, name=f"scan {covers}"
            )
        return self._scans[covers]

    @functools.cached_property
    def refresh(self) -> Callable[..., Any]:
        """The forward pass that continues the model state."""
        return self._devices.compile(
            self._one.refresh,
            donates=False,
            part=lambda state: state.model_state,
            name="refresh",
        )
