"""Checkpoints, configurations and data sets are data: nothing that is read is run.

A folder that somebody else sent must be safe to open. So nothing in the library or the
command line unpickles, evaluates or imports by a name that it has read, and everything
that is installed is pinned by its hash.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest


ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("lwsam_jax", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
)
# Modules that run what they read, and names that do so wherever they are from.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MODULES |= {"_pickle", "pickletools", "code", "codeop", "imp", "runpy"}
BUILTINS = {"exec", "eval", "compile", "__import__"}
IMPORTS = {"importlib.import_module"}
METHODS = {
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load"},
    "torch": {"load"},
    "os": {"system", "popen"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "builtins": BUILTINS,
}


def _names(tree: ast.AST) -> dict[str, str]:
    """What each name stands for: `np` for `numpy`, `load` for `yaml.load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _called(node: ast.AST, names: dict[str, str]) -> str:
    """The whole name of what is read: `yaml.load` however it was imported."""
    if isinstance(node, ast.Attribute):
        return f"{_called(node.value, names)}.{node.attr}"
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return ""


def _is_ours(call: ast.Call) -> bool:
    """Whether the module that is imported by its name is one of the command line."""
    name = call.args[0] if call.args else None
    if isinstance(name, ast.JoinedStr):  # of a table of commands
        name = name.values[0]
    text = name.value if isinstance(name, ast.Constant) else ""
    return str(text).startswith("lwsam_bench.")


def unsafe(source: str) -> Iterator[str]:
    """Yields what in a source may run what it reads."""
    tree = ast.parse(source)
    names = _names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield f"line {node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES and not node.level:
                yield f"line {node.lineno}: from {node.module}"
        elif isinstance(node, (ast.Name, ast.Attribute)):
            whole = _called(node, names)
            module, _, name = whole.rpartition(".")
            package = module.split(".")[0]
            if whole in BUILTINS or name in METHODS.get(package, ()):
                yield f"line {node.lineno}: {whole}"
        elif isinstance(node, ast.Call):
            if _called(node.func, names) in IMPORTS and not _is_ours(node):
                yield f"line {node.lineno}: an import by a name"
            for keyword in node.keywords:
                is_no = (
                    isinstance(keyword.value, ast.Constant) and not keyword.value.value
                )
                if keyword.arg in ("allow_pickle", "shell") and not is_no:
                    yield f"line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    found = list(unsafe(path.read_text(encoding="utf-8")))
    assert not found, "; ".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "exec(text)",
        "run = eval",
        "import builtins\nbuiltins.eval(text)",
        "import yaml\nyaml.load(file)",
        "import yaml as y\ny.unsafe_load(file)",
        "from yaml import load as read\nread(file)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import numpy as np\nnp.load(file, allow_pickle=flag)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "import importlib\nimportlib.import_module(name)",
        "__import__(name)",
    ],
)
def test_the_check_itself_sees(source):
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load(file)",
        "import numpy as np\nnp.load(file, allow_pickle=False)\nnp.load(file)",
        "model.eval()\nlowered.compile()\nre.compile(text)",
        "import subprocess\nsubprocess.run(['git', 'log'])",
        "import importlib\nimportlib.import_module(f'lwsam_bench.paper.{name}')",
    ],
)
def test_the_check_lets_pass(source):
    assert not list(unsafe(source))


LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_each_requirement_is_pinned_by_its_hash(path):
    text = re.sub(r"^\s*#.*$", "", path.read_text(encoding="utf-8"), flags=re.M)
    requirements = re.split(r"\n(?=\S)", text.strip())
    assert len(requirements) > 20
    for requirement in requirements:
        assert re.match(r"[\w.\[\]-]+==[\w.+!]+ ", requirement), requirement[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", requirement), requirement[:80]
    assert "://" not in text  # and from no place of one's own


def test_locked_environments_are_installed_by_these_hashes():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if "pip install" in line and "-r " in line]
    assert len(installs) == len(LOCKS)
    assert all("--require-hashes" in line for line in installs)
