import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_mminterleaved import ImageSegment
from comfy_mminterleaved.errors import ImageError
from comfy_mminterleaved.stories.images import (
    decode_data_url,
    encode_data_url,
    encode_png,
    read_image,
    to_bytes,
    to_tensor,
)

RED = (200, 40, 40)


def save(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize(
    "mode, colour, want",
    [
        ("RGB", RED, RED),
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535 // 2, (127, 127, 127)),
        ("P", 0, RED),
    ],
)
def test_every_mode_of_a_png(tmp_path, mode, colour, want):
    image = Image.new(mode, (20, 10), colour)
    if mode == "P":
        image.putpalette(list(RED) + [0] * 765)
    pixels = read_image(save(tmp_path, image))
    assert pixels.shape == (3, 10, 20) and pixels.dtype == torch.float32
    assert np.abs(to_bytes(pixels)[5, 5].astype(int) - want).max() <= 1


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = to_bytes(read_image(save(tmp_path, image, "cmyk.jpg", quality=95)))[8, 8]
    assert red > 240 and green < 30 and blue < 30


def test_the_cameras_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), RED)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(save(tmp_path, image, "phone.jpg", exif=exif)).shape == (3, 40, 20)


def test_an_animation_is_refused_with_its_frames(tmp_path):
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 90, 200)]
    path = save(tmp_path, frames[0], "cat.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="cat.gif' is an animation of 3 frames; save the one you want as a PNG"):
        read_image(path)
    still = save(tmp_path, frames[1], "still.gif")
    assert read_image(still).shape == (3, 20, 20)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (7, 7)])
def test_too_thin(tmp_path, size):
    with pytest.raises(ImageError, match=f"is {size[0]} x {size[1]} px; each side must have at least 8 px"):
        read_image(save(tmp_path, Image.new("L", size)))


def test_too_long(tmp_path):
    with pytest.raises(ImageError, match="is 10 x 5000 px; its sides must not differ by more than 16 times"):
        read_image(save(tmp_path, Image.new("L", (10, 5000))))


def test_huge_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path, Image.new("1", (9000, 8000)))
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ImageError, match="is 9000 x 8000 px; at most 64 megapixels"):
        read_image(path)


def test_a_bomb_is_refused(tmp_path):
    path = save(tmp_path, Image.new("1", (20000, 20000)))
    with pytest.raises(ImageError, match="64 megapixels"):
        read_image(path)


def test_unreadable(tmp_path):
    whole = encode_png(torch.rand(3, 64, 64))
    for name, data in {"cut.png": whole[: len(whole) // 2], "text.jpg": b"hello", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}' cannot be read: "):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="no image file .*missing.png"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="no image file"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        Image.new("RGB", (9, 8), RED),
        np.full((8, 9, 3), RED, np.uint8),
        np.full((8, 9, 3), RED, np.float64) / 255,
        (np.full((8, 9, 3), RED) * 257).astype(np.uint16),
        torch.tensor(RED).view(3, 1, 1).expand(3, 8, 9).byte(),
        torch.tensor(RED).view(3, 1, 1).expand(3, 8, 9) / 255,
        torch.tensor(RED).expand(1, 8, 9, 3).float() / 255,
        np.dstack([np.full((8, 9, 3), RED, np.uint8), np.full((8, 9), 255, np.uint8)]),
    ],
)
def test_all_that_a_picture_can_come_as(source):
    pixels = to_tensor(source)
    assert pixels.shape == (3, 8, 9) and pixels.is_contiguous()
    assert (to_bytes(pixels) == RED).all()
    assert ImageSegment.of(source).size == (9, 8)


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros((8, 8, 3), np.int64), "uint8, uint16, bool or floats, not int64"),
        (torch.zeros(8, 8, 3, dtype=torch.int32), "not torch.int32"),
        (np.full((8, 8, 3), 255.0), r"within \[0, 1\]; this one has 255 to 255"),
        (np.full((8, 8, 3), np.nan), r"within \[0, 1\]"),
        (np.zeros((8, 8, 5), np.uint8), r"not \(8, 8, 5\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"not \(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), "is 8 x 0 px"),
        ("no path here", None),
        (7, "not int"),
    ],
)
def test_what_is_no_picture(source, message):
    with pytest.raises(ImageError, match=message):
        to_tensor(source)


def test_keys_tell_pictures_apart():
    a = torch.rand(3, 16, 24)
    assert ImageSegment(a).digest == ImageSegment(a.clone()).digest
    assert len({ImageSegment(a).digest, ImageSegment(a.flip(0)).digest, ImageSegment(a.reshape(3, 24, 16)).digest}) == 3


def test_urls_round_trip():
    pixels = torch.rand(3, 12, 10)
    assert (to_bytes(decode_data_url(encode_data_url(pixels))) == to_bytes(pixels)).all()
    with pytest.raises(ImageError, match="not valid base64"):
        decode_data_url("data:image/png;base64,****")


def test_png_metadata_is_kept():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("note", "Zoë, 猫")
    assert Image.open(io.BytesIO(encode_png(torch.rand(3, 8, 8), info))).text["note"] == "Zoë, 猫"


def test_values_that_are_not_numbers(tmp_path):
    path = save(tmp_path, Image.fromarray(np.full((20, 20), np.nan, np.float32)), "nan.tiff")
    with pytest.raises(ImageError, match="not numbers"):
        read_image(path)


def colours(*sides):
    return [Image.new("RGB", (32, 24), colour) for colour in sides]


@pytest.mark.parametrize("kind, suffix", [("MPO", "jpg"), ("TIFF", "tif")])
def test_the_first_picture_of_a_still_format_with_several_is_read(tmp_path, kind, suffix):
    """Case 3: cameras put a preview behind the picture (MPO); a TIFF has pages."""
    first, second = colours("red", "blue")
    first.save(tmp_path / f"x.{suffix}", kind, save_all=True, append_images=[second])
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.format == kind and image.n_frames == 2
    pixels = read_image(tmp_path / f"x.{suffix}")
    assert pixels.shape == (3, 24, 32) and pixels[0].min() > 0.9 and pixels[2].max() < 0.1


@pytest.mark.parametrize("kind, suffix", [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png")])
def test_an_animation_is_still_refused(tmp_path, kind, suffix):
    first, second = colours("red", "blue")
    first.save(tmp_path / f"x.{suffix}", kind, save_all=True, append_images=[second])
    with pytest.raises(ImageError, match="animation of 2 frames"):
        read_image(tmp_path / f"x.{suffix}")


def wide_profile() -> bytes:
    """An RGB profile of larger primaries than sRGB (those of Rec. 2020), by hand: header, tags, curves."""
    import struct

    def s15(*values):
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    def xyz(*v):
        return b"XYZ \0\0\0\0" + s15(*v)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    name = b"wide\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 78
    desc += b"\0" * (-len(desc) % 4)
    tags = {
        b"desc": desc,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.6735, 0.2790, -0.0019),
        b"gXYZ": xyz(0.1657, 0.6753, 0.0300),
        b"bXYZ": xyz(0.1251, 0.0456, 0.7969),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + s15(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_embedded_profile_is_converted_to_srgb(tmp_path, mode):
    from PIL import ImageCms

    image = Image.new(mode, (16, 16), (150, 100, 80, 255)[: len(mode)])
    image.save(tmp_path / "wide.png", icc_profile=wide_profile())
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "srgb.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    image.save(tmp_path / "broken.png", icc_profile=b"no profile")
    wide, plain, srgb, broken = (read_image(tmp_path / f"{n}.png") for n in ("wide", "plain", "srgb", "broken"))
    assert (plain * 255).round()[:, 0, 0].tolist() == [150, 100, 80]
    assert (wide - plain).abs().max() > 0.03 and wide[0, 0, 0] > plain[0, 0, 0]  # the same numbers, more saturated
    assert torch.equal(srgb, plain) and torch.equal(broken, plain)


def test_heic(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.from_pillow(colours("red")[0]).save(tmp_path / "x.heic")
    pixels = read_image(tmp_path / "x.heic")
    assert pixels.shape == (3, 24, 32) and pixels[0].mean() > 0.9 and pixels[2].mean() < 0.1
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="is a HEIC file; install pillow-heif to read it, or save it as JPEG or PNG"):
        read_image(tmp_path / "x.heic")
