"""`lwsam-bench sharpness RUN`: numbers, table and plot of the network of a run."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from lwsam_bench.commands.cli import _parser, main
from lwsam_bench.commands.train import train_config
from lwsam_bench.models import smallcnn
from lwsam_bench.sharpness import measure, plot
from lwsam_bench.support.errors import UserError
from lwsam_bench.training import loop, tasks
from lwsam_bench.training.config import RunOptions


BRIEF = ["train", "--method", "sgd", "--batch-size", "8", "--steps", "5"]
BRIEF += ["--train-images", "24", "--test-images", "20"]
EXTENT = measure.Extent(examples=16, m=4, eigenvalues=2, iterations=6, samples=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smallcnn, "BLOCKS", ((4, 1),))
        out = tmp_path_factory.mktemp("run")
        config = train_config(_parser().parse_args(BRIEF))
        options = RunOptions(str(out), None, log_every=2, checkpoint_every=3)
        assert loop.train(config, options, Console(file=io.StringIO())) == 0
        console = Console(file=io.StringIO(), width=300)
        assert measure.run(str(out), EXTENT, None, console) == 0
        yield out, console.file.getvalue()


def test_the_numbers_are_those_of_the_network(run):
    out, printed = run
    row = json.loads((out / measure.NUMBERS).read_text())
    assert row["step"] == 5
    assert list(row["layers"]) == ["stem_conv", "block1/conv1", "block1/conv2", "dense"]
    for part in (row["whole"], *row["layers"].values()):
        assert len(part["eigenvalues"]) == 2 == len(part["residuals"])
        assert part["eigenvalues"][0] >= part["eigenvalues"][1]
        # Uphill is uphill, and no direction rises more than the gradient's at first.
        assert part["m_sharpness"] > 0 < part["gradient"]
        assert part["gradient"] > part["random"]
    largest = max(part["eigenvalues"][0] for part in row["layers"].values())
    assert row["whole"]["eigenvalues"][0] >= largest * 0.99
    assert (out / measure.PLOT).stat().st_size > 10_000
    table = (out / measure.TABLE).read_text()
    assert table.strip() in printed.strip().replace("  ", " ")
    assert table == plot.markdown(row)
    assert "| along minus the momentum |" in table.splitlines()[0]


def test_the_loss_is_that_of_evaluation(run):
    out, _ = run
    config = measure.config_of(out)
    task = tasks.make(config, None)
    state = loop.final_state(out, config, task)
    row = json.loads((out / measure.NUMBERS).read_text())
    batches = [task.batches(step) for step in range(2)]
    losses = []
    for batch in batches:
        logits, _ = task.network.apply(
            state.params, state.model_state, batch["image"], train=False
        )
        chosen = jax.nn.log_softmax(logits)[np.arange(8), batch["label"]]
        losses.append(-float(chosen.mean()))
    np.testing.assert_allclose(row["value"], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "1000"], "--examples 1000 is more than the 24 of an epoch"),
        (
            ["--examples", "16", "--m", "5"],
            "`m` to be a divisor of the batch 16, got 5",
        ),
    ],
)
def test_what_cannot_be_measured(run, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(smallcnn, "BLOCKS", ((4, 1),))
    assert main(["sharpness", str(run[0]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run of `train`"):
        measure.config_of(tmp_path)
