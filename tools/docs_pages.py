"""A hook of mkdocs (mkdocs.yml): pages of the repository's root join the site, a folder in its navigation becomes the
folder's pages, and links that leave docs/ become plain text.

On the host of the repository such links work as they are. The site has no copy of the sources, so it shows their names
alone. A link to a file that does not exist is an error in both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
IMAGE = re.compile(r'<img src="([^"]+)" width="(\d+)" alt="([^"]*)">')
"""A picture with a width, as the host of the repository reads it. mkdocs relinks Markdown alone."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the root's pages, as if they lay in docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_config(config: Any) -> Any:
    """Put the pages of a folder in its place: mkdocs itself knows none in a navigation."""

    def pages(entry: Any) -> Any:
        if isinstance(entry, str):
            folder = ROOT / "docs" / entry
            return sorted(f"{entry}{page.name}" for page in folder.glob("*.md")) if entry.endswith("/") else entry
        if isinstance(entry, dict):
            return {title: pages(inside) for title, inside in entry.items()}
        return [pages(inside) for inside in entry]

    config["nav"] = pages(config["nav"])
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Point every relative link at where the page is in the site."""
    origin = {name: ROOT / source for source, name in PAGES.items()}.get(
        page.file.src_uri, ROOT / "docs" / page.file.src_uri
    )

    def relink(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if ":" in target:
            return match[0]
        path = (origin.parent / target).resolve()
        if not path.exists():
            raise PluginError(f"{origin.relative_to(ROOT)}: expected a file behind the link {target}, got none")
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES:
            inside = PAGES[name]
        elif name.startswith("docs/") and path.suffix in (".md", ".svg", ".webp"):
            inside = name.removeprefix("docs/")
        else:
            return text
        depth = page.file.src_uri.count("/")
        return f"{image}[{text}]({'../' * depth}{inside}{anchor or ''})"

    return LINK.sub(relink, IMAGE.sub(r"![\3](\1){width=\2}", markdown))
