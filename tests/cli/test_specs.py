"""The grammar of policies, reducers and rows: what is read, what is written reads the same again, and a mistake is named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dyrate_kernels as dk
from dyrate_kernels import specs
from dyrate_kernels.cli import contenders
from dyrate_kernels.specs import Call, Row

ROOT = Path(__file__).resolve().parents[2]
REDUCERS = dk.vision.names()

ROWS = {
    "none": Row(Call("none")),
    "fastv:k=2:rate=0.75@evict": Row(Call("fastv", {"k": 2, "rate": 0.75}), retention="evict"),
    "fastv:rate=0.5+tome+aim:keep=0.5": Row(Call("fastv", {"rate": 0.5}), (Call("tome"), Call("aim", {"keep": 0.5}))),
    "aim": Row(Call("aim")),
    "aim+aim@recoverable": Row(Call("aim"), (Call("aim"),), "recoverable"),
    "recycle:policy=(fastv:k=2):share=1+uniform as my own": Row(
        Call("recycle", {"policy": Call("fastv", {"k": 2}), "share": 1}), (Call("uniform"),), label="my own"
    ),
    "klguard:policy=(recycle:policy=(vtw))": Row(Call("klguard", {"policy": Call("recycle", {"policy": Call("vtw")})})),
    "dyrate:predictor=a+b": Row(Call("dyrate", {"predictor": "a+b"})),
    "dyrate:predictor='a+aim@b, c:d as e'@evict": Row(Call("dyrate", {"predictor": "a+aim@b, c:d as e"}), retention="evict"),
    "dyrate:predictor=/runs/it's (1)": Row(Call("dyrate", {"predictor": "/runs/it's (1)"})),
    "dyrate:predictor='0.5'": Row(Call("dyrate", {"predictor": "0.5"})),
    "schedule:k=2:kept=[(0, 60), (3, 20)] + downsample : keep = 0.5 as é 1": Row(
        Call("schedule", {"k": 2, "kept": [(0, 60), (3, 20)]}), (Call("downsample", {"keep": 0.5}),), label="é 1"
    ),
    "dyrate@pool": Row(Call("dyrate"), retention="pool=0.25"),
    "dyrate:k=2+aim@pool=0.5 as half": Row(Call("dyrate", {"k": 2}), (Call("aim"),), "pool=0.5", "half"),
    "fixed@ pool = 1 : by = uniform": Row(Call("fixed"), retention="pool=1.0:by=uniform"),
    "fixed@pool:by=0.3": Row(Call("fixed"), retention="pool=0.25:by=0.3"),
    "vtw:k=None": Row(Call("vtw", {"k": None})),
    "fixed:rate=1e-3 as bob's": Row(Call("fixed", {"rate": 1e-3}), label="bob's"),
}


@pytest.mark.parametrize(("text", "row"), ROWS.items(), ids=str)
def test_a_row_is_read_and_its_text_reads_the_same(text, row):
    (read,) = specs.rows(text, REDUCERS)
    assert read == row
    assert specs.rows(str(read), REDUCERS) == [row]


def test_rows_stand_between_commas():
    assert specs.rows("none, ,schedule:kept=[(0, 60), (3, 20)],fixed as x,", REDUCERS) == [
        Row(Call("none")), Row(Call("schedule", {"kept": [(0, 60), (3, 20)]})), Row(Call("fixed"), label="x"),
    ]  # fmt: skip
    assert specs.rows("", REDUCERS) == [] and specs.rows("fixed as a@b+c", REDUCERS) == [Row(Call("fixed"), label="a@b+c")]


MISTAKES = [
    ("fixed@never", "--policies: retention must be recoverable, evict or pool, got 'never' in 'fixed@never'"),
    ("fixed@evict@evict", "retention must be recoverable, evict or pool, got 'evict@evict' in"),
    ("fixed@pool=", "retention must be recoverable, evict or pool, got 'pool='; a pool is written pool=0.25 or pool=0.25:by=uniform"),
    ("fixed@evict=0.5", "retention must be recoverable, evict or pool, got 'evict=0.5'"),
    ("fixed@pool=2", r"pool must be a number in \(0, 1\].*got 2; pool=1"),
    ("fixed@pool=half", r"pool must be a number in \(0, 1\].*got 'half'"),
    ("fixed@pool:by=best", "pool_by must be 'policy', 'uniform' or a number .*got 'best'"),
    ("fixed@pool:kept=3", "retention options are by=RANKING, once, got 'kept' in 'pool:kept=3'"),
    ("fixed@pool:by=0.1:by=0.2", "retention options are by=RANKING, once, got 'by'"),
    ("fixed@evict:by=uniform", "pool_by goes with retention='pool' alone, got pool_by='uniform' with retention='evict'"),
    ("dyrate:predictor=a@b", "got 'b' in 'dyrate:predictor=a@b'; put a value that holds '@' in quotes"),
    ("none+bogus:keep=1", "--policies: reducer must be one of hired, .*got 'bogus:keep=1' in 'none"),
    ("none+bogus+aim", "reducer must be one of hired, .*got 'bogus' in 'none"),
    ("none++aim", r"a reducer is missing beside a '\+' in 'none\+\+aim'"),
    ("none+aim+", r"a reducer is missing beside a '\+'"),
    ("fastv:k", "policy options are NAME=VALUE, got 'k' in 'fastv:k'"),
    ("fastv:k=", "policy options are NAME=VALUE, got 'k='"),
    ("fastv:=2", "policy options are NAME=VALUE, got '=2'"),
    ("fastv:k=2:k=3", "policy options stand once each, got 'k' twice"),
    ("none+aim:keep", "reducer options are NAME=VALUE, got 'keep' in 'aim:keep'"),
    ("schedule:kept=[(0, 60)", "brackets and quotes must close, got '\\[' left open"),
    ("dyrate:predictor='a", 'brackets and quotes must close, got "\'" left open'),
    ("schedule:kept=(0, 60])", "brackets must match, got one '\\]' too many"),
    ("fixed as a as b", "one name stands behind ' as '"),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_is_named_with_its_part(text, words):
    with pytest.raises(ValueError, match=words) as error:
        specs.rows(f"none,{text}", REDUCERS)
    assert str(error.value).startswith("--policies: ")


MADE = [
    *(dk.policies.get(name) for name in dk.policies.names()),
    *(dk.vision.get(name) for name in dk.vision.names()),
    dk.policies.FastV(k=2, rate=0.75, ranking="mean"),
    dk.policies.Schedule(k=2, kept=[(0, 60), (3, 20)]),
    dk.policies.DyRate(predictor="runs/a+b@c:d, 'e'", rates=[0, 0.5], spread=0.25),
    dk.policies.DyRate(predictor="0.5"),
    dk.policies.KLGuard(policy=dk.policies.Recycle(policy=dk.policies.ST3(k=2, rate=0.0)), every=3),
    dk.policies.SparseVLM(keep=[0.5, 0.25], layers=[2, 4]),
    dk.vision.Temporal(method="mean", group=2),
    dk.vision.PruMerge(keep=None),
]


@pytest.mark.parametrize("made", MADE, ids=lambda made: str(specs.of(made)))
def test_the_text_of_an_object_makes_it_again(made):
    registry = dk.vision if isinstance(made, dk.vision.Reducer) else dk.policies
    assert registry.parse(str(specs.of(made))) == made


def test_a_predictor_that_was_never_saved_has_no_text():
    predictor = dk.DyRatePredictor(num_heads=4, rates=[0.0, 0.5])
    with pytest.raises(ValueError, match="option predictor of 'dyrate' must be a number, a text or a list, got DyRatePredictor"):
        specs.of(dk.policies.DyRate(predictor=predictor))


def test_every_entrance_takes_the_same_text(make_model):
    text = "recycle:policy=(fastv:k=2:rate=0.75):share=1"
    want = dk.policies.Recycle(policy=dk.policies.FastV(k=2, rate=0.75), share=1)
    assert dk.policies.parse(text) == want == contenders.parse(text)[0].policy
    assert dk.policies.Recycle(policy="fastv:k=2:rate=0.75", share=1) == want
    assert dk.policies.parse("fastv:k=2", rate=0.75) == dk.policies.FastV(k=2, rate=0.75)
    model = make_model("llava", "llama")
    with dk.patch(model, policy="fastv:rate=0.75", k=2, vision="uniform:keep=0.5") as handle:
        assert handle.policy == dk.policies.FastV(k=2, rate=0.75) and handle.vision == (dk.vision.UniformTokens(keep=0.5),)


def test_a_coarser_picture_is_named_coarse_or_as_before_downsample():
    found = contenders.parse("coarse:side=7,downsample:side=7 as old,coarse,none+downsample")
    assert [(each.label, each.side) for each in found] == [("coarse:side=7", 7), ("old", 7), ("coarse", 6), ("none+downsample", None)]
    for text in ("coarse:side=0", "coarse:keep=1", "coarse:side=x", "coarse:side=True", "coarse+aim"):
        with pytest.raises(ValueError, match="coarse takes one option, side .*got 'coarse"):
            contenders.parse(text)


def test_no_second_parser_is_in_the_package():
    """Values are read by ``specs.value`` alone, and nothing else takes a text apart at the grammar's marks."""
    found = []
    for path in (ROOT / "dyrate_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "literal_eval":
                found.append(str(path.relative_to(ROOT / "dyrate_kernels")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("split", "partition"):
                if any(isinstance(each, ast.Constant) and each.value in ("+", "=", " as ") for each in node.args):
                    found.append(str(path.relative_to(ROOT / "dyrate_kernels")))
    assert set(found) == {"specs.py"}
