"""Every document that a docstring, a comment or a text of the code cites is in the repository, and so is the section."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dyrate_kernels", "triton_kernels", "csrc", "bench", "tests", "examples", ".ci")
CITED = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*[\w-]+\.md)\b(?:`*, section (\d+))?")


def python_words(text: str) -> Iterator[str]:
    """Docstrings and comments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def words_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return "\n".join(python_words(text)) if path.suffix == ".py" else text


def sources() -> list[Path]:
    found = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".sh")]
    return [path for path in found if path.name != "test_citations.py" and "results" not in path.parts]


def written_by_users(name: str, place: Path) -> bool:
    """``OUT_DIR/report.md`` and the like: files that a command makes."""
    return bool(re.match(r"(OUT|DIR|out)", name)) or name in ("report.md", "experiments.md", "shapes.md", "pope.md", "lines.md")


def resolved(name: str, place: Path) -> Path | None:
    """From the root, from ``docs``, or beside the file that names it."""
    return next((folder / name for folder in (ROOT, ROOT / "docs", place.parent) if (folder / name).is_file()), None)


def test_every_cited_document_exists():
    missing, cited = [], 0
    for path in sources():
        for name, section in CITED.findall(words_of(path)):
            if written_by_users(name, path):
                continue
            cited += 1
            page = resolved(name, path)
            if page is None:
                missing.append(f"{path.relative_to(ROOT)} cites {name}")
            elif section and not re.search(rf"^## {section}\. ", page.read_text(encoding="utf-8"), re.MULTILINE):
                missing.append(f"{path.relative_to(ROOT)} cites {name}, section {section}")
    assert not missing and cited > 20


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see (docs/design.md, section 6).", [("docs/design.md", "6")]),
        ("`design.md`, section 10", [("design.md", "10")]),
        ("of docs/costs.md", [("docs/costs.md", "")]),
        ("x.mdx, readme", []),
    ],
)
def test_citations_are_found(text, found):
    assert CITED.findall(text) == found


def test_the_words_of_the_glossary_stand_once():
    rows = re.findall(r"^\| \*([^*]+)\* \|", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows)) > 20
