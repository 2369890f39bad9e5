"""What the README shows and links to is there."""

import pathlib
import re


ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_it_shows_and_links_to_is_there():
    places = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert places
    for place in places:
        assert (ROOT / place).exists(), place
