"""img2dataset's Downloader and Resizer, driven: their code, with names of ours in it.

img2dataset keeps its fetch in a global of its module and shuts the whole process's stdout and
stderr while it decodes, so one of them that hangs would be in every later one's way. Here each
gets its own fetch, and the silence can be taken from one that hangs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import DownloadConfig

Fetch = Callable[..., tuple[int, io.BytesIO | None, str | None]]
Write = Callable[[bytes | None, dict[str, Any]], None]


@functools.cache
def modules() -> tuple[Any, Any]:
    """img2dataset's downloader and resizer modules, imported (seconds) without a word."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network for its newest version
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset import downloader, resizer
    return downloader, resizer


def download(
    urls: list[str | None],
    folder: str,
    cfg: DownloadConfig,
    fetch: Fetch,
    resize: Callable[[Any, Any], tuple[Any, ...]],
    write: Write,
) -> None:
    """Run a Downloader over `urls`; `fetch`, `resize` and `write` are called from its threads.

    `fetch` gets (row, url) and returns (row, stream or None, error or None); `resize` gets the
    stream and returns what a Resizer does; `write` gets every row, with its meta["row"].
    """
    shard = Path(folder) / "shard.arrow"
    rows = pa.array(range(len(urls)), pa.int64())
    table = pa.table({"row": rows, "url": pa.array(urls, pa.string())})
    with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    downloader = modules()[0].Downloader(
        sample_writer_class=lambda *_: _Writer(write),
        resizer=resize,
        thread_count=cfg.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=folder,
        column_list=["row", "url"],
        timeout=cfg.timeout_s,
        number_sample_per_shard=len(urls),
        oom_shard_count=1,
        compute_hash=None,
        verify_hash_type=None,
        encode_format=cfg.encode_format,
        retries=cfg.retries,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    run = with_names(type(downloader).download_shard, download_image_with_retry=fetch)
    run(downloader, (0, str(shard)))


class Resizer:
    """img2dataset's Resizer for pixels that are decoded already."""

    def __init__(self, cfg: DownloadConfig, downscale: str = "area") -> None:
        self._resizer = modules()[1].Resizer(
            image_size=cfg.image_size,
            resize_mode="center_crop",
            resize_only_if_bigger=False,
            downscale_interpolation=downscale,
            encode_quality=cfg.encode_quality,
            encode_format=cfg.encode_format,
        )

    def __call__(self, pixels: np.ndarray) -> tuple[bytes | None, int, int]:
        """[height, width, 3 or 4] uint8, BGR(A) -> encoded image, width, height; None = fault."""
        run = with_names(
            type(self._resizer).__call__,
            cv2=_Decoded(pixels),
            A=_transforms(),
            SuppressStdoutStderr=contextlib.nullcontext,
        )
        image, width, height, *_ = run(self._resizer, io.BytesIO(b"-"), None)
        return image, width, height


def with_names(function: Any, **names: Any) -> Any:
    """The function itself, but with these names instead of its module's."""
    scope = {**function.__globals__, **names}
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)


class _Decoded:
    """cv2, but its decoder gives the pixels that are there."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __getattr__(self, name: str) -> Any:
        return getattr(modules()[1].cv2, name)

    def imdecode(self, *_: Any) -> np.ndarray:
        return self.pixels


@functools.cache
def _transforms() -> Any:
    """albumentations with its transforms made once: making one costs as much as a small resize."""
    library = modules()[1].A
    return types.SimpleNamespace(
        SmallestMaxSize=functools.cache(library.SmallestMaxSize),
        CenterCrop=functools.cache(library.CenterCrop),
    )


class _Writer:
    """img2dataset's writer protocol."""

    def __init__(self, put: Write) -> None:
        self.put = put

    def write(self, image: bytes | None, key: str, caption: Any, meta: dict[str, Any]) -> None:
        self.put(image, meta)

    def close(self) -> None:
        pass


class _Silence:
    """Shuts the process's stdout and stderr (C libraries' too) while anybody holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: set[object] = set()
        self._kept: tuple[int, int] | None = None

    @contextlib.contextmanager
    def held(self, holder: object) -> Iterator[None]:
        with self._lock:
            self._holders.add(holder)
            if self._kept is None:
                self._shut()
        try:
            yield
        finally:
            self.release(holder)

    def release(self, holder: object) -> None:
        """Let go, also in the place of a holder that hangs; nothing happens if it holds nothing."""
        with self._lock:
            self._holders.discard(holder)
            if not self._holders and self._kept is not None:
                for stream, kept in zip((1, 2), self._kept, strict=True):
                    os.dup2(kept, stream)
                    os.close(kept)
                self._kept = None

    def _shut(self) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        self._kept = os.dup(1), os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)


silence = _Silence()
