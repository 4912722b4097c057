"""Training data of a predictor: questions about pictures with their answers, from LLaVA's JSON, Hugging Face datasets or drawn scenes.

A source is a sequence of examples. Reading one may fail (a corrupt picture, a turn with no answer): ``EncodedExamples`` reports it, counts
it and goes on with the next one, so that one bad file in a million does not end a run. Which example takes its place depends on the source
alone, so a resumed run sees the same data.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dyrate_kernels import chat
from dyrate_kernels.files import printable
from dyrate_kernels.json_files import SUFFIXES, Broken, read_entries
from dyrate_kernels.pictures import UnreadableError, find_picture, is_numbers, read_picture

logger = logging.getLogger(__name__)

_MOST_WARNINGS = 20


class Unreadable(ValueError):
    """This example cannot be used; the message says why."""


@dataclass(frozen=True)
class Example:
    """A conversation up to a question, and the answer.

    Attributes:
        name: for reports.
        messages: as ``chat.render`` takes them.
        images: PIL pictures, in the order of the messages' image parts.
        answer: plain text.
    """

    name: str
    messages: list[chat.Message]
    images: list[Any]
    answer: str


class ShapesSource(Sequence[Example]):
    """Drawn scenes (``dyrate_kernels.shapes``): sample i is scene ``seed * 10**6 + i``, descriptions and short questions in turn.

    Args:
        count: examples.
        seed: where the scenes begin; the same seed gives the same examples everywhere. Scenes below 0 are held out for evaluation.
        describe: share of descriptions; the rest are short questions.
        size: of the pictures.
    """

    def __init__(self, count: int, seed: int = 0, describe: float = 0.5, size: int = 96) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.length, self.seed, self.describe, self.size = count, seed, describe, size

    @property
    def origin(self) -> str:
        """Enough to tell it from another source."""
        return f"shapes: {self.length} examples, seed {self.seed}, {self.describe:g} described, size {self.size}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        import random

        from dyrate_kernels import shapes

        if not 0 <= index < self.length:
            raise IndexError(index)
        scene = self.seed * 10**6 + index
        rng = random.Random(f"training {scene}")
        drawn = shapes.make_scene(scene)
        task = "describe" if rng.random() < self.describe or not drawn.things else rng.choice(shapes.SHORT_TASKS)
        sample = shapes.make_sample(scene, task, drawn)
        return Example(f"scene {scene}", [chat.user(sample.prompt, images=1)], [sample.image(self.size)], sample.answer)


class ConversationSource(Sequence[Example]):
    """LLaVA's format: a list of ``{"image": file, "conversations": [{"from": "human", "value": ..}, {"from": "gpt", ..}, ..]}``.

    Every answer of a conversation is an example, with the turns before it as its prompt. The turns may also stand as columns
    (``{"from": [..], "value": [..]}``), as JSON in a text, or with the names ``role`` and ``content``. ``image`` (or ``images``) holds one
    picture or a list of them, each as ``pictures.find_picture`` takes it. An entry of which nothing can be used is one example that
    cannot be read.

    Args:
        path: the JSON (or JSON-lines) file.
        images: folder that pictures' paths are relative to.

    Raises:
        ValueError: the file is not such a list, or holds no answer.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> None:
        self.path, self.folder = Path(path), Path(images) if images is not None else Path(path).parent
        self.entries = read_entries(self.path)
        self.turns: list[tuple[int, int]] = []
        self.unusable: dict[int, str] = {}
        """Reason by the example's index, of entries without an answer."""
        for number, (where, content) in enumerate(self.entries):
            try:
                answers = [turn for turn, line in enumerate(_lines(content)) if _speaker(line) == "gpt"]
                if not answers:
                    raise Unreadable("the conversation has no answer")
            except Unreadable as error:
                self.unusable[len(self.turns)] = f"{self.path.name} {where}: {error}"
                answers = [-1]
            self.turns += [(number, turn) for turn in answers]
        if len(self.unusable) == len(self.turns):
            first = f"; the first: {self.unusable[0]}" if self.unusable else ""
            raise ValueError(
                f"{self.path} holds no answer: expected a list of entries with conversations of 'human' and 'gpt' turns{first}"
            )

    @property
    def origin(self) -> str:
        """Enough to tell it from another source; the file's content counts, too."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        return f"{os.path.realpath(self.path)} ({digest}), pictures in {os.path.realpath(self.folder)}"

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        if index in self.unusable:
            raise Unreadable(self.unusable[index])
        number, turn = self.turns[index]
        where, content = self.entries[number]
        name = f"{self.path.name} {where} turn {turn}"
        with _named(name):
            return conversation(name, _lines(content)[: turn + 1], _pictures(content, self.folder))


class DatasetSource(Sequence[Example]):
    """A Hugging Face dataset with a column ``image`` (or ``images``) and ``question`` / ``answer``, or LLaVA's ``conversations``.

    Args:
        data: a ``datasets.Dataset``, or anything indexed with rows of dicts.
        folder: that pictures' paths are relative to.

    Raises:
        ValueError: it has none of these columns, or no rows.
    """

    def __init__(self, data: Any, folder: str | os.PathLike[str] = ".") -> None:
        self.data, self.folder, self.features = data, Path(folder), None
        self.fingerprint = getattr(data, "_fingerprint", None)  # datasets' own: of the content, and of what was done to it
        if not len(data):
            raise ValueError("the dataset is empty")
        names = set(data.column_names) if hasattr(data, "column_names") else set(data[0])
        if hasattr(data, "with_format") and data.format["type"] is None:  # rows as they are stored: pictures are read here
            self.data, self.features = data.with_format("arrow"), copy.deepcopy(data.features)
            _leave_encoded(self.features)
        if not ({"question", "answer"} <= names or "conversations" in names):
            raise ValueError(f"the dataset must have the columns 'question' and 'answer', or 'conversations'; it has {sorted(names)}")
        self.turns = "conversations" in names

    @classmethod
    def load(cls, name: str, split: str = "train") -> DatasetSource:
        """A folder made by ``save_to_disk``, or the name of a dataset on the hub."""
        try:
            import datasets
        except ImportError:
            raise RuntimeError("reading a dataset needs the package datasets: pip install 'dyrate-kernels[train]'") from None
        if not Path(name).is_dir():
            return cls(datasets.load_dataset(name, split=split))
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{name} has the splits {sorted(loaded)}, not {split!r}")
            loaded = loaded[split]
        return cls(loaded)

    @property
    def origin(self) -> str:
        """Enough to tell it from another source."""
        made = "" if self.fingerprint is None else f", fingerprint {self.fingerprint}"
        return f"a dataset of {len(self)} rows{made}"

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        name = f"row {index}"
        try:
            row = self.data[index]
            if self.features is not None:
                row = self.features.decode_example(row.to_pylist()[0])
        except Exception as error:  # a format of the caller's, or a text that is none, raises what it likes
            if isinstance(error, IndexError):
                raise
            raise Unreadable(f"{name} cannot be read ({error})") from error
        with _named(name):
            if not isinstance(row, dict):
                raise Unreadable(f"it must be an object, got {str(row)[:60]}")
            if self.turns:
                return conversation(name, _lines(row), _pictures(row, self.folder))
            question, answer = row.get("question"), row.get("answer")
            answer = answer[0] if isinstance(answer, list) and answer else answer
            if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
                raise Unreadable("it has no question or no answer")
            return conversation(name, [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], _pictures(row, self.folder))


def _leave_encoded(feature: Any) -> None:
    """Has ``decode_example`` of a dataset's features leave pictures (sounds, films) as bytes and paths, however deep they stand."""
    if isinstance(feature, dict | list | tuple):
        for each in feature.values() if isinstance(feature, dict) else feature:
            _leave_encoded(each)
    elif hasattr(feature, "feature"):  # a list
        _leave_encoded(feature.feature)
    elif hasattr(feature, "decode"):
        feature.decode = False


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Unreadable with the example's name before it."""
    try:
        yield
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from error


def conversation(name: str, lines: list[dict[str, Any]], images: list[Any]) -> Example:
    """Turns of LLaVA's format up to an answer, the last one of them.

    Raises:
        Unreadable: turns do not alternate, the answer is empty, or its ``<image>`` marks are not as many as the pictures.
    """
    while lines and _speaker(lines[-1]) != "gpt":
        lines = lines[:-1]
    if not lines:
        raise Unreadable("the conversation has no answer")
    messages, marks = [], 0
    for index, line in enumerate(lines):
        wanted, text = ("human", "gpt")[index % 2], line.get("value", line.get("content"))
        if _speaker(line) != wanted or not isinstance(text, str):
            raise Unreadable(f"turn {index} must be a text of {wanted!r}, got {str(line)[:80]}")
        text = printable(text)  # no tokenizer takes half of a character
        if wanted == "gpt":
            messages.append(chat.assistant(text))
            continue
        marks += text.count("<image>")
        messages.append(chat.user(text.replace("<image>", "").strip(), images=text.count("<image>")))
    if marks == 0 and images:  # some sets leave the mark out
        messages[0] = chat.user(messages[0]["content"][-1]["text"], images=len(images))
    elif marks != len(images):
        raise Unreadable(f"{marks} <image> marks for {len(images)} pictures")
    answer = messages.pop()["content"][0]["text"]
    if not answer.strip():
        raise Unreadable("the answer is empty")
    return Example(name, messages, images, answer)


def read_image(source: Any, folder: str | os.PathLike[str] = "") -> Any:
    """A picture as RGB (``pictures.read_picture``), decoded to its last byte.

    Args:
        source: as ``pictures.find_picture`` takes it.
        folder: that paths are relative to.

    Raises:
        Unreadable: it is missing or damaged.
    """
    try:
        return read_picture(find_picture(source, Path(folder)))
    except UnreadableError as error:
        shown = str(source)[:120] if isinstance(source, str | Path) else f"({type(source).__name__})"
        raise Unreadable(f"the picture {shown} cannot be read ({error})") from error


def _pictures(content: dict[str, Any], folder: Path) -> list[Any]:
    """All pictures of an entry; none where it names none."""
    found = content.get("images")
    found = content.get("image") if found is None or found == [] else found
    if found is None:
        return []
    several = isinstance(found, list | tuple) and not is_numbers(found)
    return [read_image(each, folder) for each in (found if several else [found])]


def _lines(content: Any) -> list[dict[str, Any]]:
    """The turns of an entry.

    Raises:
        Unreadable: it has none, or they are in no form that is known.
    """
    if isinstance(content, Broken):
        raise Unreadable(f"it is not JSON ({content.why})")
    if not isinstance(content, dict):
        raise Unreadable(f"it must be an object with 'conversations', got {str(content)[:60]}")
    lines = content.get("conversations")
    if isinstance(lines, str):
        try:
            lines = json.loads(lines)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"its conversations are a text that is no JSON ({error})") from None
    if isinstance(lines, dict):
        speakers, texts = lines.get("from", lines.get("role")), lines.get("value", lines.get("content"))
        if not isinstance(speakers, list) or not isinstance(texts, list) or len(speakers) != len(texts):
            raise Unreadable(f"its conversations must be columns 'from' and 'value' of one length, got {str(lines)[:60]}")
        return [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=True)]
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise Unreadable(f"its conversations must be a list of turns, got {str(lines)[:60]}")
    return lines


def _speaker(line: dict[str, Any]) -> str:
    speaker = str(line.get("from", line.get("role")))
    return {"user": "human", "assistant": "gpt"}.get(speaker, speaker)


@dataclass
class EncodedExample:
    """An example, ready for a batch: its prompt as text, its pictures, the token ids of its answer."""

    text: str
    images: list[Any]
    answer: list[int]


@dataclass
class EncodedExamples(Dataset[EncodedExample]):
    """A source's examples for a data loader. One that cannot be read, or is too long, is skipped: the next one takes its place.

    Attributes:
        source: the examples.
        processor: of the model.
        max_length: the most tokens of prompt (visual tokens included) and answer together; None: any.
        max_answer: the most tokens of an answer; longer ones are cut (a description may be as long as it likes); None: any.
        skipped: reason by the example's index.
    """

    source: Sequence[Example]
    processor: Any
    max_length: int | None = None
    max_answer: int | None = None
    skipped: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, why in getattr(self.source, "unusable", {}).items():
            self._skip(index, why)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EncodedExample:
        for each in self._from(index):
            if each in self.skipped:
                continue
            try:
                return self.encode(self.source[each])
            except Unreadable as error:
                self._skip(each, str(error))
            except Exception as error:  # a processor that will not take it raises what it likes
                self._skip(each, f"{type(error).__name__}: {error}")
        raise ValueError(f"none of the {len(self)} examples can be used; the last reason: {self.skipped[index]}")

    def _skip(self, index: int, why: str) -> None:
        self.skipped[index] = printable(why)
        if len(self.skipped) <= _MOST_WARNINGS:
            more = "; further ones are only counted" if len(self.skipped) == _MOST_WARNINGS else ""
            logger.warning("example %d is skipped: %s%s", index, self.skipped[index], more)

    def _from(self, index: int) -> Iterator[int]:
        return ((index + step) % len(self) for step in range(len(self)))

    def encode(self, example: Example) -> EncodedExample:
        """Raises Unreadable where the example is too long."""
        text = chat.render(self.processor, example.messages)
        answer = chat.answer_ids(self.processor, example.messages, example.answer)[: self.max_answer]
        if len(answer) < 2:
            raise Unreadable(f"{example.name}: an answer of {len(answer)} token leaves no step to choose a rate for")
        if self.max_length is not None:
            ids = chat.encode(self.processor, [text], [example.images])["input_ids"]
            if ids.shape[1] + len(answer) > self.max_length:
                raise Unreadable(f"{example.name}: {ids.shape[1]} + {len(answer)} tokens are more than {self.max_length}")
        return EncodedExample(text, example.images, answer)


@dataclass
class Collator:
    """Makes a batch of examples: ``prompt`` (of the processor, padded on the left), ``answer`` and ``answer_mask`` int64 ``[B, T]``."""

    processor: Any

    def __call__(self, examples: list[EncodedExample]) -> dict[str, Any]:
        prompt = chat.encode(self.processor, [each.text for each in examples], [each.images for each in examples])
        tokenizer = self.processor.tokenizer
        longest = max(len(each.answer) for each in examples)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        answer = torch.tensor([each.answer + [pad] * (longest - len(each.answer)) for each in examples])
        mask = torch.tensor([[1] * len(each.answer) + [0] * (longest - len(each.answer)) for each in examples])
        return {
            "prompt": prompt,
            "answer": answer,
            "answer_mask": mask,
        }


def names_file(text: str) -> bool:
    """Returns whether ``--data`` names a file of conversations, there or missing, by its ending."""
    return text.lower().endswith(SUFFIXES) and not os.path.isdir(text)


def origin_of(source: Sequence[Example]) -> str:
    """Returns a source's origin, as it says itself (an attribute ``origin``), or else of how many examples."""
    return str(getattr(source, "origin", f"{type(source).__name__} of {len(source)} examples"))


def open_source(text: str, images: str | None, count: int, seed: int, split: str = "train") -> Sequence[Example]:
    """Opens what a command line names: ``shapes``, a file of conversations, a saved dataset's folder, or a dataset on the hub.

    Raises:
        ValueError: there is no such file, or it is of another kind; or the source's own error.
        OSError: it cannot be read.
    """
    if text == "shapes":
        return ShapesSource(count, seed)
    if names_file(text):
        if not os.path.exists(text):
            raise ValueError(f"--data {text}: no such file; give a file of conversations, the folder of a saved dataset, or shapes")
        return ConversationSource(text, images)
    if os.path.isfile(text):
        raise ValueError(f"--data {text}: a file of conversations must end in {', '.join(SUFFIXES)}; rename or convert it")
    return DatasetSource.load(text, split)
