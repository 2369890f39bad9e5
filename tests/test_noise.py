"""The noise of `random()`: Threefry by its published numbers, Gaussian by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import special, stats

from lwsam_jax._axes import noise
from plain import enable_x64


SHAPES = {"w": (64, 48), "bias": (48,), "scalar": (), "empty": (0, 3)}


def tree(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def words(key, first, second):
    """Threefry-2x32-20 in NumPy."""
    turn = lambda x, by: (x << np.uint32(by)) | (x >> np.uint32(32 - by))
    parts = [key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    with np.errstate(over="ignore"):
        a, b = first + parts[0], second + parts[1]
        for number in range(20):
            by = ((13, 15, 26, 6), (17, 29, 16, 24))[number // 4 % 2][number % 4]
            a = a + b
            b = turn(b, by) ^ a
            if number % 4 == 3:
                turn_number = number // 4 + 1
                a = a + parts[turn_number % 3]
                b = b + parts[(turn_number + 1) % 3] + np.uint32(turn_number)
    return a, b


@pytest.mark.parametrize(
    ("key", "counter", "found"),
    [  # Random123's known answers
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (
            (0x13198A2E, 0x03707344),
            (0x243F6A88, 0x85A308D3),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_threefry_has_the_published_words(key, counter, found):
    as_words = lambda pair: [jnp.asarray(x, jnp.uint32) for x in pair]
    assert [int(x) for x in noise.threefry(as_words(key), *as_words(counter))] == list(
        found
    )


def test_every_number_is_that_of_its_leaf_and_index():
    key = jax.random.key(3)
    drawn = noise.normal_like(tree(), key)
    main = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    for number, (name, z) in enumerate(sorted(drawn.items())):
        own = words(main, np.uint32(number), np.uint32(0))
        index = np.arange(z.size, dtype=np.uint32)
        bits = words(own, index, np.zeros_like(index))[0]
        uniform = ((bits >> 9).astype(np.float64) + 0.5) / 2**22 - 1
        found = special.erf(np.ravel(z).astype(np.float64) / np.sqrt(2))
        np.testing.assert_allclose(found, uniform, atol=3e-7, err_msg=name)


def test_float64_is_drawn_in_float64():
    with enable_x64(True):
        x = jnp.zeros((64, 48), jnp.float64)
        wide = noise.normal_like(x, jax.random.key(0))
    narrow = noise.normal_like(jnp.zeros((64, 48)), jax.random.key(0))
    assert wide.dtype == np.float64
    uniform = special.erf(np.asarray(wide) / np.sqrt(2)) * 2**22
    np.testing.assert_allclose(uniform - np.round(uniform - 0.5), 0.5, atol=1e-6)
    np.testing.assert_allclose(narrow, wide, rtol=1e-5)


def test_numbers_are_gaussian_and_independent_of_leaf_and_step():
    big = {"a": jnp.zeros((200, 250)), "b": jnp.zeros((200, 250))}
    one = noise.normal_like(big, jax.random.key(0))
    two = noise.normal_like(big, jax.random.key(1))
    draws = [np.ravel(x) for x in (one["a"], one["b"], two["a"])]
    for x in draws:
        assert stats.kstest(x, "norm").pvalue > 1e-3
    correlation = np.corrcoef(draws)
    assert np.max(np.abs(correlation - np.eye(3))) < 0.02
    along = draws[0].reshape(200, 250)
    assert abs(np.corrcoef(np.ravel(along[1:]), np.ravel(along[:-1]))[0, 1]) < 0.02


def test_no_counter_is_met_twice_past_a_word(monkeypatch):
    monkeypatch.setattr(noise, "_WORD", 12)  # as if words were short
    pairs = noise._counters((5, 3, 4))
    assert (
        len({(int(a), int(b)) for a, b in zip(*map(np.ravel, pairs), strict=True)})
        == 60
    )
    assert int(jnp.max(pairs[0])) == 11


def test_complex_numbers_have_half_the_variance_in_each_part():
    z = np.ravel(
        noise.normal_like(jnp.zeros((300, 100), jnp.complex64), jax.random.key(0))
    )
    assert z.dtype == np.complex64
    np.testing.assert_allclose([z.real.var(), z.imag.var()], 0.5, rtol=0.03)
    assert abs(np.corrcoef(z.real, z.imag)[0, 1]) < 0.02


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_low_precision_draws_what_float32_does(low):
    key = jax.random.key(0)
    found, wide = noise.normal_like(tree(low), key), noise.normal_like(tree(), key)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, found, wide)


def test_integers_get_zeros_and_any_key_is_taken():
    params = {"steps": jnp.arange(3), "w": jnp.ones((4,))}
    drawn = noise.normal_like(params, jax.random.key(0, impl="rbg"))
    np.testing.assert_array_equal(drawn["steps"], np.zeros(3, int))
    assert np.all(np.asarray(drawn["w"]) != 0)


def test_a_sharded_leaf_draws_its_part_alone():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    draw = lambda x, key: noise.normal_like(x, key)
    x, key = jnp.zeros((16, 24)), jax.random.key(0)
    sharded = jax.jit(draw, in_shardings=(sharding, None), out_shardings=sharding)
    compiled = sharded.lower(x, key).compile()
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "collective"))
    np.testing.assert_array_equal(sharded(x, key), draw(x, key))
