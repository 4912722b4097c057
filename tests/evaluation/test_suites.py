"""Suites over files in the formats of the published data sets: right questions, official scores, clear errors, nothing lost."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageFile

import dyrate_kernels as dk
from dyrate_kernels.evaluation import suites
from dyrate_kernels.evaluation.runner import Contender, run
from dyrate_kernels.evaluation.suites.pope import yes_or_no
from dyrate_kernels.evaluation.suites.scienceqa import letter_of
from dyrate_kernels.evaluation.suites.vqa import normalise, vqa_accuracy
from dyrate_kernels.shapes import draw, make_scene
from dyrate_kernels.training.data import Unreadable
from tests.evaluation.datasets_as_published import MAKERS, captions, publish, scenes, write

P = dk.policies


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.mark.parametrize("name", suites.names())
def test_questions_and_scores(name, tmp_path):
    suite = suites.get(name, *publish(name, tmp_path))
    assert len(suite) == 4 and suite.name == name and len({suite[i].name for i in range(4)}) == 4
    for i in range(4):
        item = suite[i]
        assert [picture.size for picture in item.images] == [(96, 96)]
        right = {"scienceqa": "B", "textvqa": "other"}.get(name, suite.questions[i].answers[0])
        assert suite.score(i, "Nothing of this kind.") == (pytest.approx(0.0), 1.0) or name == "pope"
        points, total = suite.score(i, right)
        assert total == 1.0 and (points > 2.0 if name in ("coco", "flickr30k", "nocaps") else points == 1.0)
    first = suites.get(name, *publish(name, tmp_path), limit=2)
    assert [first[i].name for i in range(2)] == [suite[i].name for i in range(2)]
    assert first.score(0, "A picture of a dog.") == suite.score(0, "A picture of a dog.")
    assert suite.long == ({suite[i].group for i in range(4)} if suite.captions else frozenset())


def test_prompts(tmp_path):
    asked = {}
    for name in suites.names():
        suite = suites.get(name, *publish(name, tmp_path / name, 2))
        asked[name] = suite[1].messages[0]["content"][-1]["text"].split("\n")
    for name in ("gqa", "textvqa", "pope"):
        assert len(asked[name]) == 2 and asked[name][1] == "Answer the question using a single word or phrase."
    assert asked["vizwiz"][1] == "When the provided information is insufficient, respond with 'Unanswerable'."
    assert asked["scienceqa"][0] == "Context: It was drawn." and asked["scienceqa"][2] == "A. plaid" and asked["scienceqa"][4] == "C. none"
    assert asked["scienceqa"][5] == "Answer with the option's letter from the given choices directly."
    assert asked["coco"] == asked["nocaps"] == ["Provide a one-sentence caption for the provided image."]


def test_vqa_accuracy():
    answers = ["two"] * 3 + ["three"] * 7
    # 2: left out among its own 3 people 2 / 3, among the other 7 people 1
    assert vqa_accuracy("2", answers) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("The three.", answers) == 1.0 and vqa_accuracy("one", answers) == 0.0
    assert vqa_accuracy("yes", ["yes"] + ["no"] * 9) == pytest.approx(9 / 3 / 10)


# printed by EvalAIAnswerProcessor of MMF, the evaluation of TextVQA
@pytest.mark.parametrize(
    "text, same",
    [
        ("A Dog.", "dog"), ("dont", "don't"), ("red-blue", "red blue"), ("red -blue", "red blue"), ("1,000", "1000"), ("3.5 m.", "3.5 m"),
        ("the dog's bowl?", "dog 's bowl"), ("None", "0"), ("(x)", "x"), ("youd've", "you'd've"), ("a/b\tc", "b c"),
    ],
)  # fmt: skip
def test_vqa_normalisation(text, same):
    assert normalise(text) == same


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), ("b.", "B"), ("(C)", "C"), ("B. green", "B"), ("The answer is A.", "A"),
        ("D", None), ("Bees", None), ("A dog", None), ("", None),
    ],
)  # fmt: skip
def test_letters(text, letter):
    assert letter_of(text, "ABC") == letter


def test_pope_reads_answers_as_published(tmp_path):
    said = {"Yes, there is.": "yes", "No.": "no", "There is not a dog": "no", "no, none": "no", "Sure. No doubt": "yes", "nothing": "yes"}
    assert {text: yes_or_no(text) for text in said} == said
    suite = suites.get("pope", *publish("pope", tmp_path))  # yes no yes no
    assert suite.summary(["Yes", "Yes", "No", "No"]) == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_share": 0.5}


def test_other_layouts(tmp_path):
    """COCO's own captions, POPE in one file for its three parts, a list where lines are usual, pictures in a subfolder."""
    file, images = publish("nocaps", tmp_path)
    content = json.loads(file.read_text())
    assert [q.group for q in suites.get("nocaps", file, images).questions] == ["in-domain", "out-domain"] * 2
    (images / "val2014").mkdir()
    for image in content["images"]:
        del image["domain"]
        (images / image["file_name"]).rename(images / "val2014" / image["file_name"])
    suite = suites.get("coco", write(content, tmp_path / "captions_val2014.json"), images)
    assert len(suite) == 4 and suite.questions[1].answers == tuple(captions(scenes(4)[1])) and suite[0].group == "coco"
    file, images = publish("pope", tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    both = [{**line, "category": part} for part in ("random", "popular") for line in lines]
    assert len(suites.get("pope", write(both, tmp_path / "all.json"), images)) == 8


WRONG = {
    "gqa": lambda content: next(iter(content.values())).pop("answer"),
    "vizwiz": lambda content: content[2].update(answers=[]),
    "textvqa": lambda content: content["data"][1].update(answers=[3] * 10),
    "scienceqa": lambda content: content["1"].update(answer=3),
    "pope": lambda content: content[1].update(label="maybe"),
    "nocaps": lambda content: content["annotations"].clear(),
    "flickr30k": lambda content: content["images"][1].pop("sentences"),
    "coco": lambda content: content["images"][1].update(sentences=[{"tokens": ["a"]}]),
}
SAYS = {
    "gqa": r"question 200 must have 'answer' \(str\), got none; its keys: question, imageId",
    "vizwiz": r"entry 2 must have 'answers' \(list\), got '\[\]'",
    "textvqa": r"entry 1 must have answers that are texts",
    "scienceqa": r"problem 1 must have an answer in \[0, 2\]",
    "pope": r"entry 1 must have the label yes or no, got 'maybe'",
    "nocaps": r"must have 'annotations' \(list\)",
    "flickr30k": r"image 1 must have 'sentences' \(list\), got none",
    "coco": r"image 1 must have sentences with a 'raw' text",
}


@pytest.mark.parametrize("name", suites.names())
def test_wrong_entries(name, tmp_path):
    publish(name, tmp_path)
    content = MAKERS[name](tmp_path, scenes(4))
    WRONG[name](content)
    file = write(content, tmp_path / "wrong.json")
    with pytest.raises(ValueError, match=SAYS[name]) as caught:
        suites.get(name, file, tmp_path / "images")
    assert str(file) in str(caught.value) and "Expected " in str(caught.value)


@pytest.mark.parametrize("name", suites.names())
def test_files_of_other_data_sets(name, tmp_path):
    """Every file is refused by every other suite, but COCO's and NoCaps's captions, whose format is one."""
    for other in suites.names():
        if other == name or {other, name} == {"coco", "nocaps"}:
            continue
        file, images = publish(other, tmp_path / other, 2)
        with pytest.raises(ValueError, match="xpected") as caught:
            suites.get(name, file, images)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", suites.names())
def test_empty_and_broken_files(name, tmp_path):
    content = MAKERS[name](tmp_path, scenes(2))
    if isinstance(content, list):
        content = []
    elif "data" in content:
        content["data"] = []
    elif "images" in content:
        content["images"] = []
    else:
        content = {}
    with pytest.raises(ValueError, match="holds no questions"):
        suites.get(name, write(content, tmp_path / "empty.json"), tmp_path / "images")
    for text, words in (
        (b"", "is empty"),
        (b"{nonsense", "is not JSON"),
        (b"3", "must"),
        (b"[1, 2]", "must"),
        (b"\xff\xd8\xff", "no text"),
    ):
        (tmp_path / "broken.json").write_bytes(text)
        with pytest.raises(ValueError, match=words):
            suites.get(name, tmp_path / "broken.json", tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"nowhere.json: no such file; .* reads"):
        suites.get(name, tmp_path / "nowhere.json")
    file, images = publish(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        suites.get(name, file, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        suites.get(name, file, images, 0)


def test_unknown_suite(tmp_path):
    with pytest.raises(ValueError, match="suite must be one of gqa, vizwiz, .*, got 'gpa'"):
        suites.get("gpa", tmp_path / "x.json")


def test_missing_pictures_are_met_at_once(tmp_path):
    file, images = publish("gqa", tmp_path)
    (images / "n2.jpg").unlink()
    (images / "n3.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"2 of 4 questions cannot be read: .*n2.jpg is missing \(question 202\)"):
        suites.get("gqa", file, images)
    assert len(suites.get("gqa", file, images, limit=2)) == 2  # the others are not asked


def test_a_published_oddity_is_no_error(tmp_path):
    """Some data sets have questions and captions without a word."""
    file, images = publish("vizwiz", tmp_path)
    content = json.loads(file.read_text())
    content[0]["question"], content[0]["answers"][3]["answer"] = "", ""
    assert len(suites.get("vizwiz", write(content, file), images)) == 4


def test_questions_twice(tmp_path):
    file, images = publish("pope", tmp_path)
    file.write_text(2 * file.read_text())
    with pytest.raises(ValueError, match="the id 1 is there twice"):
        suites.get("pope", file, images)


def test_a_picture_that_breaks_in_between(demo, tmp_path, monkeypatch):
    """Answers before it are kept, the error names it, a rerun goes on behind them."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval leaves it
    suite = suites.get("pope", *publish("pope", tmp_path))
    contender = Contender("fixed", P.Fixed(k=2, rate=0.5))
    whole = run(*demo, suite, contender, tmp_path / "whole", batch_size=1)
    path = suite.questions[2].picture
    picture = path.read_bytes()
    path.write_bytes(picture[: len(picture) // 2])
    with pytest.raises(Unreadable, match=r"question 3: the picture .*0002.jpg cannot be read .*answers so far are kept"):
        run(*demo, suite, contender, tmp_path / "broken", batch_size=1)
    answers = tmp_path / "broken" / "fixed.jsonl"
    before = answers.read_text().splitlines()
    assert len(before) == 3
    path.write_bytes(picture)
    again = run(*demo, suite, contender, tmp_path / "broken", batch_size=1)
    assert answers.read_text().splitlines()[:3] == before
    assert [a.tokens for a in again] == [a.tokens for a in whole] and len(again) == 4


def test_changed_questions_are_asked_again(demo, tmp_path):
    file, images = publish("gqa", tmp_path)
    contender = Contender("none", P.KeepAll())
    run(*demo, suites.get("gqa", file, images, limit=2), contender, tmp_path / "out")
    content = json.loads(file.read_text())
    content["201"]["answer"] = "plaid"
    run(*demo, suites.get("gqa", write(content, file), images, limit=3), contender, tmp_path / "out")
    asked = [json.loads(line)["item"].split()[0] for line in (tmp_path / "out" / "none.jsonl").read_text().splitlines()[1:]]
    assert sorted(asked) == ["200", "201", "201", "202"]


def test_damaged_answers(demo, tmp_path):
    suite = suites.get("gqa", *publish("gqa", tmp_path, 1))
    contender = Contender("none", P.KeepAll())
    run(*demo, suite, contender, tmp_path)
    path = tmp_path / "none.jsonl"
    good = path.read_text()
    wrong = good.splitlines()[1].replace('"right": ', '"right": null, "x": ')
    for text, line in (
        ("not json\n", 1), ("{}\n", 1), ("[]\n", 1), (good + '{"item": "x"}\n', 3), (good + "half\n", 3), (good + "null\n", 3),
        (good + wrong + "\n", 3),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=f"none.jsonl line {line} is no answer"):
            run(*demo, suite, contender, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("name", suites.names())
def test_files_of_every_encoding(name, encoding, tmp_path):
    """Byte-order marks, Windows' ends of lines, and ends of lines of other kinds that stand inside of a text."""
    file, images = publish(name, tmp_path)
    plain = suites.get(name, file, images)
    file.write_bytes(file.read_text().replace("\n", "\r\n").replace(" a ", " a\u2028\x85").encode(encoding))
    suite = suites.get(name, file, images)
    assert [question.id for question in suite.questions] == [question.id for question in plain.questions]
    assert [each.split() for question in suite.questions for each in question.answers] == [
        each.split() for question in plain.questions for each in question.answers
    ]


def test_a_broken_line_is_named(tmp_path):
    """Scores over fewer questions would be another benchmark's: the file is refused."""
    file, images = publish("pope", tmp_path)
    first, *others = file.read_bytes().splitlines(keepends=True)
    for line, words in ((b"{oops\n", "Expecting"), (b'{"text": "caf\xe9"}\n', "UTF-8"), (b"[" * 90_000 + b"\n", "nested too deeply")):
        file.write_bytes(first + line + b"".join(others))
        with pytest.raises(ValueError, match=rf"{file.name} line 2 is not JSON .*{words}"):
            suites.get("pope", file, images)


ODD = (5, None, True, "words", [1], [], {}, float("nan"), "x" * 5000, "a\0b", "\ud800", [[[]]], {"a": 1})


@pytest.mark.parametrize("name", suites.names())
def test_values_of_any_type_are_read_or_refused_by_name(name, tmp_path):
    """Each value of an entry, and each entry, in turn replaced by something else."""
    file, images = publish(name, tmp_path, 2)
    content = [json.loads(line) for line in file.read_text().splitlines()] if name == "pope" else json.loads(file.read_text())

    def places(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            if isinstance(value[key], dict | list):
                yield from places(value[key])

    refused = 0
    for holder, key in list(places(content))[:40]:
        before = holder[key]
        for odd in ODD:
            holder[key] = odd
            write(content, file, lines=name == "pope")
            try:
                suite = suites.get(name, file, images)
                assert all(suite[i].images[0].mode == "RGB" and suite.score(i, "a") for i in range(len(suite)))
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                assert str(file) in str(error) and not isinstance(error, UnicodeError)
        holder[key] = before
    assert refused


def test_names_and_texts_that_are_no_utf8(demo, tmp_path):
    file, images = publish("pope", tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    odd = os.fsdecode(b"caf\xe9.jpg")
    (images / lines[0]["image"]).rename(images / odd)
    lines[0].update(image=odd, text="Is there a \ud800 dog?")
    suite = suites.get("pope", write(lines, file, lines=True), images)
    out = tmp_path / os.fsdecode(b"out \xe9")
    contender = Contender("none", P.KeepAll())
    assert run(*demo, suite, contender, out) == run(*demo, suite, contender, out) and len(suite) == 4


def test_pictures_are_read_as_everywhere(tmp_path):
    """16 bits are scaled to 8, and damaged EXIF beside a whole picture is left out."""
    suite = suites.get("pope", *publish("pope", tmp_path))
    ramp = (np.arange(96 * 96) * 7).astype("uint16").reshape(96, 96)
    Image.fromarray(ramp).save(suite.questions[0].picture, "png")
    assert np.array_equal(np.asarray(suite[0].images[0])[..., 0], ramp >> 8)
    whole = draw(make_scene(1))
    whole.save(suite.questions[1].picture, "webp", lossless=True, exif=b"Exif\0\0nonsense")
    assert np.array_equal(suite[1].images[0], whole)


def test_held_back(tmp_path):
    file, images = publish("gqa", tmp_path, 6)
    content = json.loads(file.read_text())
    content["203"]["imageId"] = content["200"]["imageId"]
    write(content, file)
    suite = suites.get("gqa", file, images, limit=2)
    others = suite.held_back(2, 1)
    assert [q.id for q in others.questions] == ["202", "204"] and [q.id for q in suite.questions] == ["200", "201"]
    with pytest.raises(ValueError, match=r"tuning needs 4 to 24 questions .*3 of 6 are left behind the first 2: give a lower limit"):
        suite.held_back(24, 4)
