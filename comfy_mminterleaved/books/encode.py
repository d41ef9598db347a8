"""Images as files for books, without any metadata."""

from __future__ import annotations

import io

from PIL import Image

LOSSLESS_SIDE = 768  # px; larger images are JPEGs


def encode_image(image: Image.Image, side: int | None = None, dpi: int | None = None) -> tuple[bytes, str]:
    """The bytes of a file, and its suffix: a PNG if small, else a JPEG.

    Args:
        side: Px of the longer side, to which larger images are reduced.
        dpi: For printers; None says nothing of it.
    """
    if side is not None and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    is_small, file = max(image.size) <= LOSSLESS_SIDE, io.BytesIO()
    resolution = {} if dpi is None else {"dpi": (dpi, dpi)}
    if is_small:
        image.save(file, "PNG", compress_level=6, **resolution)
    else:
        image.save(file, "JPEG", quality=92, subsampling=0, **resolution)
    return file.getvalue(), ".png" if is_small else ".jpg"
