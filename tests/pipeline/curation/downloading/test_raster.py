"""Everything that passes the header decodes to 8-bit colour, upright; reduced means no worse."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.config import DownloadConfig
from pipeline.curation.downloading import raster
from pipeline.curation.downloading.driven import Resizer
from pipeline.curation.downloading.vetting import vet
from pipeline.curation.fetching.fetch import FetchError
from tests.pipeline.curation.downloading.pictures import encoded, two_halves

CFG = DownloadConfig(min_image_size=16, max_pixels=20_000_000)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colours with the spectrum of photographs, amplitude ~ 1 / frequency."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fx, fy), 1 / max(width, height))
    amplitude = amplitude * np.exp(-2 * (np.pi * np.hypot(fx, fy)) ** 2)  # the lens
    planes = []
    for contrast in (48, 12, 12):
        noise = rng.normal(size=(2, *amplitude.shape))
        plane = np.fft.irfft2((noise[0] + 1j * noise[1]) * amplitude, (height, width))
        planes.append(128 + contrast * plane / plane.std())
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8), "YCbCr").convert(
        "RGB"
    )


def decoded(body: bytes, cfg: DownloadConfig = CFG) -> np.ndarray:
    """As the resizer gets it, in RGB, alpha left out."""
    pixels = raster.decode(body, vet(body, cfg))
    assert pixels.dtype == np.uint8 and pixels.shape[2] in (3, 4)
    return np.ascontiguousarray(pixels[:, :, 2::-1])


@pytest.mark.parametrize("form", ["GIF", "BMP", "PNG", "WEBP", "JPEG"])
def test_formats(form: str) -> None:
    pixels = decoded(encoded(two_halves(), form, **({"lossless": True} if form == "WEBP" else {})))
    difference = np.abs(pixels.astype(int) - np.asarray(two_halves()))
    assert difference.mean() < (8 if form == "JPEG" else 0.01)


BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """As a camera held so stores it, and what it notes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image if orientation == 1 else image.transpose(BACK[orientation]), exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    corners = np.zeros((32, 40, 3), np.uint8)
    corners[:16, :20], corners[16:, 20:] = RED, BLUE  # no turn or flip of it is itself
    corners[:16, 20:] = 255
    image = Image.fromarray(corners)
    stored, exif = turned(image, orientation)
    for form in ("JPEG", "PNG", "WEBP"):
        body = encoded(stored, form, exif=exif)
        assert np.abs(decoded(body).astype(int) - corners).mean() < 8
    body = encoded(stored.resize((stored.width * 9, stored.height * 9)), "JPEG", exif=exif)
    pixels = raster.reduced(body, vet(body, CFG), 32)
    assert pixels is not None and pixels.shape == (64, 64, 3)
    expected = np.asarray(image.resize((80, 64)).crop((8, 0, 72, 64)))
    assert np.abs(pixels[:, :, ::-1].astype(int) - expected).mean() < 8


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    if mode == "I;16":
        gray = np.asarray(two_halves().convert("L")).astype(np.uint16) * 257
        image, form = Image.fromarray(gray), "PNG"
    else:
        image = two_halves().convert(mode)
        form = "JPEG" if mode == "CMYK" else "PNG"
    pixels = decoded(encoded(image, form)).astype(int)
    expected = np.asarray(
        image.convert("RGB") if mode != "I;16" else two_halves().convert("L").convert("RGB")
    )
    assert np.abs(pixels - expected).mean() < 8


def test_ycck_jpegs_of_print_shops() -> None:
    """Adobe's kind of CMYK: its inks stored inverted, and turned into luma and chroma."""
    inks = np.asarray(two_halves().convert("CMYK"))
    colours = np.asarray(Image.fromarray(np.ascontiguousarray(inks[:, :, :3])).convert("YCbCr"))
    planes = np.dstack([255 - colours, inks[:, :, 3]])  # Pillow inverts once more
    body = bytearray(encoded(Image.fromarray(planes, "CMYK"), "JPEG", quality=95, subsampling=0))
    transform = body.index(b"Adobe") + 11
    assert body[transform] == 0  # Pillow marks plain CMYK
    body[transform] = 2
    assert np.abs(decoded(bytes(body)).astype(int) - np.asarray(two_halves())).mean() < 12


def test_deep_colour_keeps_its_upper_bits() -> None:
    deep = (np.asarray(two_halves()).astype(np.uint16) * 257)[:, :, ::-1]
    body = cv2.imencode(".png", deep)[1].tobytes()
    assert not vet(body, CFG).plain
    assert np.array_equal(decoded(body), np.asarray(two_halves()))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_image_the_first_frame(form: str) -> None:
    blue = Image.new("RGB", (40, 32), BLUE)
    body = encoded(two_halves(), form, save_all=True, append_images=[blue], duration=40)
    assert not vet(body, CFG).plain
    assert np.abs(decoded(body).astype(int) - np.asarray(two_halves())).mean() < 8


def test_colour_profiles_are_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_profile = encoded(two_halves(), "JPEG", icc_profile=profile)
    assert np.array_equal(decoded(with_profile), decoded(encoded(two_halves(), "JPEG")))


def test_transparency_lies_on_white() -> None:
    image = two_halves().convert("P")
    body = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    assert (decoded(body)[:16] == 255).all()
    clear = Image.new("RGBA", (2100, 2100), (0, 0, 0, 0))
    assert (decoded(encoded(clear, "PNG", compress_level=1)) == 255).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_images_are_named_so(form: str) -> None:
    body = encoded(photo(200, 160), form)
    header = vet(body, CFG)
    with pytest.raises(FetchError, match="truncated"):
        raster.decode(body[: len(body) * 2 // 3], header)
    if form == "JPEG":
        assert raster.reduced(body[: len(body) * 2 // 3], header, 32) is None


def stored(body: bytes, side: int, reduced: bool) -> np.ndarray:
    """As it is stored: through img2dataset's resizer, without loss."""
    cfg = DownloadConfig(image_size=side, encode_quality=0)
    header = vet(body, cfg)
    pixels = raster.reduced(body, header, side) if reduced else raster.decode(body, header)
    assert pixels is not None
    image, width, height = Resizer(cfg, "linear" if reduced else "area")(pixels)
    assert (width, height) == (side, side) and image is not None
    return np.asarray(Image.open(io.BytesIO(image)))


@pytest.mark.parametrize("size", [(150, 131), (200, 243), (301, 257), (410, 387), (900, 701)])
def test_reduced_is_as_good_as_full(size: tuple[int, int]) -> None:
    side = 128
    original = photo(*size)
    body = encoded(original, "JPEG", quality=92)
    full, reduced = stored(body, side, False), stored(body, side, True)
    assert cv2.PSNR(full, reduced) > 36
    short = min(size)
    width, height = (round(length * side / short) for length in size)
    left, top = (width - side) // 2, (height - side) // 2
    best = original.resize((width, height), Image.Resampling.LANCZOS)
    best = np.asarray(best.crop((left, top, left + side, top + side)))

    assert cv2.PSNR(reduced, best) > cv2.PSNR(full, best) - 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_is_cut_where_the_upright_one_is(orientation: int) -> None:
    """Sides that are no multiple of the factor, 8 here: a row and a column are in part padding."""
    image, exif = turned(photo(1033, 1025), orientation)
    body = encoded(image, "JPEG", quality=92, exif=exif)
    assert cv2.PSNR(stored(body, 64, False), stored(body, 64, True)) > 40


def test_sides_that_opencv_cannot_warp_are_decoded_whole() -> None:
    cfg = DownloadConfig(image_size=16)
    for length in (32_760, 32_767, 40_000, 65_500):
        body = encoded(Image.new("RGB", (length, 40)), "JPEG")
        pixels = raster.reduced(body, vet(body, cfg), 16)
        assert pixels is None or pixels.shape == (32, 32, 3)
        assert (pixels is None) == (length > 32_764)


def test_what_is_not_reduced() -> None:
    for body in (
        encoded(photo(300, 300), "PNG"),
        encoded(photo(300, 300).convert("L"), "JPEG"),
        encoded(photo(64, 64), "JPEG"),  # not larger than what is stored
    ):
        assert raster.reduced(body, vet(body, CFG), 64) is None
