"""Where a loss is cut: what stays in the prefix, and what carries a gradient across."""

import jax
import jax.numpy as jnp
import pytest

import lwsam_jax as lwsam
import nets
from lwsam_jax._engine.cut import cut, divide
from lwsam_jax._engine.graph import REMAT
from lwsam_jax._engine.trace import inline, trace
from plain import assert_close, two_gradients


PARAMS = {name: nets.weight(3, 3, seed=i) for i, name in enumerate("uvw")}
X = nets.weight(4, 3, seed=7)


def both(loss, selected, **options):
    """The penalized gradient by the split, and by two plain ones."""
    out = lwsam.value_and_grad(loss, selected, rho=0.3, alpha=0.7, **options)(PARAMS, X)
    plain = two_gradients(
        lambda p, x: (loss(p, x), None),
        PARAMS,
        (X,),
        selected=selected,
        rho=0.3,
        alpha=0.7,
    )
    return out, plain


def net(p, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ p["u"]) @ p["v"]) @ p["w"] ** 2)


def test_what_stands_behind_a_stop_gradient_carries_none_across():
    """Such as targets that a loop finds: JAX has no reverse mode for it."""
    stop = jax.lax.stop_gradient

    def loss(p, x):
        h = jnp.tanh(x @ p["u"])
        start = stop(h) @ stop(p["v"])
        target = jax.lax.while_loop(
            lambda s: jnp.sum(s**2) > 1e-3, lambda s: 0.5 * s, start
        )
        return jnp.mean((jnp.tanh(h @ p["v"]) @ p["w"] - target) ** 2)

    out, plain = both(loss, ("v",))
    assert_close(out.grads, plain.grads)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_remat_of_the_whole_net_is_cut_also_behind_a_cast(dtype):
    def loss(p, x):
        cast = jax.tree.map(lambda w: w.astype(dtype), p)
        return jax.checkpoint(net)(cast, x.astype(dtype)).astype(jnp.float32)

    program = inline(trace(lambda p: loss(p, X), PARAMS))
    parts = cut(program, program.params[2:], program.params[:2])
    assert any(e.primitive.name in REMAT for e in parts.before)
    assert any(e.primitive.name in REMAT for e in parts.after)


def test_a_remat_that_names_its_inputs_is_cut():
    # Old JAX has one prevent_cse for all inputs, and takes the tuple as true.
    out, plain = both(jax.checkpoint(net, prevent_cse=(True, False)), ("w",))
    assert_close(out.grads, plain.grads)


def test_collectives_of_another_branch_stay_in_the_prefix():
    def loss(params):
        a, b = params
        one = jax.lax.psum(jnp.tanh(a), "d")
        other = jax.lax.psum(jnp.sin(b), "d")
        return jnp.sum(one * other)

    ones = jnp.ones(3)
    program = inline(trace(loss, (ones, ones), axis_env=[("d", 2)]))
    before, after = divide(program.eqns, program.params[:1])
    names = [e.primitive.name for e in before]
    assert "sin" in names
    assert any("psum" in name for name in names)
    assert "sin" not in [e.primitive.name for e in after]
