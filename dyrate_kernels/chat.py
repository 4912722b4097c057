"""A conversation as the text that a processor reads."""

from __future__ import annotations

from typing import Any

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


def answer_ids(processor: Any, messages: list[Message], text: str) -> list[int]:
    """Token ids of an answer as a generation after ``render(processor, messages)`` would give them, end of sequence included."""
    tokenizer = processor.tokenizer
    prompt = render(processor, messages)
    whole = render(processor, [*messages, assistant(text)], answer_follows=False)
    behind = whole[len(prompt) :] if whole.startswith(prompt) else f" {text}"
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    while ids and end is not None and ids[-1] != end and not tokenizer.decode(ids[-1:]).strip():
        ids = ids[:-1]  # a template's newline behind the end
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
