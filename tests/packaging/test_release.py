"""Version, changelog, citation and metadata say one thing; ``tools/release.sh`` looks at them before it builds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import dyrate_kernels

ROOT = Path(__file__).parents[2]
VERSION = dyrate_kernels.__version__
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # of Keep a Changelog


def headings(level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_changelog_is_by_version_the_newest_first():
    first, *versions = headings(2)
    assert first == "Unreleased"
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - (\d{4}-\d{2}-\d{2})", heading) for heading in versions]
    assert all(found), f"a heading is '## VERSION - DATE', got {versions}"
    numbers = [tuple(map(int, each.groups()[:3])) for each in found]
    assert numbers == sorted(set(numbers), reverse=True)
    assert ".".join(map(str, numbers[0])) == VERSION, "the newest version of the changelog is that of the package"
    assert set(headings(3)) <= set(KINDS)


def test_the_citation_is_that_of_this_version_and_names_the_method():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(found) and found["cff-version"] == "1.2.0"  # what version 1.2.0 requires
    assert found["version"] == VERSION and found["license"] == "Apache-2.0"
    assert f"## {VERSION} - {found['date-released']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (paper,) = found["references"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    entry = re.search(r"^  author  = \{(.+)\},$", readme, re.MULTILINE)[1]
    assert " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]) == entry
    assert f"title   = {{{paper['title']}}}" in readme
    assert paper["identifiers"][0]["value"] == "arXiv:2501.14204"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of the files that the script looks at before it builds."""
    for name in ("tools/release.sh", "dyrate_kernels/__init__.py", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    git(tmp_path / "checkout", "init", "-q")
    commit(tmp_path / "checkout")
    return tmp_path / "checkout"


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")


def refused(checkout: Path, *arguments: str) -> str:
    """The message with which the script stops; ``no-python`` ends it where it would begin to build."""
    done = subprocess.run(["bash", str(checkout / "tools" / "release.sh"), *arguments], cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_script_refuses_what_is_no_release(checkout, tmp_path):
    out = str(tmp_path / "out")
    assert "no-python" in refused(checkout, out, "no-python")  # nothing to refuse: it goes on to the environment
    assert "give a folder" in refused(checkout)
    edit(checkout / "CITATION.cff", f"version: {VERSION}", "version: 0.0.1")
    assert "not committed" in refused(checkout, out, "no-python")
    commit(checkout)
    assert "CITATION.cff has another version" in refused(checkout, out, "no-python")
    edit(checkout / "CHANGELOG.md", f"## {VERSION} - ", "## ")
    commit(checkout)
    assert f"no heading '## {VERSION} - DATE'" in refused(checkout, out, "no-python")
    (tmp_path / "out" / "old.whl").touch()
    assert "is not empty" in refused(checkout, out, "no-python")
