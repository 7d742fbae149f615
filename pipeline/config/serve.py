"""Settings of jobs/serve.py."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from pipeline.config.shared import ModelsConfig, Precision, RayConfig, at_least
from pipeline.errors import UserError

MOST_GUIDANCE = 100.0
"""Of any request."""


@dataclass
class LimitsConfig:
    """What one request may ask for."""

    upload_mib: int = 20
    """Bytes of a whole request, MiB."""
    pixels: int = 25_000_000
    """Pixels of an uploaded picture; its header is read before it is decoded."""
    subjects: int = 4
    """Subjects of a picture."""
    steps: int = 100
    """Denoising steps."""
    side: int = 1024
    """Longest side of a drawn picture, pixels."""
    text: int = 1000
    """Characters of a prompt or a query."""

    def __post_init__(self) -> None:
        at_least(self, "limits", upload_mib=1, pixels=1, subjects=1, steps=1, side=1, text=1)


@dataclass
class ServeConfig:
    """jobs/serve.py: a trained SSR-Encoder -> an HTTP service, and a page on it."""

    root: str = "runs/mini"
    """The run's root; its model/ is served."""
    model: str | None = None
    """Trained SSR-Encoder: folder, hub id or miniworld:ssr (shipped); none = root/model."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    controlnet: str | None = None
    """ControlNet for requests with a control image: hub id or folder; none = such are refused."""
    device: str = "auto"
    """Torch device of each replica: auto, cpu, cuda."""
    dtype: Precision = "float32"
    """Precision of the models."""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs a token."""
    port: int = 8000
    """TCP port to listen on."""
    token_file: str | None = None
    """File with the token that requests must bring (Authorization: Bearer ...); none = the
    environment's SSR_TOKEN; neither = no token, on loopback only."""
    page: bool = True
    """Whether the page is served at /; the API is there without it."""
    replicas: int = 1
    """Processes that draw, each with the models on its device."""
    batch: int = 4
    """Pictures that a replica denoises at once; requests alike in steps, guidance, size and number
    of subjects go together."""
    batch_wait_ms: int = 20
    """How long the first request of a batch waits for others, ms."""
    queue: int = 32
    """Requests that may wait at a replica; one more is answered 429."""
    deadline_s: float = 120.0
    """Longest time from a request to its answer, s; a request may ask for less. What is late is
    answered 504, and not drawn any further."""
    drain_s: float = 30.0
    """How long a stop waits for pictures that are being drawn, s."""
    steps: int = 30
    """DDIM steps of a request that names none."""
    guidance: float = 7.5
    """Guidance of a request that names none."""
    guidance_rescale: float = 0.0
    """guidance_rescale of a request that names none, 0 to 1 (see jobs/generate.py)."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        at_least(self, "serve", replicas=1, batch=1, batch_wait_ms=0, queue=0, drain_s=0)
        if self.deadline_s <= 0:
            raise UserError(f"deadline_s: {self.deadline_s} leaves no time; choose 10 or more")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port: {self.port} is not within 0 to 65535")
        self._check_defaults()

    def _check_defaults(self) -> None:
        """Or every request that leaves them out would fail, or be more than the limits allow."""
        if not 1 <= self.steps <= self.limits.steps:
            raise UserError(
                f"steps: {self.steps} is not within 1 to {self.limits.steps}, limits.steps"
            )
        for name, most in (("guidance", MOST_GUIDANCE), ("guidance_rescale", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name}: {getattr(self, name)} is not within 0 to {most:g}")

    @property
    def room(self) -> int:
        """Requests that the replicas wait for or work on at once; more could only be refused."""
        return self.replicas * (self.queue + 2 * self.batch)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
