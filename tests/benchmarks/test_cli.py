"""What a user can get wrong ends with a message and exit code 2, never a traceback."""

import json

import numpy as np
import pytest

from lwsam_bench.commands.cli import _parser, main
from lwsam_bench.commands.train import train_config


def train(*arguments):
    return main(["train", "--dataset", "digits", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "imagenet"], "unknown dataset 'imagenet'"),
        (["train", "--dataset", "none.npz", "--steps", "1"], "no such file: none.npz"),
        (["train", "--method", "sgd", "--rho", "0.1"], "--rho has no meaning"),
        (["train", "--method", "sam", "--k", "3"], "--k has no meaning"),
        (["train", "--method", "gsam", "--max-overhead", "1"], "--max-overhead has no"),
        (["train", "--method", "sgd", "--every", "2"], "--every has no meaning"),
        (["train", "--method", "looksam", "--alpha", "1"], "--alpha has no meaning"),
        (["train", "--method", "lwsam", "--reuse", "1"], "--reuse has no meaning"),
        (
            ["train", "--method", "esam", "--ascent", "random"],
            "--ascent has no meaning",
        ),
        (["train", "--method", "asam", "--shape", "raw"], "--shape has no meaning"),
        (
            ["train", "--method", "gsam", "--ascent", "momentum"],
            "--ascent momentum has no meaning for --method gsam",
        ),
        (
            ["train", "--ascent", "momentum", "--alpha", "0.8"],
            "--alpha has no meaning for --ascent momentum",
        ),
        (
            ["train", "--fraction", "0.2"],
            "--fraction has no meaning for --ascent whole",
        ),
        (["train", "--shape", "relative"], "another unit than that of --method lwsam"),
        (["train", "--ascent", "random"], "say --rho"),
        (
            ["train", "--ascent", "micro_batch", "--batch-size", "8", "--steps", "1"],
            "0 of 8 examples",
        ),
        (
            ["train", "--optimizer", "adamw", "--momentum", "0"],
            "--momentum has no mean",
        ),
        (["train", "--model", "wrn10-1", "--weights", "x"], "--weights has no meaning"),
        (["train", "--model", "gpt"], "--model gpt cannot learn from --dataset digits"),
        (
            ["train", "--dataset", "tiny_shakespeare", "--augment"],
            "--augment has no meaning for --model gpt",
        ),
        (
            ["train", "--dataset", "tiny_shakespeare", "--model", "wrn10-1"],
            "take gpt",
        ),
        (["train", "--steps", "1", "--batch-size", "5000"], "--batch-size 5000"),
    ],
)
def test_errors_of_the_user(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_data(tmp_path, capsys):
    arguments = ["--dataset", "cifar10", "--data-dir", str(tmp_path / "data")]
    out = str(tmp_path / "run")
    assert main(["train", *arguments, "--steps", "1", "--out", out]) == 2
    message = capsys.readouterr().err
    assert 'file_format="array_record"' in message
    assert str(tmp_path / "data") in message


@pytest.mark.parametrize(
    "option",
    [
        "--rho=-1",
        "--rho=nan",
        "--alpha=inf",
        "--lr=fast",
        "--k=0",
        "--steps=0",
        "--epochs=1.5",
        "--batch-size=-3",
        "--label-smoothing=1",
        "--seed=-1",
        "--model=vgg",
        "--model=resnet21",
        "--model=wrn28",
        "--criterion=best",
        "--every=0",
        "--max-overhead=-1",
        "--optimizer=lion",
        "--train-images=0",
        "--normalize=some",
        "--ascent=up",
        "--fraction=0",
        "--fraction=1.5",
        "--shape=round",
        "--last=0",
    ],
)
def test_bad_values_name_the_option(capsys, option):
    with pytest.raises(SystemExit) as caught:
        main(["train", option])
    assert caught.value.code == 2
    name, value = option.split("=")
    message = capsys.readouterr().err
    assert name in message
    assert value in message


def test_steps_and_epochs_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--steps", "1", "--epochs", "1"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("train", "--steps", "1"), ("demo",)])
def test_output_that_cannot_be_written(tmp_path, capsys, command):
    (tmp_path / "file").touch()
    assert main([*command, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write to --out" in capsys.readouterr().err


def test_more_layers_than_there_are(tmp_path, capsys):
    assert train("--k", 11, "--steps", 1, "--out", tmp_path) == 2
    assert "`k`" in capsys.readouterr().err


def test_a_run_of_another_configuration_is_refused(tmp_path, capsys):
    run = ("--method", "sgd", "--steps", 2, "--batch-size", 16, "--out", tmp_path)
    assert train(*run) == 0
    capsys.readouterr()
    assert train(*run, "--lr", 0.2) == 2
    assert "lr: 0.1 -> 0.2" in capsys.readouterr().err
    assert train(*run) == 0
    assert "finished" in capsys.readouterr().out

    # Checkpoints alone tell whose they are.
    (tmp_path / "config.json").unlink()
    assert train(*run, "--lr", 0.2) == 2
    assert "lr: 0.1 -> 0.2" in capsys.readouterr().err
    assert train(*run, "--lr", 0.2, "--no-resume") == 0
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["lr"] == 0.2
    assert [origin["from_step"] for origin in record["provenance"]] == [0]
    assert record["provenance"][0]["packages"]["jax"]

    (tmp_path / "config.json").write_text("{")
    assert train(*run) == 2
    assert "config.json cannot be read" in capsys.readouterr().err


def damage(folder):
    for path in (folder / "state" / "d").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_damaged_checkpoint(command, tmp_path):
    # A process of its own: what it prints while it ends counts too.
    run = ["train", "--method", "sgd", "--steps", 2, "--out", tmp_path]
    assert command.run(*run)[0] == 0
    checkpoints = tmp_path / "checkpoints"
    damage(checkpoints / "2")
    (tmp_path / "config.json").unlink()  # written last, so it need not be there
    (tmp_path / "metrics.jsonl").write_text("")
    code, output = command.run(*run)
    assert code == 0, output
    assert f"{checkpoints / '2'} cannot be read" in output
    assert f"it is in {tmp_path / 'damaged-2'} now" in output
    assert "going on from step 1 of 2" in output
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    assert {path.name for path in checkpoints.iterdir()} == {"1", "2"}
    # Where none can be read, nothing is moved, and the remedy is named.
    for step in (1, 2):
        damage(checkpoints / str(step))
    (tmp_path / "config.json").unlink()
    (tmp_path / "metrics.jsonl").write_text("")
    code, output = command.run(*run)
    assert code == 2, output
    assert f"{checkpoints / '2'} cannot be read" in output
    assert output.count("\n") == 1
    assert {path.name for path in checkpoints.iterdir()} == {"1", "2"}


def test_a_file_of_arrays_is_a_dataset(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "blobs.npz"
    np.savez(
        path,
        x_train=rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
        y_train=np.arange(16) % 4,
        x_test=rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
        y_test=np.arange(5) % 4,
    )
    out = tmp_path / "run"
    arguments = ["--dataset", path, "--model", "smallcnn", "--method", "sgd"]
    arguments += ["--steps", 1, "--batch-size", 8, "--out", out]
    assert main(["train", *map(str, arguments)]) == 0
    *_, test, end = (out / "metrics.jsonl").read_text().splitlines()
    test, end = json.loads(test), json.loads(end)
    assert (test["kind"], end["kind"]) == ("test", "end")
    assert end["accuracy"] == test["accuracy"]


def defaults(*arguments):
    return train_config(_parser().parse_args(["train", *arguments]))


def test_defaults_are_the_recipe_of_the_paper():
    config = defaults("--dataset", "cifar10")
    assert (config.model, config.method, config.epochs) == ("resnet20", "lwsam", 150)
    assert (config.k, config.rho, config.alpha) == (4, 0.1, 0.8)
    assert config.normalize == "none"
    assert (config.batch_size, config.lr, config.momentum) == (128, 0.1, 0.9)
    assert (config.weight_decay, config.label_smoothing) == (1e-4, 0.1)
    assert config.augment


def test_defaults_follow_data_method_and_optimizer():
    flowers = defaults("--dataset", "oxford_flowers102", "--method", "generalized_sam")
    assert (flowers.model, flowers.batch_size, flowers.epochs) == ("wrn16-2", 40, 100)
    assert (flowers.rho, flowers.alpha, flowers.normalize) == (0.1, 0.8, "none")
    look = defaults("--dataset", "cifar100", "--method", "looksam")
    assert (look.model, look.epochs, look.every, look.reuse) == (
        "wrn28-10",
        200,
        3,
        0.7,
    )
    text = defaults("--dataset", "tiny_shakespeare", "--optimizer", "adamw")
    assert (text.model, text.lr, text.label_smoothing) == ("gpt", 0.001, 0.0)
    assert defaults("--dataset", "cifar100", "--model", "vit-b16").lr == 0.001
    assert defaults().criterion == "high"
