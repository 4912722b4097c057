"""Answers of the commands: one a prompt, the checkpoint's generation defaults honoured or overridden; how long an answer is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dyrate_kernels.patching import leaving
from dyrate_kernels.patching.api import Handle

OVERRIDDEN: dict[str, Any] = {
    # one answer a prompt, as token ids
    "num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
    "output_attentions": False, "output_hidden_states": False,
    # one token after the other: what beams, drafts and second models cost is not what is measured here
    "num_beams": 1, "num_beam_groups": None, "diversity_penalty": None, "constraints": None, "force_words_ids": None,
    "penalty_alpha": None, "dola_layers": None, "low_memory": None, "guidance_scale": None, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "is_assistant": False, "use_mtp": None, "speculation_type": None, "token_healing": False,
    # as long as the command says, and over a cache that can be pruned
    "max_length": None, "max_time": None, "use_cache": True, "cache_implementation": None, "prefill_chunk_size": None,
}  # fmt: skip
"""Generation defaults of a checkpoint that no command follows, and what holds instead; every other one (end tokens, stop strings,
penalties, suppressed tokens, the least number of tokens) is followed."""

EVERY = 8  # tokens between two looks at which sequences have ended
_TAIL = 8  # tokens beyond those that a stop string may take


def overridden(model: Any, sample: bool = False) -> dict[str, Any]:
    """The checkpoint's own generation defaults that a command does not follow: name -> the checkpoint's value."""
    config = getattr(model, "generation_config", None)
    found = {name: getattr(config, name, None) for name in OVERRIDDEN}
    found = {name: value for name, value in found.items() if value is not None and bool(value or OVERRIDDEN[name])}
    found = {name: value for name, value in found.items() if value != OVERRIDDEN[name]}
    return found | ({"do_sample": True} if not sample and getattr(config, "do_sample", None) else {})


def settings(model: Any, max_new_tokens: int, sample: bool = False) -> dict[str, Any]:
    """Arguments of ``generate`` beside the inputs: greedy, or sampled as the checkpoint has it; see ``OVERRIDDEN``.

    Raises:
        ValueError: ``max_new_tokens`` is less than 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    given = {name: OVERRIDDEN[name] for name in overridden(model, sample) if name in OVERRIDDEN}
    config = getattr(model, "generation_config", None)
    least = getattr(config, "min_new_tokens", None)
    if least is not None and least > max_new_tokens:
        given["min_new_tokens"] = max_new_tokens
    heat = getattr(config, "temperature", None)
    if sample and heat is not None and not heat > 0:
        given["temperature"] = 1.0
    return {"max_new_tokens": max_new_tokens, "do_sample": sample, **given}


def end_ids(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Tokens that end an answer: those of the checkpoint's generation defaults, one or several; without any the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)


def until_end(row: Sequence[int], ends: Collection[int]) -> list[int]:
    """A row of generated token ids up to the first end token, that included: what stands behind it is padding of the batch."""
    return list(row[: next((index for index, token in enumerate(row, 1) if token in ends), len(row))])


def generate(
    model: Any, processor: Any, inputs: dict[str, Tensor], max_new_tokens: int, *, sample: bool = False, stop: Sequence[str] = (),
    stopping_criteria: Sequence[Any] = (), handle: Handle | None = None, **options: Any,
) -> list[list[int]]:  # fmt: skip
    """Each prompt's answer as token ids, its end included: the same whatever batch it is in.

    Args:
        inputs: of :func:`chat.encode`, on the model's device.
        sample: sample as the checkpoint has it, instead of taking the likeliest token.
        stop: strings that end an answer, beside those of the checkpoint's generation defaults.
        handle: of the patched model: sequences that have ended leave its batch while the others go on (:class:`Leave`).
            ``handle.stats`` then tells of one sequence at a time, and hidden states are of those that stay. None: all stay to the end.
        stopping_criteria, options: more for ``model.generate``.
    """
    ends = end_ids(model, processor.tokenizer)
    given = settings(model, max_new_tokens, sample)
    config = getattr(model, "generation_config", None)
    if getattr(config, "eos_token_id", None) is None and ends:
        given["eos_token_id"] = list(ends)
    theirs = getattr(config, "stop_strings", None) or []
    stop = [*([theirs] if isinstance(theirs, str) else theirs), *stop]
    start = inputs["input_ids"].shape[1]
    criteria = list(stopping_criteria)
    watch = StopStrings(processor.tokenizer, start, stop) if stop else None
    if watch is not None:
        criteria.insert(0, watch)
        given["stop_strings"] = None  # transformers' own would see the prompt, too
    if handle is not None:
        criteria.append(Leave(handle, start, ends, watch))
    if criteria:
        given["stopping_criteria"] = StoppingCriteriaList(criteria)
    with torch.no_grad():
        output = model.generate(**inputs, **given, **options)
    stopped = {} if watch is None else watch.stopped
    return [until_end(row[: stopped.get(index)], ends) for index, row in enumerate(output[:, start:].tolist())]


class Leave(StoppingCriteria):
    """Ends nothing itself. Every ``EVERY`` tokens, sequences that have ended leave the passes of the patched model
    (``leaving.dismiss``), where that makes the batch smaller by a quarter or more. Those that stay go on as they would beside them.

    Args:
        handle: of the model.
        start: columns of the prompt.
        ends: tokens that end an answer.
        watch: stop strings that do.
    """

    def __init__(self, handle: Handle, start: int, ends: Collection[int], watch: StopStrings | None = None) -> None:
        self.handle, self.start, self.ends, self.watch = handle, start, list(ends), watch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        answers = input_ids[:, self.start :]
        if answers.shape[1] % EVERY == 0:
            ended = torch.isin(answers, torch.tensor(self.ends, dtype=answers.dtype, device=answers.device)).any(1)
            for index in () if self.watch is None else self.watch.stopped:
                ended[index] = True
            leaving.dismiss(self.handle, ended)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class StopStrings(StoppingCriteria):
    """Ends a row where its answer holds one of some strings, and remembers how long it was then.

    Attributes:
        stopped: row -> tokens that it has, of rows that a string ended.
    """

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, [each for each in stop if each]
        self.stopped: dict[int, int] = {}
        self.tail = 4 * max((len(each) for each in self.stop), default=0) + _TAIL  # a letter may be four tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        count = input_ids.shape[1] - self.start
        if self.stop and count > 0:
            for index, row in enumerate(input_ids[:, self.start :][:, -self.tail :].tolist()):
                if index not in self.stopped and any(each in self.tokenizer.decode(row) for each in self.stop):
                    self.stopped[index] = count
        return torch.tensor([index in self.stopped for index in range(input_ids.shape[0])], device=input_ids.device)
