"""Images in and out: any image -> RGB floats, files and data URLs."""

from __future__ import annotations

import base64
import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ImageError

MAX_PIXELS = 64_000_000  # 8000 x 8000: decoded it is 768 MB of float32
MIN_SIDE = 8
MAX_ASPECT = 16
_ARRAY_TYPES = tuple(map(np.dtype, ("uint8", "uint16", "bool", "float16", "float32", "float64")))


# Formats whose further frames are an animation; those of others (MPO, TIFF, PSD, ...) are previews, pages or layers.
ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF", "FLI")
PAGE_SIDE = 1600  # px, the longer side of what a page embeds
# Formats whose files are saved unchanged with a story, because every browser and image program shows them.
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}


@dataclass(frozen=True)
class ImageFile:
    """An image file as it was read: its bytes, and the suffix of its format."""

    data: bytes
    suffix: str


def read_image(path: str | Path) -> torch.Tensor:
    """Reads an image file as RGB float32 (3, H, W) in [0, 1]; raises ImageError.

    Transparent pixels are laid on white; 16-bit, CMYK and embedded colour profiles are converted to sRGB; the camera's
    rotation is applied. Of a still format with more than one image the first is read; an animation is refused.
    """
    return read_image_file(path)[0]


def read_image_file(path: str | Path) -> tuple[torch.Tensor, ImageFile | None]:
    """`read_image`, and the file's bytes if its format is one of SUFFIXES."""
    path = Path(path)
    if not _is_file(path):
        raise ImageError(f"There is no image file {str(path)!r}.")
    name = repr(str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"The image {name} cannot be read: {error.strerror or error}.") from None
    pixels, kind = _decode(data, name)
    return pixels, ImageFile(data, SUFFIXES[kind]) if kind in SUFFIXES else None


def _is_file(path: Path) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL in the name
        return False


def decode_data_url(url: str) -> torch.Tensor:
    """RGB float32 (3, H, W) from a data: URL."""
    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError:  # binascii's own error is one
        raise ImageError("An image's data URL is not valid base64.") from None
    return _decode(data, "in the data URL")[0]


def _decode(data: bytes, name: str) -> tuple[torch.Tensor, str | None]:
    """The pixels of an image file's bytes, and Pillow's name of its format."""
    try:
        with _open(data, name) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format in ANIMATIONS:
                raise ImageError(
                    f"The image {name} is an animation of {frames} frames; save the one you want as a PNG."
                )
            _check_size(*image.size, name)
            image.load()
            return to_tensor(_to_srgb(ImageOps.exif_transpose(image), image.info.get("icc_profile"))), image.format
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"The image {name} is too large; at most {MAX_PIXELS // 10**6} megapixels are read.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no image in a format that Pillow knows"
        raise ImageError(f"The image {name} cannot be read: {reason}.") from None


def _open(data: bytes, name: str) -> Image.Image:
    """The image in a file's bytes. HEIC, which Pillow does not know, goes through pillow-heif if it is installed."""
    if data[4:8] != b"ftyp" or data[8:12] not in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return Image.open(io.BytesIO(data))
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(
            f"The image {name} is a HEIC file; install pillow-heif to read it, or save it as JPEG or PNG."
        ) from None
    return pillow_heif.open_heif(io.BytesIO(data)).to_pillow()


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image converted from its embedded colour profile; one whose profile cannot be used stays as it is."""
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    from PIL import ImageCms

    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        opaque = image if alpha is None else image.convert("RGB")
        image = ImageCms.profileToProfile(opaque, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if alpha is not None:
        image.putalpha(alpha)
    return image


def to_tensor(source) -> torch.Tensor:
    """Any image in memory as RGB float32 (3, H, W) in [0, 1]; raises ImageError.

    Takes a PIL image of any mode; a numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a torch tensor of these
    shapes, or with channels first: uint8, uint16, bool, or floats within [0, 1].
    """
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, np.ndarray):
        if source.dtype not in _ARRAY_TYPES:
            raise ImageError(f"An image array must be of uint8, uint16, bool or floats, not {source.dtype}.")
        source = torch.from_numpy(np.ascontiguousarray(source))
    if not isinstance(source, torch.Tensor):
        raise ImageError(f"An image must be a PIL image, a numpy array or a tensor, not {type(source).__name__}.")

    if not (source.is_floating_point() or source.dtype in (torch.uint8, torch.uint16, torch.bool)):
        raise ImageError(f"An image tensor must be of uint8, uint16, bool or floats, not {source.dtype}.")
    pixels = source.detach().cpu()
    shape = tuple(pixels.shape)
    if pixels.ndim == 4 and shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    elif pixels.ndim == 3 and pixels.shape[0] not in (1, 3, 4):
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
        raise ImageError(f"An image array must be (H, W), (H, W, channels) or (channels, H, W), not {shape}.")
    if pixels.is_floating_point():
        low, high = pixels.float().aminmax() if pixels.numel() else (torch.zeros(()), torch.ones(()))
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ImageError(f"An image of floats must be within [0, 1]; this one has {low:.3g} to {high:.3g}.")
        pixels = pixels.float().clamp(0, 1)
    elif pixels.dtype == torch.bool:
        pixels = pixels.float()
    else:
        pixels = pixels.float() / torch.iinfo(pixels.dtype).max
    _check_size(pixels.shape[2], pixels.shape[1], "given")
    if pixels.shape[0] == 4:
        pixels = pixels[:3] * pixels[3:] + (1 - pixels[3:])  # on white
    return pixels.expand(3, -1, -1).contiguous()


def _from_pil(image: Image.Image) -> torch.Tensor:
    _check_size(*image.size, "given")
    if image.mode.startswith("I;16"):
        array = np.asarray(image).astype(np.float32) / 65535
        return torch.from_numpy(array).expand(3, -1, -1).contiguous()
    if image.mode in ("I", "F"):
        array = np.asarray(image).astype(np.float32)
        if not np.isfinite(array).all():
            raise ImageError("The image has values that are not numbers (NaN or infinite).")
        top = 65535 if array.max(initial=0) > 255 else 255 if array.max(initial=0) > 1 or image.mode == "I" else 1
        return torch.from_numpy(np.clip(array / top, 0, 1)).expand(3, -1, -1).contiguous()
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float() / 255


def _check_size(width: int, height: int, name: str) -> None:
    size = f"{width} x {height} px"
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"The image {name} is {size}; each side must have at least {MIN_SIDE} px.")
    if width * height > MAX_PIXELS:
        raise ImageError(f"The image {name} is {size}; at most {MAX_PIXELS // 10**6} megapixels are read.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"The image {name} is {size}; its sides must not differ by more than {MAX_ASPECT} times.")


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) floats -> (H, W, 3) uint8, rounded to nearest."""
    return pixels.mul(255).add(0.5).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def to_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(to_bytes(pixels.float()))


def fit_image(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of an image `(3, H, W)` in another size `(width, height)`."""
    return to_tensor(ImageOps.fit(to_pil(pixels), size, Image.Resampling.LANCZOS))


def encode_png(pixels: torch.Tensor, info=None) -> bytes:
    """A PNG file; `info` is a PIL PngInfo."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def encode_data_url(pixels: torch.Tensor) -> str:
    """A data: URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode("ascii")


def encode_page_url(pixels: torch.Tensor) -> str:
    """A data: URL for a page, of at most PAGE_SIDE px a side: a PNG up to 768 px, else a JPEG."""
    image = to_pil(pixels)
    if max(image.size) <= 768:
        return encode_data_url(pixels)
    image.thumbnail((PAGE_SIDE, PAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, progressive=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
