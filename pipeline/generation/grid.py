"""Pictures side by side with words: the labelled grid that people look at.

Small pictures are enlarged by whole factors without smoothing, so that their pixels stay crisp;
large ones are reduced to fit. The fonts come with Pillow: the grid is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

INK = (32, 33, 36)
QUIET = (95, 99, 104)
PAPER = (255, 255, 255)
TONES = {"a": (26, 103, 210), "b": (196, 88, 0), "c": (118, 60, 170)}
"""Frame and caption colours: the first subject, the second, one of another picture."""

_GAP = 14
_FRAME = 3


@dataclass(frozen=True)
class Cell:
    """One picture of the grid; without an image the place stays empty."""

    image: Image.Image | None = None
    caption: str = ""
    """What is under the picture; lines are split at newlines and wrapped to the cell."""
    tone: str | None = None
    """A key of TONES: whose picture this is; none = nobody's."""


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """The picture within side x side: whole factors and nearest pixels up, Lanczos down."""
    longest = max(image.size)
    if longest <= side:
        return ImageOps.scale(image, side // longest, Image.Resampling.NEAREST)
    return ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)


def _wrap(text: str, width: float, size: int) -> list[str]:
    font, lines = _font(size), []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def draw(
    titles: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    heading: str = "",
    note: str = "",
    side: int = 160,
) -> Image.Image:
    """The grid as one RGB picture.

    Args:
        titles: one title per column.
        rows: as many cells per row as there are titles.
        heading, note: a sentence above and a quieter one below.
        side: side of the square that a picture is fitted into, pixels.

    Raises:
        ValueError: a row has more or fewer cells than there are titles.
    """
    for number, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f"row {number} has {len(row)} cells for {len(titles)} titles")
    text, line, step = 14, 18, side + _GAP
    width = _GAP + step * len(titles)
    captions = [[_wrap(cell.caption, side, text) for cell in row] for row in rows]
    heads = [_wrap(title, side, text) for title in titles]
    top = _wrap(heading, width - 2 * _GAP, text + 5) if heading else []
    foot = _wrap(note, width - 2 * _GAP, text) if note else []
    head_height = line * max((len(head) for head in heads), default=0) + 6
    row_heights = [
        side + 2 * _FRAME + 4 + line * max((len(c) for c in row), default=0) + _GAP
        for row in captions
    ]
    height = (
        2 * _GAP + (line + 7) * len(top) + head_height + sum(row_heights) + line * len(foot) + _GAP
    )
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)

    y = _write(pen, _GAP, _GAP, top, text + 5, line + 7, INK) + _GAP
    for column, head in enumerate(heads):
        centre = _GAP + column * step + side // 2
        _write(pen, centre, y, head, text, line, INK, centred=True, bold=True)
    y += head_height
    for row, lines, row_height in zip(rows, captions, row_heights, strict=True):
        for column, (cell, words) in enumerate(zip(row, lines, strict=True)):
            left = _GAP + column * step
            colour = TONES[cell.tone] if cell.tone else QUIET
            if cell.image is not None:
                picture = enlarge(cell.image.convert("RGB"), side)
                at = (left + (side - picture.width) // 2, y + _FRAME + side - picture.height)
                if cell.tone:
                    box = (at[0] - _FRAME, at[1] - _FRAME)
                    edge = (at[0] + picture.width + _FRAME - 1, at[1] + picture.height + _FRAME - 1)
                    pen.rectangle((*box, *edge), fill=colour)
                sheet.paste(picture, at)
            below = y + side + 2 * _FRAME + 4
            _write(pen, left + side // 2, below, words, text, line, colour, centred=True)
        y += row_height
    _write(pen, _GAP, y, foot, text, line, QUIET)
    return sheet


def _write(
    pen: ImageDraw.ImageDraw,
    x: int,
    y: int,
    lines: Sequence[str],
    size: int,
    line: int,
    colour: tuple[int, int, int],
    centred: bool = False,
    bold: bool = False,
) -> int:
    """Lines of text from (x, y) down, x the left edge or the centre; the y below them."""
    for words in lines:
        pen.text(
            (x, y),
            words,
            colour,
            _font(size),
            anchor="ma" if centred else "la",
            stroke_width=0.4 if bold else 0,
        )
        y += line
    return y
