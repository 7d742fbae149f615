"""Pictures that another tool drew, scored like the others: <key>.png for each request.

Where the bench's requests.jsonl lies beside them, it says what they were drawn of (export.py).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, Outline, Request
from pipeline.evaluation.benches.export import REQUESTS
from pipeline.evaluation.methods.method import Drawn
from pipeline.generation.references import open_picture
from pipeline.storage import Storage
from ssr_model.images import as_rgb

KINDS = (".png", ".jpg", ".jpeg", ".webp")
MAX_BYTES = 100_000_000
"""Largest file that is read."""
_AT_ONCE = 16
_MEND = "draw what jobs/evaluate.py requests writes for this --bench, --seeds and --seed"


class DrawnElsewhere:
    """A folder of pictures, local or s3://, named by the requests' keys.

    They may be of any size and shape and are taken as they are, in RGB: nothing is cropped or
    scaled here, each metric scales what it looks at.
    """

    native, learns = False, False

    def __init__(self, name: str, folder: str) -> None:
        self.name = self.title = name
        self._storage = Storage(folder)

    @property
    def settings(self) -> dict[str, Any]:
        """The name and the content of every picture in the folder: another one is another method's.
        All of them are read. `seeds`: whether the folder says which ones they were drawn from."""
        told = REQUESTS in self._sizes
        return {"method": "folder", "sha256": self._sha256, "seeds": "told" if told else "unknown"}

    def check(self, bench: Bench) -> None:
        """Raise UserError where the folder lacks a request's picture, has two of one, or says that
        they were drawn of other requests or from other seeds.
        """
        asked = {request.key: request for request in bench.outlines()}
        if REQUESTS in self._sizes:  # first: it knows why pictures lack
            self._check_drawn(asked)
        self.check_keys(list(asked))

    def _check_drawn(self, asked: Mapping[str, Outline]) -> None:
        drawn, url = self._drawn(), self._storage.url(REQUESTS)
        unknown = [key for key in asked if key not in drawn]
        if unknown:
            raise UserError(
                f"images_from: {url}: mismatched requests: {len(unknown)} of the bench's "
                f"{len(asked)} are not there, {unknown[0]} for one; {_MEND}"
            )
        for what in ("prompt", "seed"):
            wanted = {key: getattr(request, what) for key, request in asked.items()}
            odd = [key for key, value in wanted.items() if drawn[key].get(what) != value]
            if odd:
                asks, there = repr(wanted[odd[0]])[:80], repr(drawn[odd[0]].get(what))[:80]
                raise UserError(
                    f"images_from: {url}: mismatched {what}s of {len(odd)} of {len(asked)} "
                    f"requests: of {odd[0]} it is {there} there, and {asks} in the bench; {_MEND}"
                )

    def _drawn(self) -> dict[str, dict[str, Any]]:
        """What the folder's requests.jsonl says, by key."""
        url = self._storage.url(REQUESTS)
        if self._sizes[REQUESTS] > MAX_BYTES:
            raise UserError(
                f"images_from: {url} is {self._sizes[REQUESTS]:,} bytes, more than {MAX_BYTES:,} "
                "are not read"
            )
        try:
            lines = self._storage.read_bytes(REQUESTS).decode().split("\n")
            return {said["key"]: said for said in map(json.loads, filter(str.strip, lines))}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"images_from: {url} is not what jobs/evaluate.py requests writes "
                f"({type(error).__name__}); write it again, or take it away"
            ) from None

    def check_keys(self, keys: Sequence[str]) -> None:
        missing = [key for key in keys if key not in self._files]
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(
                f"images_from: {self._storage.url()} lacks {len(missing)} of {len(keys)} pictures: "
                f"{some}; each is <key>.png, .jpg or .webp"
            )

    def open(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        keys = [request.key for request in requests]
        self.check_keys(keys)
        return [Drawn(self._picture(self._files[key])) for key in keys]

    def _picture(self, path: str) -> Image.Image:
        url = self._storage.url(path)
        try:
            return as_rgb(open_picture(url, io.BytesIO(self._storage.read_bytes(path))))
        except ValueError as error:
            raise UserError(f"{url}: {' '.join(str(error).split())}") from None

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self._storage.sizes()

    @cached_property
    def _files(self) -> dict[str, str]:
        """Path of each key's picture."""
        files: dict[str, str] = {}
        for path, size in self._sizes.items():
            file = PurePosixPath(path)
            if file.suffix.lower() not in KINDS:
                continue
            if size > MAX_BYTES:
                raise UserError(
                    f"images_from: {self._storage.url(path)} is {size:,} bytes, more than "
                    f"{MAX_BYTES:,} are not read"
                )
            key = str(file.with_suffix(""))
            if key in files:
                raise UserError(
                    f"images_from: {self._storage.url()} has two pictures of {key}: {files[key]} "
                    f"and {path}; leave one"
                )
            files[key] = path
        if not files:
            there = self._storage.exists()
            what = f"has no pictures ({', '.join(KINDS)})" if there else "is not there"
            raise UserError(
                f"images_from: {self._storage.url()} {what}; name a folder with a <key>.png for "
                "each request"
            )
        return files

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for path, data in self._contents():
            digest.update(f"{path}\0{hashlib.sha256(data).hexdigest()}\n".encode())
        return digest.hexdigest()

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        paths = sorted(self._files.values())
        for first in range(0, len(paths), _AT_ONCE):
            yield from self._storage.read_many(paths[first : first + _AT_ONCE]).items()
