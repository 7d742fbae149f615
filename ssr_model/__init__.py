"""SSR-Encoder: selective subject representation for Stable Diffusion. Knows nothing of Ray."""
