"""SSR on Ray: what runs on Ray, from web metadata to a trained SSR-Encoder."""

__version__ = "0.1.0"
