"""The command line, on the bundled model."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import dyrate_kernels as dk
from dyrate_kernels.cli.generate import chosen_steps
from dyrate_kernels.cli.main import main

SCENE = -4  # held out


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    dk.shapes.draw(dk.shapes.make_scene(SCENE), 336).save(path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """The bundled model, loaded once."""
    model, processor = dk.load_demo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dyrate_kernels.load_demo", lambda: (model, processor))
        yield


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_prints_text_steps_and_totals(capsys, picture):
    status, out, _ = run(capsys, "generate", "--image", picture, "--policy", "fixed", "--rate", "0.75")
    assert status == 0
    sample = dk.shapes.make_sample(SCENE, "describe")
    named = dk.shapes.score(sample, out.split("policy")[0])
    assert named.fraction > 0.3  # pruned to a quarter, it still sees something
    assert "0 (prefill)" in out and "36 of 144" in out
    for word in ("saved:", "means:", "KV cache:", "FLOPs:", "unpruned", "paper cost:", "tokens/s"):
        assert word in out


def test_a_graph_that_cannot_be_captured_here_changes_nothing(capsys, picture):
    with pytest.warns(UserWarning, match="cuda_graph=True has no effect"):
        status, out, _ = run(capsys, "generate", "--image", picture, "--max-new-tokens", "4", "--json", "--cuda-graph")
    _, want, _ = run(capsys, "generate", "--image", picture, "--max-new-tokens", "4", "--json")
    assert status == 0 and json.loads(out)["text"] == json.loads(want)["text"]


def test_generate_json_is_stats_and_text(capsys, picture):
    status, out, _ = run(capsys, "generate", "--image", picture, "--policy", "none", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["text"] == dk.shapes.make_sample(SCENE, "describe").answer
    assert {"policy", "predictor", "backend", "retention", "visual_tokens", "steps", "kept_mean", "kv_bytes_live", "flops"} <= result.keys()
    assert len(result["steps"]) == result["new_tokens"]
    assert all(step["kept"] == [144] and abs(sum(step["mass"][0]) - 1) < 1e-4 for step in result["steps"])
    assert result["flops"] == result["flops_unpruned"]


def test_evict_saves_flops_and_memory(capsys, picture):
    results = {}
    for retention in ("recoverable", "evict"):
        _, out, _ = run(capsys, "generate", "--image", picture, "--policy", "fixed", "--rate", "0.75", "--retention", retention, "--json",
                        "--max-new-tokens", "8")  # fmt: skip
        results[retention] = json.loads(out)
    assert results["evict"]["kv_bytes_live"] < results["recoverable"]["kv_bytes_live"]
    assert results["evict"]["flops"] < results["recoverable"]["flops"]


def test_pool(capsys, picture):
    """By options or in one text: the prompt holds a part of the picture, steps choose within it."""
    given, found = ("generate", "--image", picture, "--policy", "fixed", "--rate", "0.9", "--json", "--max-new-tokens", "6"), []
    for options in (("--retention", "pool", "--pool", "0.5", "--pool-by", "0.25"), ("--retention", "pool=0.5:by=0.25")):
        status, out, _ = run(capsys, *given, *options)
        found.append(json.loads(out))
        assert status == 0 and found[-1]["settings"]["retention"] == "pool=0.5:by=0.25"
        assert [step["kept"] for step in found[-1]["steps"]] == [[72], *[[14]] * 5]
        assert (found[-1]["retention"], found[-1]["pool"], found[-1]["pool_by"]) == ("pool", 0.5, 0.25)
    assert found[0]["text"] == found[1]["text"]
    status, out, _ = run(capsys, *given, "--retention", "pool", "--pool-by", "uniform")
    assert status == 0 and json.loads(out)["settings"]["retention"] == "pool=0.25:by=uniform"
    for options, words in (
        (("--pool", "0.5"), "--retention, --pool, --pool-by: pool goes with retention='pool' alone"),
        (("--retention", "pool", "--pool", "nan"), "pool must be a number in (0, 1]"),
        (("--retention", "pool", "--pool-by", "best"), "pool_by must be 'policy', 'uniform' or a number in [0, 1], got 'best'"),
        (("--retention", "pool=0.5", "--pool", "0.25"), "pool must be given once"),
        (("--retention", "pool", "--policy", "vtw"), "no option 'rate'"),
    ):
        status, _, err = run(capsys, *given, *options)
        assert status == 1 and words in err, (options, err)
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--retention", "never"])
    assert stopped.value.code == 2 and "retention must be recoverable, evict or pool, got 'never'" in capsys.readouterr().err


def test_compare_within_a_pool(capsys, picture):
    given = ("compare", "--image", picture, "--max-new-tokens", "3", "--retention", "pool", "--json")
    status, out, _ = run(capsys, *given)
    found = {row["policy"]: row for row in json.loads(out)["policies"]}
    assert status == 0 and found["dyrate"]["retention"] == "pool=0.25" and found["dyrate"]["kept_by_step"][0] == [0, 36]
    assert found["fastv@evict"]["retention"] == "evict"
    status, out, _ = run(capsys, *given, "--policies", "fixed@pool=0.5:by=uniform as half,fixed@evict")
    assert status == 0 and json.loads(out)["settings"]["half"]["retention"] == "pool=0.5:by=uniform"
    status, _, err = run(capsys, *given, "--policies", "dyrate,fastv:rate=0.5")
    assert status == 1 and "--policies: fastv:rate=0.5: retention='pool' needs a policy" in err and "use retention='evict'" in err


def test_plot(capsys, picture, tmp_path):
    target = tmp_path / "kept.png"
    status, out, _ = run(capsys, "generate", "--image", picture, "--plot", str(target), "--max-new-tokens", "12")
    assert status == 0 and str(target) in out
    with Image.open(target) as plot:
        assert plot.width > 1000 and len(plot.convert("RGB").resize((64, 64)).getcolors(4096)) > 50


def test_compare(capsys, picture):
    status, out, _ = run(
        capsys, "compare", "--image", picture, "--policies", "none,dyrate,fastv:rate=0.75,vtw", "--max-new-tokens", "10", "--json"
    )
    rows = json.loads(out)["policies"]
    assert status == 0 and [row["policy"] for row in rows] == ["none", "dyrate", "fastv:rate=0.75", "vtw"]
    status, out, _ = run(capsys, "compare", "--image", picture, "--policies", "none,uniform", "--max-new-tokens", "4")
    assert out.count("There are") == 1 and "\nnone, uniform: There are" in out  # one answer of two, told once
    assert status == 0 and "uniform: " in out and "none: " in out


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_what_is_printed_fits_the_screen(capsys, picture, monkeypatch, columns):
    """No line is longer, no cell is cut, and what was saved stands before the tables."""
    monkeypatch.setenv("COLUMNS", str(columns))
    _, generated, _ = run(capsys, "generate", "--image", picture, "--max-new-tokens", "12")
    generated = generated.split("\nsaved:")[1]  # the answer before it is a stream
    given = ("compare", "--image", picture, "--policies", "none,dyrate,fastv:rate=0.75", "--max-new-tokens", "12")
    _, compared, _ = run(capsys, *given)
    folder = str(dk.bundled.MODEL_FOLDER)  # a name that cannot be folded
    for out in (generated, compared.replace(folder, "DIR")):
        assert "…" not in out and max(map(len, out.splitlines())) <= columns, out
    assert compared.index("saved:") < compared.index("means:") < compared.index("kept %")
    rows = [line.split() for line in compared.splitlines() if line.startswith("none ")]
    assert [len(row) for row in rows] == [8, 7] and rows[0][1:4] == ["100.0"] * 3 and rows[1][2:5] == ["144", "->", "144"]


def test_it_says_where_little_can_be_gained_and_where_something_can(capsys, picture):
    """By bytes: of one picture the weights are most of what a step of the bundled model reads, of eight the picture is."""
    for pictures, words, more in ((1, "Little can be gained here", True), (8, "There is something to gain here", False)):
        status, out, _ = run(capsys, "generate", "--image", *[picture] * pictures, "--policy", "fixed", "--max-new-tokens", "3")
        means = " ".join(out[out.index("means:") : out.index("policy fixed")].split())  # wherever lines fold
        assert status == 0 and words in means and ("dyrate doctor" in means) == more
        assert f"of {144 * pictures} visual tokens" in " ".join(out.split())


def test_several_pictures_are_drawn_side_by_side(capsys, picture, tmp_path):
    kept = list(range(144, 288))  # the second of three
    drawn = dk.plots.kept_picture([Image.new("RGB", (96, 96), (255, 0, 0))] * 3, kept, 3 * 144)
    red = (drawn[..., 0] == 1) & (drawn[..., 1] == 0)
    assert drawn.ndim == 3 and 0.2 < red[:, drawn.shape[1] // 2 :].mean() and not red[:, : drawn.shape[1] // 2].any()
    assert dk.plots.kept_picture([Image.new("RGB", (96, 96))] * 5, kept, 3 * 144) is None
    path = tmp_path / "kept.png"
    status, _, _ = run(capsys, "generate", "--image", picture, picture, "--max-new-tokens", "3", "--plot", str(path))
    assert status == 0 and path.exists()


def test_reducers_and_combined_budgets(capsys, picture, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # xdist gives its workers those of its own terminal
    spec = "none+aim:keep=0.5,schedule:k=2:kept=[(0, 60), (3, 20)]+downsample:keep=0.5,none"
    status, out, _ = run(
        capsys, "compare", "--image", picture, "--policies", spec, "--vision", "uniform:keep=0.25", "--max-new-tokens", "6", "--json"
    )
    first, second, third = json.loads(out)["policies"]
    assert status == 0
    assert [first[key] for key in ("vision", "visual_tokens_in", "visual_tokens", "kept_by_step")] == ["aim", 144, 72, [[0, 72]]]
    assert second["vision"] == "downsample" and second["visual_tokens"] == 64  # 8 of 12 cells a side
    assert second["kept_by_step"] == [[0, 64], [1, 60], [3, 20]]
    assert third["vision"] == "uniform" and third["visual_tokens"] == 36
    assert third["flops_share"] < first["flops_share"] < 1
    status, out, _ = run(capsys, "compare", "--image", picture, "--policies", "none+aim:keep=0.5,dyrate", "--max-new-tokens", "3")
    assert status == 0 and "144 -> 72 ->" in out and "before the reducers -> after them" in out


def test_a_picture_of_what_reducers_left(capsys, picture, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("dyrate_kernels.plots._draw_kept", lambda axes, image, kept, total: drawn.append((kept, total)))
    target = tmp_path / "kept.png"
    options = ["--max-new-tokens", "3", "--vision", "uniform:keep=0.5", "--policy", "none"]
    status, out, _ = run(capsys, "generate", "--image", picture, "--plot", str(target), *options)
    assert status == 0 and "144 visual tokens -> 72 (uniform)" in out
    assert drawn[0] == (list(range(1, 144, 2)), 144)


def test_info(capsys):
    status, out, _ = run(capsys, "info", "--json")
    found = json.loads(out)
    assert status == 0 and found["backends"] == dk.backends()
    status, out, _ = run(capsys, "info", "--config", "llava-next-7b", "--batch", "32")
    assert status == 0 and "reference:  available" in out and "llava-next-7b" in out


@pytest.mark.parametrize("columns", [80, 120])
def test_info_fits_the_screen(capsys, monkeypatch, columns):
    """No line is longer, no name or number is cut, and what a request gains stands beside its time."""
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = run(capsys, "info", "--config", "llava-next-7b", "--batch", "1", "128", "--new-tokens", "2048")
    assert status == 0 and max(map(len, out.splitlines())) <= columns and "…" not in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("dense ", "recoverable ", "evict ", "pool "))]
    assert len(rows) == 16 and all(len(row) == 10 for row in rows[:8])  # totals, memory with its unit; then phases
    assert (rows[0][4], rows[6][0], rows[6][4]) == ("1.00x", "evict", f"{float(rows[4][3]) / float(rows[6][3]):.2f}x")
    assert all(row[6:] == ["compute,", "compute,", "bandwidth"] for row in rows[8:])


BAD = [
    (["--image", "missing.png"], "no such file"),
    (["--image", "EMPTY"], "the file is empty"),
    (["--image", "TEXT"], "not a picture"),
    (["--policy", "dyrat"], "policy must be one of"),
    (["--policy", "fixed", "--rate", "2"], r"rate must be in [0, 1]"),
    (["--policy", "dyrate", "--rate", "0.5"], "no option 'rate'"),
    (["--k", "9"], "k must be in [1, 5]"),
    (["--predictor", "/not/there"], "/not/there"),
    (["--model", "/not/there"], "no such folder"),
    (["--prompt", ""], "--prompt is empty"),
    (["--plot", "/not/there/plot.png"], "does not exist"),
    (["--option", "ranking"], "NAME=VALUE"),
    (["--vision", "pumerge"], "reducer must be one of"),
    (["--vision", "aim+tome"], "must be the first of a chain"),
    (["--vision", "aim:keep=2"], "keep must be in"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_a_mistake_is_one_clear_line(capsys, picture, tmp_path, arguments, message):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    arguments = [{"EMPTY": str(tmp_path / "empty.png"), "TEXT": str(tmp_path / "text.png")}.get(a, a) for a in arguments]
    status, out, err = run(capsys, "generate", "--image", picture, *arguments)
    assert status == 1 and out == ""
    assert err.startswith("dyrate: error: ") and err.count("\n") == 1 and message in err


WRONG = [[], ["foo"], ["generate"], ["generate", "--image", "x", "--retention", "y"], ["info", "--config", "nope"]]


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_chosen_steps():
    assert chosen_steps(5, 0) == chosen_steps(5, 9) == [0, 1, 2, 3, 4]
    assert chosen_steps(100, 3) == [0, 50, 99] or chosen_steps(100, 3)[0] == 0 and chosen_steps(100, 3)[-1] == 99
    assert len(chosen_steps(1000, 16)) == 16
