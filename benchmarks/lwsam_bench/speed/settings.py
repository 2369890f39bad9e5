"""What a preset trains where the plain loss by itself will not do."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lwsam_jax as lwsam
from lwsam_bench.models.network import Network
from lwsam_bench.training.recipe import LossFn, make_loss_fn


RATE, MOMENTUM = 0.1, 0.9
RANK, SCALE = 2, 2.0  # of the adapters


class Setting(NamedTuple):
    """What a step is made for.

    Attributes:
      loss_fn: As `TrainStep` takes it.
      params: The parameters.
      model_state: The model state.
      batch: A batch.
      optimizer: The base optimizer.
      is_plain: Whether its own plain step is what it is compared with; else that of
        `plain`.
    """

    loss_fn: LossFn
    params: Any
    model_state: Any
    batch: Any
    optimizer: Any
    is_plain: bool = True


def plain(net: Network, batch: Any) -> Setting:
    """Return SGD with momentum on the cross-entropy, with the loss of each example."""
    loss_fn = make_loss_fn(net, per_example=True)
    return Setting(loss_fn, net.params, net.model_state, batch, _sgd())


def with_saf(net: Network, batch: Any) -> Setting:
    """Return it with the term of SAF, whose memory has the examples of one batch."""
    term = lwsam.saf(start=0)
    size = len(batch["label"])

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        del key
        state, memory = model_state
        logits, state = net.apply(params, state, batch["image"], train=True)
        extra, memory = term(memory, logits, batch["index"], batch["epoch"])
        return _loss(logits, batch) + extra, ((state, memory), {})

    classes = jax.eval_shape(
        lambda: net.apply(net.params, net.model_state, batch["image"], train=False)[0]
    ).shape[-1]
    return Setting(
        loss_fn,
        net.params,
        (net.model_state, term.init(size, classes)),
        {**batch, "index": jnp.arange(size), "epoch": jnp.int32(1)},
        _sgd(),
        is_plain=False,
    )


def with_mesa(net: Network, batch: Any) -> Setting:
    """Return it with the term of MESA."""
    term = lwsam.mesa(start=0)

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        del key
        state, average = model_state
        average = term.update(average, params)
        old, _ = net.apply(average, state, batch["image"], train=True)
        logits, state = net.apply(params, state, batch["image"], train=True)
        extra = term(logits, old, batch["epoch"])
        return _loss(logits, batch) + extra, ((state, average), {})

    return Setting(
        loss_fn,
        net.params,
        (net.model_state, term.init(net.params)),
        {**batch, "epoch": jnp.int32(1)},
        _sgd(),
        is_plain=False,
    )


def with_das(net: Network, batch: Any) -> Setting:
    """Return it with DAS, which takes kernel and bias of a layer for its cores."""
    optimizer = lwsam.das(_sgd(), RATE, lwsam.modules)
    return plain(net, batch)._replace(optimizer=optimizer, is_plain=False)


def with_adapters(net: Network, batch: Any) -> Setting:
    """Return the training of adapters beside the last layer, whose weights are frozen."""
    kernel = net.params["dense"]["kernel"][...]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), kernel.dtype)
    adapted = {
        "kernel": kernel,
        "lora_a": draw(kernel.shape[0], RANK),
        "lora_b": draw(RANK, kernel.shape[1]),
    }
    inner = make_loss_fn(net)
    place = lwsam.Layers.of(net.params, lwsam.leaves).names.index("dense")

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        state, frozen = model_state
        q = params["dense"]
        merged = jax.lax.stop_gradient(q["kernel"])
        merged = merged + SCALE * q["lora_a"] @ q["lora_b"]
        leaves, treedef = jax.tree.flatten(frozen)
        leaves[place] = merged
        whole = jax.tree.unflatten(treedef, leaves)
        loss, (state, metrics) = inner(whole, state, batch, key)
        return loss, ((state, frozen), metrics)

    state = (net.model_state, net.params)
    return Setting(loss_fn, {"dense": adapted}, state, batch, _sgd())


def _loss(logits: Any, batch: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.mean(losses)


def _sgd() -> optax.GradientTransformation:
    return optax.sgd(RATE, momentum=MOMENTUM)
