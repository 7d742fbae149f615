"""Ways to break the rendered example site, each with the lints that must notice, and no others;
and changes that none may.

A module for each of infra/checks/lints; importing it registers what it breaks.
"""

from tests.infra.broken import (  # noqa: F401
    cluster,
    drain,
    identity,
    jobs,
    network,
    pods,
    serving,
    training,
    versions,
)
from tests.infra.broken.breakage import ALLOWED, BREAKAGES, Breakage

__all__ = ["ALLOWED", "BREAKAGES", "Breakage"]
