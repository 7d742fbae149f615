"""The service: an HTTP API and a page, on whoever draws."""
