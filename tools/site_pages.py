"""Hooks of ``mkdocs build`` (mkdocs.yml): pages that lie outside of ``docs/`` are part of the site, and folders of ``nav`` are their pages.

Links of a page are those of the repository, so they work where the repository is read as files, too. What leads out of the site (source
files) becomes its text. The README of the repository is the first page, in the place of ``docs/README.md``, which the navigation replaces.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOME = "README.md"
# Pages of the site that are not in docs/.
OUTSIDE = (HOME, "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "bench/results/README.md", "examples/README.md")
# Code before a link hides what looks like one in it; a link before code has code in its label. Whichever comes first is what is there.
CODE_OR_LINK = re.compile(
    r"^```.*?^```$|`[^`\n]*`|(?P<picture>!?)\[(?P<label>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def pages_outside() -> list[str]:
    """Returns the paths of ``OUTSIDE`` and of the records' reports and pictures, from the root of the repository."""
    records = sorted(path for pattern in ("*/report.md", "*/*.png") for path in (ROOT / "bench" / "results").glob(pattern))
    return [*OUTSIDE, *(path.relative_to(ROOT).as_posix() for path in records)]


def in_repository(uri: str) -> str:
    """Returns the path, from the root of the repository, of a file of the site."""
    return uri if uri in OUTSIDE or uri.startswith("bench/") else f"docs/{uri}"


def in_site(path: str, files: set[str]) -> str | None:
    """Returns the address in the site for a path in the repository; None where the site does not have it.

    Args:
        path: of a file or a folder, from the root of the repository.
        files: the addresses of the site.
    """
    if path in ("docs", f"docs/{HOME}"):
        return HOME
    for each in (path, posixpath.join(path, "README.md")):
        uri = each.removeprefix("docs/")
        if uri in files and in_repository(uri) == each:
            return uri
    return None


def rewritten(text: str, page: str, files: set[str]) -> str:
    """Returns a page whose relative links, which lead through the repository, lead through the site.

    Args:
        text: Markdown.
        page: address of the page in the site.
        files: the addresses of the site.
    """

    def replace(found: re.Match[str]) -> str:
        picture, label, target, anchor = found.groups(default="")
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(page)), target))
        uri = in_site(path, files)
        if uri is None:
            return label
        return f"{picture}[{label}]({posixpath.relpath(uri, posixpath.dirname(page) or '.')}{anchor})"

    return CODE_OR_LINK.sub(replace, text)


def expanded(nav: list[Any]) -> list[Any]:
    """Returns ``nav`` with each folder (``methods/``) replaced by its pages, the index first, called by the names of their files."""
    result: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/"):
            pages = sorted(path for path in (ROOT / "docs" / entry).glob("*.md") if path.name != "README.md")
            result += [f"{entry}README.md", *({path.stem: f"{entry}{path.name}"} for path in pages)]
        elif isinstance(entry, dict):
            result += [{title: expanded(value) if isinstance(value, list) else value} for title, value in entry.items()]
        else:
            result.append(entry)
    return result


def on_config(config: Any) -> Any:
    """Called by mkdocs. Anchors are made as GitHub makes them, so that one link is right in both places."""
    from pymdownx.slugs import slugify

    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify(case="lower")
    config["nav"] = expanded(config["nav"])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: adds the pages outside of ``docs/``, the first one in the place of another."""
    from mkdocs.structure.files import File

    files.remove(files.get_file_from_path(HOME))
    for path in pages_outside():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs."""
    return rewritten(markdown, page.file.src_uri, {file.src_uri for file in files})
