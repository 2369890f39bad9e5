"""Hypothesis strategies for what nobody expects in a parameter tree, and in a gradient.

The normal suite draws 200 examples for each property, and 50 where something compiles;
`--hypothesis-profile=thorough`, which `make test-slow` sets, draws 2,000 for each.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import re
import traceback
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np


# The one shape of our messages, `_checks.message`.
OUR_MESSAGE = re.compile(r"[\w.\[\]']+: expected `[^`]+` to be .+, got .*\. \S", re.S)


# Compiled examples until all are forgotten: each leaves megabytes, and 2,000 gigabytes.
KEPT = 100


def examples(function):
    """A property that compiles nothing."""
    return hypothesis.settings(hypothesis.settings.default)(function)


def compiled_examples(function):
    """A property where each example compiles: a quarter of the examples, or 2,000."""
    default = hypothesis.settings.default
    most = default.max_examples
    few = most if most >= 1000 else most // 4
    inner, calls = function.hypothesis.inner_test, itertools.count(1)

    @functools.wraps(inner)
    def test(*args, **kwargs):
        if next(calls) % KEPT == 0:
            jax.clear_caches()
        inner(*args, **kwargs)

    function.hypothesis.inner_test = test
    return hypothesis.settings(default, max_examples=few)(function)


@contextlib.contextmanager
def only_our_errors():
    """Passes over what we refuse in our own words; anything else is a crash."""
    try:
        yield
    except (ValueError, TypeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not OUR_MESSAGE.match(str(error)) or "lwsam_jax" not in where:
            raise


class Pair(NamedTuple):
    first: object
    second: object


@jax.tree_util.register_pytree_node_class
class WithoutPaths:
    """A node that has children and no names for them."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    kernel: object
    bias: object


class Sized(NamedTuple):
    """What has a shape and a dtype, and is no array."""

    shape: tuple
    dtype: object


SHAPES = ((), (0,), (3,), (1, 1), (2, 3), (0, 4), (2, 0, 3), (1, 2, 2))
FLOATS = (jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64)


def _array(rng_seed, shape, dtype):
    rng = np.random.default_rng(rng_seed)
    x = rng.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return jnp.asarray(x).astype(dtype)


def floats():
    """Arrays with a gradient, of any rank, size and precision."""
    return st.builds(
        _array, st.integers(0, 99), st.sampled_from(SHAPES), st.sampled_from(FLOATS)
    )


def odd_leaves():
    """Leaves without a gradient, and what is no array at all."""
    return st.one_of(
        st.sampled_from(SHAPES).map(lambda shape: jnp.zeros(shape, jnp.int32)),
        st.sampled_from(SHAPES).map(lambda shape: jnp.zeros(shape, bool)),
        st.sampled_from(SHAPES).map(lambda s: np.ones(s, np.float64)),
        st.sampled_from(
            [
                *(None, 2, 0.5, True, 1j, np.float32(1.0), np.int64(3)),
                *(jnp.zeros((2,), jnp.float8_e4m3fn), np.array(["text"])),
                *("text", len, object(), np.array([None]), jnp.float32),
                Sized((2, 3), jnp.float32),
            ]
        ),
        st.integers(0, 9).map(jax.random.key),
        st.integers(0, 9).map(lambda n: jax.random.split(jax.random.key(n), 2)),
        st.integers(0, 9).map(lambda n: jax.random.PRNGKey(n)),
    )


KEYS = st.sampled_from(
    [
        *("kernel", "bias", "w", "b", "a/b", "a", "scale", "value", "", "params"),
        *("ключ", "Block_2", "Block_10", "b\n", "²", "٣"),
    ]
)
ODD_KEYS = (
    st.integers(-2, 2),
    st.tuples(st.integers(0, 1), st.sampled_from(["a", "b"])),
    st.booleans(),
    st.sampled_from([0.0, 1.5]),
    st.binary(max_size=2),
    st.frozensets(st.integers(0, 1)),
)


def _containers(children):
    dicts = [
        st.dictionaries(keys, children, max_size=3) for keys in (KEYS, *ODD_KEYS[:5])
    ]
    return st.one_of(
        *dicts,
        st.dictionaries(KEYS, children, max_size=3).map(collections.OrderedDict),
        st.dictionaries(st.one_of(KEYS, *ODD_KEYS), children, max_size=2),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Pair, children, children),
        st.builds(Record, children, children),
        st.builds(WithoutPaths, children),
        st.builds(WithoutPaths),
    )


def trees(leaves=None):
    """Parameter trees of any leaves, structures and keys."""
    leaves = st.one_of(floats(), odd_leaves()) if leaves is None else leaves
    return st.recursive(leaves, _containers, max_leaves=6)


def float_trees():
    """Parameter trees of which every leaf has a gradient, in any structure."""
    return trees(floats())


def trees_with_a_weight():
    """Trees that have a layer under every rule, and may have anything beside it."""
    weight = st.sampled_from(FLOATS).map(lambda dtype: _array(0, (2, 3), dtype))
    return st.one_of(
        st.builds(lambda w, t: {"kernel": w, "rest": t}, weight, float_trees()),
        st.builds(lambda w, t: {"a": {"kernel": w}, "b": t}, weight, float_trees()),
        st.builds(lambda w, t: [t, w], weight, trees()),
    )


TINY = np.float32(1e-42)  # below the smallest normal float32
NUMBERS = st.one_of(
    st.sampled_from(
        [0.0, -0.0, 1.0, TINY, -TINY, 1e-30, 1e30, 3e38, np.inf, -np.inf, np.nan]
    ),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
