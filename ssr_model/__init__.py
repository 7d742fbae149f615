"""SSR-Encoder: selective subject representation for Stable Diffusion. Knows nothing of Ray."""

from ssr_model.conditioning import SSREncoder, Subject
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter
from ssr_model.maps import AttentionMap, overlay

__all__ = ["AttentionMap", "SSRAdapter", "SSRConfig", "SSREncoder", "Subject", "overlay"]
