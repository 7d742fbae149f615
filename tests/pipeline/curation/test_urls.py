"""One rule for a url's identity: here for one url, in the filter for columns of them."""

from __future__ import annotations

import random

import numpy as np
import polars as pl
import pytest

from pipeline.curation.urls import key_of, keys_of, normal_url

URLS = {
    "HTTP://Example.COM/Path?Q=A#top": "http://example.com/Path?Q=A",
    "  https://a.b/c \n": "https://a.b/c",
    "\u3000https://a.b/c\u2003": "https://a.b/c",
    "https://A.B?x": "https://a.b?x",
    "https://A.B#x": "https://a.b",
    "https://A.B:8080/%7Ex//y": "https://a.b:8080/%7Ex//y",
    "https://User@A.B/X": "https://user@a.b/X",
    "https://MÜNCHEN.de/Ä": "https://münchen.de/Ä",
    "https://a.b/two\nlines": "https://a.b/two\nlines",
    "svn+SSH://A/b": "svn+ssh://a/b",
    "//Example.com/a": "//Example.com/a",
    "Not a url": "Not a url",
    "1http://A.b/c": "1http://A.b/c",
    "\x1chttp://A.b": "\x1chttp://A.b",
    "": "",
}


@pytest.mark.parametrize(("url", "normal"), URLS.items())
def test_one_url(url: str, normal: str) -> None:
    assert normal_url(url) == normal
    assert normal_url(normal) == normal


def test_keys_tell_urls_apart_and_nothing_else() -> None:
    keys = keys_of(pl.Series([*URLS, *URLS.values()]))
    assert keys.dtype == np.uint64
    assert keys[: len(URLS)].tolist() == keys[len(URLS) :].tolist() == list(map(key_of, URLS))
    assert len(set(keys.tolist())) == len(set(URLS.values()))
    assert f"{keys_of(pl.Series(['http://a.org/x']))[0]:016x}" == "abe6027a24e59868"
    assert keys_of(pl.Series([], dtype=pl.String)).tolist() == []


def test_what_is_normal_at_a_glance_is_normal() -> None:
    """The shortcut for columns never passes over a url that is not normal yet."""
    rng = random.Random(1)
    letters = "aZ:/?#@. \n\x1c\x85\u3000ü8-+"
    urls = ["http://a.b" + "".join(rng.choices(letters, k=rng.randrange(6))) for _ in range(20_000)]
    urls += ["".join(rng.choices("ahS:/" + letters, k=12)) for _ in range(20_000)]
    assert keys_of(pl.Series(urls)).tolist() == [key_of(url) for url in urls]
