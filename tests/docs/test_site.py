"""The site of ``mkdocs.yml``: every page is in its navigation, and links through the repository become links through the site."""

from __future__ import annotations

import importlib.util
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("site_pages", ROOT / "tools" / "site_pages.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def leaves(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            yield from leaves(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    named = list(leaves(site.expanded(CONFIG["nav"])))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    tables = {page for page in pages if page.startswith("results/") and page != "results/README.md"}  # linked by the page of results
    assert sorted(named) == sorted({*pages - tables, *site.OUTSIDE})


FILES = {"README.md", "costs.md", "methods/README.md", "methods/dyrate.md", "results/README.md", "kept.webp", *site.pages_outside()}


@pytest.mark.parametrize(
    ("page", "text", "becomes"),
    [
        ("costs.md", "[a](methods/dyrate.md#b)", "[a](methods/dyrate.md#b)"),
        ("costs.md", "[a](results)", "[a](results/README.md)"),
        ("methods/dyrate.md", "[a](../../bench/README.md)", "[a](../bench/README.md)"),
        ("costs.md", "[a](../README.md) [b](README.md)", "[a](README.md) [b](README.md)"),
        ("README.md", "[a](docs/costs.md) [b](LICENSE) ![c](docs/kept.webp)", "[a](costs.md) b ![c](kept.webp)"),
        ("costs.md", "[`patch`](../dyrate_kernels/patching/api.py)", "`patch`"),
        ("bench/README.md", "[a](../docs/costs.md) [b](results/README.md)", "[a](../costs.md) [b](results/README.md)"),
        ("bench/results/README.md", "![a](2026-11-27-h200/models.png)", "![a](2026-11-27-h200/models.png)"),
        ("CONTRIBUTING.md", "[a](docs/methods/README.md)", "[a](methods/README.md)"),
        ("costs.md", "[a](https://example.org/b) [c](#d)", "[a](https://example.org/b) [c](#d)"),
        ("costs.md", "`[a](nowhere.md)`", "`[a](nowhere.md)`"),
        ("costs.md", "[`a`](../LICENSE), `b` [`c`](methods/dyrate.md) `[d](e)`", "`a`, `b` [`c`](methods/dyrate.md) `[d](e)`"),
        ("costs.md", "```python\nx[a](nowhere)\n```\n", "```python\nx[a](nowhere)\n```\n"),
    ],
)
def test_links_lead_through_the_site(page, text, becomes):
    assert site.rewritten(text, page, FILES) == becomes


def pages_and_pictures() -> set[str]:
    """Addresses of everything that the site has."""
    return {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()} | set(site.pages_outside())


@pytest.mark.parametrize("page", sorted(page for page in pages_and_pictures() if page.endswith(".md")))
def test_no_link_of_a_page_leads_out_of_the_site(page):
    """What ``mkdocs build --strict`` refuses, without mkdocs."""
    files = pages_and_pictures()
    text = site.rewritten((ROOT / site.in_repository(page)).read_text(encoding="utf-8"), page, files)
    text = re.sub(r"^```.*?^```$|(?<!\[)`[^`\n]*`(?!\])", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in target]
    outside = [target for target in targets if posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) not in files]
    assert not outside, f"{page} leads to {outside}, which the site does not have"


def test_what_the_site_takes_from_outside_exists():
    assert all((ROOT / path).is_file() for path in site.pages_outside())
    assert "bench/results/2026-11-27-h200/models.png" in site.pages_outside()
