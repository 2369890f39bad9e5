"""Who may import whom, and what every public name must have."""

import ast
import inspect
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import lwsam_jax as lwsam


ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lwsam_jax"
MODULES = sorted(PACKAGE.glob("**/*.py"))

# A module imports modules of a lower floor only. A new module needs a floor here.
FLOORS = {
    "_checks": 0,
    "_version": 0,
    "_devices": 1,
    "_jaxpr": 1,
    "_promotion": 1,
    "_tree": 1,
    "_flops": 2,
    "_layers": 2,
    "_perturbation": 2,
    "_split": 2,
    "_selection": 3,
    "_selectors": 3,
    "_cost": 4,
    "_executables": 4,
    "_gradient": 4,
    "_method": 4,
    "_budget": 5,
    "_step_checks": 5,
    "_one_step": 6,
    "_transform": 6,
    "_step": 7,
    "__init__": 8,
}
RUN_TIME = {"jax", "numpy", "optax"}
TYPES_ONLY = {"chex"}


class Import(NamedTuple):
    line: int
    package: str  # the first part of the name; empty for the library itself
    modules: tuple[str, ...]  # modules of the library; empty for other packages
    for_types: bool  # under `if TYPE_CHECKING`


def _is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _imports(tree: ast.AST, for_types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, rest = alias.name.partition(".")
                if package == "lwsam_jax":
                    package, modules = "", (rest.partition(".")[0] or "__init__",)
                else:
                    modules = ()
                yield Import(node.lineno, package, modules, for_types)
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            package, _, rest = name.partition(".")
            if node.level or package == "lwsam_jax":
                inside = name if node.level else rest
                modules = (
                    (inside.partition(".")[0],)
                    if inside
                    else tuple(alias.name for alias in node.names)
                )
                yield Import(node.lineno, "", modules, for_types)
            else:
                yield Import(node.lineno, package, (), for_types)
        elif isinstance(node, ast.If) and _is_type_checking(node):
            for child in node.body:
                yield from _imports(ast.Module([child], []), True)
            for child in node.orelse:
                yield from _imports(ast.Module([child], []), for_types)
        else:
            yield from _imports(node, for_types)


def _module_imports(path: pathlib.Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text(encoding="utf-8"))))


def _upward(module: str, imports: list[Import]) -> list[str]:
    floor = FLOORS[module]
    return [
        f"line {found.line}: floor {floor} imports {target} "
        f"of floor {FLOORS.get(target, 'unknown')}"
        for found in imports
        for target in found.modules
        if FLOORS.get(target, floor) >= floor
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    assert path.stem in FLOORS, f"{path.name}: give it a floor in FLOORS"
    assert path.parent == PACKAGE, f"{path}: the library is one folder"
    upward = _upward(path.stem, _module_imports(path))
    assert not upward, f"{path.name}: " + "; ".join(upward)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_only_jax_numpy_and_optax(path):
    for found in _module_imports(path):
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
import lwsam_jax._step
from . import _tree, _transform
from ._gradient import value_and_grad
from lwsam_jax import _step
from lwsam_jax._method import LayerwiseSAM
if TYPE_CHECKING:
    import chex
else:
    import haiku
def late():
    import tensorflow
"""
    found = list(_imports(ast.parse(source)))
    assert [(item.package, item.modules, item.for_types) for item in found] == [
        ("numpy", (), False),
        ("flax", (), False),
        ("", ("__init__",), False),
        ("", ("_step",), False),
        ("", ("_tree", "_transform"), False),
        ("", ("_gradient",), False),
        ("", ("_step",), False),
        ("", ("_method",), False),
        ("chex", (), True),
        ("haiku", (), False),
        ("tensorflow", (), False),
    ]
    assert len(_upward("_gradient", found)) == 6  # all of the library's but _tree


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
