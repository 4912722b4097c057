"""Runs policies over a suite. Every answer is written as it comes, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from dyrate_kernels import answering, chat, flops
from dyrate_kernels.evaluation.coarse import downsampled, thin
from dyrate_kernels.evaluation.suite import Item, Suite
from dyrate_kernels.journal import Journal
from dyrate_kernels.loading import model_name
from dyrate_kernels.measuring import timing
from dyrate_kernels.patching.api import Handle, patch, shape_for
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.stats import Stats
from dyrate_kernels.vision import Reducer


@dataclass(frozen=True)
class Contender:
    """A policy as it is compared.

    Attributes:
        label: its row in the table; also its file's name.
        policy: what runs; ``policies.KeepAll()`` is the unpruned model.
        retention: as ``patch`` takes it, options in the text: ``"pool=0.5:by=uniform"``.
        side: the picture is first averaged to ``side`` x ``side`` tokens (``evaluation.coarse``); None: not.
        vision: reducers before the language model (``vision.chain``).
    """

    label: str
    policy: Policy
    retention: str = "recoverable"
    side: int | None = None
    vision: tuple[Reducer, ...] = ()

    def bound(self, model: Any) -> Policy:
        """The policy as ``patch`` would bind it to the model."""
        return self.policy.bind(shape_for(model, self.retention))

    def patch(self, model: Any, backend: str, **options: Any) -> Handle:
        """The model patched so (but for ``side``); ``options``: more for ``patch``."""
        return patch(model, self.policy, retention=self.retention, backend=backend, vision=self.vision or None, **options)


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    Attributes:
        item, group: of the question.
        right, total: points, and points that could be had.
        tokens: ids, end of sequence included where it was reached.
        kept: mean fraction of the visual tokens (those before any reducer) that layers >= k read.
        visual_share: the same over all layers.
        n: tokens of the sequence when its prompt ended, nothing reduced.
        paper_cost, exact_cost: FastV's formula and the exact one over the whole sequence, a fraction of unpruned, mean over steps.
        flops, flops_unpruned: executed.
        kv_bytes: of the rows held at the end.
        read: bytes that its batch's decode steps read (weights once a step), divided by the batch's decode tokens, times its own.
        seconds: of its batch's decode steps, likewise.
        floor: ``read`` over the copy bandwidth measured in the same process, seconds.
        first: seconds to the batch's first token.
        batch: how many were asked together.
        text: the answer.
        predictor: what predicted the rate, for policies that have one.
    """

    item: str
    group: str
    right: float
    total: float
    tokens: list[int]
    kept: float
    visual_share: float
    n: int
    paper_cost: float
    exact_cost: float
    flops: float
    flops_unpruned: float
    kv_bytes: int
    read: float
    seconds: float
    floor: float
    first: float
    batch: int
    text: str
    predictor: str | None = None


def run(
    model: Any,
    processor: Any,
    suite: Suite,
    contender: Contender,
    folder: Path,
    *,
    batch_size: int = 8,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """The contender's answers to the whole suite, in the suite's order; those that ``folder`` holds already are not asked again.

    Raises:
        ValueError: the file in ``folder`` is of another suite or setting.
        Whatever the model raises: an answer that cannot be had is an error, never a zero.
    """
    names = [suite[index].name for index in range(len(suite))]
    journal, done = journal_of(folder, suite, contender, model_name(model))
    todo = [index for index, name in enumerate(names) if name not in done]
    if todo:
        for answers in _parts(model, processor, suite, contender, todo, batch_size, backend):
            journal.add(*map(asdict, answers))
            done.update((answer.item, answer) for answer in answers)
            if progress is not None:
                progress(len(done), len(names))
    return [done[name] for name in names]


def journal_of(folder: Path, suite: Suite, contender: Contender, model: str) -> tuple[Journal, dict[str, Answer]]:
    """The file of a contender's answers, and those of an earlier run to questions of this suite, by name.

    Args:
        model: what tells it from another one.

    Raises:
        ValueError: the file is of another suite or setting.
    """
    names = {suite[index].name for index in range(len(suite))}
    setting = {"suite": suite.name, "policy": str(contender.policy), "retention": contender.retention, "model": model}
    setting |= getattr(suite, "where", {})  # a data set's files number their questions alike
    if contender.side is not None:
        setting["side"] = str(contender.side)
    if contender.vision:
        setting["vision"] = str(contender.vision)
    journal = Journal(folder / f"{contender.label}.jsonl", setting)
    return journal, {answer.item: answer for answer in journal.read(Answer) if answer.item in names}


def ask_all(
    model: Any, processor: Any, suite: Suite, contender: Contender, *, batch_size: int = 8, backend: str = "auto"
) -> list[Answer]:  # fmt: skip
    """The contender's answers, not written anywhere; in no particular order."""
    parts = _parts(model, processor, suite, contender, range(len(suite)), batch_size, backend)
    return [answer for answers in parts for answer in answers]


def _parts(
    model: Any, processor: Any, suite: Suite, contender: Contender, todo: Sequence[int], batch_size: int, backend: str
) -> Iterator[list[Answer]]:  # fmt: skip
    """Answers, a batch at a time."""
    with contextlib.ExitStack() as stack:
        if contender.side is not None:
            stack.enter_context(downsampled(model, contender.side))
        handle = stack.enter_context(contender.patch(model, backend))
        for part in _batches(suite, todo, batch_size):
            yield _ask(model, processor, handle, suite, part, contender.side)


def _batches(suite: Suite, todo: Sequence[int], size: int) -> Iterator[list[int]]:
    """Questions of one group together: their answers are of like length."""
    by_group: dict[tuple[str, int], list[int]] = {}
    for index in todo:
        by_group.setdefault((suite[index].group, suite[index].most), []).append(index)
    for group in by_group.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


@torch.no_grad()
def _ask(model: Any, processor: Any, handle: Any, suite: Suite, part: list[int], side: int | None) -> list[Answer]:
    items = [suite[index] for index in part]
    inputs = encode(processor, items)
    n_visual = lengths = None
    if side is not None:
        placeholder = model.config.image_token_id
        n_visual = (inputs["input_ids"] == placeholder).sum(1)
        lengths = inputs["attention_mask"].sum(1)
        pictures = sum(len(item.images) for item in items)
        inputs = thin(inputs, placeholder, int(n_visual.sum()) // max(pictures, 1), side)
    inputs = chat.placed(inputs, model)
    clock = _Clock(model.device)
    rows = answering.generate(model, processor, inputs, items[0].most, logits_processor=[clock])
    first, seconds = clock.stop()
    decoded = max(sum(len(row) - 1 for row in rows), 1)
    weights = flops.weight_bytes(handle.shape)
    every = [handle.stats(sequence, len(row)) for sequence, row in enumerate(rows)]
    read = max(map(len, rows)) - 1  # steps that read the weights, all sequences together
    read = weights * read + sum(stats.bytes_read - weights * (len(row) - 1) for stats, row in zip(every, rows, strict=True))
    bandwidth, _ = timing.copy_bandwidth(device=model.device)
    answers = []
    for sequence, (index, item, row) in enumerate(zip(part, items, rows, strict=True)):
        text = processor.decode(row, skip_special_tokens=True).strip()
        right, total = suite.score(index, text)
        stats: Stats = every[sequence]
        share = (len(row) - 1) / decoded
        answer = Answer(
            item.name, item.group, right, total, row, stats.kept_mean * stats.received, stats.visual_share * stats.received,
            int(inputs["attention_mask"][sequence].sum()), stats.paper_cost, stats.exact_cost, stats.flops, stats.flops_unreduced,
            stats.kv_bytes_live, read * share, seconds * share, read * share / bandwidth, first, len(part), text,
            stats.predictor,
        )  # fmt: skip
        if n_visual is not None and lengths is not None and n_visual[sequence]:
            answer = _beside_whole(answer, handle.shape, int(n_visual[sequence]), int(lengths[sequence]))
        answers.append(answer)
    return answers


def _beside_whole(answer: Answer, shape: ModelShape, n_visual: int, length: int) -> Answer:
    """An answer to a thinned picture, its costs as fractions of those with all ``n_visual`` tokens."""
    seen = n_visual - (length - answer.n)
    cost = coarse_cost(shape, len(answer.tokens), n_visual, seen, length)
    share = seen / n_visual
    return replace(
        answer, n=length, kept=share, visual_share=share, paper_cost=cost.paper_cost, exact_cost=cost.exact_cost, flops=cost.flops,
        flops_unpruned=cost.flops_unpruned,
    )  # fmt: skip


def coarse_cost(shape: ModelShape, steps: int, n_visual: int, seen: int, length: int) -> flops.GenerationCost:
    """Of an answer of ``steps`` tokens to a prompt of ``length`` that reads ``seen`` of its ``n_visual`` visual tokens."""
    return flops.generation_cost(
        shape, text_rows=[length - n_visual], visual_tokens=[n_visual], group_layers=[shape.num_layers],
        kept=np.full((steps, 1, 1), float(seen)), prefill_shrunk=True,
    )  # fmt: skip


class _Clock(LogitsProcessor):
    """Time to the first token, and from there to the end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.first = device, 0.0
        self.started = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = self.first or self._now()
        return scores

    def stop(self) -> tuple[float, float]:
        """(seconds to the first token, seconds of all others)."""
        return self.first - self.started, self._now() - self.first


def encode(processor: Any, items: Sequence[Item], model: Any = None) -> dict[str, torch.Tensor]:
    """Model inputs of several questions (``chat.encode``)."""
    return chat.encode(processor, [chat.render(processor, item.messages) for item in items], [item.images for item in items], model)
