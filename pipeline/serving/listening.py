"""Where the service listens."""

from __future__ import annotations

import socket

from pipeline.config.serve import ServeConfig
from pipeline.errors import UserError


def free_port(cfg: ServeConfig) -> int:
    """cfg.port, or a free one for 0. Raises UserError for one in use, and for a foreign host."""
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((cfg.host, cfg.port))
        except OSError as fault:
            reason = fault.strerror or str(fault)
            raise UserError(
                f"cannot listen on {cfg.host}:{cfg.port}: {reason}; choose another --port or --host"
            ) from None
        return int(probe.getsockname()[1])


def url(cfg: ServeConfig) -> str:
    """As people of this machine ask for it."""
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    return f"http://{host}:{cfg.port}"
