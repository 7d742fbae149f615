"""What the page shows of its answers, as HTML: looks, pictures, progress, complaints.

Pictures stand in it as data URLs: nothing is written to a file, and nothing is served from one.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pipeline.generation import png
from pipeline.generation.recipe import Recipe
from pipeline.serving.artist import Look
from pipeline.serving.page_card import data_url, shown
from ssr_model.maps import overlay

_SMALL = 256
"""Pixels of a longest side below which a picture is enlarged with its pixels kept crisp."""
_LARGEST_LOOK = 512
"""Pixels: an overlay is not shown larger, and need not be sent larger."""

_COMING = "what the base model draws from the same noise: coming"
NOTHING_CHOSEN = "Type a word, or paint over the subject: what is selected shows here."


def head(facts: str = "") -> str:
    """What the page is, and in a line below who draws."""
    return (
        "<h1>Selective subject-driven generation</h1><p>Drop a picture. A word, or a mask you "
        "paint, says which subject to take; the prompt says where to put it.</p>"
        f'<p class="facts">{html.escape(facts) or "&nbsp;"}</p>'
    )


def looked(image: Image.Image, look: Look, masked: bool) -> str:
    """Where the encoder looks for a query."""
    seen = image.crop(look.box)
    said = f"where the encoder looks for “{look.query}”"
    if masked:
        said += "; of that, what you painted"
    return _selected(overlay(seen, look.attention), said)


def masked(image: Image.Image, mask: Image.Image) -> str:
    """What a mask selects."""
    return _selected(overlay(image, np.asarray(mask, np.float32)), "what you painted")


def waiting(words: str = NOTHING_CHOSEN) -> str:
    """The place of a look that is not there."""
    return f'<div class="look"><h4>Selected</h4><div class="empty">{html.escape(words)}</div></div>'


def not_looked(line: str) -> str:
    """Why there is no look."""
    return f'<div class="look"><h4>Selected</h4>{complaint(line)}</div>'


def pictures(recipe: Recipe, made: Sequence[bytes]) -> str:
    """What was drawn so far (PNG, whole): the recipe's picture, and beside it the one without its
    subjects.
    """
    if not recipe.subjects:
        cells = [_drawn(made[0], "Without subjects", "plain", recipe)]
    else:
        cells = [_drawn(made[0], "With subjects", "ssr", recipe)]
        if len(made) > 1:
            cells.append(_drawn(made[1], "Without: scale 0", "plain", recipe))
        else:
            cells.append(f'<div class="empty">{_COMING}</div>')
    return f'<div class="pair">{"".join(cells)}</div>'


def progress(done: int, of: int, left_s: float | None, words: str) -> str:
    """Steps that are done; left_s: estimated seconds to the end, none = not known yet."""
    left = "" if left_s is None else f", about {max(1, round(left_s))} s left"
    return (
        f'<div class="progress" role="status"><span>{html.escape(words)}: step {done} of {of}{left}'
        f'</span><progress max="{of}" value="{done}" aria-label="Progress"></progress></div>'
    )


def complaint(line: str) -> str:
    """One line of what went wrong, and what to do."""
    return f'<p class="complaint" role="alert">{html.escape(" ".join(line.split()))}</p>'


def shared(texts: Mapping[str, str], files: Mapping[str, bytes]) -> str:
    """Texts to copy by title, empty ones left out, and the pictures that they read by file name."""
    parts = [
        f'<section><div class="links"><h4>{html.escape(title)}</h4>'
        f'<button type="button" class="link" data-copy aria-label="Copy {html.escape(title)}">Copy'
        f'</button></div><pre tabindex="0" aria-label="{html.escape(title)}">{html.escape(text)}'
        "</pre></section>"
        for title, text in texts.items()
        if text
    ]
    if files:
        found = " ".join(
            f'<a class="link" download="{html.escape(name)}" href="{data_url(data)}">'
            f"{html.escape(name)}</a>"
            for name, data in files.items()
        )
        parts.append(f'<p class="links">Files that they read: {found}</p>')
    return "".join(parts)


def _selected(picture: Image.Image, said: str) -> str:
    picture.thumbnail((_LARGEST_LOOK, _LARGEST_LOOK), Image.Resampling.LANCZOS)
    return f'<div class="look"><h4>Selected</h4>{_figure(picture, said)}</div>'


def _figure(picture: Image.Image, said: str, more: str = "", title: str = "") -> str:
    small = ' class="small"' if max(picture.size) < _SMALL else ""
    heading = f'<figcaption class="title">{html.escape(title)}</figcaption>' if title else ""
    words = html.escape(said)
    return (
        f'<figure>{heading}<img{small} src="{shown(picture)}" alt="{words}">'
        f"<figcaption>{words}{more}</figcaption></figure>"
    )


def _drawn(data: bytes, title: str, kind: str, recipe: Recipe) -> str:
    link = (
        f' <a class="link" download="{kind}-seed{recipe.seed}.png" href="{data_url(data)}" '
        f'aria-label="Download {html.escape(title)}">Download</a>'
    )
    return _figure(png.picture(data), f"“{recipe.prompt}”, seed {recipe.seed}", link, title)
