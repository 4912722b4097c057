"""Each model family's particulars stand in one table, and the page of families says the same."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

from dyrate_kernels.families import FAMILIES, TEXT_MODELS, TOWERS, module_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dyrate_kernels"
# builders of models by name, and the named models that costs are counted for
BUILDERS = {"measuring/random_models.py", "flops.py"}


def named_in(path: Path) -> set[str]:
    """Names of families, text models and towers among the strings of a file."""
    known = {*FAMILIES, *TEXT_MODELS, *TOWERS}
    texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts & known


def test_a_family_is_named_in_the_table_alone():
    found = {str(path.relative_to(PACKAGE)): named_in(path) for path in PACKAGE.rglob("*.py")}
    assert len(found.pop("families.py")) == len({*FAMILIES, *TEXT_MODELS, *TOWERS})
    found["policies/base.py"] -= {"llama"}  # the default of a shape that is given by numbers
    assert {name: found for name, found in found.items() if found and name not in BUILDERS} == {}


def test_every_text_model_of_a_family_has_a_row_and_every_row_a_family():
    assert {text for family in FAMILIES.values() for text in family.text_models} == set(TEXT_MODELS)


def test_the_page_of_families_says_what_the_table_says():
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    said = {}
    for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")):
        for name in re.findall(r"`(\w+)`", cells[0]):
            said.setdefault(name, cells)
    said = {name: cells for name, cells in said.items() if name in FAMILIES}
    assert set(said) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert (said[name][3] == "yes") == family.tower, f"{name}: reducers that look into the tower"
        assert said[name][3] in ("yes", "features"), name


def test_the_classes_of_every_text_model_that_is_fused_are_in_transformers():
    missing = []
    for name, row in ((name, row) for name, row in TEXT_MODELS.items() if row.fusable):
        module = importlib.import_module(module_of(name))
        missing += [f"{name}: {each}" for each in (row.norm, row.feed_forward, row.attention, row.layer) if not hasattr(module, each)]
    assert not missing
