"""The documentation: its Python blocks run, its quick commands run, its links lead somewhere, every method has its page."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import dyrate_kernels as dk
from dyrate_kernels.cli.main import COMMANDS, main
from dyrate_kernels.evaluation import suites

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"])
OUTSIDE = ("README.md", "CHANGELOG.md", "bench/README.md", "bench/results/README.md", "examples/README.md")
WRITTEN = [*PAGES, *(ROOT / name for name in OUTSIDE)]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = ("dyrate info", "dyrate bench e2e --config toy")  # commands of bash blocks that take a second or two


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


@pytest.mark.parametrize("page", [page for page in [*PAGES, ROOT / "README.md"] if blocks(page, "python")], ids=named)
def test_python_blocks_run_in_order(page, monkeypatch):
    for package in (dk.policies, dk.vision):  # what a page registers is gone behind it
        monkeypatch.setattr(package._REGISTRY, "by_name", dict(package._REGISTRY.by_name))
    namespace: dict[str, object] = {"__name__": "builtins"}  # dataclasses look their module up
    for number, body in enumerate(blocks(page, "python")):
        exec(compile(body, f"{named(page)}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in [*PAGES, ROOT / "README.md"] if blocks(page, "bash")], ids=named)
def test_quick_commands_run(page, capsys):
    for line in "".join(blocks(page, "bash")).splitlines():
        if line.startswith(QUICK):
            assert main(shlex.split(line, comments=True)[1:]) == 0, line
            assert capsys.readouterr().out


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{named(page)} links to {target}, which does not exist"


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_fences_and_tables_are_whole(page):
    """A fence that lost its other end turns what follows inside out; a row that lost a cell, or half of one, is cut text."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *(```\S*)$", text, re.MULTILINE)
    assert len(fences) % 2 == 0 and set(fences[1::2]) <= {"```"}, f"{named(page)}: a fence has no other end, of {fences}"
    text = re.sub(r"^ *```.*?^ *```$|`[^`\n]*`|\[[^\]\n|]*, [^\]\n|]*\)", "", text, flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^ *\|.*\n)+", text, re.MULTILINE):
        rows = [re.sub(r"\\\|", "", row.strip())[1:-1].split("|") for row in table.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}, f"{named(page)}: a row of the table {rows[0]} has another number of cells"
        halves = [cell for row in rows for cell in row if cell.count("(") != cell.count(")")]
        assert not halves, f"{named(page)}: parentheses do not match in {halves}"


def test_own_questions_are_in_the_form_that_the_page_shows(tmp_path):
    (body,) = blocks(ROOT / "docs" / "evaluation.md", "json")
    (tmp_path / "mine.json").write_text(body)
    Image.new("RGB", (8, 8)).save(tmp_path / "kitchen.png")
    suite = suites.get("gqa", tmp_path / "mine.json", tmp_path)
    assert [suite[index].group for index in range(len(suite))] == ["object", "count"]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_links_lead_to_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert anchor in anchors(page.parent / target if target else page), f"{named(page)} links to {target}#{anchor}"


def page_of(folder: str, name: str) -> tuple[Path, str]:
    """The page of a method or reducer and what it says; the index must link it."""
    page = ROOT / "docs" / folder / f"{name}.md"
    assert page.exists(), f"write {named(page)}, as the pages beside it: what {name} does, its options, cost, quality and traps"
    index = page.parent / "README.md"
    assert f"({name}.md)" in index.read_text(encoding="utf-8"), f"{named(index)} must link {name}.md: give its table a row for {name}"
    return page, page.read_text(encoding="utf-8")


def said_of(page: Path, text: str) -> None:
    """A page shows how a method is used, and has the headings that all have."""
    assert blocks(page, "python"), f"{named(page)} must show how {page.stem} is used: a Python block"
    for heading in ("What it does", "When to use it", "Cost", "Quality on `shapes`", "Traps"):
        assert f"**{heading}" in text, f"{named(page)} must have a paragraph that begins with **{heading}"


@pytest.mark.parametrize("name", dk.policies.names())
def test_every_method_has_a_page_that_names_its_options(name):
    page, text = page_of("methods", name)
    defaults = {field.name: field for field in dataclasses.fields(type(dk.policies.get(name)))}
    for option in dk.policies.options(name):
        field = defaults[option]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert f"| `{option}` | `{default!r}` |" in text, f"{named(page)} must say what {option} is, and that its default is {default!r}"
    said_of(page, text)


@pytest.mark.parametrize("name", dk.vision.names())
def test_every_reducer_has_a_page_that_names_its_options(name):
    page, text = page_of("vision", name)
    for field in dataclasses.fields(dk.vision.get(name)):
        line = f"| `{field.name}` | `{field.default!r}` |"
        assert line in text, f"{named(page)} must say what {field.name} is, and that its default is {field.default!r}"
    said_of(page, text)


def test_the_readme_names_every_method_reducer_and_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    missing = [name for name in dk.policies.names() if name not in rows]
    assert not missing, f"README.md, Methods: the table must have a row for every policy, and lacks {missing}"
    reducers = next(paragraph for paragraph in text.split("\n\n") if paragraph.startswith("**Before the language model**"))
    missing = [name for name in dk.vision.names() if f"`{name}`" not in reducers]
    assert not missing, f"README.md, 'Before the language model' must name every reducer, and lacks {missing}"
    missing = [name for name in COMMANDS if f"dyrate {name}" not in text]
    assert not missing, f"README.md must show every command, and shows none of {missing}"


@pytest.mark.parametrize("package", [dk.policies, dk.vision], ids=["policies", "vision"])
def test_every_registered_class_is_public(package):
    classes = {type(package.get(name)).__name__ for name in package.names()}
    missing = classes - set(package.__all__)
    assert not missing, f"{package.__name__}.__all__ must name what _CLASSES registers, and lacks {sorted(missing)}"


def long_answers(table):
    """Label -> cells of the first table of a report."""
    lines = [line for line in table.split("\n## ")[1].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in rows if len(row) > 6}


def test_figures_of_the_pages_are_those_of_the_committed_tables():
    checked = {"k1": 0, "reducers": 0}
    for page in [*(ROOT / "docs/methods").glob("*.md"), *(ROOT / "docs/vision").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        named_tables = re.findall(r"results/(\w+)/shapes\.md", text)
        for policy, cost, visual, score in re.findall(r"^\| `([\w@+-]+)` \| ([\d.]+) % \| ([\d.]+ %) \| (.+) \|$", text, re.MULTILINE):
            rows = long_answers((ROOT / f"docs/results/{named_tables[0]}/shapes.md").read_text(encoding="utf-8"))
            cells = rows[f"{policy}@{cost}"]
            assert (cells[5], cells[2]) == (visual, score), f"{named(page)}: {policy}@{cost}"
            checked[named_tables[0]] += 1
    assert checked["k1"] > 30 and checked["reducers"] > 20
    rows = long_answers((ROOT / "docs/results/reducers/shapes.md").read_text(encoding="utf-8"))
    overview = re.findall(r"^\| `([\w@+]+)` \| (\d[^|]+) \| (\d[^|]+) \|$", (ROOT / "docs/vision/README.md").read_text(), re.MULTILINE)
    assert len(overview) > 10
    for label, mild, strong in overview:
        assert (rows[f"{label}@57.9"][2], rows[f"{label}@33.3"][2]) == (mild, strong), label
