"""The command `demo`: SGD, SAM and layer-wise SAM side by side on real images.

Scikit-learn's digits, with part of the training labels replaced at random: label noise
is where a flat minimum is known to matter. The methods take turns within each epoch, so
their times can be compared.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

import lwsam_jax as lwsam
from lwsam_bench.data import sources, splits
from lwsam_bench.data.augment import Batches
from lwsam_bench.models import by_name
from lwsam_bench.models.network import Network
from lwsam_bench.support.measure import Stopwatch
from lwsam_bench.support.rows import Row
from lwsam_bench.training.evaluation import Evaluator
from lwsam_bench.training.methods import make_method, with_radius
from lwsam_bench.training.recipe import make_loss_fn, make_schedule


@dataclasses.dataclass(frozen=True)
class DemoMethod:
    """One row of the table."""

    label: str
    method: str  # as `make_method` knows it
    rho: float
    k: int = 0
    every: int = 1

    @property
    def kind(self) -> tuple[str, int, int]:
        """All but the radius."""
        return self.method, self.k, self.every


# All radii by one rule: the smallest one within two points of the method's best mean in
# results/demo-radius.jsonl, on other seeds. The best ones themselves stand a step below
# where training breaks down, and some seeds fail there.
METHODS = (
    DemoMethod("SGD", "sgd", rho=0.0),
    DemoMethod("SAM every 2nd step", "sam", rho=0.9, every=2),
    DemoMethod("SAM", "sam", rho=0.6),
    DemoMethod("layer-wise SAM, top 4", "lwsam", rho=0.75, k=4),
)
BASE = METHODS[0].label


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Everything that decides the result of the demo."""

    methods: tuple[DemoMethod, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 40
    batch_size: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    label_noise: float = 0.4


@dataclasses.dataclass
class Racer:
    """A method under way."""

    method: DemoMethod
    step: lwsam.TrainStep
    state: Any = None
    infos: list[Any] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # of the last epoch

    def run(self, batches: Sequence[Any]) -> bool:
        """Run some steps; return whether none of them had to compile."""
        compiled = self.step.compile_seconds
        self.infos = []
        start = time.perf_counter()
        for batch in batches:
            self.state, info = self.step(self.state, batch)
            self.infos.append(info)
        jax.block_until_ready(self.state)
        self.seconds = time.perf_counter() - start
        return self.step.compile_seconds == compiled


class Demo:
    """The methods, their train steps, and the stopwatch that compares them."""

    def __init__(self, config: DemoConfig):
        self.config = config
        self.dataset = sources.load("digits")
        self.mean, self.std = self.dataset.statistics()
        self.steps_per_epoch = len(self.dataset.train) // config.batch_size
        network = self._network(seed=0)
        self.evaluate = Evaluator(
            network,
            self.dataset.test,
            mean=self.mean,
            std=self.std,
            batch_size=len(self.dataset.test),
        )
        self.racers = self._make_racers(network)
        self.stopwatch = Stopwatch()

    def epochs(self, seed: int) -> Iterator[list[Row]]:
        """Train all methods from one seed; yield a row for each after each epoch."""
        noisy = splits.corrupt_labels(
            self.dataset.train.labels,
            self.config.label_noise,
            self.dataset.num_classes,
            seed,
        )
        batches = Batches(
            splits.Split(self.dataset.train.images, noisy),
            batch_size=self.config.batch_size,
            seed=seed,
            mean=self.mean,
            std=self.std,
            augment=False,
        )
        network = self._network(seed)
        for racer in self.racers:
            state = racer.step.init(
                network.params,
                network.model_state,
                batches(0),
                key=jax.random.key(seed),
            )
            # SGD has no radius.
            rho = racer.method.rho
            racer.state = with_radius(state, rho) if rho else state
        for epoch in range(self.config.epochs):
            first = epoch * self.steps_per_epoch
            group = [batches(first + i) for i in range(self.steps_per_epoch)]
            jax.block_until_ready(group)
            times = {}
            # Nobody always runs first.
            turn = epoch % len(self.racers)
            for racer in self.racers[turn:] + self.racers[:turn]:
                if racer.run(group):
                    times[racer.method.label] = racer.seconds
            self.stopwatch.add_round(times)
            yield [self._row(racer, seed, epoch + 1) for racer in self.racers]

    def _make_racers(self, network: Network) -> list[Racer]:
        """Return a racer for each method; what it compiles, all seeds use.

        So do methods that differ in the radius alone, which is part of the state.
        """
        total = self.config.epochs * self.steps_per_epoch
        optimizer = optax.sgd(
            make_schedule(self.config.lr, total), momentum=self.config.momentum
        )
        loss_fn = make_loss_fn(network)
        steps: dict[tuple[Any, ...], lwsam.TrainStep] = {}
        for method in self.config.methods:
            if method.kind not in steps:
                made = make_method(
                    method.method,
                    rho=method.rho,
                    k=method.k,
                    when=lwsam.every(method.every),
                )
                steps[method.kind] = lwsam.TrainStep(loss_fn, optimizer, made)
        return [Racer(method, steps[method.kind]) for method in self.config.methods]

    def _network(self, seed: int) -> Network:
        return Network.of(
            by_name.build(
                "smallcnn",
                image_shape=self.dataset.image_shape,
                num_classes=self.dataset.num_classes,
                seed=seed,
            )
        )

    def _row(self, racer: Racer, seed: int, epoch: int) -> Row:
        infos = jax.device_get(racer.infos)
        test = self.evaluate(racer.state.params, racer.state.model_state)
        layers = racer.step.layers
        assert layers is not None  # the step has run
        names = in_depth_order(layers)
        norms = np.mean([info.norms for info in infos], axis=0)
        masks = np.sum([info.mask for info in infos], axis=0)
        where = [layers.names.index(name) for name in names]
        return {
            "kind": "epoch",
            "label": racer.method.label,
            "seed": seed,
            "epoch": epoch,
            "step": epoch * self.steps_per_epoch,
            "train_loss": float(np.mean([info.value for info in infos])),
            "train_accuracy": float(
                np.mean([info.metrics["accuracy"] for info in infos])
            ),
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "overhead": float(np.mean([info.overhead for info in infos])),
            "images_per_second": self.config.batch_size * len(infos) / racer.seconds,
            "norms": {n: float(norms[i]) for n, i in zip(names, where, strict=True)},
            "perturbed": {n: int(masks[i]) for n, i in zip(names, where, strict=True)},
        }


def in_depth_order(layers: lwsam.Layers) -> list[str]:
    """Return the names of the layers from the input to the output."""
    return [name for _, name in sorted(zip(layers.depth, layers.names, strict=True))]
