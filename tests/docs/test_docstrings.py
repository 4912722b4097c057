"""Docstrings say what is done, in lines that no tool has broken."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("dyrate_kernels", "triton_kernels")
FRAGMENT = re.compile(r"(What|Whether|How|It|Does (it|so|that)|See (above|below)|TODO)\b")
ENTRY = re.compile(r"\s*([-*>|]|``|\w+(, \w+)*:)")  # an item of a list or of Args begins a line of its own
SHORT = 60  # a line below this that the next line's first word fits behind was broken by accident


def documented(*folders: str) -> Iterator[tuple[str, ast.AST, str, list[str]]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                    first, last = node.body[0].lineno - 1, node.body[0].end_lineno
                    yield f"{path.relative_to(ROOT)}:{first + 1}", node, ast.get_docstring(node), text.split("\n")[first:last]


def broken(lines: list[str]) -> list[str]:
    """Lines of a docstring that end in the middle of a sentence although the next word would have fitted."""
    found = []
    for line, after in zip(lines, lines[1:], strict=False):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text or not after.strip() or after.strip() == '"""' or ENTRY.match(line) or ENTRY.match(after):
            continue
        same = len(after) - len(after.lstrip()) >= indent
        if same and len(line) < SHORT and "  " not in text and not re.search(r"[.:;)`>\]{}]$", text) and after.strip()[0].islower():
            found.append(text)
    return found


def test_no_docstring_begins_as_a_fragment():
    found = [f"{place}: {text.splitlines()[0]}" for place, _, text, _ in documented(*PACKAGE, "bench", "tools") if FRAGMENT.match(text)]
    assert found == [], "begin with what is done (Returns, Writes, Checks), or with what a module or a class is"


def test_a_fragment_is_found():
    for text in ("What is read.", "Whether it is on.", "How many stay.", "It is on.", "Does it.", "See below."):
        assert FRAGMENT.match(text)
    assert not FRAGMENT.match("Returns what is read.") and not FRAGMENT.match("Items that were read.")


def test_no_docstring_was_broken_by_a_reflow():
    code = ("bench", "python -m", "rows ", "row ")  # blocks of text that is no prose
    found = {place: broken(lines) for place, _, _, lines in documented(*PACKAGE)}
    assert {place: lines for place, lines in found.items() if [line for line in lines if not line.startswith(code)]} == {}


def test_the_broken_line_is_found():
    assert broken(["    The tensors are described,", "    stride", "    of a head, stride of a row."]) == [
        "The tensors are described,", "stride"
    ]  # fmt: skip
    assert broken(["    Args:", "        a: one.", "        b: two."]) == []
