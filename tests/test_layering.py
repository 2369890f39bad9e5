"""Who may import whom, and what every public name must have."""

import ast
import graphlib
import inspect
import pathlib
import re
import sys

import pytest

import lwsam_jax as lwsam
from import_reader import Import, Package


ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = Package(ROOT / "lwsam_jax")
MODULES, NAMES = PACKAGE.modules, PACKAGE.names

# The floors of the house, and those within each of its folders, from below. What stands
# on a floor may import what stands below it, and nothing beside or above it. A new
# module of the first five needs a floor here; a preset does not.
HOUSE = (
    ("_checks", "_version"),
    ("_tree",),
    ("_engine",),
    ("_axes",),
    ("_method",),
    ("_loops",),
    ("_measure",),
    ("_devices",),
    ("_train",),
    ("_presets",),
    ("__init__",),
)
FOLDERS = {
    "_engine": (
        ("__init__", "graph", "loss_scale", "rules"),
        ("stacks", "trace"),
        ("flops",),
        ("cut", "depth"),
        ("layers",),
        ("cover",),
        ("peel",),
        ("run",),
        ("cost",),
    ),
    "_axes": (
        ("__init__", "moments", "noise", "shape", "sparse", "when", "which"),
        ("ascent", "bandit", "combine", "proportional"),
        ("descent", "probe", "sub_batches"),
    ),
    "_loops": (
        ("__init__", "plan", "refresh", "static", "varying"),
        ("arguments", "moves", "state"),
        ("held", "separate"),
        ("passes",),
        ("functional",),
        ("perturbed", "transform"),
    ),
    "_measure": (
        ("__init__", "lanczos"),
        ("sharpness",),
    ),
    "_devices": (
        ("__init__", "accumulate", "hosts", "layout", "local"),
        ("mesh",),
        ("apart",),
        ("spread",),
    ),
    "_train": (
        (
            "__init__",
            "executables",
            "find_rho",
            "parts",
            "skipping",
            "state",
            "step_checks",
            "update",
        ),
        ("budget", "masks", "study"),
        ("one_step",),
        ("compiled",),
        ("step",),
    ),
}
MOST_FILES = 14  # in a folder
MOST_LINES = 350  # of a file
RUN_TIME = {"jax", "numpy", "optax"}
TYPES_ONLY = {"chex"}


_name = PACKAGE.name


def _at(floors: tuple[tuple[str, ...], ...], name: str) -> int | None:
    return next((i for i, floor in enumerate(floors) if name in floor), None)


def _floor(name: str) -> tuple[int, int] | None:
    """The floor in the house and that in the folder; None if the module has none."""
    folder, _, inside = name.rpartition(".")
    house = _at(HOUSE, name.partition(".")[0])
    if name.startswith("_presets."):
        within = 0 if inside in ("__init__", "preset") else 1
    else:
        within = _at(FOLDERS[folder], inside) if folder in FOLDERS else 0
    return None if house is None or within is None else (house, within)


def _upward(module: str, imports: list[Import]) -> list[str]:
    floor = _floor(module)
    assert floor is not None, f"{module}: give it a floor"
    return [
        f"line {found.line}: floor {floor} imports {target} of floor {_floor(target)}"
        for found in imports
        for target in found.modules
        if (_floor(target) or floor) >= floor
    ]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_down(path):
    upward = _upward(_name(path), PACKAGE.imports(path))
    assert not upward, f"{_name(path)}: " + "; ".join(upward)


def test_every_floor_has_its_module():
    """None of those that are named here is gone."""
    named = {name for floor in HOUSE for name in floor if not _is_folder(name)}
    for folder, floors in FOLDERS.items():
        named |= {f"{folder}.{name}" for floor in floors for name in floor}
    assert named <= NAMES
    folders = {_name(path).partition(".")[0] for path in MODULES}
    folders = {name for name in folders if _is_folder(name)}
    assert folders == {name for floor in HOUSE for name in floor if _is_folder(name)}


def _is_folder(name: str) -> bool:
    return (PACKAGE.path / name).is_dir()


def test_imports_run_in_no_circle():
    """By the modules alone, whatever floors they were given."""
    list(graphlib.TopologicalSorter(PACKAGE.graph()).static_order())


@pytest.mark.parametrize("folder", PACKAGE.folders(), ids=lambda path: path.name)
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    files = list(folder.glob("*.py"))
    assert len(files) <= MOST_FILES, f"{folder.name}: {len(files)} files"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_no_file_is_long(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{_name(path)}: {lines} lines"


def test_a_preset_is_known_to_the_exports_alone():
    """So a new one is one file and a line in `__init__`."""
    presets = {
        name
        for name in NAMES
        if name.startswith("_presets.") and not name.endswith((".__init__", ".preset"))
    }
    exported = set()
    for path in MODULES:
        read = {m for found in PACKAGE.imports(path) for m in found.modules} & presets
        if _name(path) == "__init__":
            exported = read
        else:
            assert not read, f"{_name(path)} imports {', '.join(sorted(read))}"
    assert exported == presets


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_only_jax_numpy_and_optax(path):
    for found in PACKAGE.imports(path):
        allowed = RUN_TIME | sys.stdlib_module_names | {""}
        if found.for_types:
            allowed |= TYPES_ONLY
        assert found.package in allowed, (
            f"{path.name}, line {found.line}: the library does not import "
            f"{found.package}"
        )


def test_the_check_itself_sees_every_form_of_import():
    source = """
import numpy as np, flax.linen
import lwsam_jax
import lwsam_jax._train.step
from . import plan, passes
from .. import _tree, Method
from .._engine import cut, Cover
from .functional import value_and_grad
from lwsam_jax import _method
from lwsam_jax._presets.sam import sam
if TYPE_CHECKING:
    import chex
else:
    import haiku
def late():
    import tensorflow
"""
    found = list(PACKAGE.read(ast.parse(source), ["_loops"]))
    assert [(item.package, item.modules, item.for_types) for item in found] == [
        ("numpy", (), False),
        ("flax", (), False),
        ("", ("__init__",), False),
        ("", ("_train.step",), False),
        ("", ("_loops.plan", "_loops.passes"), False),
        ("", ("_tree", "__init__"), False),
        ("", ("_engine.cut", "_engine.__init__"), False),
        ("", ("_loops.functional",), False),
        ("", ("_method",), False),
        ("", ("_presets.sam",), False),
        ("chex", (), True),
        ("haiku", (), False),
        ("tensorflow", (), False),
    ]
    # Twice the exports, the step, the functional form, and a preset; for the passes
    # themselves a file of their own floor, too.
    assert len(_upward("_loops.transform", found)) == 4
    assert len(_upward("_loops.passes", found)) == 6


def _public() -> list[str]:
    named = getattr(lwsam, "__all__", None)
    if named is not None:
        return [name for name in named if not name.startswith("_")]
    return [
        name
        for name, value in vars(lwsam).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]


def test_public_names_exist():
    assert _public()
    missing = [name for name in _public() if not hasattr(lwsam, name)]
    assert not missing


@pytest.mark.parametrize("name", _public())
def test_public_name_has_a_docstring(name):
    value = getattr(lwsam, name)
    doc = value.__doc__
    assert doc, f"lwsam_jax.{name} has no docstring"
    # What the standard library writes for classes without a docstring of their own.
    assert not doc.startswith((f"{name}(", "Alias for")), f"{name}: {doc!r}"


def test_api_page_lists_exactly_the_public_names():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: lwsam_jax\.(\w+)$", page, flags=re.MULTILINE)
    assert len(listed) == len(set(listed)), "docs/api.md lists a name twice"
    assert sorted(listed) == sorted(_public())
