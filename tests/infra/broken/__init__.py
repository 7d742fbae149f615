"""Ways to break the rendered example site, each with the lints that must notice, and no others;
and changes that none may.

Modules are called as those of infra/checks/lints; importing one registers what it breaks.
References are broken in versions.py, and what fits a job in tests/infra/test_fit.py.
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
