"""The names of networks: one scheme, read without importing what builds them."""

import dataclasses
import re


SCHEME = (
    "smallcnn, tinycnn, resnet<depth> with a depth of 6 n + 2 (resnet20),"
    " resnet<depth>w<width> with the channels of the first stage (resnet8w4),"
    " wrn<depth>-<width> with a depth of 6 n + 4 (wrn28-10), vit-b16, vit-tiny, gpt,"
    " gpt-small or gpt-tiny"
)
PLAIN_WIDTH = 16  # channels of the first stage of a plain residual network

_RESNET = re.compile(r"resnet([1-9]\d{0,3})(?:w([1-9]\d{0,3}))?")
_WRN = re.compile(r"wrn([1-9]\d{0,3})-([1-9]\d{0,2})")
_FIXED = {
    "smallcnn": "smallcnn",
    "tinycnn": "smallcnn",
    "vit-b16": "vit",
    "vit-tiny": "vit",
    "gpt": "gpt",
    "gpt-small": "gpt",
    "gpt-tiny": "gpt",
}


@dataclasses.dataclass(frozen=True)
class ModelName:
    """A name taken apart.

    Attributes:
      name: The whole name.
      family: `smallcnn`, `resnet`, `wrn`, `vit` or `gpt`.
      depth: Of a residual network; else 0.
      width: Of a residual network: channels of the first stage, or how many times as
        wide as a plain one; else 0.
    """

    name: str
    family: str
    depth: int = 0
    width: int = 0

    @property
    def reads_text(self) -> bool:
        """Whether the input is characters, not images."""
        return self.family == "gpt"

    @property
    def is_pretrained(self) -> bool:
        """Whether the network needs published weights to be of any use."""
        return self.name == "vit-b16"


def parse(name: str) -> ModelName:
    """Take a name apart.

    Raises:
      ValueError: If it does not follow `SCHEME`.
    """
    if name in _FIXED:
        return ModelName(name, _FIXED[name])
    if match := _RESNET.fullmatch(name):
        depth, width = int(match[1]), int(match[2] or PLAIN_WIDTH)
        if depth >= 8 and depth % 6 == 2:
            return ModelName(name, "resnet", depth, width)
    if match := _WRN.fullmatch(name):
        depth, width = int(match[1]), int(match[2])
        if depth >= 10 and depth % 6 == 4:
            return ModelName(name, "wrn", depth, width)
    raise ValueError(f"unknown model {name!r}: expected {SCHEME}")
