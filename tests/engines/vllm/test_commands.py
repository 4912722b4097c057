"""``dyrate caption``, ``dyrate eval`` and ``dyrate info`` with vLLM, beside engine ``local``: the same tokens, scores and figures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dyrate_kernels import shapes
from tests.engines.vllm import kit, models

ENGINE = (
    "--engine", "vllm", "--engine-option", "max_model_len=1024", "--engine-option", "max_num_seqs=4", "--engine-option",
    f"kv_cache_memory_bytes={64 << 20}", "--engine-option", "enforce_eager=True",
)  # fmt: skip
TEMPLATE = (  # of models whose processor has none
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def dyrate(*arguments: str, in_process: bool = True) -> Any:
    """What a command prints as JSON."""
    done = kit.run([sys.executable, "-m", "dyrate_kernels.cli.main", *arguments, "--json"], env=kit.environment(in_process=in_process))
    begins = 0 if done.stdout.startswith("{") else done.stdout.index("\n{") + 1  # vLLM's own lines may stand before and behind it
    return json.JSONDecoder().raw_decode(done.stdout, begins)[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes of several sizes, one of them broken."""
    place = tmp_path_factory.mktemp("pictures")
    for number in range(9):
        drawn = shapes.draw(shapes.make_scene(number + 1))
        drawn.resize((96, 96 - 16 * (number % 3))).save(place / f"{number}.png")
    (place / "4.png").write_bytes(b"no picture")
    return place


def plain(place: Path, folder: Path) -> Path:
    """The model without the predictor beside it, which reads hidden states."""
    made = place / folder.name
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns("dyrate_predictor.*"))
    return made


def captions(out: Path) -> list[dict[str, Any]]:
    """Lines by name, without what tells of times."""
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()][1:]
    return [{name: value for name, value in line.items() if name not in ("seconds", "worker")} for line in lines]


def check_captions(place: Path, model: Path, pictures: Path, *options: str, in_process: bool = True) -> list[dict[str, Any]]:
    given = ("caption", "--images", str(pictures), "--model", str(model), "--max-new-tokens", "48", *options)
    dyrate(*given, "--out", str(place / "vllm"), *ENGINE, in_process=in_process)
    dyrate(*given, "--out", str(place / "local"), "--engine", "local")
    got, wanted = captions(place / "vllm"), captions(place / "local")
    assert len(got) == 9 and [line["name"] for line in got] == [f"{number}.png" for number in range(9)]
    assert [line.pop("read") for line in got] == pytest.approx([line.pop("read") for line in wanted])
    assert got == wanted
    return got


def test_captions_are_the_local_engines(folder, pictures, tmp_path):
    """With ends of sequence, which the bundled model writes."""
    model = plain(tmp_path, folder("demo"))
    found = check_captions(tmp_path / "pruned", model, pictures, "--policy", "dyrate", "--k", "2", "--predictor", "closed-form")
    assert 1 < len({line["tokens"] for line in found}) and min(line["tokens"] for line in found if line["caption"]) < 48


def test_captions_of_an_engine_in_a_process_of_its_own(folder, pictures, tmp_path):
    model = plain(tmp_path, folder("demo"))
    check_captions(tmp_path / "pruned", model, pictures, "--policy", "fastv", "--k", "2", "--rate", "0.75", in_process=False)


def test_captions_where_pictures_have_unlike_numbers_of_tokens(folder, pictures, tmp_path):
    """Qwen's marks around a picture, by its chat template; min_new_tokens and a penalty of repetition are followed."""
    model = plain(tmp_path, folder("qwen2_5_vl"))
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", models.FAMILIES["qwen2_5_vl"].image))
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 1.3, "eos_token_id": list(range(5, 60)),
                                                                       "min_new_tokens": 6}))  # fmt: skip
    found = check_captions(tmp_path / "out", model, pictures, "--policy", "fixed", "--k", "2", "--rate", "0.75")
    assert len({line["visual_tokens"] for line in found}) > 2
    tokens = [line["tokens"] for line in found if line["caption"] is not None]
    assert min(tokens) >= 6 and min(tokens) < 48


def test_captions_by_ray_datas_processor(folder, pictures, tmp_path):
    """On this machine, an engine on its CPU."""
    pytest.importorskip("ray.data.llm", reason="Ray is not there: run.sh installs it", exc_type=ImportError)
    model = plain(tmp_path, folder("demo"))
    job = (
        "import json, sys; from dyrate_kernels import policies; from dyrate_kernels.captioning import inputs, vllm_on_ray\n"
        "from dyrate_kernels.captioning.captioner import Task\n"
        "task = Task(model=sys.argv[1], policy=policies.get('vtw', k=2), max_new_tokens=48)\n"
        f"more = dict(max_model_len=1024, max_num_seqs=4, kv_cache_memory_bytes={64 << 20}, enforce_eager=True)\n"
        "found = vllm_on_ray.run_on_ray(task, inputs.find(sys.argv[2]).sources, 1, None, more, cpus=1)\n"
        "open(sys.argv[3], 'w').write(json.dumps([each.to_dict() for part in found for each in part]))\n"
    )
    result = tmp_path / "found.json"
    kit.run([sys.executable, "-c", job, str(model), str(pictures), str(result)], env=kit.environment())
    given = ("caption", "--images", str(pictures), "--model", str(model), "--max-new-tokens", "48", "--policy", "vtw", "--k", "2")
    dyrate(*given, "--out", str(tmp_path / "local"), "--engine", "local")
    same = ("name", "caption", "error", "kind", "visual_tokens", "tokens")
    found = {line["name"]: [line[name] for name in same] for line in json.loads(result.read_text())}
    assert found == {line["name"]: [line[name] for name in same] for line in captions(tmp_path / "local")}


def test_rows_of_a_comparison_are_the_local_engines(folder, tmp_path):
    """Each in an engine of its own, in one process."""
    model = plain(tmp_path, folder("demo"))
    policies = "dyrate:predictor=closed-form:k=2,fastv:k=2:rate=0.75,vtw"
    given = ("eval", "--model", str(model), "--scenes", "4", "--tasks", "describe,colour", "--policies", policies)
    got = dyrate(*given, "--out", str(tmp_path / "vllm"), *ENGINE)
    wanted = dyrate(*given, "--out", str(tmp_path / "local"))
    for file in sorted((tmp_path / "local").glob("*.jsonl")):
        theirs, ours = (
            {line["item"]: line for line in map(json.loads, (tmp_path / engine / file.name).read_text().splitlines()[1:])}
            for engine in ("local", "vllm")
        )
        assert {name: line["tokens"] for name, line in ours.items()} == {name: line["tokens"] for name, line in theirs.items()}, file.name
        assert len(ours) == 8
    exact = ("label", "group", "score", "retained", "agreement", "kept", "visual_share", "n", "flops_share", "kv_bytes", "questions")
    assert len(got["lines"]) == len(wanted["lines"]) == 16
    for line, other in zip(got["lines"], wanted["lines"], strict=True):
        assert {name: line[name] for name in exact} == pytest.approx({name: other[name] for name in exact}), line["label"]
        assert line["paper_cost"] == pytest.approx(other["paper_cost"], abs=0.01)  # of the mean over rows
        assert line["time_per_token"] > 0 and line["first"] > 0
    assert got["engine"] == "vllm" and "vllm" in got["machine"]
    assert min(line["agreement"] for line in got["lines"]) < 1, "no policy changes anything: equality says nothing"


def test_info_tells_what_there_is():
    found = dyrate("info")["vllm"]
    assert found["version"].startswith("0.3") and found["why_not"] is None
    assert (found["platform"], found["attention_backends"]) == ("cpu", ["CPU_ATTN"])
