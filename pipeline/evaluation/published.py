"""Figures of the paper, to stand beside ours where the bench is the same, and nowhere else.

SSR-Encoder, arXiv 2312.16272, Table 1: DreamBench, 30 subjects, 25 prompts, 4 seeds. The paper does
not say which CLIP and DINO looked, so even on its bench a difference of a few hundredths may be the
backbone's. Its multi-subject bench was never published: no bench of ours is it.
"""

from __future__ import annotations

DREAMBENCH: dict[str, dict[str, float]] = {
    "Textual Inversion": {"clip_t": 0.255, "dino": 0.569, "clip_i": 0.780, "aesthetic": 6.029},
    "DreamBooth": {"clip_t": 0.305, "dino": 0.668, "clip_i": 0.803, "aesthetic": 6.330},
    "Break-A-Scene": {"clip_t": 0.287, "dino": 0.653, "clip_i": 0.788, "aesthetic": 6.234},
    "BLIP-Diffusion": {"clip_t": 0.300, "dino": 0.594, "clip_i": 0.779, "aesthetic": 6.212},
    "Reference only": {"clip_t": 0.286, "dino": 0.542, "clip_i": 0.727, "aesthetic": 5.812},
    "IP-Adapter": {"clip_t": 0.274, "dino": 0.608, "clip_i": 0.809, "aesthetic": 6.432},
    "ELITE": {"clip_t": 0.298, "dino": 0.605, "clip_i": 0.775, "aesthetic": 6.283},
    "SSR-Encoder": {"clip_t": 0.308, "dino": 0.612, "clip_i": 0.821, "aesthetic": 6.563},
}
"""By method, as the paper's tables have them; measures by our names."""
