"""The examples of the README and the documentation run as they stand."""

import pathlib
import re
import traceback

import pytest

import lwsam_jax as lwsam


ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")
NO_RUN = re.compile(r"^<!-- no-run: .+ -->$")


def _blocks(text: str) -> list[tuple[int, str]]:
    """The Python blocks to run: the line before the first one of each, and its code.

    A block directly below `<!-- no-run: reason -->` is left out.
    """
    blocks = []
    above, opened = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None and fence:
            info = fence["info"].strip().split()
            run = info[:1] == ["python"] and not NO_RUN.match(above.strip())
            opened = (number, len(fence["indent"]), run, [])
        elif opened is not None and fence and not fence["info"].strip():
            start, _, run, lines = opened
            if run:
                blocks.append((start, "\n".join(lines)))
            opened = None
        elif opened is not None:
            opened[3].append(line[min(opened[1], len(line) - len(line.lstrip())) :])
        if line.strip():
            above = line
    assert opened is None, f"the fence of line {opened and opened[0]} is not closed"
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(page.read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("no examples to run")
    namespace = {"__name__": "__main__"}
    for start, code in blocks:
        # The empty lines make the line numbers of errors those of the page.
        source = "\n" * start + code
        try:
            exec(compile(source, str(page), "exec"), namespace)
        except Exception:
            pytest.fail(
                f"{page.name}, the example after line {start}:\n"
                f"{traceback.format_exc(limit=-3)}",
                pytrace=False,
            )


def test_which_blocks_run():
    text = """
```python
a = 1
```

<!-- no-run: needs two hosts -->
```python
raise RuntimeError
```

```
not python
```

- in a list

  ```python title="x"
  if a:
      a = 2
  ```

```bash
make demo
```
"""
    assert _blocks(text) == [(2, "a = 1"), (17, "if a:\n    a = 2")]


def test_an_unclosed_fence_is_an_error():
    with pytest.raises(AssertionError, match="line 2 is not closed"):
        _blocks("\n```python\na = 1\n")


@pytest.mark.parametrize(
    ("folder", "page"), [("_axes", "axes"), ("_presets", "presets")]
)
def test_every_part_and_preset_stands_on_its_page(folder, page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = {n: getattr(lwsam, n) for n in lwsam.__all__ if not n.startswith("_")}
    is_there = lambda name: re.search(rf"\b{name}\b", text)
    own = [n for n, x in named.items() if f".{folder}." in f"{x.__module__}."]
    assert own
    assert not [name for name in own if not is_there(name)]
