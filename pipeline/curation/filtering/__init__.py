"""Metadata -> units of urls."""
