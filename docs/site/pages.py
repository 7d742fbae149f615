"""Hooks of mkdocs.yml: the site shows the files that the repository's hub shows.

Pages outside docs/ (README, SECURITY.md, infra/README.md, ...) are pages of the site too, so each
text stands once; a linked source file becomes a page with its text. Links are written as the hub
follows them, from file to file, and are led here to the pages that the site has for these files.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "infra/README.md": "deploy.md",
    "infra/docker/README.md": "deploy/images.md",
    "infra/policies/README.md": "deploy/policies.md",
}
"""Pages outside docs/, and what they are called in the site."""

LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=[)\s])")
FENCE = re.compile(r"^ *(```+|~~~+)")
ITEM = re.compile(r"^( *)([-*+]|\d+\.) ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages outside docs/, and the source files that any page links to."""
    texts = {name: (REPOSITORY / name).read_text() for name in OUTSIDE}
    for name, text in texts.items():
        files.append(File.generated(config, OUTSIDE[name], content=text))
    for file in files.documentation_pages():
        if file.src_uri not in OUTSIDE.values() and file.src_uri.endswith(".md"):
            texts[f"docs/{file.src_uri}"] = file.content_string
    linked = {target for name, text in texts.items() for target in _targets(name, text)}
    for target in sorted(linked):
        if not target.startswith("docs/") and target not in OUTSIDE:
            files.append(File.generated(config, _in_site(target), content=_source(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's links led to the site's pages; lists as Python-Markdown wants them."""
    at = page.file.src_uri
    origin = next((name for name, uri in OUTSIDE.items() if uri == at), f"docs/{at}")
    if at.startswith("source/"):
        return markdown

    def led(link: str) -> str:
        path, hash_sign, anchor = link.partition("#")
        target = _target(origin, path)
        if target is None:
            return link
        return posixpath.relpath(_in_site(target), posixpath.dirname(at)) + hash_sign + anchor

    return _lists(_outside_fences(markdown, lambda line: LINK.sub(lambda m: led(m[1]), line)))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A notebook's links led likewise; and without the script that would fetch Mermaid."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r'(?<=href=")([\w./-]+)\.md(?=[#"])', r"\1.html", html)
    return re.sub(
        r"<script type=\"module\">(?:(?!</script>).)*mermaid.*?</script>", "", html, flags=re.S
    )


def _target(origin: str, path: str) -> str | None:
    """The file of the repository that `path` of the file `origin` means; none = elsewhere."""
    if not path or re.match(r"[a-z]+:", path) or path.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))


def _targets(origin: str, text: str) -> set[str]:
    found: set[str] = set()

    def look(line: str) -> str:
        paths = (_target(origin, m[1].partition("#")[0]) for m in LINK.finditer(line))
        found.update(path for path in paths if path is not None)
        return line

    _outside_fences(text, look)
    return found


def _in_site(target: str) -> str:
    if target in OUTSIDE:
        return OUTSIDE[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"source/{target}.md"


def _source(target: str) -> str:
    path = REPOSITORY / target
    if not path.is_file():
        raise PluginError(f"a page links to {target}, which is no file; mend the link")
    if path.suffix == ".md":
        raise PluginError(f"a page links to {target}; give it a place in OUTSIDE of {__file__}")
    kind = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(path.suffix, "text")
    return f"# {PurePosixPath(target)}\n\n`````{kind}\n{path.read_text().rstrip()}\n`````\n"


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    lines, fence = [], ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip() == fence:
            fence = ""
        lines.append(line if fence or mark else change(line))
    return "\n".join(lines) + "\n"


def _lists(text: str) -> str:
    """A list may follow its sentence at once on the hub; Python-Markdown asks for a blank line,
    and for four spaces where an item lies within another.
    """
    before = ""

    def change(line: str) -> str:
        nonlocal before
        item = ITEM.match(line)
        opens = item and before.strip() and not ITEM.match(before) and not before.startswith(" ")
        opens = opens and not before.startswith("#")
        before = line
        return f"\n{line}" if opens else line

    return _outside_fences(text, change)
