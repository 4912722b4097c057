"""The unpruned model's own answers to a user's pictures and prompts: what a calibration measures against (``calibration``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import answering, chat
from dyrate_kernels.captioning import inputs
from dyrate_kernels.files import printable
from dyrate_kernels.json_files import SUFFIXES, Broken, read_entries
from dyrate_kernels.patching.api import patch
from dyrate_kernels.policies.none import KeepAll
from dyrate_kernels.training.data import Example, Unreadable, read_image

Progress = Callable[[str, int, int], None]
"""Told of the work: its name, how much is done, of how much."""


class PromptedPictures(Sequence[Example]):
    """Pictures of a folder (or rows of Parquet files) and prompts, no answers.

    Args:
        images: as ``captioning.inputs.find`` takes it.
        prompts: asked of the pictures by turns; or pairs (name of a picture below the folder, prompt): then these alone are asked.

    Raises:
        ValueError: there is no picture, or no prompt, or a pair names a picture that is not there.
    """

    def __init__(self, images: str | Path, prompts: Sequence[str | tuple[str, str]]) -> None:
        found = inputs.find(images)
        self.column, self.where = found.column, str(images)
        if not prompts:
            raise ValueError("prompts are missing: give at least one question to ask about the pictures")
        by_name = {source.name: source for source in found.sources}
        pairs = [each for each in prompts if isinstance(each, tuple)]
        if pairs:
            gone = [name for name, _ in pairs if name not in by_name]
            if gone:
                raise ValueError(f"prompts name {len(gone)} pictures that are not in {images}: {', '.join(gone[:3])}; mend the names")
            self.asked = [(by_name[name], text) for name, text in pairs]
        else:
            self.asked = list(zip(found.sources, itertools.cycle([str(each) for each in prompts]), strict=False))

    @property
    def origin(self) -> str:
        """Enough to tell it from another source."""
        return f"{len(self)} pictures in {self.where}"

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        source, prompt = self.asked[index]
        (payload,) = inputs.payloads([source], self.column)
        try:
            picture = read_image(payload) if not isinstance(payload, Exception) else None
        except Unreadable as error:
            raise Unreadable(f"{source.name}: {error}") from error
        if picture is None:
            raise Unreadable(f"{source.name}: {payload}")
        return Example(source.name, [chat.user(prompt, images=1)], [picture], "")


def read_prompts(file: str | Path) -> list[str] | list[tuple[str, str]]:
    """Prompts of a file: a text with one a line; or JSON or JSON lines: texts, or objects with ``prompt`` (or ``question``, ``text``) and,
    in all of them or in none, ``image``: the picture's name.

    Raises:
        ValueError: there is no such file, it holds no prompt, or an entry is none of these; names it.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--prompts {file}: no such file; give one with a prompt a line, or JSON lines with prompt and image")
    if path.suffix.lower() not in SUFFIXES:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
        prompts = [printable(line) for line in lines if line]
        if not prompts:
            raise ValueError(f"--prompts {file}: holds no prompt; write one a line")
        return prompts
    found: list[tuple[str | None, str]] = []
    for where, entry in read_entries(path):
        value = entry if isinstance(entry, dict) else {"prompt": entry}
        text = next((value[name] for name in ("prompt", "question", "text") if name in value), None)
        image = value.get("image")
        if isinstance(entry, Broken) or not isinstance(text, str) or not text.strip() or not isinstance(image, str | None):
            raise ValueError(f"--prompts {file} {where}: must be a text, or an object with prompt and image, got {str(entry)[:60]}")
        found.append((image, printable(text.strip())))
    named = [(image, text) for image, text in found if image is not None]
    if not found or len(named) not in (0, len(found)):
        raise ValueError(f"--prompts {file}: {len(named)} of {len(found)} entries name an image; all of them must, or none")
    return named or [text for _, text in found]


@dataclass
class Batch:
    """Prompts and the unpruned answers to them.

    Attributes:
        fields: of ``chat.encode``.
        answer, mask: int64 ``[B, T]``.
        pictures: index of each example among those that are used.
        half: 0 or 1; all of them are in it.
    """

    fields: dict[str, Tensor]
    answer: Tensor
    mask: Tensor
    pictures: list[int]
    half: int


@dataclass(frozen=True)
class OwnAnswers:
    """Answers of the unpruned model.

    Attributes:
        batches: pictures in two halves, answers of like length together.
        names: of the pictures.
        skipped: reasons of the others.
    """

    batches: list[Batch]
    names: list[str]
    skipped: list[str]

    @property
    def tokens(self) -> Tensor:
        """int64 ``[P]``, of each picture's answer."""
        found = torch.zeros(len(self.names), dtype=torch.int64)
        for batch in self.batches:
            found[batch.pictures] = batch.mask.sum(1)
        return found


@torch.no_grad()
def answer_all(
    model: Any, processor: Any, source: Sequence[Example], max_new_tokens: int, batch_size: int, seed: int = 0,
    progress: Progress | None = None,
) -> OwnAnswers:  # fmt: skip
    """Asks the unpruned model, greedily. What cannot be read, what the processor will not take, and an answer of one token, which no decode
    step makes, are skipped. ``seed``: of which half a picture is in.
    """
    asked: list[tuple[Example, list[int]]] = []
    skipped: list[str] = []
    with patch(model, KeepAll()) as handle:
        for start in range(0, len(source), batch_size):
            if progress is not None:
                progress("answers", start, len(source))
            part = [each for index in range(start, min(start + batch_size, len(source))) if (each := _example(source, index, skipped))]
            for example, row in zip(part, _answers(model, processor, part, max_new_tokens, handle, skipped), strict=True):
                if row is not None and len(row) < 2:
                    skipped.append(f"{example.name}: the answer is one token, which no decode step makes")
                elif row is not None:
                    asked.append((example, row))
    if progress is not None:
        progress("answers", len(source), len(source))
    batches = []
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()  # prompts may stand by turns
    for half in (0, 1):
        mine = sorted(order[half::2], key=lambda index: (len(asked[index][1]), index))
        batches += [_batch(processor, asked, mine[start : start + batch_size], half) for start in range(0, len(mine), batch_size)]
    return OwnAnswers(batches, [example.name for example, _ in asked], skipped)


def _example(source: Sequence[Example], index: int, skipped: list[str]) -> Example | None:
    try:
        example = source[index]
    except Unreadable as error:
        skipped.append(printable(str(error)))
        return None
    if not example.images:
        skipped.append(f"{example.name}: it has no picture")
        return None
    return example


def _answers(
    model: Any, processor: Any, part: Sequence[Example], most: int, handle: Any, skipped: list[str]
) -> list[list[int] | None]:  # fmt: skip
    """Token ids; None for what the processor will not take: of a batch that it refuses, one after the other is tried."""
    if not part:
        return []
    try:
        fields = chat.placed(_encoded(processor, part), model)
    except Exception as error:  # a processor raises what it likes
        if len(part) == 1:
            skipped.append(printable(f"{part[0].name}: {type(error).__name__}: {error}"))
            return [None]
        return [row for each in part for row in _answers(model, processor, [each], most, handle, skipped)]
    return list(answering.generate(model, processor, fields, most, handle=handle))


def _encoded(processor: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    texts = [chat.render(processor, example.messages) for example in examples]
    return chat.encode(processor, texts, [example.images for example in examples])


def _batch(processor: Any, asked: list[tuple[Example, list[int]]], mine: list[int], half: int) -> Batch:
    rows = [asked[index][1] for index in mine]
    longest = max(map(len, rows))
    answer = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return Batch(_encoded(processor, [asked[index][0] for index in mine]), answer, mask, mine, half)
