"""The fetch against a hostile server on loopback: real sockets, every end in its class."""

from __future__ import annotations

import gzip
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.config import DownloadConfig
from pipeline.curation.addresses import Resolver
from pipeline.curation.fetch import Fetcher, FetchError

Answer = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """A server whose paths answer as a test says; it notes what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.seen: list[str] = []
        self.agents: list[str] = []
        self.lock = threading.Lock()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with site.lock:
                    site.seen.append(self.path)
                    site.agents.append(self.headers["User-Agent"])
                site.answers[self.path](self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def fetcher(self, **settings: object) -> Fetcher:
        cfg = DownloadConfig(timeout_s=30.0, retries=0, allow_private_hosts=[self.host])
        return Fetcher(replace(cfg, **settings), sleep=lambda seconds: None)


@pytest.fixture()
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def says(status: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def cause(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(FetchError) as caught:
        fetcher(url)
    return caught.value.cause


def test_a_body_arrives_and_we_say_who_we_are(site: Site) -> None:
    site.answers["/a"] = says(200, b"picture")
    fetched = site.fetcher()(site.url("/a"))
    assert fetched.body == b"picture"
    assert site.agents == [DownloadConfig().user_agent]


@pytest.mark.parametrize("status", [400, 403, 404, 410, 451, 500, 503])
def test_a_status_is_its_class(site: Site, status: int) -> None:
    site.answers["/a"] = says(status)
    assert cause(site.fetcher(), site.url("/a")) == f"http_{status}"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "ftp://example.org/a.jpg", "data:image/png;base64,AA==", "a.jpg"],
)
def test_only_http_and_https_are_fetched(site: Site, url: str) -> None:
    assert cause(site.fetcher(), url) == "forbidden_scheme"


@pytest.mark.parametrize(
    "url", ["http://", "http://a:b/", "http://[::1/", "http:///x", "http://a b/"]
)
def test_broken_urls(site: Site, url: str) -> None:
    assert cause(site.fetcher(), url) == "bad_url"


def test_blanks_and_foreign_letters_in_a_url_are_quoted(site: Site) -> None:
    site.answers["/a%20b/%C3%BC.jpg?q=%C3%A4%20%25"] = says(200, b"x")
    assert site.fetcher()(site.url("/a b/ü.jpg?q=ä %25#part")).body == b"x"


def test_loopback_is_refused_without_the_exemption(site: Site) -> None:
    site.answers["/a"] = says(200, b"secret")
    for url in (site.url("/a"), site.url("/a").replace("127.0.0.1", "localhost")):
        with pytest.raises(FetchError) as caught:
            site.fetcher(allow_private_hosts=[])(url)
        assert caught.value.cause == "forbidden_address"
        assert caught.value.rule
    assert site.seen == []


@pytest.mark.parametrize(
    "inside",
    ["http://169.254.169.254/latest/", "http://127.0.0.1:1/", "http://[::1]/", "http://0/"],
)
def test_redirects_to_the_inside_are_refused(site: Site, inside: str) -> None:
    site.answers["/a"] = says(302, Location=inside)
    assert cause(site.fetcher(), site.url("/a")) == "forbidden_address"


def test_redirects_to_another_scheme_are_refused(site: Site) -> None:
    site.answers["/a"] = says(301, Location="file:///etc/passwd")
    assert cause(site.fetcher(), site.url("/a")) == "forbidden_scheme"


def test_relative_redirects_are_followed_and_loops_end(site: Site) -> None:
    site.answers["/a"] = says(302, Location="deep/b?x")
    site.answers["/deep/b?x"] = says(200, b"x")
    site.answers["/loop"] = says(307, Location="/loop")
    fetched = site.fetcher()(site.url("/a"))
    assert fetched.url == site.url("/deep/b?x")
    assert cause(site.fetcher(), site.url("/loop")) == "too_many_redirects"
    assert site.seen.count("/loop") < 10


def test_the_vetted_address_is_the_one_connected_to(site: Site) -> None:
    """A name that turns inward after it was judged (DNS rebinding) is never asked again."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    port = site.server.server_address[1]
    resolver = Resolver(
        [f"rebound.example:{port}"], ttl_s=0.0, lookup=lambda host, port: next(answers)
    )
    site.answers["/a"] = says(200, b"x")
    fetcher = Fetcher(DownloadConfig(timeout_s=30.0), resolver)
    assert fetcher(f"http://rebound.example:{port}/a").body == b"x"
    assert next(answers) == ["10.0.0.1"]  # one look-up, one connection


def test_names_that_do_not_resolve() -> None:
    def lookup(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    cfg = DownloadConfig(timeout_s=30.0, retries=0)
    assert cause(Fetcher(cfg, Resolver([], lookup=lookup)), "http://gone.example/a") == "dns"


def test_a_closed_port_and_a_server_that_hangs_up(site: Site) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    assert cause(site.fetcher(allow_private_hosts=[closed]), f"http://{closed}/") == "connection"
    site.answers["/a"] = lambda request: request.connection.shutdown(socket.SHUT_RDWR)
    assert cause(site.fetcher(), site.url("/a")) == "connection"


def test_what_is_no_http(site: Site) -> None:
    site.answers["/a"] = lambda request: request.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n") and None
    assert cause(site.fetcher(), site.url("/a")) == "bad_response"


def test_a_body_of_more_bytes_than_allowed_is_not_read(site: Site) -> None:
    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while True:
            request.wfile.write(bytes(1 << 16))

    site.answers["/honest"] = says(200, Content_Length=str(10**12))
    site.answers["/endless"] = endless
    fetcher = site.fetcher(max_bytes=1 << 20)
    assert cause(fetcher, site.url("/honest")) == "too_large"
    assert cause(fetcher, site.url("/endless")) == "too_large"


def test_gzip_is_unpacked_and_a_bomb_is_not(site: Site) -> None:
    site.answers["/a"] = says(200, gzip.compress(b"picture" * 10), Content_Encoding="gzip")
    bomb = gzip.compress(bytes(20 << 20), 1)
    site.answers["/bomb"] = says(200, bomb, Content_Encoding="gzip")
    site.answers["/bad"] = says(200, b"no gzip", Content_Encoding="gzip")
    site.answers["/br"] = says(200, b"brotli", Content_Encoding="br")
    fetcher = site.fetcher(max_bytes=1 << 20)
    assert len(bomb) < 1 << 20
    assert fetcher(site.url("/a")).body == b"picture" * 10
    assert cause(fetcher, site.url("/bomb")) == "too_large"
    assert cause(fetcher, site.url("/bad")) == "bad_encoding"
    assert cause(fetcher, site.url("/br")) == "bad_encoding"


def test_an_empty_body_and_one_that_breaks_off(site: Site) -> None:
    site.answers["/empty"] = says(200)
    site.answers["/short"] = says(200, b"half", Content_Length="8")
    assert cause(site.fetcher(), site.url("/empty")) == "empty"
    assert cause(site.fetcher(), site.url("/short")) == "incomplete"


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_slow_drip_ends_at_the_deadline(site: Site, where: str) -> None:
    """Every byte comes within any socket timeout; only a deadline over all of it ends this."""

    def drip(request: BaseHTTPRequestHandler) -> None:
        start = b"HTTP/1.0 200 OK\r\n" + (b"" if where == "head" else b"\r\n")
        request.wfile.write(start)
        for _ in range(200):
            request.wfile.write(b"x")
            time.sleep(0.05)

    site.answers["/a"] = drip
    assert cause(site.fetcher(timeout_s=0.4), site.url("/a")) == "timeout"


def test_retry_after_is_kept_and_then_the_body_comes(site: Site) -> None:
    answers = iter([says(429, Retry_After="1"), says(503, Retry_After="0"), says(200, b"x")])
    site.answers["/a"] = lambda request: next(answers)(request)
    waited: list[float] = []
    fetcher = site.fetcher(retries=2)
    fetcher.sleep = waited.append
    assert fetcher(site.url("/a")).body == b"x"
    assert waited == [1.0, 0.0]


def test_a_wait_beyond_the_deadline_is_not_begun(site: Site) -> None:
    site.answers["/a"] = says(429, Retry_After="3600")
    site.answers["/date"] = says(429, Retry_After="Fri, 31 Dec 2999 23:59:59 GMT")
    for path in ("/a", "/date"):
        assert cause(site.fetcher(retries=5), site.url(path)) == "http_429"
    assert site.seen == ["/a", "/date"]


def test_only_what_may_pass_is_tried_again(site: Site) -> None:
    site.answers["/gone"] = says(404)
    site.answers["/down"] = says(502)
    fetcher = site.fetcher(retries=2)
    assert cause(fetcher, site.url("/gone")) == "http_404"
    assert cause(fetcher, site.url("/down")) == "http_502"
    assert site.seen == ["/gone", "/down", "/down", "/down"]


@pytest.mark.parametrize(
    ("tag", "out"),
    [
        ("noai", True),
        ("NoImageAI, nofollow", True),
        ("noindex", True),
        ("none", True),
        ("noml", True),
        ("ssr-on-ray: noai", True),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("max-image-preview: large, noimageindex", True),
        ("otherbot: noai", False),
        ("all", False),
        ("nofollow, nosnippet", False),
    ],
)
def test_opt_out_headers(site: Site, tag: str, out: bool) -> None:
    site.answers["/a"] = says(200, b"x", X_Robots_Tag=tag)
    if out:
        assert cause(site.fetcher(), site.url("/a")) == "opted_out"
    else:
        assert site.fetcher()(site.url("/a")).body == b"x"


def test_a_host_is_asked_by_so_many_at_a_time(site: Site) -> None:
    """Waiting for our own turn does not count against the deadline."""

    busy: list[int] = []

    def slow(request: BaseHTTPRequestHandler) -> None:
        with site.lock:
            busy.append(1)
        time.sleep(0.1)
        with site.lock:  # before the answer: the client may ask again before we are through
            busy.append(-1)
        says(200, b"x")(request)

    site.answers["/a"] = slow
    fetcher = site.fetcher(per_host=2, timeout_s=1.0)
    bodies: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: bodies.append(fetcher(site.url("/a")).body))
        for _ in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bodies) == 24
    assert max(itertools.accumulate(busy)) <= 2
    assert fetcher._hosts._slots == {}


def test_https_is_checked_by_name(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that nobody vouches for, or for another name, is refused; a good one serves."""
    certificate = self_signed("photos.example", tmp_path)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    site.server.socket = server_side.wrap_socket(site.server.socket, server_side=True)
    site.answers["/a"] = says(200, b"picture" * 50_000)
    port = site.server.server_address[1]
    names = [f"photos.example:{port}", f"other.example:{port}"]
    resolver = Resolver(names, lookup=lambda host, port: ["127.0.0.1"])
    fetcher = Fetcher(DownloadConfig(timeout_s=30.0, retries=0), resolver)
    assert cause(fetcher, f"https://{names[0]}/a") == "tls"
    monkeypatch.setattr(
        "pipeline.curation.fetch._TLS", ssl.create_default_context(cafile=certificate)
    )
    assert fetcher(f"https://{names[0]}/a").body == b"picture" * 50_000
    assert cause(fetcher, f"https://{names[1]}/a") == "tls"


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
