"""The samples of a tar: of a sound one all, of a hostile one those that are sound."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tracemalloc
from typing import Any

import pytest

from pipeline.curation.webdataset import samples

Entry = tuple[str, bytes | tarfile.TarInfo]


def pack(*entries: Entry, kind: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        for name, data in entries:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            body = b"" if isinstance(data, tarfile.TarInfo) else data
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return sink.getvalue()


def special(name: str, kind: bytes, target: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def read(data: bytes, **options: Any) -> samples.Found:
    return samples.read(io.BytesIO(data), len(data), **options)


def told(found: samples.Found) -> dict[str, str]:
    return {sample.member: sample.caption for sample in found.samples}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_sample_and_where_its_image_lies(kind: int) -> None:
    long = "folder/" * 20 + "süß"
    said = {"caption": "a tree", "aesthetic": 6.5, "predictor": "v2", "url": "http://x/"}
    entries: list[Entry] = [
        special("folder", tarfile.DIRTYPE),
        ("./a.jpg", b"IMAGE A"), ("./a.txt", "\ufeffa  red\nfish\n".encode()),
        ("b.c.webp", b"IMAGE B"), ("b.json", json.dumps(said).encode()),
        ("d.JPEG", b"IMAGE D"), ("d.json", b'{"text": "a cup"}'), ("d.txt", b" "),
        ("e.png", b"IMAGE E"), ("e.cls", b"3"), ("README", b"x"), ("._a.jpg", b"mac"),
    ]  # fmt: skip
    if kind != tarfile.USTAR_FORMAT:
        entries.append((f"{long}.png", b"IMAGE L" * 1000))
    data = pack(*entries, kind=kind)
    found = read(data)
    wanted = {"a.jpg": "a red fish", "b.c.webp": "a tree", "d.JPEG": "a cup", "e.png": ""}
    if kind != tarfile.USTAR_FORMAT:
        wanted[f"{long}.png"] = ""
    assert told(found) == wanted and not found.dropped and not found.failed and not found.damage
    for sample in found.samples:
        assert data[sample.offset :][: sample.bytes].startswith(b"IMAGE ")
        assert not data[sample.offset + sample.bytes :][:1].strip(b"\0")
    assert [s.aesthetic for s in found.samples][:2] == [None, 6.5]
    assert found.samples[1].predictor == "v2"


def test_which_file_is_the_image_and_the_caption() -> None:
    data = pack(
        ("a.input.jpg", b"1"), ("a.output.jpg", b"2"), ("a.txt", b"one"), ("a.long.txt", b"two"),
        ("b.input.jpg", b"3"),
    )  # fmt: skip
    assert read(data).dropped == {"several_images": 1}
    found = read(data, images=["output.jpg", "input.jpg"], captions=["long.txt", "txt"])
    assert told(found) == {"a.output.jpg": "two", "b.input.jpg": ""}


def test_what_is_no_sample_is_counted() -> None:
    evil = "\udcff".encode("utf-8", "surrogateescape")
    hostile: dict[str, list[Entry]] = {
        "bad_name": [
            ("/etc/passwd.jpg", b"x"), ("../../up.jpg", b"x"), ("in/../../up.png", b"x"),
            ("line\nfeed.jpg", b"x"), ("\x1b[31m.jpg", b"x"), ("l" * 2000 + ".jpg", b"x"),
        ],
        "duplicate_key": [("a.jpg", b"again"), ("t.jpg", b"1"), ("t.jpg", b"2")],
        "no_image": [("only.txt", b"x"), ("m.mp4", b"x")],
        "several_images": [("s.jpg", b"1"), ("s.png", b"2")],
        "not_a_file": [
            special("l.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            special("h.jpg", tarfile.LNKTYPE, "a.jpg"), special("c.jpg", tarfile.CHRTYPE),
            special("f.jpg", tarfile.FIFOTYPE),
        ],
        "bad_caption": [
            ("u.jpg", b"1"), ("u.txt", b"\xff\xfe"), ("v.jpg", b"1"), ("v.json", b"{"),
            ("w.jpg", b"1"), ("w.txt", b"x" * 70_000), ("y.jpg", b"1"), ("y.json", b"[" * 200_000),
            ("z.jpg", b"1"), ("z.json", b'{"caption": "\\ud800"}'),
        ],
    }  # fmt: skip
    entries: list[Entry] = [("a.jpg", b"A"), ("a.txt", b"a fish")]
    for some in hostile.values():
        entries += some
    found = read(pack(*entries, ("last.jpg", b"Z")))
    assert found.dropped == {
        "bad_name": 6, "duplicate_key": 2, "no_image": 2, "several_images": 1, "not_a_file": 4,
        "bad_caption": 5,
    }  # fmt: skip
    assert told(found) == {"a.jpg": "a fish", "last.jpg": ""} and not found.damage
    data = pack(("QQQQ.jpg", b"x"), kind=tarfile.GNU_FORMAT)  # a name of bytes that are no text
    header = bytearray(data)
    header[:4] = evil * 4
    header[148:156] = b" " * 8
    header[148:155] = f"{sum(header[:512]):06o}\0".encode()
    assert read(bytes(header)).dropped == {"bad_name": 1}
    odd = read(pack(("a.jpg", b"1"), ("a.json", b'{"aesthetic": NaN, "predictor": 3}')))
    assert (odd.samples[0].aesthetic, odd.samples[0].predictor) == (None, None)


def test_a_tar_that_ends_early_gives_what_came_before() -> None:
    whole = pack(*((f"{n}.{e}", b"x" * 700) for n in range(5) for e in ("jpg", "txt")))
    assert len(read(whole).samples) == 5
    # in an image, in a caption, in the header of a caption, in that of the next sample
    for cut, kept in ((4 * 1536 + 600, 2), (5 * 1536 + 600, 2), (5 * 1536 + 200, 2), (6344, 1)):
        found = read(whole[:cut])
        assert found.damage and found.failed == {"truncated_tar": 1}, cut
        assert len(found.samples) == kept, cut
    assert len(read(whole[: 4 * 1536]).samples) == 2  # between two samples, as some writers end
    broken = read(whole[:3072] + b"garbage" * 1000)
    assert broken.damage and len(broken.samples) <= 1
    for magic in (b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00"):
        assert "compressed" in read(magic + b"x" * 2000).damage
    assert read(b"<html>").damage and read(b"").damage
    assert not read(bytes(10240)).damage and not read(bytes(10240)).samples


def test_headers_that_ask_for_too_much() -> None:
    """Names of gigabytes, chains without end, sizes below nothing: an end, and little memory."""

    def header(kind: bytes, size: int, name: str = "x") -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    sound = pack(("a.jpg", b"A"), ("a.txt", b"t"), ("b.jpg", b"B"))[: 6 * 512]
    negative = bytearray(header(tarfile.REGTYPE, 0, "n.jpg"))
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b" " * 8
    negative[148:155] = f"{sum(negative[:512]):06o}\0".encode()
    attacks = {
        "pax": header(tarfile.XHDTYPE, 1 << 40),
        "long name": header(tarfile.GNUTYPE_LONGNAME, 1 << 33),
        "chain": header(tarfile.XHDTYPE, 0) * 5000,
        "negative": bytes(negative),
        "huge member": header(tarfile.REGTYPE, 1 << 50, "huge.jpg"),
    }
    tracemalloc.start()
    for name, attack in attacks.items():
        found = read(sound + attack + bytes(8 << 20))
        assert found.damage, name
        assert "a.jpg" in told(found), name
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_damage_never_raises() -> None:
    data = pack(*((f"{n}.{e}", b"{}" * 50) for n in range(4) for e in ("jpg", "json")))
    chance = random.Random(0)
    for _ in range(500):
        broken = bytearray(data[: chance.randrange(len(data))])
        for _ in range(chance.randrange(1, 20)):
            if broken:
                broken[chance.randrange(len(broken))] = chance.randrange(256)
        found = read(bytes(broken))
        for sample in found.samples:
            assert sample.offset >= 0 and sample.offset + sample.bytes <= len(broken)
            sample.member.encode()
