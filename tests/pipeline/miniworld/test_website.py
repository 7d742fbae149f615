"""The mini world's web: deterministic links and metadata, a real server, its faults."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageOps

from pipeline.config import WebsiteConfig
from pipeline.errors import UserError
from pipeline.miniworld import links, serving, website, world
from pipeline.storage import Storage
from tests.ports import free_port

ROOT = Path(website.__file__).parents[2]


def get(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(website.HOST, port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()


def first(fate: str) -> links.Link:
    return next(item for item in (links.link(0, i) for i in range(5000)) if item.fate == fate)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((website.HOST, port)) == 0


def test_shares_of_the_fates_add_up_and_links_rot_as_the_web_does() -> None:
    assert sum(links.FATES.values()) == pytest.approx(1.0)
    found = Counter(links.link(0, index).fate for index in range(3000))
    alive = sum(found[fate] for fate in links.ALIVE) / 3000
    assert 0.68 < alive < 0.76
    assert set(found) == set(links.FATES)


def test_metadata_has_the_habits_of_laion(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    paths = links.write_metadata(storage, "meta", "http://127.0.0.1:1", 1200, seed=0)
    frames = [pl.read_parquet(tmp_path / path) for path in paths]
    assert sum(frame.height for frame in frames) == 1200
    assert {"URL", "url"} <= {name for frame in frames for name in frame.columns}
    sizes = {str(frame.schema.get("WIDTH") or frame.schema["width"]) for frame in frames}
    assert sizes == {"Float64", "Int32", "Int64"}
    urls = pl.concat([frame.select(pl.col("^(?i)url$").alias("url")) for frame in frames])["url"]
    assert 20 < urls.len() - urls.n_unique() < 80
    laion = frames[0]
    assert laion["hash"].is_duplicated().any() and laion["TEXT"].null_count() > 0
    assert 0.4 < (laion["AESTHETIC_SCORE"] > 6).mean() < 0.8
    assert (laion["punsafe"] > 0.5).any() and (laion["pwatermark"] > 0.8).any()
    again = links.write_metadata(storage, "again", "http://127.0.0.1:1", 1200, seed=0)
    for one, two in zip(paths, again, strict=True):
        assert storage.read_bytes(one) == storage.read_bytes(two)


def test_pictures_show_the_scene_of_the_link_upright_and_centred() -> None:
    items = [links.link(0, index) for index in range(400)]
    chosen = [item for item in items if item.fate == "ok"]
    turned = [item for item in chosen if item.orientation > 1]
    assert turned and {item.format for item in chosen} == {"JPEG", "PNG", "WEBP"}
    for item in [*chosen[:20], *turned]:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(serving.picture(item))))
        assert image.size == (item.width, item.height)
        assert min(image.size) >= 64 and max(image.size) <= 192
        square = ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.BOX)
        scene = world.render(world.scene(item.scene_seed, "train"), (32, 32))
        assert np.abs(np.asarray(square).astype(int) - scene).mean() < 25


def test_the_site_serves_images_and_faults(tmp_path: Path) -> None:
    port = free_port()
    cfg = WebsiteConfig(enabled=True, port=port, rows=60)
    with website.ensure(cfg, Storage(tmp_path)) as site:
        assert site.host == f"127.0.0.1:{port}"
        assert len(list(Path(site.metadata).glob("part-*.parquet"))) == 6
        ok = first("ok")
        status, headers, body = get(port, ok.path)
        assert (status, body) == (200, serving.picture(ok))
        assert headers["Content-Type"] == f"image/{ok.format.lower()}"
        busy = first("busy_once").path
        assert [get(port, busy)[0] for _ in range(3)] == [429, 200, 429]
        for fate, status in [
            ("gone_404", 404),
            ("gone_410", 410),
            ("down_503", 503),
            ("moved", 302),
        ]:
            assert get(port, first(fate).path)[0] == status
        assert get(port, first("opted_out").path)[1]["X-Robots-Tag"].startswith(
            ("noai", "noimageai", "noindex")
        )
        for path in ("/", "/0/xx.jpg", "/0/99999999999999999999.jpg", "/0/1.jpg", "/../etc/passwd"):
            assert get(port, path)[0] == 404
        stamp = Path(site.metadata, "part-00000.parquet").stat().st_mtime_ns
        with website.ensure(cfg, Storage(tmp_path)) as second:  # the same world: used, not started
            assert second == site
        assert Path(site.metadata, "part-00000.parquet").stat().st_mtime_ns == stamp
        assert get(port, ok.path)[0] == 200
    assert gone(port)


def test_a_port_taken_by_another_program_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind((website.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* taken .*--website.port"):
            website.serve(port)
        other.settimeout(60)
        import threading

        def hang_up() -> None:
            for _ in range(2):  # the first look, and the question about the world
                other.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        with (
            pytest.raises(UserError, match="taken by another program"),
            website.ensure(WebsiteConfig(port=port, rows=6), Storage(tmp_path)),
        ):
            pass


def test_the_site_leaves_when_its_starter_is_killed(tmp_path: Path) -> None:
    port = free_port()
    script = (
        "import time\n"
        "from pipeline.config import WebsiteConfig\n"
        "from pipeline.miniworld.website import ensure\n"
        "from pipeline.storage import Storage\n"
        f"with ensure(WebsiteConfig(port={port}, rows=6), Storage({str(tmp_path)!r})):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    starter = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert starter.stdout is not None
    with starter.stdout:
        assert starter.stdout.readline() == "up\n"
    assert listens(port)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    with website.ensure(WebsiteConfig(port=port, rows=6), Storage(tmp_path)):
        # the site outlives its starter: workers in flight finish, and the next job uses it
        time.sleep(0.5)
        assert listens(port)
    assert gone(port)


def test_a_site_stays_for_the_last_job_that_uses_it(tmp_path: Path) -> None:
    cfg = WebsiteConfig(port=free_port(), rows=6)
    starter, other = contextlib.ExitStack(), contextlib.ExitStack()
    starter.enter_context(website.ensure(cfg, Storage(tmp_path)))
    other.enter_context(website.ensure(cfg, Storage(tmp_path)))
    starter.close()
    assert get(cfg.port, first("ok").path)[0] == 200
    other.close()
    assert gone(cfg.port)


def gone(port: int) -> bool:
    until = time.monotonic() + 60
    while listens(port) and time.monotonic() < until:
        time.sleep(0.05)
    return not listens(port)


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        website.main(["--help"])
    assert ended.value.code == 0
    assert "--metadata" in capsys.readouterr().out
