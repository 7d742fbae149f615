"""What can go wrong in a store: what is tried again, and the one line that the rest ends in.

A fault is transient (the store is busy, slow, or the line to it broke) or permanent (no such
bucket, no right, a full disk). Transient ones of a remote store are tried again; where they last
longer than our patience they end in a StoreHiccup. No line ever holds credentials.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.errors import StoreHiccup, UserError
from pipeline.progress import say

T = TypeVar("T")

PATIENCE_VARIABLE = "SSR_STORE_PATIENCE_S"
"""Environment variable: for how long one operation is tried again, seconds; unset = 60."""

_PATIENCE_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_SAY_AFTER_S = 5.0  # a person sees why a job waits

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STORE_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "s3fs", "fsspec"}
_BUSY = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "OperationAborted",
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded",
    "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch",
}  # fmt: skip
# by name, as only storage.py imports the clients: every one is "the line broke or was silent"
_BROKEN_LINE = {
    "HTTPClientError", "EndpointConnectionError", "IncompleteReadError", "IncompleteRead",
    "ResponseParserError", "ClientPayloadError", "ClientConnectionError", "FSTimeoutError",
}  # fmt: skip
_HOPELESS = {"SSLError", "ProxyConnectionError", "InvalidProxyConfiguration"}


def attempt(action: str, url: str, call: Callable[[], T]) -> T:
    """`call()`, tried again with growing, jittered pauses while a remote store is only busy.

    `call` must do the same thing when it is done twice. Its tries take about a minute together
    (`PATIENCE_VARIABLE`); the last one may run into the client's own time limits beyond it.

    Raises:
        StoreHiccup: the fault is transient and outlasted the tries.
        UserError: the fault is permanent.
    """
    started, tries, told = time.monotonic(), 0, False
    while True:
        try:
            with one_line(action, url):
                return call()
        except StoreHiccup as hiccup:
            tries += 1
            spent = time.monotonic() - started
            # "full jitter": workers that failed together do not come back together
            pause = random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**tries))
            if spent + pause > _patience():
                raise StoreHiccup(
                    f"{hiccup}; tried {tries} times in {spent:.0f} s; what is finished is kept, "
                    "run the same command again when the store is well"
                ) from hiccup.__cause__
            if spent > _SAY_AFTER_S and not told:
                told = True
                say(f"waiting: {hiccup}; trying again for up to {_patience():.0f} s")
            time.sleep(pause)


@contextlib.contextmanager
def one_line(action: str, url: str) -> Iterator[None]:
    """Turn a store's failure into one UserError line without credentials; nothing is retried.

    A transient fault of a remote store is a StoreHiccup.
    """
    where = public(url)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = f"cannot {action} {where}: "
        if "://" in url and transient(error):
            raise StoreHiccup(line + _reason(error)) from error
        if isinstance(error, FileNotFoundError):
            missing = "no such bucket or file" if "://" in url else "no such file or folder"
            raise UserError(f"{line}{missing}; check the path") from error
        if isinstance(error, RecursionError) and "://" in url:
            # botocore follows a redirect that does not say where to until the stack ends
            raise UserError(f"{line}the store redirects{_ELSEWHERE}") from None
        if isinstance(error, PermissionError):
            raise UserError(line + _denied(error, action if "://" in url else "")) from error
        if isinstance(error, OSError):
            if error.errno in _FULL_DISK:
                raise UserError(f"{line}the disk is full; free space and run again") from error
            raise UserError(f"{line}{_reason(error)}{_mend(error)}") from error
        if type(error).__module__.partition(".")[0] not in _STORE_CLIENTS:
            raise
        raise UserError(f"{line}{_reason(error)}; check endpoint and credentials") from error


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    answer = _answer(error)
    if answer is not None:
        code, status = answer
        return code in _BUSY or status == 429 or (status >= 500 and status != 501)
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _HOPELESS:
        return False
    return bool(names & _BROKEN_LINE) or isinstance(error, ConnectionError | TimeoutError)


def there_already(error: UserError) -> bool:
    """Whether a store refused to create an object because there is one."""
    cause = error.__cause__
    status = (_answer(cause) or ("", 0))[1] if cause is not None else 0
    return isinstance(cause, FileExistsError) or status == 412


def public(url: str) -> str:
    """`url` without the credentials that somebody may have written into it."""
    return _USER_INFO.sub("://***@", url)


def _patience() -> float:
    try:
        return float(os.environ.get(PATIENCE_VARIABLE, _PATIENCE_S))
    except ValueError:
        return _PATIENCE_S


def _answer(error: BaseException) -> tuple[str, int] | None:
    """Error code and HTTP status of the store's answer behind `error`; None if it gave none."""
    link: BaseException | None = error
    while link is not None:
        response: Any = getattr(link, "response", None)
        if isinstance(response, dict) and "Error" in response:
            code = str(response["Error"].get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return code, int(status)
        link = link.__cause__ or link.__context__
    return None


def _denied(error: PermissionError, action: str) -> str:
    code = (_answer(error) or ("", 0))[0]
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        return f"the store does not accept the credentials ({code}); set others and run again"
    right = next((_RIGHTS[name] for name in _operations(error) if name in _RIGHTS), None)
    right = right or _RIGHTS.get(action)  # of a bulk deletion the store answers 200
    if right is None:
        return "permission denied; check rights or credentials"
    return f"permission denied, {right} is not granted; check the role's policy or the credentials"


def _operations(error: BaseException) -> Iterator[str]:
    """What was asked of S3, as its clients call it, where the refusal tells."""
    link: BaseException | None = error
    while link is not None:
        yield str(getattr(link, "operation_name", ""))
        link = link.__cause__ or link.__context__


_READ, _WRITE, _LIST, _DELETE = "s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObject"
# By the operation's name, or our own verb; what is missing is hidden from who may not list it.
_RIGHTS = {
    "GetObject": _READ, "HeadObject": f"{_READ} or {_LIST}", "ListObjectsV2": _LIST,
    "PutObject": _WRITE, "CreateMultipartUpload": _WRITE, "UploadPart": _WRITE,
    "CompleteMultipartUpload": _WRITE,
    "DeleteObject": _DELETE, "DeleteObjects": _DELETE, "delete": _DELETE,
}  # fmt: skip


def _mend(error: OSError) -> str:
    """What to do about an answer of the store that no trying again would change."""
    code, status = _answer(error) or ("", 0)
    if code in ("PermanentRedirect", "301") or status in (301, 307, 308):
        return _ELSEWHERE
    if code == "MissingContentLength" or status == 411:
        return "; the store refuses trailing checksums: unset AWS_REQUEST_CHECKSUM_CALCULATION"
    return "; check endpoint and bucket" if status else ""


_ELSEWHERE = "; the bucket lives elsewhere: set AWS_DEFAULT_REGION or AWS_ENDPOINT_URL to its own"

# key:secret@ with slashes in the secret, and user@ before the first slash; a port is neither
_USER_INFO = re.compile(r"://(?:[^/@\s:]*:(?!\d+/)[^@\s]*|[^/@\s]+)@")
_SECRET_NAME = re.compile(r"(?:SECRET|TOKEN|PASSWORD|API_KEY|ACCESS_KEY|ACCESS_KEY_ID)$")
"""Environment variables whose values are nobody's business: AWS_*, HF_TOKEN, WANDB_API_KEY, ..."""
_SHORTEST_SECRET = 6  # characters: a shorter one would star out half of a sentence
_SECRETS = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{8,}\b|(?i:(?<=Signature=)[^&\s]+|(?<=Credential=)[^&\s]+"
    r"|(?<=token=)[^&\s]+)"
)


def _reason(error: BaseException) -> str:
    answer = _answer(error)
    if answer is not None and transient(error):
        return f"the store answers {answer[0]} (HTTP {answer[1]})"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return scrubbed(" ".join(str(text).split()))[:300]


def scrubbed(text: str) -> str:
    """`text` with what looks like credentials, or is one of this process's, starred out."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SECRETS.sub("***", public(text))
