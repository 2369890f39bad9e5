"""The rooms of `lwsam_bench`: who may import whom, and how much stands in one."""

import ast
import graphlib
import pathlib

import pytest

import lwsam_bench
from import_reader import Package


PACKAGE = Package(pathlib.Path(lwsam_bench.__file__).parent)
FILES = pytest.mark.parametrize("path", PACKAGE.modules, ids=PACKAGE.name)
FOLDERS = pytest.mark.parametrize(
    "folder",
    PACKAGE.folders(),
    ids=lambda path: ".".join(path.relative_to(PACKAGE.path.parent).parts),
)

# The floors of each folder, from below: its files, and the folders within it. What stands
# on a floor may import what stands below it, and nothing beside or above it. No
# `__init__` imports anything, so it has no floor.
FLOORS = {
    "": (
        ("support",),
        ("data", "models", "pages"),
        ("training",),
        ("comparison", "faults", "scaling", "sharpness", "speed", "tuning"),
        ("accelerator", "paper", "radius"),
        ("front",),
        ("commands",),
        ("__main__",),
    ),
    "support": (
        ("cores",),
        (
            "cache",
            "errors",
            "hlo",
            "measure",
            "progress",
            "provenance",
            "quick_compile",
            "stopping",
        ),
        ("processes", "row_lock", "rows"),
        ("tensorboard",),
    ),
    "data": (
        ("images", "names", "splits"),
        ("augment", "prepared", "text"),
        ("pipeline", "sources"),
    ),
    "models": (
        ("init", "names", "network"),
        ("parts", "vit"),
        ("finetune", "gpt", "resnet", "wrn"),
        ("smallcnn",),
        ("by_name",),
    ),
    "pages": (("docs", "report"),),
    "training": (
        ("checkpoint", "config", "evaluation", "family", "run_rows"),
        ("earlier", "methods", "vit_checkpoint"),
        ("recipe", "run_folder"),
        ("records", "tasks"),
        ("loop",),
    ),
    "tuning": (
        ("space", "tasks"),
        ("method", "protocol"),
        ("family",),
        ("methods",),
        ("results", "runs"),
        ("report", "workers"),
        ("tune",),
    ),
    "front": (("committed",), ("demo", "first"), ("pages",)),
    "tuning.report": (
        ("summary",),
        ("plot",),
        ("pareto", "verdicts"),
        ("page",),
        ("family",),
    ),
    "tuning.runs": (
        ("course", "measures", "optimizers"),
        ("trajectory",),
        ("images", "runner", "text"),
    ),
    "faults": (
        ("forked", "on_devices", "table"),
        ("trainer",),
        ("compare",),
        ("devices", "disks", "kills", "processes"),
        ("suite",),
    ),
    "radius": (("report", "trials"), ("run",)),
    "scaling": (("programs", "table"), ("run", "worker")),
    "sharpness": (("plot",), ("measure",)),
    "comparison": (
        ("precision_train",),
        ("precision",),
    ),
    "speed": (
        ("flops", "settings", "workloads"),
        ("baselines", "report"),
        ("racers",),
        ("limits", "race"),
        ("cost", "presets", "prices"),
    ),
    "paper": (
        ("published", "request"),
        ("scales",),
        ("setups",),
        ("artefact", "runs", "traced"),
        ("curves", "landscape", "report", "theorem1", "throughput"),
        ("tables",),
    ),
    "paper.curves": (("plots",), ("figures",)),
    "paper.landscape": (("grid", "report"), ("figures",)),
    "paper.report": (("absent", "extras", "grid"), ("page",)),
    "paper.runs": (("outcome",), ("attempts",), ("pool",), ("sweep",), ("grouped",)),
    "paper.theorem1": (("problem", "report"), ("bound",)),
    "paper.throughput": (("report",), ("race",)),
    "accelerator": (("networks", "report", "runs"), ("races",), ("evidence",)),
    "commands": (
        ("options",),
        ("demo", "faults", "find_rho", "measures", "paper", "train", "tune"),
        ("cli",),
    ),
    "commands.measures": (
        (
            "accelerator",
            "cost",
            "flops",
            "precision",
            "scaling",
            "sharpness",
            "speed",
        ),
    ),
    "commands.options": (("arguments",), ("method", "processes")),
}
MOST_FILES = 14  # in a folder
MOST_LINES = 350  # of a file


def upward(module: str, target: str) -> str:
    """Why a module must not import another one; empty if it may."""
    parts, others = module.split("."), target.split(".")
    shared = 0
    while parts[shared] == others[shared] and shared < min(len(parts), len(others)) - 1:
        shared += 1
    folder = ".".join(parts[:shared])
    mine, its = parts[shared], others[shared]
    at = {name: i for i, floor in enumerate(FLOORS[folder]) for name in floor}
    if its != "__init__" and at[its] >= at[mine]:
        return f"{mine} on floor {at[mine]} imports {its} of floor {at[its]}"
    return ""


@FILES
def test_imports_point_down(path):
    module = PACKAGE.name(path)
    found = [
        f"line {item.line}: {reason}"
        for item in PACKAGE.imports(path)
        for target in item.modules
        if (reason := upward(module, target))
    ]
    assert not found, f"{module}: " + "; ".join(found)


def test_the_check_itself_knows_up_from_down():
    assert not upward("training.loop", "training.tasks")
    assert not upward("training.config", "data.names")
    assert not upward("paper.tables", "paper.throughput.race")
    assert not upward("commands.cli", "__init__")
    assert upward("training.tasks", "training.loop")
    assert upward("data.names", "training.config")
    assert upward("data.sources", "pages.report")
    assert upward("paper.artefact", "paper.runs.sweep")


@FOLDERS
def test_every_file_and_folder_has_a_floor(folder):
    name = ".".join(folder.relative_to(PACKAGE.path).parts)
    there = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert {entry for floor in FLOORS[name] for entry in floor} == there


def test_imports_run_in_no_circle():
    """By the modules alone, whatever floors they were given."""
    list(graphlib.TopologicalSorter(PACKAGE.graph()).static_order())


@FOLDERS
def test_a_room_can_be_taken_in_at_a_glance(folder):
    files = list(folder.glob("*.py"))
    assert len(files) <= MOST_FILES, f"{folder.name}: {len(files)} files"


@FOLDERS
def test_a_room_says_what_is_in_it_and_imports_nothing(folder):
    """So `--help` waits for nothing that it does not show."""
    (only,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
    assert str(only.value.value).endswith(".")


@FILES
def test_no_file_is_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{PACKAGE.name(path)}: {lines} lines"
