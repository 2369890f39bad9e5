"""Optimizers whose loop holds the perturbed parameters: no second gradient, no change.

The loop's own gradient is taken at what it holds, and so is the descent gradient
already. The unperturbed parameters are computed back from what made the perturbation,
which is in the state (the moment, or the key of the noise) with the factors that were
applied; nothing else is kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .._axes import which
from .._axes.when import always
from .._engine.layers import Layers, Rule
from .._method import Method
from . import arguments, held, state as _state
from .held import PerturbedState
from .plan import first_of_shape
from .static import register_with_flax, Static


_WHO = "perturbed"


def perturbed(
    base: optax.GradientTransformation,
    rho: Any,
    *,
    ascent: Any = None,
    shape: Any = None,
    select: which.Selector | None = None,
    k: Any = None,
    rule: Rule | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns an optimizer that trains at perturbed parameters, at the base's own price.

    The loop stays as it is, and holds $\tilde w_t = w_t + \rho(t)\,s(a_t)$, with a
    direction $a_t$ that needs no gradient of its own. Its gradient at $\tilde w_t$ goes
    to the base optimizer, which sees the unperturbed $w_t$ (so weight decay acts on
    these). Gradient 0 is taken where the loop starts, unperturbed. Evaluate, average and
    save `lwsam.eval_params(opt_state, params)`.

    Nothing that changes updates may follow it in a chain, for the loop would hold other
    parameters than the state knows; what comes before (a clip) acts on the gradient.
    Statistics of a BatchNorm are those of $\tilde w$: see `lwsam.refresh`. Further
    keywords of `update` go to the base optimizer.

    Args:
      base: Any Optax optimizer.
      rho: Radius, >= 0, a number, which a loop may set (`state.hyperparams["rho"]`), or
        a schedule of the step count. A Python 0 is the base optimizer, bit for bit. Or a
        `Method`, such as a preset, in place of all that follows: one whose ascent needs
        no gradient and whose gradient is the descent's.
      ascent: A stale ascent: `momentum()` (the default), `previous()` or `random()`.
      shape: `relative()` (the default) or any other; `raw`, `normalized` and `relative`
        are undone from their factors, for all others the state keeps a copy of the
        parameters.
      select: Which layers, `everything()` by default; norms are of the loop's gradient.
      k: In place of `select`: the k layers of the largest gradient norm.
      rule: What a layer is; every float leaf by default, for `relative` the rule
        `lwsam.weights`.
      seed: Seed of what is drawn at random.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `PerturbedState`. Parameters
      below float32 are kept unperturbed, and so stay exact. Works on masked trees
      (`multi_transform`, `masked`) and on sharded parameters.

    Raises:
      ValueError: For numbers out of range, an ascent with a pass of its own, both of k
        and select, a `Method` with parts that a loop's one gradient cannot follow.
      TypeError: For arguments of the wrong kind.

    Examples:
      >>> import jax, optax, jax.numpy as jnp, lwsam_jax as lwsam
      >>> loss = lambda p: jnp.sum((p["w"] @ jnp.ones((2, 1)) - 1.0) ** 2)
      >>> tx = lwsam.perturbed(optax.sgd(0.1, momentum=0.9), rho=0.1)
      >>> params = {"w": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(lwsam.eval_params(state, params)) < 1.0)
      True

    References:
      The momentum: Becker et al., NeurIPS 2025, arXiv:2401.12033. The noise: RWP,
      arXiv:2211.11489.
    """
    arguments.check_base(base)
    base = optax.with_extra_args_support(base)
    if isinstance(rho, Method):
        given = (ascent, shape, select, k, rule)
        method = arguments.of_method(rho, any(x is not None for x in given))
        rho, seed = method.rho, method.seed
    else:
        method = arguments.method(rho, ascent, shape, select, k, rule, seed)
    ascent, shape, is_plain = method.ascent, method.shape, method.is_plain
    rule = method.rule

    def init_fn(params: optax.Params) -> PerturbedState:
        register_with_flax()
        if type(params).__name__ == "_ParamsPlaceholder":  # of optax.tree.map_params
            return _placeholder(params, base.init(params))
        layers = Layers.of(params, rule, allow_masked=True)
        inner = base.init(params)
        parts = held.MadeOf(layers, ascent, shape, is_plain)
        leaves = jax.tree.leaves(params)
        dtype = _tree.accumulation_dtype(*leaves)
        state = PerturbedState(
            step_count=jnp.zeros((), jnp.int32),
            base=inner,
            ascent=() if is_plain else ascent.init(params, inner),
            shape=first_of_shape(shape, params),
            factors=jnp.zeros((held.count_factors(parts, leaves),), dtype),
            # Copies: a loop may donate its parameters and this state together.
            kept=jax.tree.map(jnp.copy, held.keep(parts, params)),
            seed=jnp.asarray(seed),
            mask=jnp.zeros((len(layers),), bool),
            hyperparams=method.hyperparams(dtype),
            made_of=Static(parts),
        )
        return state

    def _placeholder(params, inner):
        return PerturbedState(
            step_count=jnp.zeros((), jnp.int32),
            base=inner,
            ascent=() if is_plain else ascent.init(params, inner),
            shape=shape.init(params),
            factors=jnp.zeros((0,)),
            kept=params,
            seed=jnp.zeros((), jnp.int32),
            mask=jnp.zeros((0,), bool),
            hyperparams=method.hyperparams(jnp.float32),
            made_of=Static(None, is_placeholder=True),
        )

    def update_fn(
        updates: optax.Updates,
        state: PerturbedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PerturbedState]:
        if params is None:
            remedy = "Call tx.update(grads, opt_state, params)."
            raise _checks.value_error(_WHO, "params", "given", None, remedy)
        count = jnp.asarray(optax.safe_increment(state.step_count))
        if is_plain:
            found, inner = base.update(updates, state.base, params, **extra_args)
            return found, state._replace(step_count=count, base=inner)
        layers = Layers.of(params, rule, allow_masked=True)
        layers.flatten(_WHO, "updates", updates)
        parts = held.MadeOf(layers, ascent, shape, is_plain)
        own = held.unperturbed(parts, state, params)
        found, inner = base.update(updates, state.base, own, **extra_args)
        own = optax.apply_updates(own, found)
        after = state._replace(
            step_count=count,
            base=inner,
            ascent=ascent.update(state.ascent, updates),
            kept=held.keep(parts, own),
            mask=_choose(method, layers, updates, count),
            hyperparams=method.scheduled(state.hyperparams, count),
            made_of=Static(parts),
        )
        radius = after.hyperparams.get("rho", rho)
        moved, after = held.perturb(parts, after, own, radius)
        pairs = zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True)
        final = [
            _step(u, new, old) if at >= 0 else u
            for at, u, (new, old) in zip(
                layers.leaf_layer, jax.tree.leaves(found), pairs, strict=True
            )
        ]
        return jax.tree.unflatten(jax.tree.structure(params), final), after

    return optax.GradientTransformationExtraArgs(
        init_fn,  # pyright: ignore[reportArgumentType]
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _step(base: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns the update from old to new, of the dtype that the base optimizer's has.

    Wrappers such as `optax.apply_if_finite` rely on that dtype. Never below that of the
    parameter: what is not kept must arrive as it was computed.
    """
    dtype = jnp.promote_types(base.dtype, new.dtype)
    return (_tree.wide(new) - _tree.wide(old)).astype(dtype)


def _choose(method: Method, layers: Layers, grads: Any, count: Any) -> jax.Array:
    everything = method.select is which.everything() and method.when is always()
    if everything:  # no norms: a sharded loop would reduce them
        return jnp.ones((len(layers),), bool)
    return method.choose(layers.norms(grads), count, layers)


def eval_params(opt_state: Any, params: Any) -> Any:
    """Returns the unperturbed parameters of a loop that trains by `perturbed`.

    Args:
      opt_state: Any pytree that holds states of `perturbed`, in chains, MultiSteps,
        multi_transform or inject_hyperparams, or an `nnx.Optimizer`. Several states over
        disjoint leaves are all undone.
      params: What the loop holds.

    Returns:
      A tree as `params`; leaves below float32 are exact, the others up to rounding.

    Raises:
      ValueError: If there is no such state, two of one leaf, or one of other parameters.
    """
    return _for_each("eval_params", held.unperturbed, opt_state, params)


def train_params(opt_state: Any, params: Any) -> Any:
    """Returns what the loop holds, from the unperturbed parameters.

    Args:
      opt_state: As for `eval_params`.
      params: What `eval_params` returned with this state.

    Raises:
      ValueError: As `eval_params`; for a shape that keeps a state and is no factor for
        each leaf, where the perturbation cannot be computed again.
    """
    return _for_each("train_params", held.perturb_again, opt_state, params)


def _for_each(who: str, function: Any, opt_state: Any, params: Any) -> Any:
    """Applies a function to the leaves of each state of ours."""
    found = _state.find(PerturbedState, opt_state)
    if not found:
        remedy = (
            "Pass the state of an optimizer that lwsam.perturbed made, or an "
            "nnx.Optimizer itself (its nnx.state lacks what says which layers)."
        )
        raise _checks.value_error(
            who, "opt_state", "one of `perturbed`", "none", remedy
        )
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    final = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    seen: set[str] = set()
    for node in found:
        parts = node.made_of.value
        count = parts.layers.treedef.num_leaves
        places = jax.tree.unflatten(parts.layers.treedef, range(count))
        own = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(places)
        ]
        if not set(own) <= set(final) or seen & set(own):
            remedy = "Pass the parameters that this state was made for."
            got = "of others" if not seen & set(own) else "two of one leaf"
            expected = "a state of these parameters"
            raise _checks.value_error(who, "opt_state", expected, got, remedy)
        seen |= set(own)
        part = jax.tree.unflatten(parts.layers.treedef, [final[k] for k in own])
        moved = function(parts, _bare(node), part)
        final.update(zip(own, jax.tree.leaves(moved), strict=True))
    return jax.tree.unflatten(
        treedef, [final[jax.tree_util.keystr(path)] for path, _ in paths]
    )


def _bare(state: PerturbedState) -> PerturbedState:
    """Returns a state whose scalars and vectors are arrays; NNX wraps them."""
    array = lambda node: jax.tree.leaves(node)[0]
    return state._replace(
        step_count=array(state.step_count),
        factors=array(state.factors),
        mask=array(state.mask),
    )
