"""Make links of the documentation to files outside docs/ work on the site: each such file becomes a page of it.

On GitHub the links work as they are. The site has a page `source/<path>` for each file that a page links to: a text in
Markdown as such, code as a listing. A link to what is not there is left as it is, and fails the strict build.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\])\(\s*(?P<target>[^()\s#:]+)(?P<anchor>#[^()\s]*)?\s*\)")
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", "Makefile": "makefile"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to, or a page that is added so."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(pages)
    for page in pages:  # grows while it is read
        for path, _ in _links_outside(page, (ROOT / page).read_text(encoding="utf-8")):
            if path not in seen and (ROOT / path).is_file():
                seen.add(path)
                files.append(File.generated(config, _page_of(path), content=_content(path)))
                if path.endswith(".md"):
                    pages.append(path)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Point the links of a page at the pages of the files."""
    own = page.file.src_uri
    place = own.removeprefix("source/") if page.file.generated_by else f"docs/{own}"
    for path, link in _links_outside(place, markdown):
        if (ROOT / path).is_file() or path.startswith("docs/"):
            target = path.removeprefix("docs/") if path.startswith("docs/") else _page_of(path)
            relative = posixpath.relpath(target, posixpath.dirname(own) or ".")
            markdown = markdown.replace(link.group(), f"({relative}{link['anchor'] or ''})")
    return markdown


def _links_outside(place: str, markdown: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the paths in the repository that a page at `place` links to from or to outside docs/, and the links."""
    for link in LINK.finditer(markdown):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link["target"]))
        if (ROOT / path / "README.md").is_file():
            path += "/README.md"
        if not (place.startswith("docs/") and path.startswith("docs/")):
            yield path, link


def _page_of(path: str) -> str:
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _content(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return NOT_SEARCHED + text
    language = LANGUAGES.get(Path(path).suffix or Path(path).name, "text")
    return f"{NOT_SEARCHED}# {path}\n\n`````{language}\n{text}\n`````\n"
