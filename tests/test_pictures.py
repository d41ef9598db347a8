import io

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_mminterleaved import Picture
from comfy_mminterleaved.errors import PictureError
from comfy_mminterleaved.pictures import decode_url, encode_png, encode_url, read_picture, to_bytes, to_pixels

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
    pixels = read_picture(save(tmp_path, image))
    assert pixels.shape == (3, 10, 20) and pixels.dtype == torch.float32
    assert np.abs(to_bytes(pixels)[5, 5].astype(int) - want).max() <= 1


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = to_bytes(read_picture(save(tmp_path, image, "cmyk.jpg", quality=95)))[8, 8]
    assert red > 240 and green < 30 and blue < 30


def test_the_cameras_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), RED)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(save(tmp_path, image, "phone.jpg", exif=exif)).shape == (3, 40, 20)


def test_an_animation_is_refused_with_its_frames(tmp_path):
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 90, 200)]
    path = save(tmp_path, frames[0], "cat.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match="cat.gif' is an animation of 3 frames; save the one you want as a PNG"):
        read_picture(path)
    still = save(tmp_path, frames[1], "still.gif")
    assert read_picture(still).shape == (3, 20, 20)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (7, 7)])
def test_too_thin(tmp_path, size):
    with pytest.raises(PictureError, match=f"is {size[0]} x {size[1]} px; each side must have at least 8 px"):
        read_picture(save(tmp_path, Image.new("L", size)))


def test_too_long(tmp_path):
    with pytest.raises(PictureError, match="is 10 x 5000 px; its sides must not differ by more than 16 times"):
        read_picture(save(tmp_path, Image.new("L", (10, 5000))))


def test_huge_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path, Image.new("1", (9000, 8000)))
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(PictureError, match="is 9000 x 8000 px; at most 64 megapixels"):
        read_picture(path)


def test_a_bomb_is_refused(tmp_path):
    path = save(tmp_path, Image.new("1", (20000, 20000)))
    with pytest.raises(PictureError, match="64 megapixels"):
        read_picture(path)


def test_unreadable(tmp_path):
    whole = encode_png(torch.rand(3, 64, 64))
    for name, data in {"cut.png": whole[: len(whole) // 2], "text.jpg": b"hello", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PictureError, match=f"{name}' cannot be read: "):
            read_picture(tmp_path / name)
    with pytest.raises(PictureError, match="no picture file .*missing.png"):
        read_picture(tmp_path / "missing.png")
    with pytest.raises(PictureError, match="no picture file"):
        read_picture(tmp_path)


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
    pixels = to_pixels(source)
    assert pixels.shape == (3, 8, 9) and pixels.is_contiguous()
    assert (to_bytes(pixels) == RED).all()
    assert Picture.of(source).size == (9, 8)


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
    with pytest.raises(PictureError, match=message):
        to_pixels(source)


def test_keys_tell_pictures_apart():
    a = torch.rand(3, 16, 24)
    assert Picture(a).key == Picture(a.clone()).key
    assert len({Picture(a).key, Picture(a.flip(0)).key, Picture(a.reshape(3, 24, 16)).key}) == 3


def test_urls_round_trip():
    pixels = torch.rand(3, 12, 10)
    assert (to_bytes(decode_url(encode_url(pixels))) == to_bytes(pixels)).all()
    with pytest.raises(PictureError, match="not valid base64"):
        decode_url("data:image/png;base64,****")


def test_png_metadata_is_kept():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("note", "Zoë, 猫")
    assert Image.open(io.BytesIO(encode_png(torch.rand(3, 8, 8), info))).text["note"] == "Zoë, 猫"


def test_values_that_are_not_numbers(tmp_path):
    path = save(tmp_path, Image.fromarray(np.full((20, 20), np.nan, np.float32)), "nan.tiff")
    with pytest.raises(PictureError, match="not numbers"):
        read_picture(path)
