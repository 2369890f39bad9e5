"""The split of random losses is the plain form: two whole gradients, in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np

import lwsam_jax as lwsam
from hostile import compiled_examples, examples, only_our_errors
from plain import assert_close, enable_x64, two_gradients
from random_programs import arguments, LAYERS, Line, Program, programs


SELECTIONS = st.lists(st.sampled_from(LAYERS), unique=True, min_size=1).map(tuple)
OPTIONS = st.fixed_dictionaries(
    {
        "rho": st.sampled_from([0.05, 0.3]),
        "alpha": st.sampled_from([0.0, 0.7, 1.0]),
        "normalize": st.sampled_from(["none", "selected", "full"]),
    }
)


def assert_is_plain(program, selection, options, seed, mask, wrap=lambda f: f):
    """A tuple perturbs its layers; a cover those of its layers that the mask names."""
    with enable_x64(True):
        params, data = arguments(seed)
        named = selection if mask is None else lwsam.Cover(selection)
        # Whole leaves: by itself it would take a matrix that a scan reads for a stack.
        layers = lwsam.Layers.of(params)
        split = lwsam.value_and_grad(
            program.loss, named, layers=layers, has_aux=True, **options
        )
        out = wrap(split)(params, data, **({} if mask is None else {"mask": mask}))
        if mask is not None:
            chosen = np.isin(LAYERS, selection) & mask
            selection = tuple(np.asarray(LAYERS)[chosen].tolist())
        whole = lambda p, d: two_gradients(program.loss, p, (d,), selection, **options)
        plain = jax.jit(whole)(params, data)  # compiled, a third of the time
        if not np.isfinite(float(plain.perturbed_value)):
            return
        # What went through fewer bits may round otherwise by one of these.
        rtol = 2e-2 if program.is_coarse else 1e-9
        assert_close(out.value, plain.value, rtol)
        assert_close(out.perturbed_value, plain.perturbed_value, rtol)
        assert_close(out.aux, plain.aux, rtol)
        assert_close(out.grads, plain.grads, rtol)
        # A gradient of exactly 0 has a norm of exactly 0.
        norms = np.asarray(plain.norms, np.float64)
        np.testing.assert_allclose(out.norms, norms, rtol=max(rtol, 1e-6), atol=1e-12)


MASKS = st.lists(st.booleans(), min_size=4, max_size=4).map(np.asarray)
DRAWN = (
    programs(),
    SELECTIONS,
    OPTIONS,
    st.integers(0, 5),
    st.one_of(st.none(), st.none(), MASKS),
)
# The only selected layer is in the branch that is not taken: its gradient is 0.
UNREACHED = (
    Program((Line("affine", (0, 0, 0)), Line("cond", (1, 1, 0))), 1, ""),
    ("w0",),
    {"rho": 0.05, "alpha": 0.0, "normalize": "selected"},
    0,
    None,
)


@compiled_examples
@hypothesis.given(*DRAWN)
@hypothesis.example(*UNREACHED)
def test_a_split_program_has_the_gradient_of_the_whole(
    program, selection, options, seed, mask
):
    assert_is_plain(program, selection, options, seed, mask, jax.jit)


@compiled_examples
@hypothesis.given(*DRAWN)
@hypothesis.example(*UNREACHED)
def test_so_it_has_operation_by_operation(program, selection, options, seed, mask):
    """Slower than compiled: each loop and branch is compiled by itself."""
    assert_is_plain(program, selection, options, seed, mask)


@examples
@hypothesis.given(programs(), st.integers(0, 5))
def test_layers_of_a_program_have_a_depth_and_a_price_each(program, seed):
    params, data = arguments(seed)
    with only_our_errors():  # where a scan reads each matrix there is no layer
        layers = lwsam.Layers.of(params, None, program.loss, data)
        scanned = any(line.operation == "scan" for line in program.lines)
        assert set(layers.names) == set(LAYERS) or scanned
        assert sorted(layers.depth) == list(range(len(layers)))
        loss = lambda p, d: program.loss(p, d)[0]
        cost = lwsam.step_cost(loss, params, data, layers=layers)
        whole = cost.ratio(layers.names)
        assert cost.ratio(()) == 1.0
        for name in layers.names:
            assert 0.99 <= cost.ratio((name,)) <= whole + 1e-6
