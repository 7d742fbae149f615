"""What the shipped overlays say where only a site can know: in one of its own it is a mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import every_string
from infra.checks.render import Document

_PLACEHOLDERS = (
    (re.compile(r"sha256:0{64}"), "the digest of no image", "push the image, and give its digest"),
    (re.compile(r"\b123456789012\b"), "the account of nobody", "give your account's number"),
    (
        re.compile(
            r"\b[\w-]+\.example(?:\.(?:com|net|org))?(?![\w.-])|\bexample\.(?:com|net|org)\b"
        ),
        "a host of nobody",
        "name your registry or server",
    ),
    (re.compile(r"\b(?:s3|gs)://example\b"), "the bucket of nobody", "name your bucket"),
    (re.compile(r"\b192\.0\.2\.\d+"), "an address of nobody", "give your site's"),
)


@lint("site", "nothing is left of the examples: digests, accounts, hosts, buckets, addresses")
def placeholders_are_replaced(documents: list[Document]) -> Iterator[Finding]:
    for document in documents:
        for path, text in every_string(document):
            for pattern, wrong, do in _PLACEHOLDERS:
                if found := pattern.search(text):
                    yield Finding(subject(document), path, f"{found[0]} is {wrong}", do)
