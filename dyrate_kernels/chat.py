"""Conversations and their pictures as what a model reads: the one place where a command's prompts and a training's answers are made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, Any]
"""``{"role": "user" | "assistant", "content": [{"type": "image"} | {"type": "text", "text": ..}, ..]}``."""


def user(text: str, images: int = 0) -> Message:
    """A user's message: so many pictures, then the text."""
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def render(processor: Any, messages: list[Message], answer_follows: bool = True) -> str:
    """The conversation by the processor's own chat template; in LLaVA-1.5's format where it has none."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(messages, add_generation_prompt=answer_follows)
    lines = []
    for message in messages:
        parts = ["<image>" if part["type"] == "image" else part["text"] for part in message["content"]]
        lines.append(f"{'USER' if message['role'] == 'user' else 'ASSISTANT'}: " + "\n".join(parts))
    return " ".join([*lines, "ASSISTANT:"] if answer_follows else lines)


def encode(processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]], model: Any = None) -> dict[str, Tensor]:
    """Model inputs for rendered conversations: tensors of B rows, padded on the left.

    What begins a sequence stands there once where the chat template writes it, the tokenizer puts it there, or both do; where neither does
    it is not added, as the model was trained without. What a tokenizer puts behind a text is left out: an answer follows.

    Args:
        texts: of :func:`render`, B of them.
        pictures: PIL pictures of each text, in the order of its marks.
        model: whose device and floating-point type the tensors get; None: as the processor makes them.

    Raises:
        Whatever the processor raises.
    """
    import torch

    tokenizer = processor.tokenizer
    texts, options, behind = _begun(tokenizer, texts)
    with _able_to_pad(tokenizer, len(texts)) as padding:
        images = [list(each) for each in pictures if len(each)]
        fields = dict(processor(images=images or None, text=texts, return_tensors="pt", **padding, **options))
    fields = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    columns = fields["input_ids"].shape
    if behind and bool((fields["input_ids"][:, -len(behind) :] == torch.tensor(behind)).all()):
        fields = {name: value[:, : -len(behind)] if value.shape[:2] == columns else value for name, value in fields.items()}
    return fields if model is None else placed(fields, model)


def token_ids(processor: Any, text: str) -> list[int]:
    """A rendered conversation as an engine takes it that places pictures itself: the ids of :func:`encode`, but that each mark of a picture
    is as the chat template writes it, not yet as many tokens as the picture has.
    """
    (text,), options, behind = _begun(processor.tokenizer, [text])
    ids = list(processor.tokenizer(text, **options)["input_ids"])
    return ids[: -len(behind)] if behind and ids[-len(behind) :] == behind else ids


def placed(fields: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The tensors on the model's device, floating-point ones in its type."""
    return {name: value.to(model.device, model.dtype if value.is_floating_point() else None) for name, value in fields.items()}


def _begun(tokenizer: Any, texts: Sequence[str]) -> tuple[list[str], dict[str, Any], list[int]]:
    """Texts that begin as :func:`encode` says, options to tokenize them with, and token ids behind them that are to be left out."""
    before, behind = _around(tokenizer)
    begin = "".join(tokenizer.convert_ids_to_tokens(before))
    written = [text for text in (begin, getattr(tokenizer, "bos_token", None)) if text]
    begun = [text.lstrip().startswith(tuple(written)) if written else False for text in texts]
    if not (before and any(begun)):
        return list(texts), {}, behind
    return [text.lstrip() if done else begin + text for text, done in zip(texts, begun, strict=True)], {"add_special_tokens": False}, []


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and behind a text of its own accord."""
    whole, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return [], []


@contextlib.contextmanager
def _able_to_pad(tokenizer: Any, rows: int) -> Iterator[dict[str, Any]]:
    """Lets so many rows be padded on the left. A tokenizer without a padding token pads with its end token meanwhile: the mask hides it."""
    if rows == 1:
        yield {}
        return
    missing = tokenizer.pad_token is None
    if missing:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    try:
        yield {"padding": True, "padding_side": "left"}
    finally:
        if missing:
            tokenizer.pad_token = None


def answer_ids(processor: Any, messages: list[Message], text: str) -> list[int]:
    """Token ids of an answer as a generation after ``render(processor, messages)`` would give them, its end included, once: the special
    token that the chat template writes behind an answer, else the tokenizer's end of sequence.
    """
    tokenizer = processor.tokenizer
    prompt = render(processor, messages)
    whole = render(processor, [*messages, assistant(text)], answer_follows=False)
    behind = whole[len(prompt) :] if whole.startswith(prompt) else f" {text}"
    said = behind.rfind(text.strip())
    tail = behind[said + len(text.strip()) :] if said >= 0 else ""
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    after = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    special = set(getattr(tokenizer, "all_special_ids", ())) | {tokenizer.eos_token_id}
    ends = [index for index, token in enumerate(after) if token in special]
    if ends:
        return ids[: len(ids) - (len(after) - 1 - ends[0])]
    end = tokenizer.eos_token_id
    while ids and end is not None and not tokenizer.decode(ids[-1:]).strip():
        ids = ids[:-1]  # a template's newline behind the answer
    return ids if end is None else [*ids, end]
