"""Random small losses, as data that Hypothesis draws, shrinks and prints.

A program is a list of lines `(operation, operands)`; each line appends one vector of
`SIZE` numbers to a pool that begins with what there is without it. Operands are taken
modulo the length of the pool, so that every list is a program. The loss is the mean
square of the last vectors, so that early ones may be used often, or not at all.
"""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np


SIZE = 3
LAYERS = ("w0", "w1", "w2", "w3")


@jax.custom_jvp
def skewed(x):
    """Its derivative is a choice of ours, so that losing the rule shows."""
    return jnp.tanh(x)


@skewed.defjvp
def _skewed_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return skewed(x), 0.5 * jnp.cos(x) * t


@jax.custom_vjp
def clipped_backward(x):
    """Its gradient is clipped on the way back, which is not linear."""
    return jnp.sin(x)


clipped_backward.defvjp(
    lambda x: (clipped_backward(x), x),
    lambda x, ct: (jnp.clip(ct * jnp.cos(x), -0.1, 0.1),),
)


@jax.jit
def shared(x, y):
    """Called from many places, and traced once."""
    return jnp.tanh(x) * y


def _scan(w, x, y):
    step = lambda carry, row: (jnp.tanh(carry + row * y), carry[0])
    carry, firsts = jax.lax.scan(step, x, w)
    return carry + firsts


def _remat(w, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(w @ jnp.sin(x)))(w, x)


def _cond(w, x, y):
    grow, turn = lambda x: w @ x, lambda x: jnp.sin(x) * y
    return jax.lax.cond(jnp.sum(x) > 0, grow, turn, x)


def _switch(x, y):
    branch = jnp.clip(jnp.sum(y > 0), 0, 2)
    return jax.lax.switch(branch, (jnp.sin, lambda x: x * y, jnp.tanh), x)


def _count(x):
    """How often x can be halved: a loop without a derivative, and none is needed."""
    x = jax.lax.stop_gradient(x)
    keep = lambda s: (jnp.sum(jnp.abs(s[1])) > 0.1) & (s[0] < 20)
    halve = lambda s: (s[0] + 1, s[1] / 2)
    return jax.lax.while_loop(keep, halve, (jnp.int32(0), x))


def _counted(x, y):
    count, _ = _count(x)
    return y * (1 + count).astype(y.dtype) / 20


def _halved(x, y):
    return y + jax.lax.stop_gradient(_count(x)[1])


def _fori(w, x):
    return jax.lax.fori_loop(0, 2, lambda _, v: jnp.tanh(w @ v), x)


def _gather(x, y):
    places = jnp.argsort(y)
    return x[places]


def _through(dtype):
    return lambda x: jnp.sin(x.astype(dtype)).astype(x.dtype)


def _noisy(x):
    return x + jax.random.normal(jax.random.key(0), x.shape, x.dtype)


def _mapped(w, x):
    return jax.vmap(lambda row: jnp.tanh(jnp.vdot(row, x)))(w)


def _solved(w, x):
    return jnp.linalg.solve(w @ w.T + 2 * jnp.eye(SIZE, dtype=x.dtype), x)


# Name: how many matrices and how many vectors it takes, and what it does.
OPERATIONS = {
    "affine": (1, 1, lambda w, x: jnp.tanh(w @ x)),
    "transposed": (1, 1, lambda w, x: jnp.tanh(x @ w)),
    "tied": (1, 1, lambda w, x: jnp.tanh(w.T @ (w @ x))),
    "row": (1, 1, lambda w, x: w[1] * x),
    "product": (0, 2, lambda x, y: x * y),
    "sum": (0, 2, lambda x, y: x + y),
    "ratio": (0, 2, lambda x, y: x / (1 + y * y)),
    "where": (0, 2, lambda x, y: jnp.where(x > 0, x, y)),
    "softmax": (0, 1, jax.nn.softmax),
    "total": (0, 2, lambda x, y: jnp.dot(x, y) + jnp.zeros_like(x)),
    "cumulated": (0, 1, lambda x: jnp.tanh(jnp.cumsum(x))),
    "joined": (0, 2, lambda x, y: jnp.concatenate([x[:1], y[1:]])),
    "sorted": (0, 2, _gather),
    "stopped": (0, 1, lambda x: jax.lax.stop_gradient(jnp.sin(x))),
    "rounded": (0, 1, lambda x: jnp.round(4 * x) / 4),
    "float32": (0, 1, _through(jnp.float32)),
    "bfloat16": (0, 1, _through(jnp.bfloat16)),
    "complex": (0, 2, lambda x, y: jnp.real(jnp.exp(1j * x) * (y + 1j * x))),
    "noisy": (0, 1, _noisy),
    "jvp": (0, 1, skewed),
    "vjp": (0, 1, clipped_backward),
    "jit": (0, 2, shared),
    "scan": (1, 2, _scan),
    "remat": (1, 1, _remat),
    "cond": (1, 2, _cond),
    "switch": (0, 2, _switch),
    "counted": (0, 2, _counted),
    "halved": (0, 2, _halved),
    "fori": (1, 1, _fori),
    "vmap": (1, 1, _mapped),
    "solve": (1, 1, _solved),
    "nested": (1, 2, jax.jit(lambda w, x, y: shared(jnp.tanh(w @ x), y))),
}
# What is computed in a precision below float64, if only in part.
COARSE = {"float32", "bfloat16"}
# What may jump where its argument moves by one rounding.
JUMPS = {"where", "sorted", "rounded", "cond", "switch", "counted", "halved"}


class Line(NamedTuple):
    """One operation and its operands, counted from the end of what there is."""

    operation: str
    operands: tuple[int, ...]


class Program(NamedTuple):
    """A loss as data.

    Attributes:
      lines: The operations, in order.
      ends: How many of the last vectors the value reads.
      wrapped: "" | "jit" | "remat": a call around the whole.
    """

    lines: tuple[Line, ...]
    ends: int
    wrapped: str

    def loss(self, params, data):
        """Returns (value, aux), of which the aux has an integer too."""

        def run(params, data):
            vectors = [data["x"], params["b"], data["y"]]
            for name, operands in self.lines:
                matrices, count, apply = OPERATIONS[name]
                w = [params[LAYERS[i % len(LAYERS)]] for i in operands[:matrices]]
                x = [vectors[-1 - i % len(vectors)] for i in operands[1 : 1 + count]]
                vectors.append(apply(*w, *x))
            value = sum(jnp.mean(v * v) for v in vectors[-self.ends :])
            aux = {"last": vectors[-1], "positive": jnp.sum(vectors[0] > 0)}
            return value, aux

        if self.wrapped == "jit":
            run = jax.jit(run)
        elif self.wrapped == "remat":
            run = jax.checkpoint(run)
        return run(params, data)

    @property
    def is_coarse(self):
        return any(line.operation in COARSE for line in self.lines)

    @property
    def is_smooth(self):
        """Whether one rounding more or less stays small, whatever the precision."""
        return not any(line.operation in JUMPS for line in self.lines)


def programs(operations=tuple(OPERATIONS)):
    """Programs whose numbers do not depend on how they are compiled."""
    line = st.builds(
        Line, st.sampled_from(operations), st.tuples(*[st.integers(0, 7)] * 3)
    )
    return st.builds(
        Program,
        st.lists(line, min_size=1, max_size=8).map(tuple),
        st.integers(1, 3),
        st.sampled_from(["", "", "", "jit", "remat"]),
    ).filter(lambda program: program.is_smooth or not program.is_coarse)


def arguments(seed=0):
    """Parameters and data in float64; one of the layers is of rank 1 and none."""
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.normal(size=(SIZE, SIZE))) for name in LAYERS}
    params["b"] = jnp.asarray(rng.normal(size=SIZE))
    data = {name: jnp.asarray(rng.normal(size=SIZE)) for name in ("x", "y")}
    return params, data
