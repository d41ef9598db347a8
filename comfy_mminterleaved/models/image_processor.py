"""The encoder's preprocessing, equal to the reference's (`center_crop_arr`)."""

import numpy as np
import torch
from PIL import Image

from ..stories.images import to_pil


def preprocess_image(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """`(3, H, W)` -> `(3, size, size)`, the center of the image.

    Halved by a box filter while at least twice the size, then bicubic, in 8 bits as the reference does.
    """
    image = to_pil(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    array = array[top : top + size, left : left + size]
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 255
