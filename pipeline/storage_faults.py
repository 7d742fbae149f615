"""What can go wrong in a store, told in one line that never holds credentials."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from pipeline.errors import UserError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def one_line(action: str, url: str) -> Iterator[None]:
    """Turn a store's failure into one UserError line without credentials."""
    where = public(url)
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        missing = "no such bucket or file" if "://" in url else "no such file or folder"
        raise UserError(f"cannot {action} {where}: {missing}; check the path") from error
    except PermissionError as error:
        raise UserError(
            f"cannot {action} {where}: permission denied; check rights or credentials"
        ) from error
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise UserError(
                f"cannot {action} {where}: the disk is full; free space and run again"
            ) from error
        raise UserError(f"cannot {action} {where}: {_reason(error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _STORE_CLIENTS:
            raise
        raise UserError(
            f"cannot {action} {where}: {_reason(error)}; check endpoint and credentials"
        ) from error


_STORE_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "s3fs", "fsspec"}
_SECRETS = re.compile(
    r"(AKIA|ASIA)\w+|(?<=Signature=)[^&\s]+|(?<=Credential=)[^&\s]+|(?<=token=)[^&\s]+", re.I
)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return scrubbed(" ".join(str(text).split()))[:300]


def scrubbed(text: str) -> str:
    """`text` with what looks like credentials, or is one of this process's, starred out."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return _SECRETS.sub("***", public(text))


def public(url: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", url)
