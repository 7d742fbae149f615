"""The fetch against a hostile server on loopback: real sockets, every end in its class."""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import DownloadConfig
from pipeline.curation.fetching.addresses import Resolver
from pipeline.curation.fetching.fetch import Fetcher, FetchError
from pipeline.curation.fetching.room import Room
from pipeline.errors import UserError
from tests.hostile import Answer, HostileSite, Site, drip, fetcher, raw, says, silence
from tests.ports import free_port

DOCS = Path(__file__).parents[4] / "docs/curation/fetch.md"


@pytest.fixture()
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileSite]:
    site = HostileSite()
    yield site
    site.close()


def failure(fetch: Fetcher, url: str, **limits: float) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch(url, **limits)
    return caught.value


def cause(fetch: Fetcher, url: str) -> str:
    return failure(fetch, url).cause


def cycle(*answers: Answer) -> Answer:
    """A path that answers each time as the next of them."""
    following = itertools.cycle(answers)
    return lambda request: next(following)(request)


# --- ends ---------------------------------------------------------------------------------


def test_a_body_arrives_and_we_say_who_we_are(site: Site) -> None:
    site.answers["/a"] = says(200, b"picture")
    fetched = fetcher(site)(site.url("/a"))
    assert (fetched.body, fetched.tries) == (b"picture", 1)
    assert 0 < fetched.seconds < 30
    assert site.agents == [DownloadConfig().user_agent]


def test_every_hostile_path_ends_in_its_class_and_in_time(
    hostile: HostileSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker meets all of them at once, with a retry allowed and none that outlasts it."""
    # it says "not now" all the time, and would be left alone for as long
    monkeypatch.setattr("pipeline.curation.fetching.courtesy._LONGEST_REST_S", 0.1)
    endless = drip(b"HTTP/1.1 404 No\r\nContent-Length: 9999\r\n\r\n")
    monkeypatch.setitem(hostile.answers, "/drip-error", endless)
    limits = {"retries": 1, "threads": 64, "per_host": 64, "connect_timeout_s": 60.0}
    brief = fetcher(hostile, timeout_s=1.5, **limits)
    patient = fetcher(hostile, timeout_s=60.0, **limits)  # the others share a core with the site
    slow = {path for path, case in hostile.cases.items() if case.cause == "timeout"}

    def end(path: str) -> tuple[str, bool, bool, int, float]:
        began = time.monotonic()
        try:
            fetched = (brief if path in slow else patient)(hostile.url(path))
            got = ("ok", False, False, fetched.tries)
        except FetchError as error:
            got = (error.cause, error.transient, error.rule, error.tries)
        return *got, time.monotonic() - began

    with ThreadPoolExecutor(64) as threads:
        ends = dict(zip(hostile.cases, threads.map(end, hostile.cases), strict=True))
    wrong = {
        path: (ends[path], case.cause)
        for path, case in hostile.cases.items()
        if ends[path][:3] != (case.cause, case.transient, case.rule)
    }
    assert not wrong
    assert all(ends[path][3] <= 1 for path in slow)  # a retry has no time of its own
    # nor has what follows an error, for whose end we look half a second
    assert max(ends[path][4] for path in (*slow, "/drip-error")) < 30


def test_the_documented_causes_are_those_that_occur(hostile: HostileSite) -> None:
    """docs/curation/fetch.md: | `cause` | rule or failure | transient or permanent | ... |"""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \|", DOCS.read_text(), re.MULTILINE)
    documented = {cause: (kind == "rule", lasts == "transient") for cause, kind, lasts in rows}
    assert {"deadline", "dns", "tls", "robots_txt", "robots_unreachable"} <= documented.keys()
    for case in hostile.cases.values():
        if case.cause != "ok" and not re.fullmatch(r"http_\d+", case.cause):
            assert documented[case.cause] == (case.rule, case.transient), case.cause


@pytest.mark.parametrize("status", [400, 403, 404, 408, 410, 425, 429, 451, 500, 502, 503, 520])
def test_a_status_is_its_class(site: Site, status: int) -> None:
    site.answers["/a"] = says(status)
    error = failure(fetcher(site), site.url("/a"))
    assert error.cause == f"http_{status}" and not error.rule
    assert error.transient == (status in (408, 425, 429) or status >= 500)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "ftp://example.org/a.jpg", "data:image/png;base64,AA==", "a.jpg"],
)
def test_only_http_and_https_are_fetched(site: Site, url: str) -> None:
    assert cause(fetcher(site), url) == "forbidden_scheme"


@pytest.mark.parametrize(
    "url", ["http://", "http://a:b/", "http://[::1/", "http:///x", "http://a b/"]
)
def test_broken_urls(site: Site, url: str) -> None:
    assert cause(fetcher(site), url) == "bad_url"


def test_blanks_and_foreign_letters_in_a_url_are_quoted(site: Site) -> None:
    site.answers["/a%20b/%C3%BC.jpg?q=%C3%A4%20%25"] = says(200, b"x")
    assert fetcher(site)(site.url("/a b/ü.jpg?q=ä %25#part")).body == b"x"


def test_what_does_not_fit_a_header_is_no_user_agent() -> None:
    for agent in ("", "crawler\r\nX-A: b", "crawler/1 ☃"):
        with pytest.raises(UserError, match=r"download\.user_agent"):
            DownloadConfig(user_agent=agent)


def test_an_encoded_body_is_unpacked(hostile: HostileSite) -> None:
    plain = fetcher(hostile)(hostile.url("/sound.png")).body
    for path in ("/gzip", "/deflate", "/raw-deflate", "/chunks-and-length", "/too-long"):
        assert fetcher(hostile)(hostile.url(path)).body == plain


# --- addresses ----------------------------------------------------------------------------


def test_loopback_is_refused_without_the_exemption(site: Site) -> None:
    site.answers["/a"] = says(200, b"secret")
    hosts = ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.1", "[::ffff:127.0.0.1]")
    for host in hosts:
        error = failure(
            fetcher(site, allow_private_hosts=[]), site.url("/a").replace("127.0.0.1", host)
        )
        assert (error.cause, error.rule) == ("forbidden_address", True)
    assert site.accepted == 0


def test_relative_redirects_are_followed_and_loops_end(site: Site) -> None:
    site.answers["/a"] = says(302, Location="deep/b?x")
    site.answers["/deep/b?x"] = says(200, b"x")
    site.answers["/loop"] = says(307, Location="/loop")
    fetched = fetcher(site)(site.url("/a"))
    assert fetched.url == site.url("/deep/b?x")
    assert cause(fetcher(site), site.url("/loop")) == "too_many_redirects"
    assert site.seen.count("/loop") < 10


def test_the_vetted_address_is_the_one_connected_to(site: Site) -> None:
    """A name that turns inward after it was judged (DNS rebinding) is never asked again."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    resolver = Resolver(
        [f"rebound.example:{site.port}"], ttl_s=0.0, lookup=lambda host, port: next(answers)
    )
    site.answers["/a"] = says(200, b"x")
    fetch = Fetcher(DownloadConfig(timeout_s=30.0), resolver)
    assert fetch(f"http://rebound.example:{site.port}/a").body == b"x"
    assert next(answers) == ["10.0.0.1"]  # one look-up, one connection


def test_names_that_do_not_exist() -> None:
    """A dead name costs one look-up, whatever the tries and rows."""
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    fetch = Fetcher(DownloadConfig(timeout_s=30.0, retries=3), Resolver([], lookup=lookup))
    for _ in range(5):
        error = failure(fetch, "http://gone.example/a")
        assert (error.cause, error.transient) == ("dns", False)
    assert asked == ["gone.example"]


def test_a_name_server_that_could_not_say_is_asked_again_soon(site: Site) -> None:
    asked = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(time.monotonic())
        if len(asked) < 2:
            raise socket.gaierror(socket.EAI_AGAIN, "not now")
        return ["127.0.0.1"]

    site.answers["/a"] = says(200, b"x")
    resolver = Resolver([f"busy.example:{site.port}"], lookup=lookup)
    cfg = DownloadConfig(timeout_s=30.0, retries=1)
    assert Fetcher(cfg, resolver)(f"http://busy.example:{site.port}/a").body == b"x"
    assert len(asked) == 2 and 1.0 <= asked[1] - asked[0] < 20


def test_what_the_name_server_could_not_say_may_come_another_time() -> None:
    def lookup(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "not now")

    fetch = Fetcher(DownloadConfig(retries=0), Resolver([], lookup=lookup))
    error = failure(fetch, "http://busy.example/a")
    assert (error.cause, error.transient) == ("dns", True)


def test_a_closed_port(site: Site) -> None:
    closed = f"127.0.0.1:{free_port()}"
    error = failure(fetcher(site, allow_private_hosts=[closed]), f"http://{closed}/")
    assert (error.cause, error.transient) == ("connection", True)


# --- tries --------------------------------------------------------------------------------


def test_retry_after_is_kept_and_then_the_body_comes(site: Site) -> None:
    site.answers["/a"] = cycle(
        says(429, Retry_After="1"), says(503, Retry_After="0"), says(200, b"x")
    )
    waited: list[float] = []
    fetch = fetcher(site, retries=2)
    fetch.sleep = waited.append
    fetched = fetch(site.url("/a"))
    assert (fetched.body, fetched.tries) == (b"x", 3)
    assert 1.0 <= waited[0] <= 1.25 and waited[1] == 0.0


def test_waits_that_are_given_are_spread(site: Site) -> None:
    """A thousand workers that were told the same must not come back in the same moment."""
    site.answers["/a"] = says(429, Retry_After="4")
    waited: list[float] = []
    for _ in range(20):
        fetch = fetcher(site, retries=1)
        fetch.sleep = waited.append
        failure(fetch, site.url("/a"))
    assert all(4.0 <= wait <= 5.0 for wait in waited) and max(waited) - min(waited) > 0.2


@pytest.fixture()
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that requests waited for their turn, on a clock that only this waiting moves."""
    rests: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(rests), sleep=rests.append)
    monkeypatch.setattr("pipeline.curation.fetching.courtesy.time", clock)
    return rests


def test_a_host_that_keeps_saying_not_now_is_left_alone(site: Site, rests: list[float]) -> None:
    """Three answers in a row hold back every row of it, and no row fails for that."""
    site.answers["/busy"], site.answers["/a"] = says(429, Retry_After="1"), says(200, b"x")
    fetch = fetcher(site)
    for busy in (2, 2, 3):  # an answer begins the count anew
        assert rests == []
        for _ in range(busy):
            failure(fetch, site.url("/busy"))
        assert fetch(site.url("/a")).body == b"x"
    assert len(rests) == 1 and 1.0 <= rests[0] <= 1.25


def test_the_rest_of_a_busy_host_is_a_few_seconds_at_most(site: Site, rests: list[float]) -> None:
    site.answers["/busy"], site.answers["/a"] = says(503, Retry_After="3600"), says(200, b"x")
    fetch = fetcher(site)
    for _ in range(3):
        failure(fetch, site.url("/busy"))
    assert fetch(site.url("/a")).body == b"x"
    assert len(rests) == 1 and 5.0 <= rests[0] <= 6.25


@pytest.mark.parametrize("path", ["/busy-seconds", "/busy-date", "/busy-absurd"])
def test_a_wait_beyond_the_deadline_is_not_begun(hostile: HostileSite, path: str) -> None:
    asked = hostile.seen.count(path)
    error = failure(fetcher(hostile, retries=5), hostile.url(path))
    assert error.cause == "http_429" and error.wait_s is not None
    assert 3600 <= error.wait_s <= 86_400
    assert hostile.seen.count(path) == asked + 1


def test_without_a_readable_wait_we_back_off_by_chance_and_further_each_time(site: Site) -> None:
    site.answers["/a"] = cycle(says(503), says(503, Retry_After="-1"), says(429, Retry_After="?"))
    waits: list[list[float]] = []
    for _ in range(30):
        fetch = fetcher(site, retries=3)
        waits.append([])
        fetch.sleep = waits[-1].append
        failure(fetch, site.url("/a"))
    for number, longest in enumerate((0.5, 1.0, 2.0)):
        spread = [wait[number] for wait in waits]
        assert all(0.1 <= wait <= longest for wait in spread)
        assert max(spread) > 0.6 * longest and min(spread) < 0.5 * longest


def test_only_what_may_pass_is_tried_again(hostile: HostileSite) -> None:
    """Every path that ends at once: as often as allowed where it is transient, else once."""
    fetch = fetcher(hostile, retries=2, timeout_s=30.0)
    quick = {
        path: case
        for path, case in hostile.cases.items()
        if case.cause not in ("ok", "timeout", "too_many_redirects")
        and not path.startswith(("/busy-seconds", "/busy-date", "/busy-absurd", "/drip"))
    }
    assert sum(case.transient for case in quick.values()) >= 8
    for path, case in quick.items():
        asked = hostile.seen.count(path)
        error, tries = failure(fetch, hostile.url(path)), 3 if case.transient else 1
        assert (error.cause, error.tries) == (case.cause, tries)
        assert hostile.seen.count(path) - asked == tries, path


# --- time and turns -----------------------------------------------------------------------


def test_a_host_is_asked_by_so_many_at_a_time(site: Site) -> None:
    """Waiting for our own turn does not count against the deadline."""
    busy: list[int] = []

    def slow(request: BaseHTTPRequestHandler) -> None:
        with site.lock:
            busy.append(1)
        time.sleep(0.25)
        with site.lock:  # before the answer: the client may ask again before we are through
            busy.append(-1)
        says(200, b"x")(request)

    site.answers["/a"] = slow
    fetch = fetcher(site, per_host=2, timeout_s=2.5)  # the last waits for longer
    with ThreadPoolExecutor(24) as threads:
        fetched = list(threads.map(fetch, [site.url("/a")] * 24))
    assert [one.body for one in fetched] == [b"x"] * 24
    assert max(itertools.accumulate(busy)) == 2
    assert fetch.courtesy._hosts == {}


def test_a_host_is_asked_so_often_a_second(site: Site) -> None:
    """The rate holds over all threads; waiting for it does not count against the deadline."""
    at: list[float] = []

    def note(request: BaseHTTPRequestHandler) -> None:
        at.append(time.monotonic())
        says(200, b"x")(request)

    site.answers["/a"] = note
    fetch = fetcher(site, per_host_rate=2.0, timeout_s=3.0)  # the eighth waits for longer
    began = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(fetch, [site.url("/a")] * 9))) == 9
    # none before its turn; how late it is seen here is the machine's affair
    assert all(when - began >= 0.5 * turn for turn, when in enumerate(sorted(at)))
    assert at[-1] - began < 30


def test_the_rate_of_one_host_does_not_hold_another(site: Site) -> None:
    other = Site({"/a": says(200, b"y")})
    site.answers["/a"] = says(200, b"x")
    resolver = Resolver(
        [f"one.example:{site.port}", f"two.example:{other.port}"],
        lookup=lambda host, port: ["127.0.0.1"],
    )
    fetch = Fetcher(DownloadConfig(per_host_rate=0.01), resolver)
    began = time.monotonic()
    assert fetch(f"http://one.example:{site.port}/a").body == b"x"
    assert fetch(f"http://two.example:{other.port}/a").body == b"y"
    assert time.monotonic() - began < 50
    other.close()


def test_until_ends_a_fetch_that_has_time_of_its_own(site: Site) -> None:
    site.answers["/a"] = silence
    site.answers["/b"] = says(503)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    fetch = fetcher(site, retries=9)
    fetch.sleep = sleep
    # the last retry of /b may have too little time left for its answer
    for path, ends in (("/a", {"deadline"}), ("/b", {"http_503", "deadline"})):
        began = time.monotonic()
        error = failure(fetch, site.url(path), until=began + 0.4)
        assert error.cause in ends and error.transient
        assert time.monotonic() - began < 20 and sum(waits) < 0.4


def test_until_ends_the_wait_for_a_place_at_the_host(site: Site) -> None:
    """A turn that does not come in time is given up; the host is not asked."""
    seen, leave = threading.Event(), threading.Event()

    def hold(request: BaseHTTPRequestHandler) -> None:
        seen.set()
        leave.wait(60)
        says(200, b"x")(request)

    site.answers["/a"] = hold
    fetch = fetcher(site, per_host=1)
    with ThreadPoolExecutor(1) as other:
        held = other.submit(fetch, site.url("/a"))
        assert seen.wait(30)
        error = failure(fetch, site.url("/b"), until=time.monotonic() + 0.3)
        assert (error.cause, error.transient) == ("deadline", True)
        assert site.seen == ["/a"] and not held.done()
        leave.set()
        assert held.result().body == b"x"


def test_until_ends_the_wait_for_the_rate_before_it_begins(site: Site) -> None:
    site.answers["/a"] = says(200, b"x")
    fetch = fetcher(site, per_host_rate=0.01)
    fetch(site.url("/a"))
    began = time.monotonic()
    error = failure(fetch, site.url("/a"), until=began + 60)
    assert (error.cause, error.transient) == ("deadline", True)
    assert time.monotonic() - began < 30 and site.seen == ["/a"]


def test_small_bodies_are_smaller_where_there_are_many_threads() -> None:
    for threads, small in ((1, 4 << 20), (32, 4 << 20), (64, 2 << 20), (512, 256 << 10)):
        assert Room(20_000_000, threads).small == small


def test_of_large_bodies_there_are_few_at_a_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one that somebody still holds keeps the next waiting, which does not count; small
    ones pass.
    """
    monkeypatch.setattr("pipeline.curation.fetching.room._BUDGET", 16 << 20)
    site.answers["/large"] = says(200, bytes(6 << 20))
    site.answers["/endless"] = raw(b"HTTP/1.1 200 OK\r\n\r\n", then=itertools.repeat(bytes(9999)))
    site.answers["/small"] = says(200, b"x")
    fetch = fetcher(site, max_bytes=8 << 20)
    held = [fetch(site.url("/large")), fetch(site.url("/large"))]
    for path in ("/large", "/endless"):
        error = failure(fetch, site.url(path), until=time.monotonic() + 0.3)
        assert error.cause == "deadline"
    assert fetch(site.url("/small")).body == b"x"
    del held[0]
    assert len(fetch(site.url("/large")).body) == 6 << 20
    assert cause(fetch, site.url("/endless")) == "too_large"
    assert cause(fetch, site.url("/endless")) == "too_large"


# --- opt-outs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "out"),
    [
        ("noai", True),
        ("NoImageAI, nofollow", True),
        ("noindex", True),
        ("none", True),
        ("noml", True),
        ("ssr-on-ray: noai", True),
        ("*: noml", True),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("max-image-preview: large, noimageindex", True),
        ("otherbot: noai", False),
        ("all", False),
        ("nofollow, nosnippet", False),
        ("nonesuch", False),
    ],
)
def test_opt_out_headers(site: Site, tag: str, out: bool) -> None:
    site.answers["/a"] = says(200, b"x", X_Robots_Tag=tag)
    if out:
        error = failure(fetcher(site), site.url("/a"))
        assert (error.cause, error.rule, error.transient) == ("opted_out", True, False)
    else:
        assert fetcher(site)(site.url("/a")).body == b"x"


def test_the_second_of_two_opt_out_headers_counts_too(site: Site) -> None:
    site.answers["/a"] = raw(
        b"HTTP/1.1 200 OK\r\nX-Robots-Tag: nofollow\r\nX-Robots-Tag: none\r\n\r\nx"
    )
    assert cause(fetcher(site), site.url("/a")) == "opted_out"
