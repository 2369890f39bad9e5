r"""FROM WHAT the perturbation comes: a gradient of its own, or a direction known before.

Two kinds. A *pass* takes a gradient at the parameters, on the whole batch or a part of
it: `whole_batch()`, `micro_batch(...)`, or a function of one's own
`(batch, key) -> part of the batch`. A *stale* ascent has its direction already, and so
costs no gradient at all: `momentum()`, `previous()`, `random()`, or any `Stale`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .moments import first_moment
from .noise import normal_like


_WHO = "micro_batch"
_OWN_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Part:
    """An ascent with a pass of its own.

    Attributes:
      cut: `(batch, key) -> batch`, what the ascent sees of a device's batch; None: all
        of it, and the split shares what both passes have in common.
    """

    cut: Callable[[Any, jax.Array], Any] | None = None

    def of(self, batch: Any, key: jax.Array, devices: int = 1, cuts: int = 1) -> Any:
        """Returns what the ascent sees of the batch of one of so many devices.

        Where the batch is accumulated in so many cuts, a micro-batch that fits into one
        is taken of the first.
        """
        if isinstance(self.cut, _MicroBatch):
            return self.cut(batch, key, devices, cuts)
        return batch if self.cut is None else self.cut(batch, key)

    def fraction(self, examples: int) -> float:
        """Returns the share of the examples that the ascent sees.

        Raises:
          TypeError: For a function of one's own, whose share only a batch can tell.
        """
        if self.cut is None:
            return 1.0
        if not isinstance(self.cut, _MicroBatch):
            remedy = "Pass the share of the examples that it sees, such as 0.25."
            raise _checks.type_error(
                "StepCost.ratio", "ascent", "a number", repr(self.cut), remedy
            )
        return self.cut.count(examples) / examples

    def measured(self, batch: Any, devices: int = 1) -> float:
        """Returns the share of the examples that it sees of a device's batch."""
        if self.cut is None:
            return 1.0
        key = jax.eval_shape(lambda: jax.random.key(0))
        part = jax.eval_shape(lambda x, k: self.of(x, k, devices), batch, key)
        return batch_size("ascent", part) / batch_size("ascent", batch)


@dataclasses.dataclass(frozen=True)
class _MicroBatch:
    share: float = 1.0
    size: int | None = None

    def count(self, examples: int, devices: int = 1) -> int:
        """Returns how many of a device's examples the ascent sees; raises on none."""
        if self.size is not None:
            count, asked = self.size // devices, f"size={self.size}"
        else:
            count, asked = math.floor(self.share * examples + 1e-9), f"{self.share}"
        if not 1 <= count <= examples:
            got = f"{asked}, which is {count} of {examples} examples"
            on = f" on each of {devices} devices" if devices > 1 else ""
            remedy = "Take a larger share or size, but no more than the batch has."
            name = "fraction" if self.size is None else "size"
            expected = "one that gives 1 example or more, and no more than there are"
            raise _checks.value_error(_WHO, name, expected, got + on, remedy)
        return count

    def __call__(
        self, batch: Any, key: jax.Array, devices: int = 1, cuts: int = 1
    ) -> Any:
        """Cuts a block at an offset that the key draws, a multiple of the count."""
        examples = batch_size(_WHO, batch)
        count = self.count(examples, devices)
        room = examples // cuts if count <= examples // cuts else examples
        offset = count * jax.random.randint(key, (), 0, room // count)
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, offset, count)
        return jax.tree.map(lambda x: cut(x) if jnp.ndim(x) else x, batch)


def batch_size(who: str, batch: Any) -> int:
    """Returns how many examples a batch has; raises where its leaves disagree."""
    named = jax.tree_util.tree_leaves_with_path(batch)
    sizes = [
        (jax.tree_util.keystr(p), jnp.shape(x)[0]) for p, x in named if jnp.ndim(x)
    ]
    if not sizes:
        remedy = "Pass arrays whose first axis is the batch."
        raise _checks.value_error(
            who, "batch", "arrays with a batch axis", "none", remedy
        )
    counts = [n for _, n in sizes]
    usual = max(counts, key=lambda n: (counts.count(n), n))
    for path, n in sizes:
        if n != usual:
            remedy = (
                "Pass what is no batch as a constant: step(state, batch, constant)."
            )
            expected = f"arrays whose first axis is the batch, {usual} examples"
            got = f"an array at {path} whose first axis is {n}"
            raise _checks.value_error(who, "batch", expected, got, remedy)
    return usual


def whole_batch() -> Part:
    """Returns the ascent on the batch of the step (the default): SAM's own.

    The forward and backward of what no perturbed layer reaches is shared by both passes.
    """
    return _WHOLE


_WHOLE = Part()


def micro_batch(fraction: float | None = None, *, size: int | None = None) -> Part:
    r"""Returns the ascent on a part of the batch, at that share of its price.

    The part is a contiguous block of `floor(fraction * examples)`, at a multiple of that
    count drawn from the step's key. On several devices each takes its part of its own
    share, so that no data moves. Model state and metrics are those of the descent.

    Args:
      fraction: Share of the examples, in (0, 1]; 1 is `whole_batch()`.
      size: Number of examples of the global batch instead.

    Raises:
      ValueError: For numbers out of range, neither or both; in a step, where the share
        gives no example.

    References:
      Bahri, Mobahi and Tay, ACL 2022, arXiv:2110.08529; m-sharpness: Foret et al.,
      ICLR 2021, arXiv:2010.01412.
    """
    if (fraction is None) == (size is None):
        got = "neither" if size is None else "both"
        remedy = "Pass micro_batch(0.1), or micro_batch(size=16)."
        raise _checks.value_error(
            _WHO, "fraction", "given, or else `size`", got, remedy
        )
    if size is not None:
        _checks.count(_WHO, "size", size, "Pass how many examples the ascent sees.")
        if size < 1:
            remedy = "Pass how many examples the ascent sees."
            raise _checks.value_error(_WHO, "size", ">= 1", size, remedy)
        return Part(_MicroBatch(size=size))
    if not _checks.is_number(fraction) or not 0 < float(fraction or 0) <= 1:
        remedy = "0.1 takes the ascent on a tenth of the batch."
        raise _checks.value_error(_WHO, "fraction", "in (0, 1]", repr(fraction), remedy)
    return _WHOLE if fraction == 1 else Part(_MicroBatch(float(fraction or 0)))


class Stale(abc.ABC):
    """An ascent along a direction that is known before the step: no pass, no price.

    One of one's own defines `direction`, and the other two if it keeps something.

    Attributes:
      reads_params: Whether the direction depends on the parameters' values. `perturbed`
        then keeps a copy of the unperturbed ones, for it could not compute it again.
    """

    reads_params: bool = True

    def init(self, params: Any, opt_state: Any) -> Any:
        """Returns what is kept between steps, () if nothing."""
        del params, opt_state
        return ()

    @abc.abstractmethod
    def direction(self, kept: Any, opt_state: Any, params: Any, key: jax.Array) -> Any:
        """Returns the direction, structured as the parameters.

        Args:
          kept: What `init` or `update` returned.
          opt_state: State of the base optimizer, None if there is none to see.
          params: The unperturbed parameters.
          key: PRNG key of the step, the same on every device.
        """

    def update(self, kept: Any, grads: Any) -> Any:
        """Returns what is kept after a step with this descent gradient."""
        del grads
        return kept

    def fraction(self, examples: int) -> float:
        """Returns 0: no example is seen."""
        del examples
        return 0.0


@dataclasses.dataclass(frozen=True)
class _Momentum(Stale):
    reads_params = False
    sign: float
    decay: float

    def init(self, params: Any, opt_state: Any) -> Any:
        if first_moment(opt_state, params) is not None:
            return ()
        return jax.tree.map(jnp.zeros_like, params)

    def direction(self, kept: Any, opt_state: Any, params: Any, key: jax.Array) -> Any:
        del key
        moment = first_moment(opt_state, params) if _is_empty(kept) else kept
        return jax.tree.map(lambda m: self.sign * _tree.wide(m), moment)

    def update(self, kept: Any, grads: Any) -> Any:
        if _is_empty(kept):
            return kept
        return jax.tree.map(
            lambda m, g: _tree.add_scaled(g, jnp.asarray(self.decay), m).astype(
                m.dtype
            ),
            kept,
            grads,
        )


def _is_empty(kept: Any) -> bool:
    return isinstance(kept, tuple) and not kept


def momentum(sign: float = -1, *, decay: float = _OWN_DECAY) -> Stale:
    r"""Returns the ascent along the base optimizer's first moment: $a = \pm v$.

    $v$ is the moment before the step's own gradient enters it: the `trace` of
    `optax.sgd(momentum=...)`, the `mu` of Adam, AdamW, Lion, LAMB and Muon (raw: without
    bias correction, not divided by the second moment), also inside a chain. Where the
    optimizer has none, or cannot be seen (`as_optax`), a moment
    $m \leftarrow \mu m + \hat g$ is kept. It is 0 at first, so step 0 is unperturbed.

    Args:
      sign: -1, the published one: $-v$ is uphill on the next batch; or 1.
      decay: $\mu$ of the moment that is kept where there is no other.

    References:
      MSAM, Becker et al., NeurIPS 2025, arXiv:2401.12033.
    """
    if sign not in (-1, 1):
        remedy = "-1 is MSAM's sign."
        raise _checks.value_error("momentum", "sign", "-1 or 1", sign, remedy)
    return _Momentum(sign, decay)


class _Previous(Stale):
    reads_params = False

    def init(self, params: Any, opt_state: Any) -> Any:
        del opt_state
        return jax.tree.map(jnp.zeros_like, params)

    def direction(self, kept: Any, opt_state: Any, params: Any, key: jax.Array) -> Any:
        del opt_state, params, key
        return jax.tree.map(_tree.wide, kept)

    def update(self, kept: Any, grads: Any) -> Any:
        return jax.tree.map(lambda m, g: g.astype(m.dtype), kept, grads)


def previous() -> Stale:
    """Returns the ascent along the descent gradient of the step before.

    Keeps one copy of the gradient. Step 0 is unperturbed. Measured behind `momentum()`
    (docs: Ascents).
    """
    return _PREVIOUS


_PREVIOUS = _Previous()


class _Random(Stale):
    reads_params = False

    def direction(self, kept: Any, opt_state: Any, params: Any, key: jax.Array) -> Any:
        del kept, opt_state
        return jax.tree.map(_tree.sharded_as, normal_like(params, key), params)


def random() -> Stale:
    r"""Returns the ascent along Gaussian noise, drawn anew in every step, never stored.

    Random weight perturbation: with `relative("filter")` that of RWP (arXiv:2211.11489,
    TMLR 2024), with `relative()` the same for each layer. The draw is that of the step's
    key, the same on every device; step 0 is perturbed already.
    """
    return _RANDOM


_RANDOM = _Random()


def as_ascent(who: str, ascent: Any) -> Part | Stale:
    """Returns a `Part` or a `Stale` of what a user may pass; raises on what is none."""
    if isinstance(ascent, Part) or hasattr(ascent, "direction"):
        return ascent
    remedy = "Pass lwsam.micro_batch(0.1), or a function (batch, key) -> part of it."
    _checks.is_callable(who, "ascent", ascent, remedy)
    return Part(ascent)
