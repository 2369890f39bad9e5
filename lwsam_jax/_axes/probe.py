"""Ascents along directions that are found by values of the loss, without a gradient."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .ascent import Stale
from .noise import normal_like


class Probe(Stale):
    """An ascent along a direction that values of the loss point out.

    As a `Stale`, and `direction` gets the loss as well. One of one's own defines
    `direction` and `forwards`.

    Attributes:
      forwards: How many forward passes a direction takes.
    """

    forwards: int = 0

    @abc.abstractmethod
    def direction(
        self,
        kept: Any,
        opt_state: Any,
        params: Any,
        key: jax.Array,
        value_fn: Callable[[Any], jax.Array] | None = None,
    ) -> Any:
        """Returns the direction, structured as the parameters.

        Args:
          kept: What `init` or `update` returned.
          opt_state: State of the base optimizer, None if there is none to see.
          params: The unperturbed parameters.
          key: PRNG key of the step, the same on every device.
          value_fn: The loss on the batch of the step, over all devices. It moves with the
            layers of the step alone, whatever its argument has elsewhere.
        """


@dataclasses.dataclass(frozen=True)
class _Differences(Probe):
    """Differences of the loss along random directions P: sum of dL / (2 mu) P."""

    count: int
    mu: float
    sign: int

    @property
    def forwards(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Two for each direction."""
        return 2 * self.count

    def draw(self, kept: Any, params: Any, key: jax.Array) -> Any:
        """Returns a random direction."""
        del kept
        return normal_like(jax.tree.map(_tree.wide, params), key)

    def direction(
        self,
        kept: Any,
        opt_state: Any,
        params: Any,
        key: jax.Array,
        value_fn: Callable[[Any], jax.Array] | None = None,
    ) -> Any:
        del opt_state
        assert value_fn is not None

        def one(total, number):
            along = self.draw(kept, params, jax.random.fold_in(key, number))
            at = lambda mu: value_fn(
                jax.tree.map(lambda w, p: _tree.add_scaled(w, mu, p), params, along)
            )
            mu = jnp.asarray(self.mu)
            slope = self.sign * (at(mu) - at(-mu)) / (2 * self.mu * self.count)
            return jax.tree.map(
                lambda t, p: _tree.add_scaled(t, slope, p), total, along
            ), None

        zero = jax.tree.map(lambda w: jnp.zeros_like(_tree.wide(w)), params)
        if self.count == 1:
            return one(zero, 0)[0]
        return jax.lax.scan(one, zero, jnp.arange(self.count))[0]


def differences(count: int = 1, mu: float = 1e-3, *, sign: int = 1) -> Probe:
    r"""Returns the ascent along differences of the loss in random directions.

    $a = \pm\frac1q \sum_j \frac{L(w + \mu P_j) - L(w - \mu P_j)}{2 \mu}\,P_j$ with
    Gaussian $P_j$, an estimate of the gradient that takes $2q$ forward passes and no
    backward pass.

    Args:
      count: $q$, >= 1. With 1 the direction is that of one random vector, or its
        opposite.
      mu: $\mu$, > 0.
      sign: 1; -1 is the sign that a formula collection prints, which descends.

    Raises:
      ValueError: For numbers out of range.

    References:
      AdaZo-SAM, Refael et al., arXiv:2502.19571; see `adazo_sam`.
    """
    _check("differences", count, mu, sign)
    return _Differences(count, float(mu), sign)


class Subspaces(NamedTuple):
    """State of `subspace_differences`.

    Attributes:
      left: For each matrix Q, m x r, 0 before the first gradient; else ().
      right: For each matrix R, r x n.
      step: int32[], steps done.
    """

    left: list[Any]
    right: list[Any]
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class _Subspace(_Differences):
    rank: int
    period: int
    seed: int

    def init(self, params: Any, opt_state: Any) -> Any:
        del opt_state
        left, right = [], []
        for x in jax.tree.leaves(params):
            rows, columns, r = self._dims(x)
            dtype = _tree.wide(x).dtype
            left.append(jnp.zeros((rows, r), dtype) if r else ())
            right.append(jnp.zeros((r, columns), dtype) if r else ())
        return Subspaces(left, right, jnp.zeros((), jnp.int32))

    def _dims(self, x: Any) -> tuple[int, int, int]:
        """Returns rows, columns and rank of a leaf as a matrix; rank 0: it is none."""
        if x.ndim < 2:
            return 0, 0, 0
        columns = x.shape[-1]
        rows = x.size // max(columns, 1)
        return rows, columns, min(self.rank, rows, columns)

    def draw(self, kept: Any, params: Any, key: jax.Array) -> Any:
        leaves, treedef = jax.tree.flatten(super().draw(kept, params, key))
        for i, (x, q, r) in enumerate(zip(leaves, kept.left, kept.right, strict=True)):
            if not isinstance(q, tuple):
                own = jax.random.fold_in(key, i)
                u = jax.random.normal(own, q.shape[1:], q.dtype)
                leaves[i] = ((q * u) @ r).reshape(x.shape)
        return jax.tree.unflatten(treedef, leaves)

    def update(self, kept: Any, grads: Any) -> Any:
        found = jax.tree.leaves(grads)
        key = jax.random.fold_in(jax.random.key(self.seed), kept.step)

        def fresh():
            left, right = [], []
            for i, (g, q) in enumerate(zip(found, kept.left, strict=True)):
                if isinstance(q, tuple):
                    left.append(())
                    right.append(())
                    continue
                matrix = _tree.wide(g).reshape(q.shape[0], -1)
                sketch = jax.random.normal(
                    jax.random.fold_in(key, i), (matrix.shape[1], q.shape[1]), q.dtype
                )
                basis, _ = jnp.linalg.qr(matrix @ sketch)
                rows, _ = jnp.linalg.qr((basis.T.conj() @ matrix).T)
                left.append(basis)
                right.append(rows.T)
            return left, right

        left, right = jax.lax.cond(
            kept.step % self.period == 0, fresh, lambda: (kept.left, kept.right)
        )
        return Subspaces(left, right, kept.step + 1)


def subspace_differences(
    count: int = 1,
    mu: float = 1e-3,
    *,
    rank: int = 8,
    period: int = 100,
    sign: int = 1,
    seed: int = 0,
) -> Probe:
    r"""Returns the ascent along differences of the loss in subspaces of the gradient.

    As `differences`, with $P_j = Q\,\mathrm{diag}(u_j)\,R$ for matrices and Gaussian
    $u_j$: $Q$ and $R$ are bases of the columns and rows of the gradient's best part of a
    rank, found by a random sketch of the descent gradient every `period` steps. Leaves of
    rank 3 and more are matrices of their last axis; vectors have a Gaussian $P_j$. Step
    0, before the first gradient, has 0 for the matrices.

    Args:
      count: $q$, >= 1.
      mu: $\mu$, > 0.
      rank: Of the subspaces, >= 1.
      period: Steps from one sketch to the next, >= 1.
      sign: 1 or -1, as in `differences`.
      seed: Of the sketches.

    Raises:
      ValueError: For numbers out of range.

    References:
      LORENZA, Refael et al., arXiv:2502.19571; see `lorenza`.
    """
    who = "subspace_differences"
    _check(who, count, mu, sign)
    for name, n in (("rank", rank), ("period", period)):
        _at_least_one(who, name, n)
    return _Subspace(count, float(mu), sign, rank, period, seed)


def _check(who: str, count: Any, mu: Any, sign: Any) -> None:
    _at_least_one(who, "count", count)
    if not _checks.is_number(mu) or not mu > 0:
        remedy = (
            "Pass the length of a probe over that of a Gaussian vector, such as 1e-3."
        )
        raise _checks.value_error(who, "mu", "> 0", repr(mu), remedy)
    if sign not in (-1, 1):
        raise _checks.value_error(who, "sign", "1 or -1", sign, "1 climbs.")


def _at_least_one(who: str, name: str, n: Any) -> None:
    remedy = "Pass a whole number, 1 or more."
    _checks.count(who, name, n, remedy)
    if n < 1:
        raise _checks.value_error(who, name, ">= 1", n, remedy)
