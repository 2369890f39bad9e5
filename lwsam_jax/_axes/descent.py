"""What the descent makes of the examples: the loss of some, or another mean of all.

The losses of the examples are `metrics["losses"]`, f32[B], which the loss must return.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .ascent import batch_size, Part, whole_batch


# (losses f32[B], batch) -> f32[B], whose mean is the loss of a pass
Weigh = Callable[[jax.Array, Any], jax.Array]
_SHARPEST, _WEIGHED = "sharpest", "weighed"


@dataclasses.dataclass(frozen=True)
class Sharpest:
    """The examples whose loss the perturbation raises most.

    Attributes:
      fraction: Share of the examples.
    """

    fraction: float

    def of(self, batch: Any, clean: Any, perturbed: Any) -> Any:
        """Returns these examples of a batch, from the metrics of both passes."""
        after, before = (losses_of(_SHARPEST, m, batch) for m in (perturbed, clean))
        examples = len(after)
        count = math.floor(self.fraction * examples + 1e-9)
        if count < 1:
            remedy = "Take a larger share."
            got = f"{self.fraction}, which is 0 of {examples} examples"
            expected = "a share that gives 1 example or more"
            raise _checks.value_error(_SHARPEST, "fraction", expected, got, remedy)
        _, places = jax.lax.top_k(after - before, count)
        return jax.tree.map(lambda x: x[places] if jnp.ndim(x) else x, batch)

    def refuse(self, who: str, method: Any) -> None:
        """Raises where the clean losses of the whole batch are not known."""
        if method.ascent != whole_batch():
            remedy = "Pass ascent=lwsam.whole_batch(), or no `descent`."
            expected = "None, for this ascent does not see the whole batch"
            raise _checks.value_error(who, "descent", expected, self, remedy)


def sharpest(fraction: float) -> Sharpest | None:
    r"""Returns the descent on the examples whose loss the perturbation raises most.

    Of B examples the `floor(fraction * B)` of largest
    $\ell_i(w + \epsilon) - \ell_i(w)$, read from `metrics["losses"]`, f32[B], which the
    loss must return. ESAM's data selection (Du et al., ICLR 2022, arXiv:2110.03141); one
    more forward pass over the batch. On several devices each takes its share of its own.

    Args:
      fraction: Share of the examples, in (0, 1]; 1 is None, all of them.

    Raises:
      ValueError: For a number out of range.
    """
    if not _checks.is_number(fraction) or not 0 < fraction <= 1:
        remedy = "0.5 takes the descent on the sharper half of the batch."
        raise _checks.value_error(
            _SHARPEST, "fraction", "in (0, 1]", repr(fraction), remedy
        )
    return None if fraction == 1 else Sharpest(float(fraction))


@dataclasses.dataclass(frozen=True)
class Weighed:
    """The losses of three passes, as functions of the examples' losses.

    Attributes:
      ascent: That of the ascent; None: as they are.
      descent: That of the descent.
      rest: That of a third gradient, at the unperturbed parameters, which is added to
        the descent's; None: there is none.
    """

    ascent: Weigh | None
    descent: Weigh
    rest: Weigh | None = None

    @property
    def fraction(self) -> float:
        """The share of the examples that the descent sees."""
        return 1.0

    def refuse(self, who: str, method: Any) -> None:
        """Raises where there is no ascent whose loss could be weighed."""
        if method.is_stale and (self.ascent or self.rest):
            remedy = "Pass an ascent with a pass of its own: whole_batch()."
            expected = (
                "one that weighs the descent alone, for this ascent takes no pass"
            )
            raise _checks.value_error(who, "descent", expected, "another", remedy)


def weighed(
    descent: Weigh, *, ascent: Weigh | None = None, rest: Weigh | None = None
) -> Weighed:
    r"""Returns passes whose losses are other means of the examples' losses.

    Each is a function `(losses f32[B], batch) -> f32[B]`, whose mean takes the place of
    the loss; the losses $\ell_i$ are `metrics["losses"]`, which the loss must return.
    With a `rest` $r$ the base optimizer gets
    $\nabla \overline{r(\ell)}(w) + c(g, \nabla \overline{d(\ell)}(w + \epsilon))$ for a
    combination $c$ and a descent $d$; ascent and rest share one forward pass. What the
    loss has beside the mean of the $\ell_i$, such as weight decay, goes with the descent,
    and with an ascent that is not weighed. Steps that perturb nothing are plain. Values
    that a step reports are those of the loss itself.

    Args:
      descent: Of the losses at the perturbed point.
      ascent: Of those at the parameters; None: the mean loss.
      rest: Of those at the parameters, for a gradient that is added; None: there is none.

    Raises:
      TypeError: For what is no function.

    Examples:
      >>> import lwsam_jax as lwsam
      >>> clipped = lambda losses, batch: losses.clip(max=5.0)
      >>> method = lwsam.sam(0.05, descent=lwsam.weighed(clipped))

    References:
      Focal-SAM, arXiv:2505.01660; ImbSAM, arXiv:2308.07815; CSAM, arXiv:2505.23866.
    """
    remedy = "Pass a function (losses, batch) -> losses."
    for name, function in (("descent", descent), ("ascent", ascent), ("rest", rest)):
        if function is not None or name == "descent":
            _checks.is_callable(_WEIGHED, name, function, remedy)
    return Weighed(ascent, descent, rest)


def class_counts(who: str, counts: Any) -> np.ndarray:
    """Returns the numbers of examples of the classes; raises on none or negative ones."""
    found = np.asarray(counts, np.float64)
    if found.ndim != 1 or not found.size or (found < 0).any() or not found.sum():
        remedy = "Pass how many examples of each class there are, such as [500, 20, 3]."
        expected = "a list of one number >= 0 for each class"
        raise _checks.value_error(who, "counts", expected, repr(counts), remedy)
    return found


def by_class(table: Any, labels: Callable[[Any], Any]) -> Weigh:
    """Returns the function that weighs each loss by the class of its example.

    Args:
      table: f32[C], the weight of each class.
      labels: Function of a batch to int32[B], its classes.
    """

    def _weigh(losses, batch):
        classes = jnp.asarray(labels(batch))
        if classes.shape != losses.shape:
            remedy = 'Pass labels=lambda batch: batch["label"], for instance.'
            expected = f"a function to {list(losses.shape)}, a class for each example"
            got = f"one to {list(classes.shape)}"
            raise _checks.value_error(_WEIGHED, "labels", expected, got, remedy)
        return jnp.asarray(table, losses.dtype)[classes] * losses

    return _weigh


def weigh_loss(
    loss: Callable[[Any], Any],
    batch: Any,
    *how: Weigh | None,
    keeps_terms: bool = False,
) -> Callable[[Any], Any]:
    """Returns a loss of parameters to (weighed value, (aux, plain value)).

    Args:
      loss: To (value, (model state, metrics)).
      batch: What it sees.
      *how: What its mean is over; None: the value as it is. Two give two values.
      keeps_terms: Whether what else the loss has stays in it.
    """

    def weighed_loss(params):
        value, aux = loss(params)

        def mean(one):
            if one is None:
                return value
            losses = losses_of(_WEIGHED, aux[1], batch)
            found = jnp.mean(one(losses, batch))
            if keeps_terms:
                found = value + (found - jnp.mean(losses))
            return found.astype(value.dtype)

        values = [mean(one) for one in how]
        return values[0] if len(values) == 1 else tuple(values), (aux, value)

    return weighed_loss


def losses_of(who: str, metrics: Any, batch: Any) -> jax.Array:
    """Returns the losses of the examples, from the metrics; raises on none."""
    try:
        losses = jnp.asarray(metrics["losses"])
    except (KeyError, TypeError, IndexError):
        remedy = 'Return {"losses": losses}, f32[B], among the metrics of the loss.'
        got = f"{jax.tree.structure(metrics)}"
        raise _checks.value_error(
            who, "metrics", 'a dict with "losses"', got, remedy
        ) from None
    examples = batch_size(who, batch)
    if losses.shape != (examples,):
        remedy = "Return one loss for each example."
        expected, got = f"f32[{examples}]", f"{losses.dtype}{list(losses.shape)}"
        raise _checks.value_error(who, 'metrics["losses"]', expected, got, remedy)
    return losses


def is_one_batch(ascent: Any) -> bool:
    """Whether the ascent sees the whole batch, as a third gradient does."""
    return isinstance(ascent, Part) and ascent.cut is None


def check(who: str, descent: Any) -> None:
    """Raises on what is no choice of examples."""
    if not isinstance(descent, (Sharpest, Weighed)):
        remedy = "Pass lwsam.sharpest(0.5), or None for the whole batch."
        expected = "lwsam.sharpest(fraction), lwsam.weighed(...) or None"
        raise _checks.type_error(who, "descent", expected, repr(descent), remedy)
