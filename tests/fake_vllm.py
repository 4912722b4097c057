"""A ``vllm`` that has the names which the commands call, and no model: for order, failures and arguments, not for what is answered.

An answer's tokens are ``tokens_of`` its picture; requests end in another order than they came.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest

from dyrate_kernels.engines.vllm import presence

FULL_PROMPT = 40  # tokens of every prompt, of which visual:
VISUAL, KEPT = 16, 4.0


def tokens_of(picture: Any) -> list[int]:
    """Tokens, from 5 on, that tell one picture from another."""
    red, green, blue = picture.resize((1, 1)).getpixel((0, 0))
    return [5 + red % 97, 5 + green % 97, 5 + blue % 97][: 1 + red % 3]


class Engine:
    """Stands for ``LLMEngine``: computes ``max_num_seqs`` requests at a time; ``broken`` widths of pictures are refused, ``cut`` ones
    have no room for a whole answer."""

    def __init__(self, most: int, broken: tuple[int, ...], cut: tuple[int, ...]) -> None:
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=most))
        self.engine_core = SimpleNamespace(shutdown=self._end)
        self.waiting: list[tuple[str, Any, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.seen, self.most_seen, self.ended, self.broken, self.cut = 0, 0, False, broken, cut
        self.dies_after: int | None = None

    def _end(self) -> None:
        self.ended = True

    def add_request(self, name: str, asked: dict[str, Any], params: Any) -> str:
        (picture,) = asked["multi_modal_data"]["image"]
        if picture.width in self.broken:
            raise ValueError(f"{picture.width} is too wide")
        self.waiting.append((name, picture, params))
        self.most_seen = max(self.most_seen, len(self.waiting))
        return f"{name}-x"

    def abort_request(self, names: list[str]) -> None:
        self.waiting = [each for each in self.waiting if each[0] not in names]

    def step(self) -> list[Any]:
        self.seen += 1
        if self.dies_after is not None and self.seen > self.dies_after:
            raise RuntimeError("the engine is dead")
        at = min(len(self.waiting), self.vllm_config.scheduler_config.max_num_seqs) - 1  # the youngest that is computed ends first
        name, picture, params = self.waiting.pop(at)
        tokens = tokens_of(picture)[: params.max_tokens]
        self.figures.append({"request": f"{name}-x", "kept": KEPT})
        prompt = [3] * VISUAL + [9] * (FULL_PROMPT - VISUAL)
        answer = SimpleNamespace(token_ids=tokens, finish_reason="length" if picture.width in self.cut else "stop")
        return [SimpleNamespace(request_id=name, finished=True, outputs=[answer], prompt_token_ids=prompt, metrics=None)]


class LLM:
    """Attributes of the class: made (every one), broken, cut, dies_after: of the next ones."""

    made: list[LLM] = []
    broken: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    dies_after: int | None = None

    def __init__(self, **arguments: Any) -> None:
        assert all(other.llm_engine.ended for other in LLM.made), "an engine was started beside another one"
        self.arguments = arguments
        self.llm_engine = Engine(arguments.get("max_num_seqs", 3), LLM.broken, LLM.cut)
        self.llm_engine.dies_after = LLM.dies_after
        LLM.made.append(self)

    def collective_rpc(self, name: str) -> list[list[dict[str, Any]]]:
        assert name == "dyrate_report"
        return [self.llm_engine.figures]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Within: ``import vllm`` gives this one."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.__version__, module.LLM = "0.32.0", LLM  # type: ignore[attr-defined]
    module.SamplingParams = lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
    parts = {
        "sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY="final")},
        "platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
    }
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name, names in parts.items():
        part = types.ModuleType(f"vllm.{name}")
        vars(part).update(names)
        monkeypatch.setitem(sys.modules, f"vllm.{name}", part)
    monkeypatch.setattr(presence, "state", lambda: {"why_not": None})
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "broken", ())
    monkeypatch.setattr(LLM, "cut", ())
    monkeypatch.setattr(LLM, "dies_after", None)
    return LLM


__all__ = ["FULL_PROMPT", "KEPT", "LLM", "VISUAL", "fake_vllm", "tokens_of"]
