"""Contenders over a suite by vLLM: an engine each, one after the other; answers and files as ``runner`` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyrate_kernels import answering_vllm, chat, flops
from dyrate_kernels.answering_vllm import Checkpoint, Chunk, Engine, Request, Setup
from dyrate_kernels.evaluation.runner import Answer, Contender, journal_of
from dyrate_kernels.evaluation.suite import Suite
from dyrate_kernels.measuring import timing


@dataclass(frozen=True)
class Engines:
    """Common parts of the engines of a comparison.

    Attributes:
        checkpoint: the model.
        pictures: that a question has at most.
        seed: of vLLM.
        more: arguments of ``vllm.LLM``.
    """

    checkpoint: Checkpoint
    pictures: int = 1
    seed: int = 0
    more: Mapping[str, Any] | None = None

    def setup(self, contender: Contender) -> Setup:
        """The engine of a contender.

        Raises:
            TypeError, ValueError: it cannot be had inside of vLLM; names the row and why.
        """
        try:
            if contender.side is not None:
                raise ValueError("a coarser picture is made before the language model, which vLLM runs as its own; use --engine local")
            if contender.vision:
                raise ValueError(f"reducers ({'+'.join(map(str, contender.vision))}) change the model; use --engine local")
            return Setup(self.checkpoint, contender.policy, contender.retention, self.pictures, self.seed, self.more or {})
        except (TypeError, ValueError) as error:
            raise type(error)(f"--policies: {contender.label}: {error}") from None


def run(
    engines: Engines, suite: Suite, contender: Contender, folder: Path, *, progress: Callable[[int, int], None] | None = None
) -> list[Answer]:  # fmt: skip
    """The contender's answers to the whole suite, in the suite's order; those that ``folder`` holds already are not asked again.

    Tokens and scores are those of ``runner.run`` in float32. Costs are counted from the mean of the visual tokens that an answer's rows
    kept; KV bytes are those of all rows, also where ``evict`` gives blocks back. A question's time is its share of the time that
    the engine took for those that came with it, prompts included.

    Raises:
        TypeError, ValueError: ``Engines.setup``; the file in ``folder`` is of another suite or setting.
        Whatever the engine raises: an answer that cannot be had is an error, never a zero.
    """
    setup = engines.setup(contender)
    journal, done = journal_of(folder, suite, contender, f"vllm {engines.checkpoint.full_name}")
    names = [suite[index].name for index in range(len(suite))]
    todo = [index for index, name in enumerate(names) if name not in done]
    if todo:
        with Engine(setup) as engine:
            begun = 0
            for chunk in engine.answers(_requests(engines.checkpoint.processor, suite, todo)):
                part = todo[begun : begun + len(chunk.answers)]
                begun += len(part)
                answers = _counted(setup, suite, part, chunk, min(engine.at_once, len(todo)))
                journal.add(*map(asdict, answers))
                done.update((answer.item, answer) for answer in answers)
                if progress is not None:
                    progress(len(done), len(names))
    return [done[name] for name in names]


def most_pictures(suite: Suite) -> int:
    """Pictures of the question that has most."""
    return max((len(suite[index].images) for index in range(len(suite))), default=0)


def _requests(processor: Any, suite: Suite, todo: Sequence[int]) -> Iterator[Request]:
    for index in todo:
        item = suite[index]
        yield Request(chat.token_ids(processor, chat.render(processor, item.messages)), list(item.images), item.most)


def _counted(setup: Setup, suite: Suite, part: Sequence[int], chunk: Chunk, together: int) -> list[Answer]:
    """Answers with their scores and costs."""
    checkpoint, shape, layers = setup.checkpoint, setup.checkpoint.shape, setup.pruned_layers()
    bandwidth, _ = timing.copy_bandwidth(device=checkpoint.device)
    decoded = max(sum(len(each.tokens) - 1 for each in chunk.answers), 1)
    weights, row = flops.weight_bytes(shape), flops.kv_bytes_per_token(shape)
    found = []
    for index, answer in zip(part, chunk.answers, strict=True):
        item = suite[index]
        if answer.error is not None:
            raise RuntimeError(f"{item.name}: {answer.error}") from answer.error
        text = checkpoint.processor.decode(answer.tokens, skip_special_tokens=True).strip()
        right, total = suite.score(index, text)
        cost, steps = _cost(setup, answer, layers), len(answer.tokens)
        share = (steps - 1) / decoded
        read = cost.bytes_read - weights * (steps - 1) + weights * chunk.steps * share
        found.append(Answer(
            item.name, item.group, right, total, answer.tokens, answer.share_where_pruned(), answer.share(layers, shape.num_layers),
            answer.prompt, cost.paper_cost, cost.exact_cost, cost.flops, cost.flops_unpruned, row * (answer.prompt + steps - 1), read,
            chunk.seconds * share, read / bandwidth, answer.first, together, text,
            setup.policy.bind(shape).predictor_name if setup.prunes else None,
        ))  # fmt: skip
    return found


def _cost(setup: Setup, answer: answering_vllm.Answer, layers: int) -> flops.GenerationCost:
    shape, steps = setup.checkpoint.shape, len(answer.tokens)
    groups = [shape.num_layers - layers, layers] if layers else [shape.num_layers]
    kept = np.full((steps, len(groups), 1), float(answer.visual))
    if layers:
        kept[1:, 1] = answer.kept  # the prompt's own step reads every token
    return flops.generation_cost(
        shape, text_rows=[answer.prompt - answer.visual], visual_tokens=[answer.visual], group_layers=groups, kept=kept,
        prefill_shrunk=False,
    )  # fmt: skip
