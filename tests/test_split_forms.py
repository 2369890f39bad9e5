"""What value_and_grad promises beyond equality: covers, masks, aux, effects, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layer_nets
import lwsam_jax as lwsam
import nets
from plain import assert_close, two_gradients


@functools.cache
def mlp():
    case = nets.mlp()
    return case, lwsam.Layers.of(case.params, None, case.loss, *case.args)


def penalized(selection, *, jit=True, **options):
    """value_and_grad of the small network, called on its own parameters."""
    case, layers = mlp()
    options = {"rho": 0.3, "alpha": 0.7, "layers": layers, **options}
    fn = lwsam.value_and_grad(case.loss, selection, has_aux=True, **options)
    return (jax.jit(fn) if jit else fn)(case.params, *case.args)


@functools.cache
def plain_cached(selected, options):
    case, _ = mlp()
    run = functools.partial(
        two_gradients, case.loss, selected=selected, **dict(options)
    )
    return jax.jit(run)(case.params, case.args)


def plain(selected, leaf_layers=None, **options):
    options = {"rho": 0.3, "alpha": 0.7, **options}
    if leaf_layers is not None:
        options["leaf_layers"] = tuple(leaf_layers)
    return plain_cached(tuple(selected), tuple(options.items()))


def test_eager_split_is_bitwise_the_plain_form():
    """Not jitted, the same operations run in the same order.

    A mean would not do: `jnp.mean` is jitted by itself, and XLA then divides otherwise.
    """
    case, layers = mlp()

    def loss(p, x):
        y = nets.affine(p["a_out"], nets.body(p, x))
        return jnp.sum(y * y), y

    for alpha in (0.7, 1.0):
        options = {"rho": 0.3, "alpha": alpha}
        fn = lwsam.value_and_grad(
            loss, ("m_mid",), layers=layers, has_aux=True, **options
        )
        out = fn(case.params, *case.args)
        expected = two_gradients(loss, case.params, case.args, ("m_mid",), **options)
        chex.assert_trees_all_equal(out.value, expected.value)
        chex.assert_trees_all_equal(out.aux, expected.aux)
        chex.assert_trees_all_equal(out.perturbed_value, expected.perturbed_value)
        chex.assert_trees_all_equal(out.grads, expected.grads)


@pytest.mark.parametrize("normalize", ["none", "selected", "full"])
@pytest.mark.parametrize("selected", [("a_out",), ("a_out", "z_in")])
def test_normalize_is_over_what_its_name_says(normalize, selected):
    out = penalized(selected, normalize=normalize)
    expected = plain(selected, normalize=normalize)
    assert_close(out.grads, expected.grads)
    assert_close(out.norms, expected.norms)
    assert_close(out.perturbed_value, expected.perturbed_value)


@pytest.mark.parametrize("normalize", ["none", "selected", "full"])
def test_a_mask_picks_among_the_layers_of_a_cover_at_run_time(normalize):
    case, layers = mlp()
    fn = lwsam.value_and_grad(
        case.loss,
        lwsam.Cover(("a_out", "m_mid")),
        rho=0.3,
        alpha=0.7,
        normalize=normalize,
        layers=layers,
        has_aux=True,
    )
    traces = []

    @jax.jit
    def run(params, mask):
        traces.append(None)
        return fn(params, *case.args, mask=mask)

    for picked in ((), ("a_out",), ("m_mid",), ("a_out", "m_mid")):
        out = run(case.params, np.isin(layers.names, picked))
        expected = plain(picked, normalize=normalize)
        assert_close(out.grads, expected.grads)
        assert_close(out.norms, expected.norms)
    assert len(traces) == 1


def test_a_layer_outside_the_cover_is_not_perturbed_whatever_the_mask_says():
    case, layers = mlp()
    fn = lwsam.value_and_grad(
        case.loss, lwsam.Cover(("a_out",)), rho=0.3, alpha=0.7, has_aux=True
    )
    out = jax.jit(fn)(case.params, *case.args, mask=np.ones(len(layers), bool))
    assert_close(out.grads, plain(("a_out",)).grads)


@pytest.mark.parametrize(
    "mask", [[True, False], [[True, False, True]], [1.0, 0.0, 1.0]], ids=str
)
def test_a_mask_of_another_shape_or_dtype_raises(mask):
    """JAX would clamp an index that is too large, and perturb another layer."""
    case, layers = mlp()
    fn = lwsam.value_and_grad(
        case.loss,
        lwsam.Cover(layers.names),
        rho=0.3,
        alpha=0.7,
        layers=layers,
        has_aux=True,
    )
    with pytest.raises(ValueError, match=r"`mask` to be bool\[3\]"):
        fn(case.params, *case.args, mask=jnp.asarray(mask))


def test_no_mask_means_all_layers_of_the_cover():
    names = ("a_out", "m_mid")
    assert_close(penalized(lwsam.Cover(names)).grads, plain(names).grads)


def test_the_order_of_names_in_a_selection_does_not_matter():
    one, other = penalized(("a_out", "z_in")), penalized(("z_in", "a_out"))
    chex.assert_trees_all_equal(one.grads, other.grads)


def test_aux_comes_from_the_clean_pass_or_on_request_from_the_perturbed_one():
    expected = plain(("z_in",))
    assert_close(penalized(("z_in",)).aux, expected.aux)
    out = penalized(("z_in",), aux_from="perturbed")
    assert_close(out.aux, expected.perturbed_aux)
    assert_close(out.value, expected.value)


def test_aux_that_passes_parameters_through_has_the_clean_ones():
    case = nets.aux_with_odd_contents()
    fn = lwsam.value_and_grad(case.loss, ("m_mid",), rho=0.3, alpha=1.0, has_aux=True)
    aux = fn(case.params, *case.args).aux
    chex.assert_trees_all_equal(aux["weight"], case.params["m_mid"]["kernel"])
    assert aux["none"] is None
    assert int(aux["count"]) == int(np.sum(np.asarray(aux["logits"]) > 0))


@pytest.mark.parametrize("name", ["probe", "unused"])
def test_perturbing_what_the_loss_ignores_is_the_plain_gradient(name):
    """Then the whole loss stands before the cut. Its norm is zero, not NaN."""
    make = {
        "probe": layer_nets.layer_used_only_in_aux,
        "unused": layer_nets.layer_never_used,
    }
    case = make[name]()

    @jax.jit
    def run(params, x):
        fn = lwsam.value_and_grad(
            case.loss,
            (name,),
            rho=0.3,
            alpha=0.7,
            normalize="selected",
            has_aux=True,
        )
        return fn(params, x), jax.value_and_grad(case.loss, has_aux=True)(params, x)

    out, ((value, aux), grads) = run(case.params, *case.args)
    assert_close((out.value, out.perturbed_value), (value, value))
    assert_close((out.grads, out.aux), (grads, aux))
    assert float(out.norms[case.names.index(name)]) == 0.0


def test_without_aux_the_field_is_none():
    case, _ = mlp()
    loss = lambda p, x: case.loss(p, x)[0]
    out = lwsam.value_and_grad(loss, ("a_out",), rho=0.3, alpha=0.7)(
        case.params, *case.args
    )
    assert out.aux is None
    assert_close(out.grads, plain(("a_out",)).grads)


def test_it_runs_inside_vmap():
    """One penalized gradient for each example, as for m-sharpness."""
    case, layers = mlp()
    fn = lwsam.value_and_grad(
        case.loss, ("m_mid",), rho=0.3, alpha=0.7, layers=layers, has_aux=True
    )
    x = case.args[0][:3, None]
    outs = jax.jit(jax.vmap(fn, (None, 0)))(case.params, x)
    for i in range(3):
        expected = two_gradients(
            case.loss, case.params, (x[i],), ("m_mid",), rho=0.3, alpha=0.7
        )
        assert_close(jax.tree.map(lambda leaf: leaf[i], outs.grads), expected.grads)  # noqa: B023
        assert_close(outs.norms[i], expected.norms)


def test_it_runs_inside_scan_and_under_remat():
    case, layers = mlp()
    fn = lwsam.value_and_grad(
        case.loss, ("m_mid",), rho=0.3, alpha=0.7, layers=layers, has_aux=True
    )

    @jax.jit
    def descend(params):
        def body(params, _):
            out = jax.checkpoint(fn)(params, *case.args)
            moved = jax.tree.map(lambda w, g: w - 0.1 * g, params, out.grads)
            return moved, out.value

        return jax.lax.scan(body, params, length=3)

    params, values = descend(case.params)
    expected = case.params
    for value in values:
        out = two_gradients(
            case.loss, expected, case.args, ("m_mid",), rho=0.3, alpha=0.7
        )
        assert_close(value, out.value, rtol=1e-5)
        expected = jax.tree.map(lambda w, g: w - 0.1 * g, expected, out.grads)
    assert_close(params, expected, rtol=1e-5)


def test_modules_rule_perturbs_kernel_and_bias_together():
    case, _ = mlp()
    names = [name for name in ("a_out", "m_mid", "z_in") for _ in range(2)]
    fn = lwsam.value_and_grad(
        case.loss, ("m_mid",), rho=0.3, alpha=0.7, rule=lwsam.modules, has_aux=True
    )
    out = jax.jit(fn)(case.params, *case.args)
    expected = plain(("m_mid",), leaf_layers=names)
    assert_close(out.grads, expected.grads)
    assert_close(out.norms, expected.norms)


def test_a_rule_of_the_user_groups_leaves_as_it_likes():
    case, _ = mlp()
    ends = lambda path, leaf: None if path[0].key == "m_mid" else "ends"
    fn = lwsam.value_and_grad(
        case.loss, ("ends",), rho=0.3, alpha=0.7, rule=ends, has_aux=True
    )
    out = jax.jit(fn)(case.params, *case.args)
    names = ["ends", "ends", None, None, "ends", "ends"]
    assert_close(out.grads, plain(("ends",), leaf_layers=names).grads)
    assert out.norms.shape == (1,)


# --- effects --------------------------------------------------------------------------


def printing_loss(log, ordered):
    say = lambda word: jax.debug.callback(lambda: log.append(word), ordered=ordered)

    def loss(p, x):
        say("start")
        h = nets.body(p, x)
        jax.debug.callback(lambda h: log.append("middle"), h, ordered=ordered)
        y = nets.affine(p["a_out"], h)
        jax.debug.callback(lambda y: log.append("logits"), y, ordered=ordered)
        say("end")
        return jnp.mean(y**2)

    return loss


@pytest.mark.parametrize("ordered", [True, False])
def test_effects_of_the_prefix_run_once_and_of_the_suffix_twice_in_order(ordered):
    """After the first effect of the suffix all later ones belong to it."""
    case, _ = mlp()
    log: list[str] = []
    loss = printing_loss(log, ordered)
    fn = lwsam.value_and_grad(loss, ("a_out",), rho=0.3, alpha=0.7)
    grads = jax.block_until_ready(jax.jit(fn)(case.params, *case.args).grads)
    jax.effects_barrier()
    if ordered:
        assert log == ["start", "middle", "logits", "end", "logits", "end"]
    else:
        assert sorted(log) == sorted(["start", "middle"] + 2 * ["logits", "end"])
    assert_close(grads, plain(("a_out",)).grads)


def test_prints_keep_their_values(capfd):
    case, _ = mlp()

    def loss(p, x):
        value, _ = case.loss(p, x)
        jax.debug.print("loss={value:.6f}", value=value)
        return value

    fn = lwsam.value_and_grad(loss, ("a_out",), rho=0.3, alpha=0.7)
    out = jax.block_until_ready(jax.jit(fn)(case.params, *case.args))
    jax.effects_barrier()
    printed = capfd.readouterr().out.split()
    assert sorted(printed) == sorted(
        [f"loss={float(out.value):.6f}", f"loss={float(out.perturbed_value):.6f}"]
    )


# --- what cannot be right raises ------------------------------------------------------


def run(loss, params, selection=("first",), **options):
    options = {"rho": 0.1, "alpha": 0.8, **options}
    return lwsam.value_and_grad(loss, selection, **options)(params)


PARAMS = {"first": jnp.ones((2, 2)), "second": jnp.ones((2, 2))}


@pytest.mark.parametrize("selection", [("first",), ()])
def test_integer_parameters_raise_as_in_jax_grad(selection):
    params = {**PARAMS, "steps": jnp.ones((), jnp.int32)}
    loss = lambda p: jnp.sum(p["first"] ** 2)
    with pytest.raises(TypeError):
        jax.grad(loss)(params)
    with pytest.raises(TypeError, match=r"`params`.*steps"):
        run(loss, params, selection)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: p["first"],
        lambda p: jnp.sum(p["first"]) + 1j,
        lambda p: (jnp.sum(p["first"]), None),
        lambda p: None,
        lambda p: jnp.int32(3),
    ],
    ids=["matrix", "complex", "forgotten has_aux", "none", "integer"],
)
@pytest.mark.parametrize("selection", [("first",), ()])
def test_a_loss_that_is_no_real_scalar_raises(loss, selection):
    with pytest.raises(TypeError, match="`loss_fn`.*scalar"):
        run(loss, PARAMS, selection)


def test_has_aux_without_aux_raises():
    with pytest.raises(TypeError, match="`loss_fn`.*aux"):
        run(lambda p: jnp.sum(p["first"]), PARAMS, has_aux=True)


@pytest.mark.parametrize("selection", [("third",), lwsam.Cover(("first", "third"))])
def test_an_unknown_layer_raises_and_lists_the_known_ones(selection):
    with pytest.raises(ValueError, match=r"`selection`.*third.*first, second"):
        run(lambda p: jnp.sum(p["first"]), PARAMS, selection)


@pytest.mark.parametrize("selection", ["first", None, {"first"}, 3, True])
def test_a_selection_of_another_kind_raises(selection):
    with pytest.raises(TypeError, match="`selection`"):
        run(lambda p: jnp.sum(p["first"]), PARAMS, selection)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"rho": -0.1}, "rho", "-0.1"),
        ({"rho": float("nan")}, "rho", "nan"),
        ({"rho": float("inf")}, "rho", "inf"),
        ({"alpha": -1}, "alpha", "-1"),
        ({"alpha": float("nan")}, "alpha", "nan"),
        ({"normalize": "layer"}, "normalize", "layer"),
        ({"normalize": True}, "normalize", "True"),
        ({"aux_from": "both"}, "aux_from", "both"),
    ],
)
def test_options_out_of_range_raise(options, name, value):
    with pytest.raises((ValueError, TypeError), match=rf"`{name}`.*{value}'?\. \w"):
        run(lambda p: jnp.sum(p["first"]), PARAMS, **options)


def test_a_mutable_reference_in_the_loss_raises():
    """It would be written twice. The constructor's name differs between versions."""
    new_ref = getattr(jax, "new_ref", None) or jax._src.core.mutable_array

    def loss(p):
        seen = new_ref(jnp.zeros(()))
        seen[...] = jnp.sum(p["first"])
        return jnp.sum(p["first"] ** 2) + seen[...]

    with pytest.raises(ValueError, match="`loss_fn`.*Ref"):
        run(loss, PARAMS)
