"""The methods that `speed` compares, each as its user would write its training step."""

import abc
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

import lwsam_jax as lwsam
from lwsam_bench.speed import baselines
from lwsam_bench.speed.workloads import Workload


SAM_RHO = 0.05  # Foret et al. (2021) for CIFAR-10
PAPER_K, PAPER_RHO, PAPER_ALPHA = 4, 0.1, 0.8  # Lee (2024) for CIFAR-10
FRACTION = 0.1  # of the batch, that a cheap ascent sees
MOMENTUM_RHO = 3.0  # Becker et al. (2024)
RELATIVE_RHO, NOISE_RHO = 0.1, 0.2  # shares of the norm of each layer

SGD = "SGD"
OPTAX_SAM = "optax.contrib.sam"
PAPER = f"layer-wise SAM, top {PAPER_K}"
TENTH = f"{PAPER}, ascent on 1/10"
SAM_TENTH = "SAM, ascent on 1/10"
MOMENTUM_SAM = "momentum_sam"
PERTURBED = "perturbed, momentum"
NOISE = "perturbed, random"


class Program(NamedTuple):
    """An executable of a method.

    Attributes:
      model: Its FLOPs over a plain gradient, by the cost model.
      steps: How many steps it ran.
      lower: Returns its `jax.stages.Lowered`.
    """

    model: float
    steps: int
    lower: Callable[[], Any]


class Racer(abc.ABC):
    """A method under training; a subclass says how a step runs.

    Attributes:
      label: Its name in the table.
      ratios: FLOPs of each step over a plain gradient, by the cost model.
      compile_seconds: Spent in calls that had to compile.
    """

    label: str
    ratios: list[float]
    compile_seconds: float

    @abc.abstractmethod
    def start(self, workload: Workload) -> None:
        """Make the state before the first step."""

    @abc.abstractmethod
    def step(self, batch: Any) -> Any:
        """Run a step and return, without waiting for it, what to wait for."""

    @abc.abstractmethod
    def note(self) -> None:
        """Read what the steps since the last call report, outside the measured time."""

    @abc.abstractmethod
    def programs(self, batch: Any) -> Iterable[Program]:
        """Yield the executables that ran."""

    def host_seconds(self, batch: Any, steps: int) -> list[float]:
        """Run more steps; return the time of each beyond that of its executable."""
        del batch, steps
        return []


class PlainRacer(Racer):
    """A step of one executable.

    Args:
      label: Its name in the table.
      make: Of `baselines`.
      gradients: FLOPs of a step over a plain gradient.
    """

    def __init__(
        self, label: str, make: Callable[[Workload], baselines.Made], gradients: float
    ):
        self.label, self._make, self._gradients = label, make, gradients

    def start(self, workload: Workload) -> None:
        """Make the state: parameters, model state, optimizer state."""
        self._step, init = self._make(workload)
        params, model_state = _copy((workload.params, workload.model_state))
        self._state = (params, model_state, init(params))
        self.ratios, self.compile_seconds, self._done = [], 0.0, 0

    def step(self, batch: Any) -> Any:
        """Run a step."""
        began = time.perf_counter()
        self._state = self._step(self._state, batch)
        if not self._done:
            self.compile_seconds = time.perf_counter() - began
        self._done += 1
        return self._state

    def note(self) -> None:
        """Count the steps: they all cost the same."""
        self.ratios = [self._gradients] * self._done

    def programs(self, batch: Any) -> Iterable[Program]:
        """Yield the only one."""
        lower = lambda: self._step.lower(self._state, batch)
        yield Program(self._gradients, len(self.ratios), lower)


class TrainStepRacer(Racer):
    """A method of this project, by `lwsam.TrainStep`.

    Args:
      label: Its name in the table.
      method: What it is.
      **options: Of `TrainStep`.

    Attributes:
      selections: The layers of each step; bit i stands for the i-th layer.
    """

    def __init__(self, label: str, method: lwsam.Method, **options: Any):
        self.label, self._method, self._options = label, method, options

    def start(self, workload: Workload) -> None:
        """Make step and state."""
        self.train_step = lwsam.TrainStep(
            workload.loss_fn, workload.optimizer, self._method, **self._options
        )
        params, model_state, batch, key = workload.args()
        self._state = self.train_step.init(params, model_state, batch, key=key)
        self._unread: list[Any] = []
        self.ratios, self.selections = [], []

    @property
    def compile_seconds(self) -> float:
        """As the train step counts them."""
        return self.train_step.compile_seconds

    def step(self, batch: Any) -> Any:
        """Run a step."""
        self._state, info = self.train_step(self._state, batch)
        self._unread.append((info.overhead, info.mask))
        return self._state, info

    def note(self) -> None:
        """Read what the steps cost and which layers they perturbed."""
        for overhead, mask in self._unread:
            self.ratios.append(1.0 + float(overhead))
            chosen = np.flatnonzero(mask).tolist()
            self.selections.append(sum(1 << i for i in chosen))
        self._unread = []

    def programs(self, batch: Any) -> Iterable[Program]:
        """Yield those that ran."""
        assert self.train_step.cost is not None
        ratios = np.asarray(self.ratios)
        for cover in self.train_step.executables:
            model = self.train_step.cost.ratio(cover, self._method.ascent)
            # The step reports in float32.
            steps = int(np.sum(np.abs(ratios - model) < 1e-6))
            lower = lambda cover=cover: self.train_step.lower(self._state, batch, cover)
            yield Program(model, steps, lower)

    def host_seconds(self, batch: Any, steps: int) -> list[float]:
        """Run more steps; return the time of each beyond that of its executable.

        That is reading the mask, choosing the executable, and whatever else the call
        does on an idle device. Dispatching the executable, as every jitted function
        needs, is not in it: the clock stops from the call of the executable until its
        results are there.
        """
        inside = 0.0

        def timed(executable: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                nonlocal inside
                began = time.perf_counter()
                result = jax.block_until_ready(executable(*args))
                inside += time.perf_counter() - began
                return result

            return call

        # Past the library's surface: only there its own time can be told from the rest.
        compiled = self.train_step._compiled
        assert compiled is not None
        executables = compiled.executables
        kept: dict[lwsam.Cover, Callable[..., Any]] = {}
        found = []
        for _ in range(steps):
            for choice, executable in executables._steps.items():
                if choice not in kept:  # another one may be compiled at any step
                    kept[choice] = executable
                    executables._steps[choice] = timed(executable)
            inside, compiling = 0.0, self.compile_seconds
            began = time.perf_counter()
            result = self.train_step(self._state, batch)
            took = time.perf_counter() - began
            # Past the clock: here the arrays of the old state are let go, which is the
            # caller's doing with any step that donates.
            self._state = result[0]
            if self.compile_seconds == compiling:
                found.append(took - inside)
        for choice in executables._steps:
            executables._steps[choice] = kept.get(choice, executables._steps[choice])
        return found


def everyone() -> list[Racer]:
    """Return the rows of the table; the first is what the others are compared with."""
    paper = {"k": PAPER_K, "rho": PAPER_RHO, "alpha": PAPER_ALPHA}
    tenth = lwsam.micro_batch(FRACTION)
    return [
        PlainRacer(SGD, baselines.sgd, 1.0),
        PlainRacer(OPTAX_SAM, baselines.optax_sam(SAM_RHO), 2.0),
        PlainRacer(
            "generalised SAM, two gradients",
            baselines.two_gradients(PAPER_RHO, PAPER_ALPHA),
            2.0,
        ),
        *(
            TrainStepRacer(
                f"SAM every {n} steps", lwsam.sam(SAM_RHO, when=lwsam.every(n))
            )
            for n in (2, 5)
        ),
        TrainStepRacer(PAPER, lwsam.LayerwiseSAM(**paper)),
        *(
            TrainStepRacer(budget(b), lwsam.LayerwiseSAM(**paper, max_overhead=b))
            for b in (0.05, 0.10, 0.25)
        ),
        TrainStepRacer(
            TENTH, lwsam.Method(lwsam.top_k(PAPER_K), rho=PAPER_RHO, ascent=tenth)
        ),
        TrainStepRacer(SAM_TENTH, lwsam.sam(SAM_RHO, ascent=tenth)),
        *_optimizers(),
    ]


def _optimizers() -> list[Racer]:
    """Return the methods that are optimizers, each in the loop of SGD."""
    made = {
        MOMENTUM_SAM: lambda base: lwsam.momentum_sam(base, MOMENTUM_RHO),
        PERTURBED: lambda base: lwsam.perturbed(base, RELATIVE_RHO),
        NOISE: lambda base: lwsam.perturbed(base, NOISE_RHO, ascent=lwsam.random()),
    }
    return [
        PlainRacer(label, baselines.plain(change), 1.0)
        for label, change in made.items()
    ]


def budget(max_overhead: float) -> str:
    """Return the label of layer-wise SAM within a bound for every step."""
    return f"{PAPER}, max_overhead {max_overhead:.2f}"


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.copy(), tree)
