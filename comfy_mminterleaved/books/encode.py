"""Images as files for books, without any metadata."""

from __future__ import annotations

import io

from PIL import Image

LOSSLESS_SIDE = 768  # px; larger images are JPEGs


def encode_image(image: Image.Image, side: int | None = None) -> tuple[bytes, str]:
    """The bytes of a file, and its suffix: a PNG if small, else a JPEG.

    Args:
        side: Px of the longer side, to which larger images are reduced.
    """
    if side is not None and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    is_small, file = max(image.size) <= LOSSLESS_SIDE, io.BytesIO()
    if is_small:
        image.save(file, "PNG", compress_level=6)
    else:
        image.save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue(), ".png" if is_small else ".jpg"
