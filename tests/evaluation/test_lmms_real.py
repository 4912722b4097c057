"""The plugin inside the real lmms-eval, with tasks of this test's own (YAML); skipped where it is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval.evaluator")

from dyrate_kernels import shapes
from dyrate_kernels.cli.main import main
from dyrate_kernels.evaluation.cider import Cider
from tests.evaluation.datasets_as_published import captions, colour_question, publish, scenes

ROOT = Path(__file__).parents[2]
YAML = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {docs}
  cache_dir: {cache}
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function drawn_utils.visual
doc_to_text: !function drawn_utils.text
doc_to_target: label
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image
def visual(doc): return [Image.open(doc["image"]).convert("RGB")]
def text(doc): return "Describe the picture." if doc["label"] == "yes" else doc["text"]
def process(doc, results): return {"said": float("objects" in results[0])}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tasks ``drawn``, ``drawn_choice`` and ``drawn_empty`` in ``tasks``; pictures in ``images``."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    file, images = publish("pope", tmp_path, 5)
    docs = [json.loads(line) for line in file.read_text().splitlines()]
    (tmp_path / "docs.json").write_text("".join(json.dumps({**doc, "image": str(images / doc["image"])}) + "\n" for doc in docs))
    (tmp_path / "empty.json").write_text("")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "drawn_utils.py").write_text(UTILS)
    generate = (
        "generation_kwargs:\n  max_new_tokens: 12\n  temperature: 0\n  do_sample: false\nprocess_results: !function drawn_utils.process"
    )
    for name, docs_file, kind, metric, more in (
        ("drawn", "docs", "generate_until", "said", generate),
        ("drawn_empty", "empty", "generate_until", "said", generate),
        ("drawn_choice", "docs", "multiple_choice", "acc", "doc_to_choice: ['yes', 'no']"),
    ):
        values = {"name": name, "docs": tmp_path / f"{docs_file}.json", "cache": tmp_path / "cache", "kind": kind, "metric": metric}
        (tasks / f"{name}.yaml").write_text(YAML.format(more=more, **values))
    return tmp_path


def run(capsys, folder, *more):
    given = ["eval", "--suite", "lmms-eval", "--include-path", str(folder / "tasks"), "--out", str(folder / "out"), "--batch-size", "2"]
    status = main([*given, "--policies", "fixed:k=2:rate=0.9@evict", *more])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_dyrate_eval(capsys, folder):
    picture = next(path for path in sorted((folder / "images").iterdir()) if "4" in path.stem[-1])
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    status, _, err = run(capsys, folder, "--tasks", "drawn")
    assert status == 1 and "task drawn, document 4: its picture cannot be read" in err and "truncated" in err
    answers = folder / "out" / "none.drawn.jsonl"
    before = answers.read_text()
    assert len(before.splitlines()) == 5  # the setting and two batches
    picture.write_bytes(content)
    status, out, _ = run(capsys, folder, "--tasks", "drawn", "--json")
    table = json.loads(out)
    assert status == 0 and answers.read_text().startswith(before) and len(answers.read_text().splitlines()) == 6
    none, fixed = (table["policies"][label]["drawn"] for label in ("none", "fixed_k=2_rate=0.9@evict"))
    assert none["metrics"]["said"][0] == pytest.approx(0.6) and none["costs"]["questions"] == 5
    assert fixed["costs"]["kept_mean"] < 0.12 and fixed["costs"]["flops_share"] < 0.8 and fixed["costs"]["ttft_seconds"] > 0
    status, out, _ = run(capsys, folder, "--tasks", "drawn", "--limit", "2", "--json")
    assert status == 0 and json.loads(out)["policies"]["none"]["drawn"]["costs"]["questions"] == 2


@pytest.mark.parametrize(
    "task, words",
    [
        ("drawn_choice", "loglikelihood"),
        ("drawn_empty", "task drawn_empty: lmms-eval cannot load its data set"),
        ("drwan", "knows no task 'drwan'; alike: drawn"),
    ],
)
def test_mistakes(capsys, folder, task, words):
    status, _, err = run(capsys, folder, "--tasks", task)
    assert status == 1 and words in err.strip().splitlines()[-1]


def published(folder):
    """lmms-eval's own tasks, over drawn scenes in the format of its data sets."""
    import datasets
    import lmms_eval.tasks

    drawn = scenes(4)
    images = [shapes.draw(scene, 96) for scene in drawn]
    (asked, answers), said = zip(*map(colour_question, drawn), strict=True), [captions(scene) for scene in drawn]
    ids = [f"COCO_val2014_{i:012d}.jpg" for i in range(4)]
    rows = {
        "gqa/gqa": ("testdev", {"question": asked, "answer": answers, "imageId": ids}),
        "vizwiz_vqa/vizwiz_vqa_val": ("val", {"question": asked, "question_id": ids, "answers": [[answer] * 10 for answer in answers]}),
        "textvqa/textvqa_val": ("validation", {"question": asked, "question_id": range(4), "answers": [[each] * 10 for each in answers]}),
        "scienceqa/scienceqa_img": (
            "test", {"question": asked, "hint": ["", "It was drawn."] * 2, "choices": [["plaid", a] for a in answers], "answer": [1] * 4},
        ),
        "pope/pope": ("test", {"question": ["Is there a dog?"] * 4, "question_id": range(4), "answer": ["yes", "no"] * 2}),
        "nocaps/nocaps_val": ("validation", {"image_id": range(4), "annotations_captions": said}),
        "flickr30k/flickr30k_test": ("test", {"img_id": [str(i) for i in range(4)], "caption": said}),
        "coco_cap/coco2014_cap_val": ("val", {"question_id": ids, "id": range(4), "answer": said}),
    }  # fmt: skip
    names = []
    for path, (split, columns) in rows.items():
        name = f"drawn_{path.split('/')[1]}"
        file = folder / f"{name}.parquet"
        data = datasets.Dataset.from_dict({key: list(values) for key, values in columns.items()} | {"image": images})
        data.cast_column("image", datasets.Image()).to_parquet(file)
        original = Path(lmms_eval.tasks.__file__).parent / f"{path}.yaml"
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"include: {original}\ntask: {name}\ndataset_path: parquet\ndataset_name: null\nprocess_docs: null\n"
            f"dataset_kwargs:\n  data_files:\n    {split}: {file}\n  cache_dir: {folder / 'cache'}\n"
        )
        names.append(name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("java", [False, True])
def test_published_tasks(capsys, folder, java, monkeypatch):
    if not java:
        monkeypatch.setenv("PATH", "")
    elif shutil.which("java") is None:
        pytest.skip("needs Java")
    names = published(folder)
    status, out, err = run(capsys, folder, "--tasks", ",".join(names), "--json")
    assert status == 0, err
    table = json.loads(out)["policies"]
    for by_task in table.values():
        assert list(by_task) == names and all(by_task[name]["costs"]["questions"] == 4 for name in names)
    metrics = {name: dict(table["none"][name]["metrics"]) for name in names}
    assert set(metrics["drawn_pope"]) == {"pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio"}
    for name, prefix in (("drawn_nocaps_val", "nocaps"), ("drawn_flickr30k_test", "flickr"), ("drawn_coco2014_cap_val", "coco")):
        found = {metric.removeprefix(f"{prefix}_") for metric in metrics[name]}
        assert found == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"} | ({"METEOR"} if java else set())
        lines = [json.loads(line) for line in (folder / "out" / f"none.{name}.jsonl").read_text().splitlines()[1:]]
        said = [captions(scene) for scene in scenes(4)]
        ours = [Cider(said).score(line["text"], said[line["doc_id"]]) for line in lines]
        assert metrics[name][f"{prefix}_CIDEr"][0] == pytest.approx(sum(ours) / 4)


def test_its_own_command(folder):
    """Found by the entry point; ``pyproject.toml`` says which."""
    if sys.version_info < (3, 11):
        pytest.skip("reads pyproject.toml with tomllib")
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    metadata = folder / "installed" / "dyrate_kernels-0.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dyrate-kernels\nVersion: 0.0.0\n")
    (metadata / "entry_points.txt").write_text("[lmms_eval.models]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()))
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "dyrate", "--tasks", "drawn", "--batch_size", "3", "--device", "cpu",
        "--output_path", str(folder / "results"), "--model_args",
        f"pretrained=demo,policy=fastv,k=2,rate=0.75,retention=evict,stats={folder / 'stats.jsonl'}",
        "--include_path", str(folder / "tasks"),
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(folder / "installed"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "|said" in done.stdout.replace(" ", ""), done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = (folder / "results").rglob("*results.json")
    results = json.loads(file.read_text())
    assert results["throughput"]["avg_ttft_seconds"] > 0 and results["throughput"]["avg_rate"] == pytest.approx(0.75)
    assert len((folder / "stats.jsonl").read_text().splitlines()) == 6
