"""Pictures are read as people see them."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from flowcache.errors import UserError
from flowcache.runtime.video import BACKGROUND, image_size, read_image

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
"""Grey values from 0 to 252."""


def save(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(
        Image.fromarray(RAMP).convert("RGB"), *profiles, outputMode="LAB"
    )
    assert image is not None
    return image


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("8 bits.png", Image.fromarray(RAMP)),
        ("16 bits.png", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("16 bits.tif", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("32 bits.tif", Image.fromarray(RAMP.astype(np.int32) * 257)),
        ("32 bits of bytes.tif", Image.fromarray(RAMP.astype(np.int32))),
        ("0 to 1.tif", Image.fromarray(RAMP.astype(np.float32) / 255)),
        ("0 to 255.tif", Image.fromarray(RAMP.astype(np.float32))),
        ("0 to 65535.tif", Image.fromarray(RAMP.astype(np.float32) * 257)),
        ("palette.png", Image.fromarray(RAMP).quantize(64)),
        ("grey with alpha.png", Image.fromarray(RAMP).convert("LA")),
        ("colour with alpha.png", Image.fromarray(RAMP).convert("RGBA")),
        ("print colours.tif", Image.fromarray(RAMP).convert("RGB").convert("CMYK")),
        ("video colours.jpg", Image.fromarray(RAMP).convert("RGB").convert("YCbCr")),
        ("lab.tif", lab()),
    ],
)
def test_every_colour_model_shows_the_same_ramp(tmp_path: Path, name: str, image: Image.Image):
    read = read_image(save(tmp_path / name, image))
    assert read.mode == "RGB"
    shown = np.asarray(read).astype(int)
    # one level of 255 for rounding; JPEG and Lab lose up to three more
    assert np.abs(shown - RAMP[..., None]).max() <= 4


def test_black_and_white_pixels_stay_black_and_white(tmp_path: Path):
    bits = Image.fromarray(RAMP > 127)
    assert set(np.unique(np.asarray(read_image(save(tmp_path / "bits.png", bits))))) == {0, 255}


@pytest.mark.parametrize("value", [-1.0, 70000.0])
def test_grey_values_of_no_known_range_are_refused(tmp_path: Path, value: float):
    pixels = RAMP.astype(np.float32)
    pixels[3, 5] = value
    path = save(tmp_path / "a.tif", Image.fromarray(pixels))
    with pytest.raises(UserError, match=r"a\.tif: its grey values are .*, but must be in 0\.\.1"):
        read_image(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_with_a_value_that_is_no_number_is_refused(tmp_path: Path, value: float):
    pixels = RAMP.astype(np.float32)
    pixels[3, 5] = value
    path = save(tmp_path / "a.tif", Image.fromarray(pixels))
    with pytest.raises(UserError, match=r"a\.tif: holds values that are not finite"):
        read_image(path)


def transparent(hidden: tuple[int, int, int]) -> Image.Image:
    """A red square; around it nothing is seen, whatever colour is stored there."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[2:6, 2:6] = (255, 0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "palette.png", "colour key.png"])
def test_transparency_is_put_over_white_whatever_colour_is_hidden(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    image = transparent((0, 255, 0))
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    if name == "palette.png":
        image = image.quantize(4)
    if name == "colour key.png":
        image, options = image.convert("RGB"), {"transparency": (0, 255, 0)}
    image.save(tmp_path / name, **options)
    with caplog.at_level(logging.INFO):
        shown = np.asarray(read_image(tmp_path / name))
    assert tuple(shown[0, 0]) == BACKGROUND
    assert tuple(shown[4, 4]) == (255, 0, 0)
    assert caplog.messages == [f"{tmp_path / name}: its transparent pixels are shown over white"]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path):
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 51))  # 51 / 255 = one fifth
    shown = read_image(save(tmp_path / "a.png", image)).getpixel((0, 0))
    assert shown == (204, 224, 244)


def test_of_an_animated_image_the_first_frame_is_read(tmp_path: Path):
    first, *others = [Image.new("RGB", (8, 8), name) for name in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
        assert read_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_those_of_the_upright_image(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        Image.new("RGB", (6, 4)).save(tmp_path / name, exif=exif)
        size = image_size(tmp_path / name)
        assert size == ((6, 4) if orientation >= 5 else (4, 6))
        assert read_image(tmp_path / name).size == size[::-1]


def test_the_size_of_what_is_no_image_is_refused(tmp_path: Path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UserError, match=r"a\.png: not an image that can be read$"):
        image_size(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png: no such file"):
        image_size(tmp_path / "b.png")
