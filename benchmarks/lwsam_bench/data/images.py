"""Images brought to one size, on the host, before a run begins."""

import numpy as np

from lwsam_bench.support.errors import UserError


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Return an image u8[H, W, C] as u8[size, size, C].

    The shorter side is resized to `size`, and the middle of the longer one is kept. The
    filter is bilinear; where an image shrinks it covers all pixels that become one.

    Raises:
      UserError: If the number of channels is neither 1 nor 3.
    """
    if image.shape[:2] == (size, size):
        return image
    from PIL import Image, ImageOps  # it takes a while to import

    channels = image.shape[-1]
    if channels not in (1, 3):
        raise UserError(
            f"--image-size {size}: images of {channels} channels cannot be resized, only"
            " those of 1 or 3"
        )
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(fitted).reshape(size, size, channels)
