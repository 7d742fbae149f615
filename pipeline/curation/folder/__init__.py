"""Images and captions of your own, in place of metadata and the web."""
