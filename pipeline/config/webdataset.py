"""Settings of WebDatasets: as an input of jobs/curate.py, and of its command `export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.shared import absolute, at_least
from pipeline.errors import UserError


@dataclass
class WebDatasetConfig:
    """Images and captions in tars, in place of metadata and the web (docs/own_images.md)."""

    inputs: list[str] = field(default_factory=list)
    """Tars, folders of them, globs or ranges in braces ({00000..00099}), local, s3:// or gs://;
    empty = another source. Of filter, unit_rows, test_rows, max_rows and seed count."""
    image: list[str] = field(default_factory=list)
    """Extensions of a sample's image, the first that it has is taken; empty = any image's, and a
    sample of several is dropped."""
    caption: list[str] = field(default_factory=lambda: ["txt", "json"])
    """Extensions of a sample's caption, the first that has one is taken: text, or for json its
    field caption or text."""

    def __post_init__(self) -> None:
        self.inputs = [absolute(path) for path in self.inputs]
        for name in ("image", "caption"):
            given = [ext.lower().lstrip(".") for ext in getattr(self, name)]
            setattr(self, name, given)
        if not all([*self.image, *self.caption, True]):
            raise UserError("webdataset.image and webdataset.caption hold an empty extension")


@dataclass
class ImagesExportConfig:
    """jobs/curate.py export: images and captions of a curation -> a WebDataset. Run again after a
    stop, it goes on; tars that are there are not made again."""

    root: str = "runs/mini"
    """Root of the curation (a folder, s3:// or gs://); its captions must be through."""
    out: str | None = None
    """Where the tars go: a folder, s3:// or gs://."""
    format: Literal["webdataset"] = "webdataset"
    """What is written: tars of key.jpg (png, webp), key.txt (the caption), key.json (the rest)."""
    split: Literal["train", "test"] = "train"
    """Rows of which split."""
    rows: int = 0
    """Rows in a tar, at least: units are put together until they have so many; 0 = a tar for each
    unit."""
    threads: int = 4
    """Tars written side by side."""

    def __post_init__(self) -> None:
        at_least(self, "export", rows=0, threads=1)
