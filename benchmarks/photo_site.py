"""A web of photographs for benchmarks: synthetic JPEGs, from the memory of a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import multiprocessing
import random
import socket
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
from PIL import Image

MEGAPIXELS = NormalDist(0.0, math.log(4) / NormalDist().inv_cdf(0.9))
"""Of the logarithm of a size: median 1, a tenth above 4."""
_CONTEXT = multiprocessing.get_context("spawn")


def photos(number: int, largest: float) -> list[np.ndarray]:
    """[height, width, 3] uint8, RGB: windows of one field whose amplitude falls as 1 / frequency.

    Their sizes are the quantiles of a log-normal distribution: median 1, a tenth above 4
    megapixels, cut at `largest`.
    """
    rng = np.random.default_rng(0)
    sizes = []
    for index in range(number):
        pixels = math.exp(MEGAPIXELS.inv_cdf((index + 0.5) / number)) * 1e6
        aspect = (4 / 3, 3 / 2, 1.0, 16 / 9)[index % 4]
        short = max(520, round(math.sqrt(min(pixels, largest * 1e6) / aspect)))
        long = round(short * aspect)
        sizes.append((short, long) if index % 3 else (long, short))
    field_side = max(max(size) for size in sizes) + 64
    frequency = np.hypot(np.fft.fftfreq(field_side)[:, None], np.fft.rfftfreq(field_side)[None])
    amplitude = np.exp(-2 * (np.pi * 1.2 * frequency) ** 2) / np.maximum(frequency, 1 / 2048)
    planes = []
    for contrast in (48, 12, 12):
        noise = rng.standard_normal((2, *amplitude.shape), dtype=np.float32)
        plane = np.fft.irfft2((noise[0] + 1j * noise[1]) * amplitude, (field_side, field_side))
        planes.append((128 + contrast * plane / plane.std()).clip(0, 255).astype(np.uint8))
    whole = cv2.cvtColor(np.dstack(planes), cv2.COLOR_YCrCb2RGB)
    out = []
    for height, width in sizes:
        top, left = rng.integers(field_side - height), rng.integers(field_side - width)
        out.append(np.ascontiguousarray(whole[top : top + height, left : left + width]))
    return out


def encode(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()


class _Site(asyncio.Protocol):
    """HTTP/1.1 from memory: /<index>.jpg."""

    bodies: list[bytes]

    def connection_made(self, transport: Any) -> None:
        self.transport, self.asked = transport, b""

    def data_received(self, data: bytes) -> None:
        self.asked += data
        while b"\r\n\r\n" in self.asked:
            head, _, self.asked = self.asked.partition(b"\r\n\r\n")
            body = self.bodies[int(head.split(b" ", 2)[1].partition(b".")[0].lstrip(b"/"))]
            kind = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
            self.transport.write(kind % len(body) + body)
            if b"connection: close" in head.lower():
                self.transport.close()


def _serve(told: Any, bodies: list[bytes]) -> None:
    """A site; and a port that takes connections and never says a word, on all of 127/8."""
    _Site.bodies = bodies

    async def run() -> None:
        loop = asyncio.get_running_loop()
        site = await loop.create_server(_Site, "127.0.0.1", 0, backlog=1024)
        mute = await loop.create_server(asyncio.Protocol, "0.0.0.0", 0, backlog=1024)
        told.send([server.sockets[0].getsockname()[1] for server in (site, mute)])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextlib.contextmanager
def website(bodies: list[bytes]) -> Iterator[tuple[int, int]]:
    """The ports of a site in a process of its own: the one that serves, and the mute one."""
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(there, bodies), daemon=True)
    process.start()
    try:
        site, mute = here.recv()
        yield site, mute
    finally:
        process.kill()
        process.join()


def links(images: int, pool: int, ports: tuple[int, int], dead: float) -> list[str]:
    """Urls in a shuffled order; of the dead ones, half refuse and half are mute."""
    rng = random.Random(0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = closed.getsockname()[1]
    urls = []
    for index in range(images):
        host = f"127.0.0.1:{ports[0]}"
        if index < dead * images:
            number = rng.randrange(1 << 16)
            address = f"127.{1 + index % 200}.{number >> 8}.{number & 255 or 1}"
            host = f"{address}:{refused if index % 2 else ports[1]}"
        urls.append(f"http://{host}/{index % pool}.jpg?{index}")
    rng.shuffle(urls)
    return urls
