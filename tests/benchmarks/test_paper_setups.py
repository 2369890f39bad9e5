"""The setups of the paper's benchmarks: its hyper-parameters, and what scales change."""

import dataclasses
import functools

import pytest
from flax import nnx

import lwsam_jax as lwsam
from lwsam_bench.commands import paper as command
from lwsam_bench.data.names import DATASETS
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.paper import setups, traced
from lwsam_bench.support.errors import UserError
from lwsam_bench.training import methods


# Table 1 and section 4.2, written down once more.
PAPER = {
    "cifar10": ("cifar10", "resnet20", 128, 0.1, 150, 0.8, 3, 4),
    "cifar100": ("cifar100", "wrn28-10", 128, 0.1, 200, 0.8, 2, 4),
    "flowers": ("oxford_flowers102", "wrn16-2", 40, 0.1, 100, 0.7, 3, 2),
    "vit": ("cifar100", "vit-b16", 128, 0.001, 10, 0.8, 2, 1),
}


@pytest.mark.parametrize("benchmark", setups.BENCHMARKS)
def test_the_paper_s_hyperparameters(benchmark):
    dataset, model, batch_size, lr, epochs, alpha, every, k = PAPER[benchmark]
    configs = {
        method: setups.config(benchmark, method, "paper", 0)
        for method in setups.METHODS
    }
    for config in configs.values():
        assert (config.dataset, config.model) == (dataset, model)
        assert (config.batch_size, config.lr) == (batch_size, lr)
        assert (config.epochs, config.steps) == (epochs, None)
        assert config.momentum == 0.9
        assert config.decay_at == (100 / 150, 130 / 150)
        assert config.train_images is config.test_images is None
    for method in ("generalized_sam", "lwsam"):
        config = configs[method]
        assert (config.rho, config.alpha, config.normalize) == (0.1, alpha, "none")
    assert configs["lwsam"].k == k
    assert configs["lwsam"].criterion == "high"
    assert configs["looksam"].every == every
    assert (configs["looksam"].rho, configs["looksam"].reuse) == (0.05, 0.7)
    assert configs["sgd"].rho == 0
    assert setups.seeds("paper") == (0, 1, 2)


def test_what_a_method_does_not_read_does_not_tell_its_runs_apart():
    for scale in setups.SCALES:
        k = {m: setups.config("cifar10", m, scale, 0).k for m in setups.METHODS}
        assert [m for m in k if k[m]] == ["lwsam"]
        every = {m: setups.config("cifar10", m, scale, 0).every for m in setups.METHODS}
        assert [m for m in every if every[m] != 1] == ["looksam"]


@pytest.mark.parametrize("scale", setups.SCALES)
def test_every_scale_has_every_benchmark(scale):
    for benchmark in (*setups.BENCHMARKS, "lm"):
        config = setups.config(benchmark, "lwsam", scale, 3, max_overhead=0.1)
        assert config.dataset in DATASETS
        assert (config.steps is None) != (config.epochs is None)
        assert (config.seed, config.max_overhead) == (3, 0.1)
        assert config.k <= setups.setup(benchmark, scale).layers
    assert setups.seeds(scale, 5) == (0, 1, 2, 3, 4)
    assert len(setups.seeds(scale)) == (1 if scale == "smoke" else 3)


def test_the_number_of_layers_is_that_of_the_networks():
    every = [
        setups.setup(benchmark, scale)
        for benchmark in (*setups.BENCHMARKS, "lm")
        for scale in setups.SCALES
    ]
    for name, expected in {setup.model: setup.layers for setup in every}.items():
        build = functools.partial(by_name.build, image_shape=(32, 32, 3), num_classes=7)
        model = nnx.eval_shape(lambda build=build, name=name: build(name, seed=0))
        params = Network.of(model, by_name.trainable(name)).params
        assert len(lwsam.Layers.of(params)) == expected, name


def test_networks_of_the_paper_s_size_are_traced():
    text = traced.sizes(setups.BENCHMARKS)
    assert "resnet20 with 269,722 trained parameters, 20 layers" in text
    assert "wrn28-10 with 36,536,884 trained parameters" in text  # 36.5 M
    assert "vit-b16" in text
    assert "gpt" in traced.sizes(("lm",))


def test_notes_tell_what_a_scale_changes():
    small = " ".join(setups.notes(("cifar10", "flowers"), "small"))
    assert "resnet8w8 instead of resnet20" in small
    assert "train images 2,000 instead of all" in small
    assert "oxford_flowers102_subset instead of oxford_flowers102" in small
    assert "weight decay" in small
    smoke = setups.notes(setups.BENCHMARKS, "smoke")
    assert "say nothing about the methods" in smoke[0]
    paper = setups.notes(("cifar10",), "paper")
    assert len(paper) == 1
    assert "instead of" not in paper[0]
    assert setups.notes(("lm",), "paper") == ()


def test_methods_beyond_the_paper_set_their_price():
    """The rule that docs/cost.md recommends, and the k largest within a bound."""
    config = setups.config("cifar10", setups.RECOMMENDED, "paper", 0)
    assert (config.rho, config.alpha, config.normalize) == (0.1, 1.0, "selected")
    made = methods.configure(config, 10)
    assert made.select == lwsam.top_k(4)
    assert (made.mean_overhead, made.max_overhead) == (0.5, None)
    assert made.combine is lwsam.descend()
    made = methods.configure(setups.config("cifar10", setups.BUDGETED, "paper", 0), 10)
    assert made.select == lwsam.top_k(4)
    assert (made.max_overhead, made.mean_overhead) == (0.1, None)
    setup = setups.setup("cifar10", "paper")
    assert [setups.label(x, setup) for x in setups.LABELS] == [
        "SGD",
        "generalised SAM",
        "LookSAM (3)",
        "layer-wise SAM (4)",
        "layer-wise SAM within 1.1 × (4)",
        "layer-wise SAM, mean of 1.5 × (4)",
    ]


def test_unknown_names():
    with pytest.raises(UserError, match="unknown scale 'huge': expected one of smoke"):
        setups.setup("cifar10", "huge")
    with pytest.raises(UserError, match="unknown benchmark 'mnist': expected one of"):
        setups.config("mnist", "sgd", "small", 0)


def test_setups_are_frozen_and_the_command_line_knows_the_scales():
    with pytest.raises(dataclasses.FrozenInstanceError):
        setups.setup("cifar10", "paper").k = 3
    assert command.SCALES == setups.SCALES
