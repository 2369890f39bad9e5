"""Random weight perturbations against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import family_reference as family
import lwsam_jax as lwsam
import reference
import weight_noise_reference as oracle
from plain import enable_x64
from weight_noise_task import (
    assert_follows,
    base_optimizer,
    BATCHES,
    follow,
    from_tree,
    GRADIENT,
    HYPER,
    KERNELS,
    KEY,
    LEAVES,
    loss_fn,
    method,
    noise,
    PARTS,
    rule_of,
    SIZE,
    to_tree,
    train,
)


# Into how many parts each cuts its batch, the clean one not counted; None: it does not.
PARTS_OF = {"m_rwp": 1, "m_arwp": 1, "damp": PARTS}


# --- the library ----------------------------------------------------------------------


def params_of(found):
    return [params for params, _ in found]


@functools.cache
def trained(name):
    return train(method(name))


def test_every_part_of_every_step_has_its_own_noise():
    flat = [
        np.concatenate([z[name].ravel() for name in LEAVES])
        for step in noise(PARTS)
        for z in step
    ]
    drawn = np.concatenate(flat)
    assert len(np.unique(drawn)) > 0.99 * len(drawn)  # of so many single numbers
    assert abs(drawn.mean()) < 0.05
    assert 0.95 < drawn.std() < 1.05
    alike = np.corrcoef(np.stack(flat)) - np.eye(len(flat))
    assert np.abs(alike).max() < 0.7


@pytest.mark.parametrize("name", HYPER)
def test_train_step_follows_the_formulas_over_20_steps(name):
    found = trained(name)
    expected = follow(rule_of(name, noise(PARTS_OF.get(name))))
    assert_follows(params_of(found), expected)
    for number, (_, info) in enumerate(found):
        assert info.finite
        assert info.overhead == 0
        np.testing.assert_allclose(info.rho, HYPER[name]["rho"], rtol=1e-6)
        assert info.metrics["losses"].shape == (SIZE // 2 if name[0] == "m" else SIZE,)
        assert info.metrics["examples"] == len(info.metrics["losses"])
        if name[0] != "m":
            np.testing.assert_allclose(info.value, info.metrics["losses"].mean())
            assert info.ascent_value is None
            continue
        w = found[number - 1][0] if number else reference.mlp_params()
        half = family.rows_of(BATCHES[number], slice(0, SIZE // 2))
        clean = reference.mlp_value_and_grad(w, half)[0]
        np.testing.assert_allclose(info.ascent_value, clean)
        np.testing.assert_allclose(info.metrics["losses"].mean(), clean)


@pytest.mark.parametrize("name", HYPER)
def test_without_a_radius_each_is_the_base_optimizer_bit_for_bit(name):
    found = train(method(name, rho=0.0), steps=3)
    plain = train(lwsam.sam(0.0), steps=3)
    for ours, base in zip(params_of(found), params_of(plain), strict=True):
        for leaf in LEAVES:
            np.testing.assert_array_equal(ours[leaf], base[leaf])


def test_the_limits_of_the_weights():
    """eta = 0 is RWP; a weight of 1 is RWP on one half, of 0 plain on the other."""
    arwp = params_of(train(method("arwp", eta=0.0), steps=4))
    assert_follows(arwp, params_of(trained("rwp"))[:4])
    m_arwp = params_of(train(method("m_arwp", eta=0.0), steps=4))
    assert_follows(m_arwp, params_of(trained("m_rwp"))[:4])
    first, second = slice(0, SIZE // 2), slice(SIZE // 2, None)
    half = lambda rows: [family.rows_of(batch, rows) for batch in BATCHES[:4]]
    on_one = params_of(train(method("m_rwp", weight=1.0), steps=4))
    assert_follows(on_one, follow(rule_of("rwp", noise(1)), half(second)))
    plain = params_of(train(method("m_rwp", weight=0.0), steps=4))
    assert_follows(plain, follow(family.sam(GRADIENT, rho=0.0), half(first)))


def test_random_sam_moves_by_exactly_its_radius():
    z = noise()[0][0]
    np.testing.assert_allclose(oracle.length(oracle.on_the_sphere(0.4)({}, z)), 0.4)


def test_the_noise_of_a_filter_has_its_norm_as_its_scale():
    """And not as its length: that is sqrt(n) times longer on average."""
    w = reference.mlp_params()
    draws = [oracle.filter_wise(0.1)(w, z[0]) for z in noise()]
    name = KERNELS[0]
    for column in range(w[name].shape[1]):
        spread = np.std([e[name][:, column] for e in draws])
        expected = 0.1 * np.linalg.norm(w[name][:, column])
        np.testing.assert_allclose(spread, expected, rtol=0.35)


@pytest.mark.parametrize("devices", [2, 8])
def test_damp_is_the_same_on_any_number_of_devices(devices):
    """Each part has its number in the global batch; devices may share one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    ours = train(method("damp"), steps=3, parallel=mesh)
    alone = trained("damp")[:3]
    assert_follows(params_of(ours), params_of(alone))
    np.testing.assert_allclose(ours[2][1].value, alone[2][1].value)


@pytest.mark.parametrize("name", ["damp", "arwp"])
def test_many_steps_in_one_executable_are_the_same(name):
    with enable_x64(True):
        step = lwsam.TrainStep(loss_fn, base_optimizer(), method(name))
        params = to_tree(reference.mlp_params())
        state = step.init(params, jnp.zeros(()), BATCHES[0], key=KEY)
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *BATCHES[:3])
        state, infos = step.scan(state, stacked)
        assert_follows([from_tree(state.params)], [trained(name)[2][0]])
        assert infos.metrics["losses"].shape == (3, SIZE)


def test_a_sam_step_of_parts_is_m_sharpness():
    ours = train(lwsam.sam(0.3, split=lwsam.sub_batches(PARTS)), steps=4)
    inner = family.sam(GRADIENT, rho=0.3)

    def rule(number, w, last, batch):
        size = SIZE // PARTS
        rows = [slice(j * size, (j + 1) * size) for j in range(PARTS)]
        parts = [inner(number, w, last, family.rows_of(batch, row)) for row in rows]
        update = family.zeros(w)
        for move in parts:
            update = family.added(update, 1 / PARTS, move.update)
        return parts[0]._replace(update=update)

    assert_follows(params_of(ours), follow(rule, BATCHES[:4]))
    w = reference.mlp_params()
    for (params, info), batch in zip(ours, BATCHES[:4], strict=True):
        value = reference.mlp_value_and_grad(w, batch)[0]
        np.testing.assert_allclose(info.value, value)
        np.testing.assert_allclose(info.ascent_value, value)
        assert info.overhead > 0.9
        w = params
