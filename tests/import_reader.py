"""Who imports whom in a package, read from its source."""

import ast
import pathlib
from collections.abc import Iterator
from typing import NamedTuple


class Import(NamedTuple):
    line: int
    package: str  # the first part of the name; empty for the package itself
    modules: tuple[str, ...]  # the package's, such as "_engine.cut"; else empty
    for_types: bool  # under `if TYPE_CHECKING`


class Package:
    """The modules of a package, by their names from its root on.

    Attributes:
      path: Its folder.
      modules: Its files.
      names: Their names; that of the package itself is `__init__`.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.modules = sorted(path.glob("**/*.py"))
        self.names = {self.name(module) for module in self.modules}

    def name(self, path: pathlib.Path) -> str:
        return ".".join(path.relative_to(self.path).with_suffix("").parts)

    def folders(self) -> list[pathlib.Path]:
        return sorted({path.parent for path in self.modules})

    def imports(self, path: pathlib.Path) -> list[Import]:
        folder = list(path.relative_to(self.path).parent.parts)
        return list(self.read(ast.parse(path.read_text(encoding="utf-8")), folder))

    def graph(self) -> dict[str, set[str]]:
        """The modules that each module imports."""
        return {
            self.name(path): {m for found in self.imports(path) for m in found.modules}
            for path in self.modules
        }

    def read(
        self, tree: ast.AST, folder: list[str], for_types: bool = False
    ) -> Iterator[Import]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    package, *rest = alias.name.split(".")
                    if package == self.path.name:
                        package, modules = "", self._targets(rest, ["__init__"])
                    else:
                        modules = ()
                    yield Import(node.lineno, package, modules, for_types)
            elif isinstance(node, ast.ImportFrom):
                package, *rest = (node.module or "").split(".")
                aliases = [alias.name for alias in node.names]
                if node.level:
                    above = folder[: len(folder) - node.level + 1]
                    inside = [part for part in (package, *rest) if part]
                    modules = self._targets([*above, *inside], aliases)
                    yield Import(node.lineno, "", modules, for_types)
                elif package == self.path.name:
                    yield Import(
                        node.lineno, "", self._targets(rest, aliases), for_types
                    )
                else:
                    yield Import(node.lineno, package, (), for_types)
            elif isinstance(node, ast.If) and _is_type_checking(node):
                for child in node.body:
                    yield from self.read(ast.Module([child], []), folder, True)
                for child in node.orelse:
                    yield from self.read(ast.Module([child], []), folder, for_types)
            else:
                yield from self.read(node, folder, for_types)

    def _targets(self, parts: list[str], aliases: list[str]) -> tuple[str, ...]:
        """The modules that `from parts import aliases` reads, parts from the root.

        A name that is no module of a folder is one of its `__init__`; what is not there
        at all is handed on as it is spelled.
        """
        base = ".".join(parts)
        if base in self.names:
            return (base,)
        inside = [f"{base}.{alias}".lstrip(".") for alias in aliases]
        init = f"{base}.__init__".lstrip(".")
        return tuple(
            dict.fromkeys(
                n if n in self.names or init not in self.names else init for n in inside
            )
        )


def _is_type_checking(node: ast.If) -> bool:
    test = node.test
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"
