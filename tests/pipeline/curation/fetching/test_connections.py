"""Kept connections: used again where that is sound, and never where it is not."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from pipeline.config import DownloadConfig
from pipeline.curation.fetching.addresses import Resolver
from pipeline.curation.fetching.fetch import Fetcher, FetchError
from tests.hostile import Site, fetcher, raw, says


@pytest.fixture()
def site() -> Iterator[Site]:
    site = Site({"/a": says(200, b"x" * 5000), "/b": says(200, b"b")})
    yield site
    site.close()


def cause(fetch: Fetcher, url: str) -> str:
    with pytest.raises(FetchError) as caught:
        fetch(url)
    return caught.value.cause


def test_a_host_s_images_come_over_one_connection(site: Site) -> None:
    kept, single = fetcher(site), fetcher(site, keep_alive_s=0)
    for _ in range(20):
        assert kept(site.url("/a")).body == b"x" * 5000
    assert site.accepted == 1
    for _ in range(20):
        single(site.url("/a"))
    assert site.accepted == 1 + 20
    kept.close()
    kept(site.url("/a"))
    assert site.accepted == 1 + 20 + 1


def test_threads_share_connections_and_the_idle_are_bounded(site: Site) -> None:
    fetch = fetcher(site, threads=3, per_host=8)
    with ThreadPoolExecutor(8) as threads:
        bodies = [one.body for one in threads.map(fetch, [site.url("/a"), site.url("/b")] * 100)]
    assert bodies == [b"x" * 5000, b"b"] * 100
    # were all eight in step, three of them would find one that is kept
    assert site.accepted < 200 * 3 / 4
    assert len(fetch.pool) <= 3


def test_a_connection_is_kept_for_so_long(site: Site) -> None:
    fetch = fetcher(site, keep_alive_s=0.2)
    fetch(site.url("/a"))
    time.sleep(0.3)
    fetch(site.url("/a"))
    assert site.accepted == 2


def test_small_errors_and_redirects_keep_it_and_what_is_not_read_does_not(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a loaded site may take long between a head and its body
    monkeypatch.setattr("pipeline.curation.fetching.connections._LEFTOVER_S", 30.0)
    site.answers["/gone"] = says(404, b"no such page" * 100)
    site.answers["/moved"] = says(302, b"over there", Location="/b")
    site.answers["/large-error"] = says(404, bytes(1 << 20))
    fetch = fetcher(site)
    fetch(site.url("/moved"))
    assert cause(fetch, site.url("/gone")) == "http_404"
    fetch(site.url("/a"))
    assert site.accepted == 1
    assert cause(fetch, site.url("/large-error")) == "http_404"
    fetch(site.url("/a"))
    assert site.accepted == 2
    assert cause(fetcher(site, max_bytes=10), site.url("/large-error")) == "http_404"


def test_a_server_that_says_close_is_believed(site: Site) -> None:
    site.answers["/bye"] = says(200, b"x", Connection="close")
    fetch = fetcher(site)
    for number in range(1, 4):
        fetch(site.url("/bye"))
        assert site.accepted == number
        assert len(fetch.pool) == 0


@pytest.mark.parametrize(
    "surplus",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
        b"x",
        b"\r\n",
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_follows_a_body_is_never_an_answer(site: Site, surplus: bytes, late: bool) -> None:
    """Whether it comes with the body, or while the connection lies idle."""
    idle, written = threading.Semaphore(0), threading.Semaphore(0)

    def smuggle(request: BaseHTTPRequestHandler) -> None:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"
        request.wfile.write(answer if late else answer + surplus)
        if late:
            idle.acquire(timeout=30)
            request.wfile.write(surplus)
            written.release()

    site.answers["/smuggle"] = smuggle
    fetch = fetcher(site)
    for number in range(1, 4):
        assert fetch(site.url("/smuggle")).body == b"good"
        if late:
            idle.release()
            assert written.acquire(timeout=30)
            time.sleep(0.05)
        assert fetch(site.url("/b")).body == b"b"
        assert site.accepted > number


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"Content-Length: 3\r\nConnection: close\r\n\r\nabc",
    ],
)
def test_a_doubtful_end_is_the_connection_s_end(site: Site, head: bytes) -> None:
    site.answers["/doubt"] = lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\n" + head)
    fetch = fetcher(site)
    assert fetch(site.url("/doubt")).body == b"abc"
    assert len(fetch.pool) == 0


def test_a_connection_that_was_closed_while_it_was_kept_costs_no_try(site: Site) -> None:
    """The end is there to be seen before we ask again."""

    def answer_and_leave(request: BaseHTTPRequestHandler) -> None:
        says(200, b"x")(request)
        request.close_connection = True  # without a word of it

    site.answers["/a"] = answer_and_leave
    fetch = fetcher(site, retries=0)
    for number in range(1, 4):
        assert fetch(site.url("/a")).tries == 1
        assert site.accepted == number
        time.sleep(0.1)


def test_a_connection_that_dies_as_we_ask_again_costs_no_try(site: Site) -> None:
    """The server closes at the very moment of the second request: its end is not seen before."""
    asked: list[object] = []

    def once_each(request: BaseHTTPRequestHandler) -> None:
        if request.connection in asked:
            request.close_connection = True
            return
        asked.append(request.connection)
        says(200, b"x")(request)

    site.answers["/a"] = once_each
    fetch = fetcher(site, retries=0)
    for _ in range(3):
        fetched = fetch(site.url("/a"))
        assert (fetched.body, fetched.tries) == (b"x", 1)
    assert (len(site.seen), site.accepted) == (5, 3)


def test_a_death_after_the_first_byte_of_an_answer_is_a_failure(site: Site) -> None:
    """A request that was answered in part is not sent again behind our back."""
    site.answers["/half"] = raw(b"HTTP/1.1 200")
    site.answers["/short"] = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
    for path, end in (("/half", "connection"), ("/short", "incomplete")):
        fetch = fetcher(site, retries=0)
        fetch(site.url("/a"))
        assert cause(fetch, site.url(path)) == end
        assert site.seen.count(path) == 1


def test_a_kept_connection_is_dropped_when_its_address_is_no_longer_the_vetted_one(
    site: Site,
) -> None:
    """The name first leads to us, then elsewhere, then to where nobody may go."""
    name = f"turning.example:{site.port}"
    answers = iter([["127.0.0.1"], ["127.0.0.1"], ["127.0.0.2"], ["10.0.0.1"]])
    resolver = Resolver([name], ttl_s=0.0, lookup=lambda host, port: next(answers))
    fetch = Fetcher(DownloadConfig(retries=0), resolver)
    for _ in range(2):
        fetch(f"http://{name}/a")
    assert site.accepted == 1
    assert cause(fetch, f"http://{name}/a") == "connection"  # nobody listens at 127.0.0.2
    assert site.accepted == 1 and len(fetch.pool) == 0
    fetch = Fetcher(DownloadConfig(), Resolver([name], lookup=lambda host, port: ["127.0.0.1"]))
    fetch(f"http://{name}/a")
    fetch.resolver = Resolver([], lookup=lambda host, port: ["10.0.0.1"])
    assert cause(fetch, f"http://{name}/a") == "forbidden_address"
    assert site.seen == ["/a"] * 3


def test_https_is_checked_by_name_and_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that nobody vouches for, or for another name, is refused; a good one serves,
    and its connections are kept for its name alone.
    """
    certificate = self_signed("photos.example", tmp_path)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    site.server.socket = server_side.wrap_socket(site.server.socket, server_side=True)
    site.answers["/a"] = says(200, b"picture" * 50_000)
    names = [f"photos.example:{site.port}", f"other.example:{site.port}"]
    resolver = Resolver(names, lookup=lambda host, port: ["127.0.0.1"])
    fetch = Fetcher(DownloadConfig(timeout_s=30.0, retries=0), resolver)
    assert cause(fetch, f"https://{names[0]}/a") == "tls"
    monkeypatch.setattr(
        "pipeline.curation.fetching.connections._TLS",
        ssl.create_default_context(cafile=certificate),
    )
    before = site.accepted
    for _ in range(3):
        assert fetch(f"https://{names[0]}/a").body == b"picture" * 50_000
    assert site.accepted == before + 1
    assert cause(fetch, f"https://{names[1]}/a") == "tls"


def test_a_handshake_that_never_comes_ends_in_time(site: Site) -> None:
    """It is part of the connection, and not tried again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"127.0.0.1:{silent.getsockname()[1]}"
        fetch = fetcher(site, connect_timeout_s=0.3, retries=3, allow_private_hosts=[name])
        began = time.monotonic()
        with pytest.raises(FetchError) as caught:
            fetch(f"https://{name}/a")
        assert time.monotonic() - began >= 0.3
    assert (caught.value.cause, caught.value.tries) == ("timeout", 1)


def self_signed(name: str, folder: Path) -> Path:
    """A PEM file of a key and a certificate for `name`."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography makes the certificate")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = folder / "site.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
