"""Parts shared by the suites of public data sets: reading a data set's own file, finding its pictures, saying what is wrong with either."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dyrate_kernels import chat
from dyrate_kernels.evaluation.suite import Item
from dyrate_kernels.files import is_file, printable
from dyrate_kernels.json_files import read_json
from dyrate_kernels.training.data import Unreadable, read_image

SHORT_ANSWER = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Question:
    """One question of a file.

    Attributes:
        id: the data set's own.
        group: as ``Item.group``.
        prompt: what the model is asked.
        picture: where it lies.
        answers: what an answer is scored against.
    """

    id: str
    group: str
    prompt: str
    picture: Path
    answers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The id, and a digest of all that an answer's score depends on: a changed question is asked again, not taken for the old one."""
        content = json.dumps([self.prompt, self.picture.name, self.answers])
        return f"{self.id} {hashlib.sha256(content.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Entry:
    """An entry of a file, which knows where it stands."""

    file: Path
    place: str
    values: dict[str, Any]
    expects: str

    def need(self, key: str, *types: type, empty: bool = False) -> Any:
        """The value of ``key``.

        Raises:
            ValueError: it is missing, of another type, or an empty text or list where that is not allowed.
        """
        value = self.values.get(key)
        if not isinstance(value, types) or isinstance(value, bool) or (not empty and value in ("", [])):
            wanted = " or ".join(each.__name__ for each in types)
            keys = ", ".join(self.values) or "none at all"
            got = f"{str(value)[:60]!r} ({type(value).__name__})" if key in self.values else f"none; its keys: {keys[:200]}"
            raise self.wrong(f"must have {key!r} ({wanted}), got {got}")
        return value

    def wrong(self, what: str) -> ValueError:
        """An error about this entry."""
        return ValueError(f"{self.file}: {self.place} {what}. Expected {self.expects}; is it of another data set, or without answers?")


class Pictures(Sequence[Any]):
    """A question's picture, decoded when it is asked for: a suite of thousands does not hold them."""

    def __init__(self, path: Path, question: str) -> None:
        self.path, self.question = path, question

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        if index not in (0, -1):
            raise IndexError(index)
        try:
            return read_image(self.path)
        except Unreadable as error:
            raise Unreadable(f"question {self.question}: {error}; restore the file and run again, answers so far are kept") from error


class FileSuite(ABC):
    """Questions of a data set's own file; implements ``Suite``.

    Args:
        data: the file.
        images: folder of the pictures; None: where the file lies.
        limit: only so many questions, the first ones.

    Raises:
        FileNotFoundError: the file, or a picture of a question that will be asked, is not there.
        ValueError: the file is not of this data set, has no answers or no questions, or an argument is out of range.
    """

    name: ClassVar[str]
    expects: ClassVar[str]
    """The file and what it holds, for errors."""
    folders: ClassVar[tuple[str, ...]] = ("",)
    """Where in ``images`` pictures may lie."""
    most: ClassVar[int] = 16
    captions: ClassVar[bool] = False
    """Answers are sentences."""

    def __init__(self, data: str | os.PathLike[str], images: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.file = Path(data)
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: no such file; {self.name} reads {self.expects}")
        self.images = self.file.parent if images is None else Path(images)
        if not self.images.is_dir():
            raise FileNotFoundError(f"{self.images}: no such folder; give the folder with the pictures of {self.file.name}")
        self.every = list(self.read(read_json(self.file)))
        if not self.every:
            raise ValueError(f"{self.file} holds no questions. Expected {self.expects}")
        ids = set()
        for question in self.every:
            if question.id in ids:
                raise ValueError(f"{self.file}: the id {question.id} is there twice; give a file in which every question has its own")
            ids.add(question.id)
        self._take(self.every[:limit])

    @abstractmethod
    def read(self, content: Any) -> Iterator[Question]:
        """The questions of the file's content."""

    @abstractmethod
    def points(self, question: Question, text: str) -> float:
        """Of an answer, as the data set's official evaluation counts them; 1 is a right answer."""

    def _take(self, questions: list[Question]) -> None:
        missing = [each for each in questions if not is_file(each.picture) or each.picture.stat().st_size == 0]
        if missing:
            first = missing[0]
            state = "is empty" if is_file(first.picture) else "is missing"
            raise FileNotFoundError(
                f"{self.file}: the pictures of {len(missing)} of {len(questions)} questions cannot be read: {first.picture} {state} "
                f"(question {first.id}); give their folder as images"
            )
        self.questions = questions

    def held_back(self, most: int, least: int) -> FileSuite:
        """A suite of up to ``most`` questions behind the scored ones, about other pictures: what methods may be tuned on.

        Raises:
            ValueError: there are fewer than ``least``.
        """
        seen = {question.picture for question in self.questions}
        others = [question for question in self.every[len(self.questions) :] if question.picture not in seen][:most]
        if len(others) < least:
            raise ValueError(
                f"{self.file}: tuning needs {least} to {most} questions that are not scored, about pictures that no scored one shows; "
                f"{len(others)} of {len(self.every)} are left behind the first {len(self.questions)}: give a lower limit"
            )
        suite = copy.copy(self)
        suite._take(others)
        return suite

    @property
    def where(self) -> dict[str, str]:
        """The whole paths of what is read, to tell answers to one file's questions from those to another's."""
        return {"data": os.path.realpath(self.file), "images": os.path.realpath(self.images)}

    @property
    def long(self) -> frozenset[str]:
        """Groups whose answers are long."""
        return frozenset(question.group for question in self.questions) if self.captions else frozenset()

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Item:
        question = self.questions[index]
        pictures = Pictures(question.picture, question.id)
        return Item(question.name, question.group, [chat.user(printable(question.prompt), images=1)], pictures, self.most)

    def score(self, index: int, text: str) -> tuple[float, float]:
        """(points, points that could be had); see ``points``."""
        return self.points(self.questions[index], text), 1.0

    def summary(self, texts: Sequence[str]) -> dict[str, float]:
        """Numbers of all answers together that are no mean of points, in the suite's order."""
        return {}

    def entries(self, content: Any, place: str = "entry") -> Iterator[Entry]:
        """The objects of a list, or of a mapping from ids."""
        if not isinstance(content, list | dict):
            raise ValueError(f"{self.file} must hold {self.expects}, got {type(content).__name__}")
        for key, values in content.items() if isinstance(content, dict) else enumerate(content):
            if not isinstance(values, dict):
                raise ValueError(f"{self.file}: {place} {key} must be an object, got {str(values)[:60]!r}. Expected {self.expects}")
            yield Entry(self.file, f"{place} {key}", values, self.expects)

    def of_type(self, content: Any, wanted: type) -> Any:
        """The content, which must be a list or an object."""
        if not isinstance(content, wanted):
            names: dict[type, str] = {list: "a list", dict: "an object"}
            got = names.get(type(content), type(content).__name__)
            raise ValueError(f"{self.file} must be {names[wanted]}, got {got}. Expected {self.expects}")
        return content

    def picture(self, *names: str) -> Path:
        """The first of the names that is there; the first one where none is, to be complained about if its question is asked."""
        places = [self.images / folder / name for folder in self.folders for name in names]
        return next((place for place in places if is_file(place)), places[0])


def with_suffixes(name: str | int) -> Iterable[str]:
    """File names of an image id."""
    return (f"{name}{suffix}" for suffix in (".jpg", ".jpeg", ".png"))
