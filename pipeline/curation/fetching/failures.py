"""How a fetch fails: every end has a cause, and says whether a later try may succeed.

docs/curation/fetch.md has the table of causes.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import zlib
from collections.abc import Iterator

import h11


class FetchError(Exception):
    """A fetch that ended without a body.

    `cause` is its class (http_404, timeout, ...); `rule` says that we declined, where otherwise
    the web failed; `transient` that a later try may succeed, after `wait_s` seconds if given;
    `soon` is false where a try within the same fetch would be of no use; `tries` counts those in
    which anything was asked for.
    """

    def __init__(
        self,
        cause: str,
        detail: str = "",
        *,
        rule: bool = False,
        transient: bool = False,
        wait_s: float | None = None,
        soon: bool = True,
    ) -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.rule, self.transient = cause, rule, transient
        self.wait_s, self.soon, self.tries = wait_s, soon, 0


def too_late(what: str) -> FetchError:
    """The unit's deadline comes before what the fetch would have to wait for."""
    return FetchError("deadline", what, transient=True, soon=False)


class ForbiddenAddress(Exception):
    """The host has only addresses that a fetch must not talk to."""


# The connection ended where TLS expected more: a reset, not a certificate or protocol at fault.
_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
NO_NAME_YET_S = 1.0
"""For so long a name that the name servers could not speak of just now is not asked for again."""
_FOR_NOW = {408, 425, 429}
_FOR_GOOD = {501, 505}


def status_error(status: int, url: str, wait_s: float | None = None) -> FetchError:
    """What a status other than 200 means: 4xx is the page's, 5xx the server's state."""
    passing = status in _FOR_NOW or (500 <= status < 600 and status not in _FOR_GOOD)
    return FetchError(f"http_{status}", url, transient=passing, wait_s=wait_s)


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Give what the network and the libraries raise its cause."""
    try:
        yield
    except FetchError:
        raise
    except ForbiddenAddress as error:
        raise FetchError("forbidden_address", str(error), rule=True) from None
    except TimeoutError as error:
        raise FetchError("timeout", str(error), transient=True) from None
    except socket.gaierror as error:
        # "not now" is remembered (addresses.py) for a moment, that there is no such name for longer
        again = error.errno == socket.EAI_AGAIN
        wait_s = NO_NAME_YET_S if again else None
        raise FetchError("dns", str(error), transient=again, wait_s=wait_s, soon=again) from None
    except (ConnectionError, *_CUT_OFF) as error:
        raise FetchError("connection", str(error), transient=True) from None
    except ssl.SSLError as error:
        raise FetchError("tls", str(error)) from None
    except zlib.error as error:
        raise FetchError("bad_encoding", str(error)) from None
    except UnicodeError as error:
        raise FetchError("bad_url", str(error)[:200]) from None
    except (h11.ProtocolError, ValueError) as error:
        raise FetchError("bad_response", f"{type(error).__name__}: {error}"[:200]) from None
    except OSError as error:
        raise FetchError("connection", str(error), transient=True) from None
