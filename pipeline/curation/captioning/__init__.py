"""Images -> captions and the subjects that they name."""
