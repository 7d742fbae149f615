"""robots.txt through the same fetch, as RFC 9309 has it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.curation.fetching.fetch import Fetcher, FetchError
from tests.hostile import Answer, Site, drip, fetcher, raw, says, silence


@pytest.fixture()
def site() -> Iterator[Site]:
    site = Site({path: says(200, b"x") for path in ("/a", "/b", "/img/1.jpg", "/img/1.png")})
    yield site
    site.close()


def rules(*lines: str) -> Answer:
    return says(200, "\n".join(lines).encode(), Content_Type="text/plain")


def end(fetch: Fetcher, url: str) -> tuple[str, bool, bool]:
    try:
        fetch(url)
    except FetchError as error:
        return error.cause, error.rule, error.transient
    return "ok", False, False


OK, DENIED = ("ok", False, False), ("robots_txt", True, False)
LATER = ("robots_unreachable", False, True)


def test_it_is_not_asked_for_unless_wished(site: Site) -> None:
    site.answers["/robots.txt"] = rules("User-agent: *", "Disallow: /")
    assert end(fetcher(site), site.url("/a")) == OK
    assert end(fetcher(site, robots_txt=True), site.url("/a")) == DENIED
    assert site.seen == ["/a", "/robots.txt"]


@pytest.mark.parametrize(
    ("lines", "ends"),
    [
        (["User-agent: *", "Disallow: /img/"], (OK, DENIED, DENIED)),
        (["User-agent: *", "Disallow: /*.jpg$"], (OK, DENIED, OK)),
        (["User-agent: *", "Disallow: /", "Allow: /img/*.png"], (DENIED, DENIED, OK)),
        (["User-agent: ssr-on-ray", "Disallow: /img", "User-agent: *", "Disallow: /a"],
         (OK, DENIED, DENIED)),
        (["User-agent: otherbot", "Disallow: /"], (OK, OK, OK)),
        (["User-agent: *", "Disallow:"], (OK, OK, OK)),
        (["\x00\xff no robots.txt <html>"], (OK, OK, OK)),
    ],
)  # fmt: skip
def test_rules(site: Site, lines: list[str], ends: tuple[tuple[str, bool, bool], ...]) -> None:
    site.answers["/robots.txt"] = rules(*lines)
    fetch = fetcher(site, robots_txt=True)
    paths = ("/a", "/img/1.jpg", "/img/1.png")
    assert tuple(end(fetch, site.url(path)) for path in paths) == ends
    assert site.seen.count("/robots.txt") == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (says(404), OK),
        (says(403), OK),
        (says(410), OK),
        (says(200), OK),  # empty
        (says(302, Location="/robots.txt"), OK),  # endless
        (says(200, b"User-agent: *\nDisallow: /b", X_Robots_Tag="noindex"), OK),
        (says(500), LATER),
        (says(503, Retry_After="3600"), LATER),
        (says(429), LATER),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), LATER),
        (says(200, b"x", Content_Encoding="br"), LATER),
        (raw(), ("connection", False, True)),
        (drip(b"HTTP/1.1 200 OK\r\n\r\n"), ("timeout", False, True)),
    ],
)
def test_what_stands_for_no_rules_and_what_for_none_yet(
    site: Site, answer: Answer, expected: tuple[str, bool, bool]
) -> None:
    site.answers["/robots.txt"] = answer
    timeout_s = 1.0 if expected[0] == "timeout" else 30.0
    assert end(fetcher(site, robots_txt=True, timeout_s=timeout_s), site.url("/a")) == expected


def test_an_unreachable_one_is_remembered_for_a_while(site: Site) -> None:
    site.answers["/robots.txt"] = says(503)
    fetch = fetcher(site, robots_txt=True, retries=3)
    assert [end(fetch, site.url("/a")) for _ in range(5)] == [LATER] * 5
    assert site.seen == ["/robots.txt"]


def test_the_unit_s_end_says_nothing_about_it(site: Site) -> None:
    site.answers["/robots.txt"] = silence
    fetch = fetcher(site, robots_txt=True)
    with pytest.raises(FetchError, match="deadline"):
        fetch(site.url("/a"), until=time.monotonic() + 0.2)
    site.answers["/robots.txt"] = says(404)
    assert end(fetch, site.url("/a")) == OK


def test_it_is_asked_for_once_however_many_want_it(site: Site) -> None:
    """Even with one request at a time to a host: who waits for the rules holds no place."""

    def slow(request: object) -> None:
        time.sleep(0.3)
        rules("User-agent: *", "Disallow: /b")(request)  # type: ignore[arg-type]

    site.answers["/robots.txt"] = slow
    fetch = fetcher(site, robots_txt=True, per_host=1, timeout_s=20.0)
    with ThreadPoolExecutor(16) as threads:
        ends = list(threads.map(lambda path: end(fetch, site.url(path)), ["/a", "/b"] * 8))
    assert ends == [OK, DENIED] * 8
    assert site.seen.count("/robots.txt") == 1


def test_every_hop_has_rules_of_its_own(site: Site) -> None:
    other = Site({"/robots.txt": rules("User-agent: *", "Disallow: /x"), "/x": says(200, b"x")})
    site.answers["/robots.txt"] = says(404)
    site.answers["/a"] = says(302, Location=other.url("/x"))
    fetch = fetcher(site, robots_txt=True, allow_private_hosts=[site.host, other.host])
    assert end(fetch, site.url("/a")) == DENIED
    assert other.seen == ["/robots.txt"]
    other.close()


def test_a_redirect_of_it_to_the_inside_is_not_followed(site: Site) -> None:
    site.answers["/robots.txt"] = says(302, Location="http://169.254.169.254/robots.txt")
    fetch = fetcher(site, robots_txt=True)
    assert end(fetch, site.url("/a")) == ("forbidden_address", True, False)


def test_an_endless_one_is_read_in_part_and_a_hostile_one_is_judged_in_time(site: Site) -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\nUser-agent: *\nDisallow: /img\n"
    site.answers["/robots.txt"] = raw(head, then=itertools.repeat(b"Disallow: /b%d\n" * 100))
    fetch = fetcher(site, robots_txt=True)
    assert end(fetch, site.url("/img/1.jpg")) == DENIED
    stars = "/" + "*a" * 1000 + "b"
    site.answers["/robots.txt"] = rules("User-agent: *", *[f"Disallow: {stars}{n}" for n in "xyz"])
    began = time.monotonic()
    site.answers["/" + "a" * 5000] = says(200, b"x")
    assert end(fetcher(site, robots_txt=True), site.url("/" + "a" * 5000)) == OK
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("delay", "least"), [("0.2", 0.6), ("nan", 0), ("-5", 0), ("x", 0)])
def test_crawl_delay_is_the_time_between_requests(site: Site, delay: str, least: float) -> None:
    site.answers["/robots.txt"] = rules("User-agent: *", f"Crawl-delay: {delay}")
    fetch = fetcher(site, robots_txt=True, timeout_s=10.0)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: end(fetch, site.url("/a")), range(4))) == [OK] * 4
    assert least <= time.monotonic() - began < least + 30


def test_an_absurd_crawl_delay_holds_nobody_for_long(site: Site) -> None:
    site.answers["/robots.txt"] = rules("User-agent: *", "Crawl-delay: 999999999")
    fetch = fetcher(site, robots_txt=True)
    assert end(fetch, site.url("/a")) == OK
    with pytest.raises(FetchError, match="deadline"):
        fetch(site.url("/a"), until=time.monotonic() + 15)
    assert fetch.courtesy._hosts["127.0.0.1"].next_at < time.monotonic() + 31
