"""Two generations that take turns, token by token: the model as it is, and the pruned one. Each is timed only while it has its turn."""

from __future__ import annotations

import contextlib
import copy
import queue
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

import dyrate_kernels as dk
from dyrate_kernels import answering, chat, specs, vision
from dyrate_kernels.bundled import MODEL_FOLDER
from dyrate_kernels.patching.api import shape_for
from dyrate_kernels.patching.vision import check_reducers
from dyrate_kernels.policies.base import Policy

SIDES = ("plain", "pruned")
_SHOW_EVERY = 2  # tokens between two looks at what is kept: each reads the device
_DRAWN = 5.0  # seconds that a generation waits for the page to draw


@dataclass(frozen=True)
class Wish:
    """A visitor's request.

    Attributes:
        question: about the picture.
        policy: a name of ``policies.names()``.
        strength: how much to prune, 0 .. 1 (``Policy.at_strength``).
        retention: as ``patch`` takes it.
        vision: a reducer before the language model, or None.
        max_new_tokens: of each answer.
        frames: how often the model is shown the picture, as a video that stands still: so many times its visual tokens.
    """

    question: str
    policy: str = "dyrate"
    strength: float = 0.5
    retention: str = "recoverable"
    vision: str | None = None
    max_new_tokens: int = 96
    frames: int = 1


@dataclass
class Side:
    """One answer so far.

    Attributes:
        text: decoded.
        tokens: how many; seconds: of its own turns; first: of these until the first token; each: of each token after it.
        done: it ended.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    first: float = 0.0
    each: tuple[float, ...] = ()
    done: bool = False

    @property
    def per_token(self) -> float | None:
        """Seconds of a token after the first, the median: what else the machine does in between does not count."""
        return statistics.median(self.each) if self.each else None


@dataclass
class State:
    """The answers so far, as the page shows them.

    Attributes:
        plain, pruned: the answers.
        visual_tokens: of the picture, before any reducer.
        kept: by step, the visual tokens that the pruned layers read, as places among those.
        read: of the visual rows, the share that the pruned answer read, mean over steps and layers; None until it is known.
        bytes_read: of the unpruned model's decode steps, weights included, likewise.
        bytes_per_token: that a decode step reads: of the unpruned model, and of the pruned one; None until it is known.
        method: what ran, in words.
        company: how many comparisons were at work at a time, at most.
    """

    plain: Side = field(default_factory=Side)
    pruned: Side = field(default_factory=Side)
    visual_tokens: int = 0
    kept: list[list[int]] = field(default_factory=list)
    read: float | None = None
    bytes_read: float | None = None
    bytes_per_token: tuple[float, float] | None = None
    method: str = ""
    company: int = 1


class Engine:
    """Compares, for any number of visitors at a time.

    Args:
        model: as ``patch`` takes it; its weights are shared by all comparisons, and never changed.
        processor: of the model.

    Attributes:
        bundled: the model is the one that comes with this package.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.shape = shape_for(model, "recoverable")
        self.bundled = self.shape.folder is not None and Path(self.shape.folder) == MODEL_FOLDER
        self._warm: set[int] = set()  # lengths of prompts that the model has read
        self._working = 0
        self._count = threading.Lock()

    def methods(self) -> list[str]:
        """Policies that have one knob for this model, and ``none``."""
        found = []
        for name in dk.policies.names():
            with contextlib.suppress(ValueError, TypeError):
                dk.policies.get(name).bind(self.shape).at_strength(0.5, self.shape.num_layers)
                found.append(name)
        return [*found, "none"]

    def reducers(self) -> list[str]:
        """Those before the language model that this model can have; empty where it can have none."""
        found = []
        for name in vision.names():
            with contextlib.suppress(TypeError):
                check_reducers(self.model, chain := vision.chain(name))
                found += [name for reducer in chain if not reducer.videos_only]
        return found

    def policy(self, wish: Wish) -> Policy:
        """Makes the policy that the wish asks for."""
        if wish.policy == "none":
            return dk.policies.KeepAll()
        bound = dk.policies.get(wish.policy).bind(shape_for(self.model, wish.retention))
        return bound.at_strength(wish.strength, self.shape.num_layers)

    def suited(self, policy: str, retention: str) -> str:
        """Returns the retention, or the next one that a policy can have."""
        bound = self.policy(Wish("", policy))
        return next(name for name in (retention, "evict", "recoverable") if specs.retention(name).suits(bound))

    def compare(self, picture: Any, wish: Wish) -> Iterator[State]:
        """States as the two answers grow; the last one has everything. A visitor who leaves closes it, and both generations end.

        Raises:
            ValueError: there is no picture or question, or the wish does not fit the model; raised at the first ``next``.
        """
        if picture is None:
            raise ValueError("Choose a picture first: drop a file on the left, or click an example.")
        if not wish.question.strip():
            raise ValueError("Ask something about the picture.")
        with self._company() as company:
            models = {side: twin(self.model) for side in SIDES}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                handle = dk.patch(
                    models["pruned"], self.policy(wish), retention=wish.retention, vision=wish.vision or None, record_importance=True
                )
            inputs = self._inputs(picture, wish)
            if (length := inputs["input_ids"].shape[1]) not in self._warm:  # else the side that begins pays for what runs first
                answering.generate(self.model, self.processor, inputs, 2)
                self._warm.add(length)
            turns = _Turns(handle, self.processor, wish)
            threads = [
                threading.Thread(target=turns.generate, args=(side, models[side], inputs, wish.max_new_tokens), daemon=True)
                for side in SIDES
            ]
            state = State(method=str(wish.policy))
            try:
                for thread in threads:
                    thread.start()
                while not (state.plain.done and state.pruned.done):
                    side, change = turns.news.get()
                    if isinstance(change, BaseException):
                        raise ValueError(f"The {'unpruned' if side == 'plain' else 'pruned'} model failed: {change}") from change
                    setattr(state, side, change.side)
                    if change.kept is not None:
                        state.kept, state.visual_tokens = change.kept, change.visual_tokens
                        state.read, state.bytes_read, state.bytes_per_token = change.read, change.bytes_read, change.bytes_per_token
                    state.company = company()
                    yield replace(state)
                    turns.shown()
            finally:
                turns.stop()
                for thread in threads:
                    thread.join(timeout=60)

    def _inputs(self, picture: Any, wish: Wish) -> dict[str, Any]:
        text = chat.render(self.processor, [chat.user(wish.question, images=wish.frames)])
        try:
            inputs = chat.encode(self.processor, [text], [[picture] * wish.frames], self.model)
        except Exception as error:
            raise ValueError(f"The picture cannot be prepared for this model: {error}") from error
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1] + wish.max_new_tokens
        if limit is not None and length > limit:
            raise ValueError(f"Question, picture and answer would be {length} tokens; this model reads {limit}. Ask something shorter.")
        return inputs

    @contextlib.contextmanager
    def _company(self) -> Iterator[Any]:
        """Within: this comparison counts; calls of what it yields give the most that were at work at a time since."""
        most = 1
        with self._count:
            self._working += 1

        def seen() -> int:
            nonlocal most
            most = max(most, self._working)
            return most

        try:
            yield seen
        finally:
            with self._count:
                self._working -= 1


def twin(model: Any) -> Any:
    """A copy of the modules over the same weights: patching it leaves the original as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


@dataclass
class _Change:
    side: Side
    kept: list[list[int]] | None = None
    visual_tokens: int = 0
    read: float | None = None
    bytes_read: float | None = None
    bytes_per_token: tuple[float, float] | None = None


class _Turns(StoppingCriteria):
    """Hands the turn from one generation to the other after each token, and tells what came."""

    def __init__(self, handle: Any, processor: Any, wish: Wish) -> None:
        self.handle, self.processor, self.wish = handle, processor, wish
        self.news: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.change = threading.Condition()
        self.turn, self.running, self.stopped = SIDES[0], set(SIDES), False
        self.unseen = 0  # news that the page has not drawn yet

    def stop(self) -> None:
        """Both generations end after the token that is under way."""
        with self.change:
            self.stopped = True
            self.change.notify_all()

    def tell(self, side: str, change: _Change) -> None:
        """Hands a change to the page and waits until it is drawn, so that no side's time holds the drawing of the other one's."""
        with self.change:
            self.unseen += 1
            self.news.put((side, change))
            self.change.wait_for(lambda: self.unseen == 0 or self.stopped, timeout=_DRAWN)

    def shown(self) -> None:
        """The page has drawn a change."""
        with self.change:
            self.unseen -= 1
            self.change.notify_all()

    def _wait(self, side: str) -> None:
        with self.change:
            self.change.wait_for(lambda: self.turn == side or self.stopped)

    def _hand_over(self, side: str) -> None:
        other = SIDES[1 - SIDES.index(side)]
        with self.change:
            if other in self.running:
                self.turn = other
                self.change.notify_all()

    def generate(self, side: str, model: Any, inputs: dict[str, Any], most: int) -> None:
        """Runs in a thread of its own."""
        step = _Step(self, side, inputs["input_ids"].shape[1], model.device)
        try:
            self._wait(side)
            if not self.stopped:
                step.start()
                answering.generate(model, self.processor, inputs, most, stopping_criteria=[step])
                step.finish()
        except BaseException as error:  # told to the visitor, whatever it is
            self.news.put((side, error))
        finally:
            with self.change:
                self.running.discard(side)
                self.turn = SIDES[1 - SIDES.index(side)]
                self.change.notify_all()

    def pruning(self) -> dict[str, Any]:
        """Returns the tokens that the pruned model has kept so far, for ``_Change``."""
        stats = self.handle.stats()
        places = None if stats.visual_places is None else stats.visual_places[0]
        kept, steps = [step.kept_tokens[0] for step in stats.steps], max(len(stats.steps) - 1, 1)
        if places is not None:
            kept = [[places[token] for token in step] for step in kept]
        return {
            "kept": kept, "visual_tokens": stats.visual_tokens_in[0], "read": stats.received * stats.visual_share,
            "bytes_read": stats.bytes_read / stats.bytes_read_unreduced if stats.bytes_read_unreduced else None,
            "bytes_per_token": (stats.bytes_read_unreduced / steps, stats.bytes_read / steps),
        }  # fmt: skip


class _Step(StoppingCriteria):
    """Called after each token of one side."""

    def __init__(self, turns: _Turns, side: str, prompt: int, device: torch.device) -> None:
        self.turns, self.side, self.prompt, self.device = turns, side, prompt, device
        self.now = Side()
        self.since = 0.0

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.since = self._clock()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        now = self._clock()
        tokens = input_ids.shape[1] - self.prompt
        took, first = now - self.since, tokens == 1
        text = self.turns.processor.decode(input_ids[0, self.prompt :], skip_special_tokens=True).strip()
        each = () if first else (*self.now.each, took)
        self.now = Side(text, tokens, self.now.seconds + took, took if first else self.now.first, each)
        shown = self.side == "pruned" and (tokens - 1) % _SHOW_EVERY == 0 and tokens > 1
        self.turns.tell(self.side, _Change(self.now, **(self.turns.pruning() if shown else {})))
        self.turns._hand_over(self.side)
        self.turns._wait(self.side)
        self.since = self._clock()
        return torch.full((input_ids.shape[0],), self.turns.stopped, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        done = replace(self.now, done=True)
        self.turns.tell(self.side, _Change(done, **(self.turns.pruning() if self.side == "pruned" else {})))
