"""One rule for a url's identity: here for one url, in the filter for columns of them."""

from __future__ import annotations

import polars as pl
import pytest

from pipeline.curation.urls import normal_url, normal_urls

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


def test_the_filter_has_the_same_rule() -> None:
    table = pl.DataFrame({"url": list(URLS)})
    assert table.select(normal_urls())["url"].to_list() == [normal_url(url) for url in URLS]
