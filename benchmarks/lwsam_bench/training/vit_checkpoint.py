"""Published weights of a vision transformer, for the backbone that is fine-tuned.

The file is the one that timm publishes for `vit_base_patch16_224`, in the safetensors
format: arrays named `patch_embed.proj.weight`, `blocks.0.attn.qkv.weight` and so on, in
PyTorch's order of axes. Its classifier, `head`, is left out.
"""

import functools
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lwsam_bench.data.splits import default_data_dir
from lwsam_bench.models import names
from lwsam_bench.models.finetune import FineTunedViT
from lwsam_bench.models.vit import ViT
from lwsam_bench.support.errors import UserError
from lwsam_bench.training.config import TrainConfig


FILE = "vit_base_patch16_224.safetensors"  # in the folder of the data
_LEFT_OUT = "head."


def find(config: TrainConfig, data_dir: str | None) -> pathlib.Path | None:
    """Return the file of weights of a run, or None if the run needs none.

    Raises:
      UserError: If it needs one that is not there.
    """
    name = names.parse(config.model)
    if config.weights is not None:
        path = pathlib.Path(config.weights).expanduser()
    elif name.is_pretrained:
        path = pathlib.Path(data_dir or default_data_dir()).expanduser() / FILE
    else:
        return None
    if not path.is_file():
        raise UserError(
            f"--model {config.model} needs the weights of a ViT-B/16 that was trained on"
            f" ImageNet, and there is no file {path}. Name one with --weights: the"
            " model.safetensors that timm publishes for vit_base_patch16_224"
        )
    return path


def digest(config: TrainConfig, data_dir: str | None) -> str | None:
    """Return the SHA-256 of the file of weights; None where there is none."""
    try:
        path = find(config, data_dir)
        if path is None:
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (UserError, ValueError, OSError):  # what needs the file will say so
        return None


def load(model: FineTunedViT, path: pathlib.Path) -> None:
    """Give the backbone of a network the weights of a file.

    Raises:
      UserError: If the file cannot be read, or holds another network.
    """
    from safetensors import numpy as safetensors, SafetensorError

    try:
        arrays = safetensors.load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a safetensors file of float16 or float32: {error}"
        ) from error
    missing: list[str] = []
    known: set[str] = set()
    for name, place, value in converted(arrays, model.backbone, missing):
        known.add(name)
        parameter: Any = functools.reduce(getattr, place.split("."), model.backbone)
        if value.shape != parameter.shape:
            raise UserError(
                f"{path}: {name} of shape {list(arrays[name].shape)} does not fit this"
                f" network, whose {place} has the shape {list(parameter.shape)}"
            )
        parameter[...] = value
    others = [n for n in arrays if n not in known and not n.startswith(_LEFT_OUT)]
    if missing or others:
        reason = (
            f"it has no {', '.join(missing[:3])}"
            if missing
            else f"it has {', '.join(others[:3])}"
        )
        raise UserError(
            f"{path} is not a vision transformer of {model.backbone.depth} blocks in the"
            f" layout of timm: {reason}"
        )


def converted(
    arrays: Mapping[str, np.ndarray], backbone: ViT, missing: list[str]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield timm's name, the place in the backbone, and the value of each parameter.

    Args:
      arrays: What the file holds.
      backbone: The network, for its sizes.
      missing: Gets the names that the file does not have.
    """
    for name, places in _places(backbone):
        if name not in arrays:
            missing.append(name)
            continue
        parts = np.array_split(arrays[name].astype(np.float32), len(places))
        for place, part in zip(places, parts, strict=True):
            yield name, place, _rearranged(place, part, backbone.heads)


def _places(backbone: ViT) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield timm's names, and the parameters of the backbone that each one holds."""
    yield "cls_token", ("class_token",)
    yield "pos_embed", ("positions",)
    modules = {"patch_embed.proj": ("patches",), "norm": ("norm",)}
    for index in range(backbone.depth):
        theirs, ours = f"blocks.{index}", f"block{index + 1}"
        modules |= {
            f"{theirs}.norm1": (f"{ours}.norm1",),
            f"{theirs}.attn.qkv": tuple(
                f"{ours}.attention.{part}" for part in ("query", "key", "value")
            ),
            f"{theirs}.attn.proj": (f"{ours}.attention.out",),
            f"{theirs}.norm2": (f"{ours}.norm2",),
            f"{theirs}.mlp.fc1": (f"{ours}.mlp_in",),
            f"{theirs}.mlp.fc2": (f"{ours}.mlp_out",),
        }
    for theirs, ours in modules.items():
        weight = "scale" if "norm" in ours[0].split(".")[-1] else "kernel"
        yield f"{theirs}.weight", tuple(f"{place}.{weight}" for place in ours)
        yield f"{theirs}.bias", tuple(f"{place}.bias" for place in ours)


def _rearranged(place: str, value: np.ndarray, heads: int) -> np.ndarray:
    """Return a value of PyTorch's order of axes in that of Flax."""
    *_, module, kind = ["", *place.split(".")]
    if place in ("class_token", "positions"):
        return (
            value.reshape(value.shape[-2:]) if place == "positions" else value.ravel()
        )
    if module == "patches" and kind == "kernel":
        return value.transpose(2, 3, 1, 0)  # [out, in, H, W] to [H, W, in, out]
    if kind == "kernel":
        value = value.T  # [out, in] to [in, out]
    if module in ("query", "key", "value"):
        return value.reshape(*value.shape[:-1], heads, -1)
    if module == "out" and kind == "kernel":
        return value.reshape(heads, -1, value.shape[-1])
    return value
