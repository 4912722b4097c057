"""Sources of training examples: formats, and what cannot be used is skipped, counted and reported."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

import dyrate_kernels as dk
from dyrate_kernels import chat
from dyrate_kernels.shapes import draw, make_scene
from dyrate_kernels.training.data import (
    Collator,
    ConversationSource,
    DatasetSource,
    EncodedExamples,
    ShapesSource,
    Unreadable,
    open_source,
    read_image,
)


@pytest.fixture(scope="module")
def processor():
    return dk.load_demo()[1]


@pytest.fixture
def folder(tmp_path):
    """A LLaVA data set of seven entries: good ones, and one of each kind of damage."""
    for seed in range(3):
        draw(make_scene(seed)).save(tmp_path / f"{seed}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no picture")
    entries = [
        {"image": "0.png", "conversations": [_human("<image>\nWhat is this?"), _gpt("A square."), _human("And?"), _gpt("A circle.")]},
        {"image": "gone.png", "conversations": [_human("<image>\nWhat?"), _gpt("Lost.")]},
        {"image": "cut.png", "conversations": [_human("<image>\nWhat?"), _gpt("Cut.")]},
        {"image": "text.png", "conversations": [_human("<image>\nWhat?"), _gpt("Text.")]},
        {"image": ["1.png", "2.png"], "conversations": [_human("<image>\n<image>\nCompare."), _gpt("Two.")]},
        {"image": "1.png", "conversations": [_human("<image>\nWhat?"), _gpt("  ")]},
        {"conversations": [_human("No picture at all."), _gpt("Words alone.")]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def _human(text):
    return {"from": "human", "value": text}


def _gpt(text):
    return {"from": "gpt", "value": text}


def test_conversations(folder):
    source = ConversationSource(folder / "data.json")
    assert len(source) == 8  # every answer is an example
    first, second = source[0], source[1]
    assert first.answer == "A square." and first.messages == [chat.user("What is this?", images=1)]
    assert second.answer == "A circle." and [message["role"] for message in second.messages] == ["user", "assistant", "user"]
    assert first.images[0].mode == "RGB"
    assert len(source[5].images) == 2 and source[7].images == []
    for place, words in {2: "gone.png", 3: "cut.png", 4: "text.png", 6: "empty"}.items():
        with pytest.raises(Unreadable, match=words):
            source[place]


def test_what_cannot_be_used_is_skipped(folder, processor, caplog):
    rows = EncodedExamples(ConversationSource(folder / "data.json"), processor)
    with caplog.at_level(logging.WARNING):
        answers = [processor.tokenizer.decode(rows[i].answer, skip_special_tokens=True).strip() for i in range(len(rows))]
    assert answers == ["A square.", "A circle.", "Two.", "Two.", "Two.", "Two.", "Words alone.", "Words alone."]
    assert set(rows.skipped) == {2, 3, 4, 6}
    assert len(caplog.records) == 4 and "gone.png" in caplog.text
    assert rows[2].answer == rows[5].answer and len(caplog.records) == 4  # told once


def test_rows_that_are_too_long(processor, caplog):
    source = ShapesSource(6, seed=3, describe=1.0)
    lengths = [processor(images=source[i].images, text=chat.render(processor, source[i].messages))["input_ids"] for i in range(6)]
    assert all(len(ids[0]) > 100 for ids in lengths)
    rows = EncodedExamples(source, processor, max_length=100)
    with pytest.raises(ValueError, match=r"none of the 6 examples can be used.*more than 100"):
        rows[2]
    assert len(rows.skipped) == 6
    assert all(len(EncodedExamples(source, processor, max_answer=7)[i].answer) == 7 for i in range(6))


def test_batches(processor):
    source = ShapesSource(40, seed=2)
    rows = EncodedExamples(source, processor)
    batch = Collator(processor)([rows[i] for i in range(5)])
    assert batch["prompt"]["input_ids"].shape[0] == 5 and batch["prompt"]["pixel_values"].shape[0] == 5
    assert (batch["prompt"]["attention_mask"][:, -1] == 1).all()  # padded on the left
    for index in range(5):
        length = int(batch["answer_mask"][index].sum())
        ids = batch["answer"][index, :length].tolist()
        assert ids[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(ids[:-1]).strip() == source[index].answer
        assert (batch["answer_mask"][index, length:] == 0).all()
    words = [chat.render(processor, [chat.user("Hello.")])]
    alone = Collator(processor)([EncodedExamples([], processor).encode(_words())])
    assert "pixel_values" not in alone["prompt"] and words


def _words():
    from dyrate_kernels.training.data import Example

    return Example("words", [chat.user("Hello.")], [], "Good day to you.")


def test_answers_are_what_a_generation_would_give():
    """The model that was trained on such answers gives them, end of sequence included."""
    model, processor = dk.load_demo()
    example = next(e for e in (ShapesSource(9, seed=4, describe=1.0)[i] for i in range(9)) if len(e.answer) > 100)
    inputs = processor(images=example.images, text=chat.render(processor, example.messages), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=200, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = processor.decode(tokens, skip_special_tokens=True).strip()
    assert tokens.tolist() == chat.answer_ids(processor, example.messages, said)


def test_shapes_are_the_same_everywhere():
    one, two = ShapesSource(30, seed=5), ShapesSource(30, seed=5)
    assert [one[i].answer for i in range(30)] == [two[i].answer for i in range(30)]
    assert [one[i].answer for i in range(30)] != [ShapesSource(30, seed=6)[i].answer for i in range(30)]
    assert {len(one[i].answer) > 40 for i in range(30)} == {True, False}
    with pytest.raises(IndexError):
        one[30]


def test_datasets(tmp_path, processor):
    datasets = pytest.importorskip("datasets")
    pictures = [draw(make_scene(seed)) for seed in range(3)]
    plain = datasets.Dataset.from_dict({"image": pictures, "question": ["What?"] * 3, "answer": ["One.", "", "Three."]})
    plain = plain.cast_column("image", datasets.Image())
    plain.save_to_disk(str(tmp_path / "plain"))
    rows = EncodedExamples(DatasetSource.load(str(tmp_path / "plain")), processor)
    assert [processor.tokenizer.decode(rows[i].answer, skip_special_tokens=True).strip() for i in range(3)] == ["One.", "Three.", "Three."]
    assert rows.skipped == {1: "row 1: it has no question or no answer"}
    turns = {"image": pictures[:1], "conversations": [[_human("<image>\nWhat?"), _gpt("This.")]]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(turns).cast_column("image", datasets.Image())}).save_to_disk(
        str(tmp_path / "turns")
    )
    assert DatasetSource.load(str(tmp_path / "turns"))[0].answer == "This."
    plain.select([0, 2]).save_to_disk(str(tmp_path / "fewer"))
    first, again, fewer, turns = (DatasetSource.load(str(tmp_path / name)).origin for name in ("plain", "plain", "fewer", "turns"))
    assert first == again and len({first, fewer, turns}) == 3
    listed = [{"question": "What?", "answer": "One."}]
    assert DatasetSource(listed).origin == "a dataset of 1 rows"
    with pytest.raises(ValueError, match="splits"):
        DatasetSource.load(str(tmp_path / "turns"), "test")
    with pytest.raises(ValueError, match="must have the columns"):
        DatasetSource(datasets.Dataset.from_dict({"text": ["a"]}))


@pytest.mark.parametrize("several", [False, True])
def test_pictures_of_a_dataset_are_read_as_those_of_files(tmp_path, processor, several):
    """Damaged EXIF leaves a picture whole, 16 bits are scaled, and what is no picture is named without its place in memory."""
    datasets = pytest.importorskip("datasets")
    good, deep = io.BytesIO(), io.BytesIO()
    draw(make_scene(0)).save(good, "png", exif=b"Exif\0\0II*\0\x08\0\0\0words")
    Image.fromarray(np.full((90, 90), 40_000, "uint16")).save(deep, "png")
    chunk = good.getvalue().index(b"eXIf")
    contents = [good.getvalue()[: chunk + 8] + b"?" + good.getvalue()[chunk + 9 :], deep.getvalue(), b"no picture"]
    with pytest.raises(Exception, match="0x|broken|chunk"):  # what Pillow alone makes of the first
        datasets.Image().decode_example({"bytes": contents[0], "path": None})
    rows = [{"bytes": content, "path": None} for content in contents]
    name, feature = ("images", datasets.Sequence(datasets.Image())) if several else ("image", datasets.Image())
    features = datasets.Features({name: feature, "question": datasets.Value("string"), "answer": datasets.Value("string")})
    columns = {name: [[row] for row in rows] if several else rows, "question": ["What?"] * 3, "answer": ["One of them."] * 3}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "set"))
    source = DatasetSource.load(str(tmp_path / "set"))
    assert [source[place].images[0].tobytes() for place in (0, 1)] == [read_image(content).tobytes() for content in contents[:2]]
    with pytest.raises(Unreadable, match=r"row 2: the picture .* cannot be read \(not a picture .*") as error:
        source[2]
    assert "0x" not in str(error.value)
    bare = DatasetSource(datasets.Dataset.from_dict(columns, features=features).select([1]).with_format("numpy"))
    assert bare.features is None  # a format that the caller has set stays


def test_texts_of_a_dataset_that_are_none_are_skipped_and_other_columns_do_not_matter(processor):
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    odd = pa.Array.from_buffers(pa.string(), 2, pa.array([b"What?", b"caf\xe9?"]).buffers())
    data = datasets.Dataset(pa.table({"question": odd, "answer": ["A square."] * 2, "kind": ["a", "b"]}))
    source = DatasetSource(data.cast_column("kind", datasets.ClassLabel(names=["a", "b"])))
    assert source[0].answer == "A square."
    with pytest.raises(Unreadable, match="row 1 cannot be read"):
        source[1]


def test_a_damaged_picture_in_a_dataset():
    rows = [{"image": {"bytes": b"no picture", "path": None}, "question": "What?", "answer": "This."}]
    with pytest.raises(Unreadable, match="cannot be read"):
        DatasetSource(rows)[0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "must be a JSON list"),
        ("[]", "holds no answer"),
        ('[{"conversations": []}]', "holds no answer"),
    ],
)
def test_files_that_are_no_conversations(tmp_path, text, words):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        ConversationSource(path)


@pytest.mark.parametrize("ending", [".json", ".JSON", ".jsonl", ".JSONL", ".ndjson", ".NdJson"])
def test_a_files_ending_in_any_case_names_conversations(folder, ending):
    text = "".join(json.dumps(entry) + "\n" for entry in json.loads((folder / "data.json").read_text()))
    (folder / f"lines{ending}").write_text(text)
    source = open_source(str(folder / f"lines{ending}"), None, 1, 0)
    assert isinstance(source, ConversationSource) and source[0].answer == "A square."
    with pytest.raises(ValueError, match=rf"--data gone{ending}: no such file"):  # and nothing is asked of the hub
        open_source(f"gone{ending}", None, 1, 0)
    (folder / "lines.txt").write_text(text)
    with pytest.raises(ValueError, match=r"lines\.txt: a file of conversations must end in \.json, \.jsonl, \.ndjson"):
        open_source(str(folder / "lines.txt"), None, 1, 0)


def test_a_saved_dataset_may_be_called_as_a_file_is(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"question": ["What?"], "answer": ["This."]}).save_to_disk(str(tmp_path / "set.json"))
    assert isinstance(open_source(str(tmp_path / "set.json"), None, 1, 0), DatasetSource)


def test_json_lines(folder):
    entries = json.loads((folder / "data.json").read_text())
    (folder / "data.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    assert len(open_source(str(folder / "data.jsonl"), None, 0, 0)) == 8
    assert len(open_source("shapes", None, 7, 0)) == 7


GOOD = {"image": "0.png", "conversations": [_human("<image>\nWhat?"), _gpt("This it is.")]}


def broken(**changes):
    return {**GOOD, **changes}


NAN = float("nan")
BROKEN = {
    "a number": 5, "null": None, "a text": "words", "a list": [1], "NaN": NAN, "nothing": {}, "image NaN": broken(image=NAN),
    "image number": broken(image=5), "image true": broken(image=True), "image null in a list": broken(image=[None]),
    "image list of numbers": broken(image=[1, 2]), "image list in a list": broken(image=[["0.png"], ["1.png"]]),
    "image object": broken(image={"a": 1}),
    "image empty": broken(image=""), "image too long": broken(image="x" * 5000), "image zero byte": broken(image="a\0b"),
    "image address": broken(image="https://host/x.png"), "image folder": broken(image="."), "image no utf-8": broken(image="caf\udce9.png"),
    "turns null": broken(conversations=None), "turns number": broken(conversations=3), "turns empty": broken(conversations=[]),
    "turns text": broken(conversations="no json"), "turns text of a number": broken(conversations="3"),
    "turns nested": broken(conversations="[" * 90_000),
    "turns mixed": broken(conversations=[_human("<image>"), 7, _gpt("This.")]),
    "turns odd": broken(conversations={"from": ["human"], "value": []}),
    "columns of numbers": broken(conversations={"from": ["human", "gpt"], "value": [1, 2]}),
    "columns null": broken(conversations={"from": None, "value": None}),
    "speaker a list": broken(conversations=[{"from": ["human"], "value": "a"}, {"from": {}, "value": "b"}]),
    "text null": broken(conversations=[_human(None), _gpt("This.")]), "answer number": broken(conversations=[_human("<image>"), _gpt(5)]),
    "too many marks": broken(conversations=[_human("<image><image>"), _gpt("This.")]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_broken_entries_of_any_type_are_skipped_counted_and_named(folder, processor, caplog, suffix):
    entries = [GOOD, *BROKEN.values(), GOOD]
    file = folder / f"odd.{suffix}"
    file.write_text(json.dumps(entries) if suffix == "json" else "".join(json.dumps(entry) + "\n" for entry in entries))
    with caplog.at_level(logging.WARNING):
        rows = EncodedExamples(ConversationSource(file), processor, max_length=4096)
        found = [rows[place] for place in range(len(rows))]
    assert len(rows) == len(entries) and len(rows.skipped) == len(BROKEN) and set(rows.skipped) == set(range(1, len(BROKEN) + 1))
    for place, why in rows.skipped.items():
        where = f"entry {place}" if suffix == "json" else f"line {place + 1}"
        assert why.startswith(f"odd.{suffix} {where}") and why.encode(), why
    assert {tuple(row.answer) for row in found} == {tuple(found[0].answer)}
    assert caplog.records and all("is skipped: odd" in record.getMessage() for record in caplog.records)


def test_lines_that_are_no_json_are_skipped_and_named(folder, processor):
    good = json.dumps(GOOD).encode()
    (folder / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n{oops\r\n\r\n" + good.replace(b"What", b"Wh\xe9") + b"\r\n" + good)
    rows = EncodedExamples(ConversationSource(folder / "odd.jsonl"), processor)
    assert len(rows) == 4 and [rows[i].answer for i in range(4)] == [rows[0].answer] * 4
    assert (
        "odd.jsonl line 2: it is not JSON (Expecting" in rows.skipped[1] and "odd.jsonl line 4: it is not JSON (no UTF-8" in rows.skipped[2]
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_files_of_every_encoding(folder, encoding):
    text = "one\u2028two\x85three"
    entry = broken(conversations=[_human("<image>\nWhat?"), _gpt(text)])
    for name in ("a.json", "a.jsonl"):
        content = json.dumps([entry], ensure_ascii=False) if name == "a.json" else 2 * (json.dumps(entry, ensure_ascii=False) + "\r\n")
        (folder / name).write_bytes(content.encode(encoding))
        assert ConversationSource(folder / name)[0].answer == text


TURNS = {
    "columns": {"from": ["human", "gpt"], "value": ["<image>\nWhat?", "This it is."]},
    "a text": json.dumps(GOOD["conversations"]),
    "a text of columns": json.dumps({"from": ["user", "assistant"], "value": ["<image>\nWhat?", "This it is."]}),
    "roles": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This it is."}],
}


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_conversations_in_other_forms(folder, turns):
    (folder / "a.json").write_text(json.dumps([broken(conversations=turns)]))
    found = [ConversationSource(folder / "a.json")[0], DatasetSource([broken(conversations=turns)], folder)[0]]
    for example in found:
        assert example.messages == [chat.user("What?", images=1)] and example.answer == "This it is." and len(example.images) == 1


def test_pictures_in_other_forms(folder):
    data = (folder / "0.png").read_bytes()
    text = base64.b64encode(data).decode()
    for value in (data, {"bytes": data, "path": None}, [{"bytes": None, "path": "0.png"}], f"data:image/png;base64,{text}", text,
                  list(data), Image.open(folder / "0.png"), ["0.png"]):  # fmt: skip
        for row in ({"image": value}, {"images": value}, {"image": value, "images": None}):
            example = DatasetSource([{**row, "question": "<image> What?", "answer": ["This it is."]}], folder)[0]
            assert example.messages == [chat.user("What?", images=1)]
            assert [picture.tobytes() for picture in example.images] == [draw(make_scene(0)).tobytes()]


def test_broken_rows_of_a_dataset(folder, processor):
    good = {"image": "0.png", "question": "What?", "answer": "This it is."}
    rows = [
        good,
        {**good, "question": 5},
        {**good, "answer": []},
        {**good, "image": NAN},
        {"image": "0.png"},
        7,
        {**good, "image": [None]},
        good,
    ]
    found = EncodedExamples(DatasetSource(rows, folder), processor)
    assert [found[place].answer for place in range(8)] == [found[0].answer] * 8 and set(found.skipped) == set(range(1, 7))
    assert all(why.startswith(f"row {place}: ") for place, why in found.skipped.items())
    with pytest.raises(ValueError, match="the dataset is empty"):
        DatasetSource([])


def test_an_example_that_the_processor_refuses_is_skipped(folder, processor):
    class Refusing:
        tokenizer, chat_template = processor.tokenizer, processor.chat_template

        def apply_chat_template(self, messages, **options):
            if "And?" in str(messages):
                raise KeyError("no such part")
            return processor.apply_chat_template(messages, **options)

    rows = EncodedExamples(ConversationSource(folder / "data.json"), Refusing())
    assert rows[1].answer == rows[5].answer and "KeyError" in rows.skipped[1]


def test_names_and_texts_that_are_no_utf8(folder, processor):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "0.png").rename(folder / name)
    (folder / "a.json").write_text(json.dumps([broken(image=name, conversations=[_human("<image> W\ud800?"), _gpt("This \udce9 it is.")])]))
    rows = EncodedExamples(ConversationSource(folder / "a.json"), processor, max_length=4096)
    assert not rows.skipped and "W\\ud800?" in rows[0].text


def test_batches_of_a_tokenizer_without_a_padding_token(processor):
    source = ShapesSource(12, seed=2)
    with_token = Collator(processor)([EncodedExamples(source, processor)[i] for i in range(4)])
    bare = copy.deepcopy(processor)
    bare.tokenizer.pad_token = None
    batch = Collator(bare)([EncodedExamples(source, bare)[i] for i in range(4)])
    assert bare.tokenizer.pad_token is None
    for name in ("attention_mask", "pixel_values"):
        assert torch.equal(batch["prompt"][name], with_token["prompt"][name])
    assert torch.equal(batch["answer_mask"], with_token["answer_mask"])


def test_marks_and_turns_that_do_not_fit(folder):
    entries = [
        {"image": "0.png", "conversations": [_human("<image> <image> What?"), _gpt("Two marks, one picture.")]},
        {"image": "0.png", "conversations": [_gpt("An answer first.")]},
        {"image": "0.png", "conversations": [_human("No mark."), _gpt("The picture comes first.")]},
        {"image": "0.png", "conversations": [_human(7), _gpt("No text.")]},
    ]
    (folder / "odd.json").write_text(json.dumps(entries))
    source = ConversationSource(folder / "odd.json")
    for place in (0, 1, 3):
        with pytest.raises(Unreadable):
            source[place]
    assert source[2].messages == [chat.user("No mark.", images=1)]


def test_pictures_of_many_kinds(tmp_path):
    Image.new("L", (5, 5)).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 5)).save(tmp_path / "clear.png")
    assert all(read_image(tmp_path / name).mode == "RGB" for name in ("grey.png", "clear.png"))
    assert read_image(Image.new("P", (4, 4))).mode == "RGB"


def test_processors_without_a_template(processor):
    class Plain:
        chat_template = None
        tokenizer = processor.tokenizer

    messages = [chat.user("One?", images=2), chat.assistant("Two."), chat.user("Three?")]
    assert chat.render(Plain(), messages) == "USER: <image>\n<image>\nOne? ASSISTANT: Two. USER: Three? ASSISTANT:"
    ids = chat.answer_ids(Plain(), messages, "Four.")
    assert processor.tokenizer.decode(ids[:-1]) == " Four." and ids[-1] == processor.tokenizer.eos_token_id
    assert torch.tensor(ids).dim() == 1
