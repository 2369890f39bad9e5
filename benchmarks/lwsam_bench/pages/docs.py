"""Pages of the documentation whose tables are generated from rows."""

import pathlib

from lwsam_bench.support.errors import UserError


def marks(name: str) -> tuple[str, str]:
    """Return the two comments that enclose what is generated, by its name."""
    return f"<!-- generated: {name} -->", "<!-- end of generated -->"


def replace_generated(page: pathlib.Path, name: str, text: str) -> str:
    """Return a page with what it has between the marks of a name replaced.

    Raises:
      UserError: If there is no such page, or it has not just one such place.
    """
    opening, closing = marks(name)
    try:
        before, rest = page.read_text(encoding="utf-8").split(opening)
        _, after = rest.split(closing, maxsplit=1)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{page} is no page with the marks {opening} and {closing}: {error}"
        ) from error
    return f"{before}{opening}\n\n{text.strip()}\n\n{closing}{after}"
