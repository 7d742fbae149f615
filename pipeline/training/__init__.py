"""Ray Train: sealed shards -> a trained SSR-Encoder."""
