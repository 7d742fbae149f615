"""Units of urls -> images."""
