"""The mini world's web site: LAION-like metadata, and its images over real HTTP on loopback.

Run by itself, it serves until interrupted:

    python -m pipeline.miniworld.website --metadata web/metadata
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import WebsiteConfig
from pipeline.errors import UserError
from pipeline.miniworld import links
from pipeline.miniworld.serving import HOST, Handler, Server, world_version
from pipeline.storage import Storage

METADATA = "web/metadata"
"""Folder of the metadata under a root."""

_ABOUT = "web/site.json"
_DONE = b"done"
_START_S = 60.0  # a loaded machine imports slowly
_ANSWER_S = 30.0  # and a site that is busy with its images answers late
_LINGER_S = 10.0  # workers of a killed job must not find their web gone and count that as rot


@dataclass(frozen=True)
class Site:
    """A running web site: its address as "host:port", and where its metadata lies."""

    host: str
    metadata: str


@contextlib.contextmanager
def ensure(cfg: WebsiteConfig, storage: Storage) -> Iterator[Site]:
    """Have the site running and its metadata under `storage` for the time of the context.

    A site that runs already is used if it serves the same world; otherwise a process is started.
    It leaves when the last job that uses it has gone, killed ones included. Raises UserError where
    another program holds the port.
    """
    publish_metadata(cfg, storage)
    process, hold = attach(cfg.port)
    try:
        yield Site(f"{HOST}:{cfg.port}", storage.url(METADATA))
    finally:
        hold.close()
        if process is not None:
            _dismiss(process)


def publish_metadata(cfg: WebsiteConfig, storage: Storage) -> None:
    """Write the metadata of this configuration under `storage`, unless it is there already."""
    about = {"world": world_version(), "port": cfg.port, "rows": cfg.rows, "seed": cfg.seed}
    if storage.exists(_ABOUT) and storage.read_json(_ABOUT) == about:
        return
    storage.delete(METADATA)
    links.write_metadata(storage, METADATA, f"http://{HOST}:{cfg.port}", cfg.rows, cfg.seed)
    storage.write_json(_ABOUT, about)


def serve(port: int) -> Server:
    """A bound server on loopback; `serve_forever()` runs it. Port 0 takes a free one."""
    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise UserError(_taken(port)) from error


def serves_this_world(port: int) -> bool:
    """Whether this world's site answers on `port`; UserError if something else does."""
    try:
        with socket.create_connection((HOST, port), timeout=_ANSWER_S):
            pass
    except OSError:
        return False  # nobody there
    try:
        connection = http.client.HTTPConnection(HOST, port, timeout=_ANSWER_S)
        connection.request("GET", "/about", headers={"Connection": "close"})
        about = json.loads(connection.getresponse().read(10_000))
        connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        raise UserError(_taken(port)) from None
    if not isinstance(about, dict) or "world" not in about:
        raise UserError(_taken(port))
    if about["world"] != world_version():
        raise UserError(
            f"port {port} on {HOST} serves another version of the mini world; stop that site, or "
            "choose another port with --website.port"
        )
    return True


def _taken(port: int) -> str:
    return (
        f"port {port} on {HOST} is taken by another program; free it, or choose another port with "
        "--website.port"
    )


def attach(port: int) -> tuple[subprocess.Popen[bytes] | None, socket.socket]:
    """Find or start the site on this machine; the process if it is ours, and the connection that
    holds it. Both are the caller's to keep.
    """
    for _ in range(3):  # a site that was found may be about to leave
        process = None if serves_this_world(port) else _start(port)
        hold = socket.create_connection((HOST, port), timeout=_START_S)
        with contextlib.suppress(OSError):
            hold.sendall(b"GET /hold HTTP/1.0\r\n\r\n")
            if hold.recv(64).startswith(b"HTTP/1.1 200"):
                return process, hold
        hold.close()
    raise UserError(
        f"the mini world's web site on port {port} does not stay; stop it and run again"
    )


def _start(port: int) -> subprocess.Popen[bytes]:
    """Start the site as a process and wait until it answers."""
    environment = dict(os.environ)
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    module = "pipeline.miniworld.website"
    # Its stdin is a pipe from us: however we end, it reads the end. A session of its own, as Ctrl-C
    # is for the job: units in flight still need the site.
    process = subprocess.Popen(
        [sys.executable, "-m", module, f"--port={port}", "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            if serves_this_world(port):
                return process  # another job was faster to start the same site
            said = (process.stderr.read() if process.stderr else b"").decode(errors="replace")
            last = said.strip().rpartition("\n")[2]
            raise UserError(last or f"the mini world's web site did not start on port {port}")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
            if serves_this_world(port):
                return process
        time.sleep(0.05)
    process.kill()
    raise UserError(f"the mini world's web site did not answer on port {port} in {_START_S:.0f} s")


def _dismiss(process: subprocess.Popen[bytes]) -> None:
    """Tell the site that we are done: it leaves at once, or with the last other job."""
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        process.communicate(_DONE, timeout=2.0)


def _leave_when_unused(server: Server) -> None:
    """Wait for the end of stdin, then for the last holder, then end the process."""
    linger = 0.0 if sys.stdin.buffer.read() == _DONE else _LINGER_S
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < linger or server.holders:
        if server.holders:
            idle_since = time.monotonic()
        time.sleep(0.05)
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    default = WebsiteConfig()
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.miniworld.website",
        description="Serve the mini world's images on loopback until interrupted.",
    )
    parser.add_argument(
        "--port", type=int, default=default.port, help="TCP port on 127.0.0.1 (%(default)s)"
    )
    parser.add_argument(
        "--metadata", help="first write the Parquet metadata below this root, under " + METADATA
    )
    parser.add_argument(
        "--rows", type=int, default=default.rows, help="metadata rows (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="seed of rows, scores, faults (%(default)s)"
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        server = serve(args.port)
        if args.metadata:
            cfg = WebsiteConfig(port=args.port, rows=args.rows, seed=args.seed)
            publish_metadata(cfg, Storage(args.metadata))
            print(f"metadata: {Storage(args.metadata).url(METADATA)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        # a plain exit: requests in flight are nobody's loss
        signal.signal(number, lambda *_: os._exit(0))
    if args.until_stdin_closes:
        threading.Thread(target=_leave_when_unused, args=(server,), daemon=True).start()
    else:
        print(
            f"serving the mini world on http://{HOST}:{server.server_address[1]} (Ctrl-C stops)",
            flush=True,
        )
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
