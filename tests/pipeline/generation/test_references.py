import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import GenerateConfig
from pipeline.errors import UserError
from pipeline.generation.references import UPLOADED, bounded, open_picture, read_references


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "cup.png"
    Image.new("RGB", (40, 30), "green").save(path)
    return str(path)


def test_query_and_mask_are_read(photo: str, tmp_path: Path) -> None:
    mask = np.zeros((60, 80), np.uint8)  # twice the image's size, same shape
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cfg = GenerateConfig(
        image=[photo, photo],
        query=["a cup", ""],
        mask=["", str(tmp_path / "mask.png")],
        prompt="a cup on snow",
    )
    by_text, by_mask = read_references(cfg)
    assert (by_text.name, by_text.query, by_text.mask) == ("cup", "a cup", None)
    assert by_mask.query is None and by_mask.mask is not None
    assert by_mask.mask.size == by_mask.image.size
    chosen = np.asarray(by_mask.mask)
    assert (chosen[:, :20] == 0).all() and (chosen[:, 20:] == 255).all()


def test_transparency_is_shown_on_white_and_exif_turns(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    paths = [str(tmp_path / "clear.png"), str(tmp_path / "turned.jpg")]
    clear, turned = read_references(GenerateConfig(image=paths, query=["a", "b"], prompt="x"))
    assert clear.image.getpixel((0, 0)) == (255, 255, 255)
    assert turned.image.size == (20, 40)


def test_sixteen_bits_are_not_clipped_to_white(tmp_path: Path) -> None:
    """Depth maps are kept so."""
    steps = np.array([[0, 100 << 8, 65535]], np.uint16).repeat(3, axis=0)
    for name in ("depth.png", "depth.tif"):
        Image.fromarray(steps).save(tmp_path / name)
        found = bounded(open_picture(str(tmp_path / name)))
        assert np.asarray(found)[0, :, 0].tolist() == [0, 100, 255]
    for number, mode in enumerate(("F", "LAB")):
        Image.new(mode, (4, 4)).save(tmp_path / f"{number}.tif")
        with pytest.raises(UserError, match="8 bits per colour"):
            open_picture(str(tmp_path / f"{number}.tif"))


def test_of_strangers_three_formats_are_decoded() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, kind)
        file.seek(0)
        if kind in UPLOADED:
            assert open_picture("an upload", file, formats=UPLOADED).size == (4, 4)
        else:
            with pytest.raises(UserError, match=r"an upload: .*give a jpg, png or webp"):
                open_picture("an upload", file, formats=UPLOADED)


def bomb(path: Path, side: int) -> None:
    """A tiny PNG whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def fails(**settings: object) -> str:
    with pytest.raises(UserError) as caught:
        read_references(GenerateConfig(**settings))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_ends_in_one_line(photo: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 100)
    (tmp_path / "cut.png").write_bytes(Path(photo).read_bytes()[:60])
    bomb(tmp_path / "large.png", 9_000)
    bomb(tmp_path / "bomb.png", 60_000)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    crooked = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")  # a text, in numbers
    Image.new("RGB", (40, 30)).save(tmp_path / "crooked.jpg", exif=crooked)
    Image.new("L", (40, 30)).save(tmp_path / "black.png")
    Image.new("L", (30, 30), 255).save(tmp_path / "square.png")
    ask = {"prompt": "x", "query": ["a cup"]}

    assert "no such image" in fails(image=[str(tmp_path / "no.jpg")], **ask)
    assert "is a folder" in fails(image=[str(tmp_path)], **ask)
    assert "not a readable image" in fails(image=[str(tmp_path / "broken.jpg")], **ask)
    assert "not a readable image" in fails(image=[str(tmp_path / "cut.png")], **ask)
    assert "broken EXIF" in fails(image=[str(tmp_path / "crooked.jpg")], **ask)
    assert "9000x9000 pixels" in fails(image=[str(tmp_path / "large.png")], **ask)
    assert "bomb" in (line := fails(image=[str(tmp_path / "bomb.png")], **ask)) and "pixels" in line
    assert "2 given for 1 image" in fails(image=[photo], prompt="x", query=["a", "b"])
    assert "1 given for 2 image" in fails(image=[photo] * 2, prompt="x", mask=[photo])
    assert "scales: 1 given for 2 image" in fails(image=[photo] * 2, prompt="x", scales=[1.0])
    assert "region: 2 given for 1 image" in fails(image=[photo], prompt="x", region=["", ""])
    assert "region" in fails(image=[photo], region=["0,0,2,1"], **ask)
    assert "cup: neither a query nor a mask" in fails(image=[photo], prompt="x")
    assert "cup: neither a query nor a mask" in fails(image=[photo], prompt="x", query=[" "])
    mask = {"image": [photo], "prompt": "x"}
    assert "black all over" in fails(mask=[str(tmp_path / "black.png")], **mask)
    assert "same shape" in fails(mask=[str(tmp_path / "square.png")], **mask)
    assert "no such image" in fails(mask=[str(tmp_path / "no.png")], **mask)
