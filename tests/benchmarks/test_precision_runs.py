"""`lwsam-bench precision`: runs in three precisions, resumption, what it says of them."""

import io
import shutil

import jax
import pytest
from flax import nnx
from rich.console import Console

from lwsam_bench.comparison import precision
from lwsam_bench.comparison.precision_train import PRECISIONS, Task
from lwsam_bench.models import by_name
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import read_rows


TASK = Task(
    "digits",
    steps=8,
    faults=2,
    train_images=60,
    test_images=50,
    image_size=8,
    batch_size=10,
)
CONFIG = precision.PrecisionConfig(TASK, seeds=1)


class Tiny(nnx.Module):
    """Compiles in a tenth of the time of the network that is measured."""

    def __init__(self, channels, outputs, rngs):
        self.first = nnx.Conv(channels, 4, (3, 3), (2, 2), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, outputs, rngs=rngs)

    def __call__(self, x, *, train):
        x = self.norm(self.first(x), use_running_average=not train)
        return self.last(jax.nn.relu(x).mean((1, 2)))


@pytest.fixture(scope="module", autouse=True)
def _tiny_networks():
    def build(name, *, image_shape, num_classes, seed):
        assert name == "smallcnn"
        return Tiny(image_shape[-1], num_classes, nnx.Rngs(seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_name, "build", build)
        yield


def run(out, config=CONFIG):
    console = Console(file=io.StringIO(), width=200)
    code = precision.run(config, None, str(out), console)
    return code, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, _tiny_networks):
    out = tmp_path_factory.mktemp("precision")
    run(out)
    return out


def test_each_precision_is_a_row_and_skips_what_is_broken(finished):
    rows = list(read_rows(finished / precision.ROWS))
    assert [row["precision"] for row in rows] == list(PRECISIONS)
    assert TASK.faulty_steps() == [2, 6]
    for row in rows:
        assert row["faults"] == 2
        assert row["skipped"] == 2 + len(row["unlike"])
        assert row["train_loss"] < 10
        assert (row["loss_scale"] is not None) == (row["precision"] == "float16")
    table = (finished / precision.TABLE).read_text()
    assert "| bfloat16 |" in table


def test_what_is_there_is_not_run_again(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / precision.ROWS).read_text()
    (out / precision.ROWS).write_text(before[:-30])  # as a crash leaves it
    _, printed = run(out)
    assert printed.count("seed 0") == 1
    rows = [list(read_rows(folder / precision.ROWS)) for folder in (finished, out)]
    same = lambda row: (row["precision"], row["test_accuracy"], row["skipped"])
    assert [same(row) for row in rows[0]] == [same(row) for row in rows[1]]


def test_rows_of_another_task_are_refused(finished):
    other = precision.PrecisionConfig(Task("digits", steps=9), seeds=1)
    with pytest.raises(UserError, match="another task"):
        run(finished, other)


def test_what_does_not_hold_is_said():
    row = {"seed": 0, "faults": 5, "skipped": 5}
    good = [
        {**row, "precision": name, "test_accuracy": x}
        for name, x in (("float32", 0.5), ("bfloat16", 0.495), ("float16", 0.52))
    ]
    assert precision.broken(good) == []
    bad = [good[0], {**good[1], "test_accuracy": 0.48}, {**good[2], "skipped": 4}]
    taken, below = precision.broken(bad)
    assert "float16, seed 0: 5 batches had a NaN, but 4" in taken
    assert "bfloat16 is 2.0 points below float32" in below
