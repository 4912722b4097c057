"""Timing generations: clocks on the host and on the device, the unpatched model's captured twin, and whether results are right."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, StaticCache, StoppingCriteria, StoppingCriteriaList

import dyrate_kernels as dk
from dyrate_kernels import answering
from dyrate_kernels.generation import cpu_step
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.measuring import timing
from dyrate_kernels.measuring.timing import Times
from dyrate_kernels.patching import calls
from dyrate_kernels.patching.graph import CudaRecorder
from dyrate_kernels.patching.lookup import cache_in, cache_name, decoder_layers, stored_weights
from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View
from dyrate_kernels.policies.none import KeepAll
from dyrate_kernels.policies.schedule import Schedule
from dyrate_kernels.policies.uniform import able_tokens
from dyrate_kernels.spacing import evenly_spaced
from dyrate_kernels.triton_kernels import interpreted

LIMIT = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float32: 1e-3}  # of the relative error of the logits
GATED = 4  # sequences that the gate looks at
GATE_TOKENS = 12  # of each of its answers: the published schedule shrinks at steps 5 and 10 of decoding
REHEARSED = 5  # in Triton's interpreter, where one takes seconds
AHEAD = 2_000_000  # clock cycles the device waits before a timed replay, so that the host is done launching it: about 1 ms
WARM = 4  # tokens whose times do not count: the first steps compile, warm up and capture


class Timeline(NamedTuple):
    """Seconds from the start of one ``generate()``.

    Attributes:
        encode: until the language model's first layer began: vision tower, projector, and what is prepared beside them.
        tokens: until the scores of each token were there.
        whole: until it had returned, and the device was done.
    """

    encode: float
    tokens: tuple[float, ...]
    whole: float

    def gaps(self, new_tokens: int | None = None) -> list[float]:
        """Seconds between tokens, of the steps that count, of the first ``new_tokens`` tokens."""
        times = self.tokens[:new_tokens]
        gaps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
        return gaps[left_out(len(gaps)) :]

    def request(self, new_tokens: int) -> float:
        """Seconds of a request for so many tokens: until the last of them, and what this one took behind its own last."""
        return self.tokens[new_tokens - 1] + self.whole - self.tokens[-1]


class Clock(LogitsProcessor):
    """Notes when the language model begins and when the scores of each token are there; times replays, where it is told to.

    On a CUDA device these are events, which nobody waits for before the end: between tokens there is no host sync that a ``generate()``
    without this clock has not. The device is idle when the clock is made, so times count from then on. On a CPU it is the host's clock.

    Args:
        model: whose ``generate()`` follows.
        handle: of a patched model whose steps are captured: replays are timed, and each of them waits (``AHEAD``), so that the other times
            of this clock mean nothing then.
    """

    def __init__(self, model: Any, handle: Any = None) -> None:
        self.handle = handle
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._wrapped: Any = None
        self._cuda = next(model.parameters()).is_cuda
        self._begun: Any = None
        self._tokens: list[Any] = []
        self._hook = decoder_layers(model)[0].register_forward_pre_hook(self._begins)
        if self._cuda:
            torch.cuda.synchronize()
        self._start = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begins(self, module: Any, args: Any) -> None:
        self._hook.remove()  # once: no decode step finds a hook
        self._begun = self._now()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._tokens.append(self._now())
        if self.handle is not None:
            call = calls.current(self.handle)
            run = None if call is None else call.graph
            if run is not None and run.captured is not None and run.captured is not self._wrapped:
                self._wrapped = run.captured
                run.captured.replay = self._timed(run.captured.replay)
        return scores

    def _timed(self, replay: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            start.record()
            replay()
            end.record()
            self.marks.append((start, end))

        return timed

    def replays(self) -> Times:
        """Device time of the replays but the first (where there are more)."""
        torch.cuda.synchronize()
        return timing.summary([start.elapsed_time(end) * 1e-3 for start, end in self.marks[1:] or self.marks])

    def close(self) -> None:
        """Takes the clock's hook off the model, where ``generate()`` never got so far."""
        self._hook.remove()

    def timeline(self) -> Timeline:
        """Returns the times of the ``generate()`` that has just returned. Waits for the device."""
        end = self._now()
        if self._cuda:
            torch.cuda.synchronize()

        def seconds(mark: Any) -> float:
            return float(self._start.elapsed_time(mark)) * 1e-3 if self._cuda else float(mark - self._start)

        return Timeline(seconds(self._begun), tuple(map(seconds, self._tokens)), seconds(end))


class StopAfter(StoppingCriteria):
    """Ends an answer early: its caches and compiled steps are those of the whole one.

    Args:
        new_tokens: of the answer.
    """

    def __init__(self, new_tokens: int) -> None:
        self.left = new_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        self.left -= 1
        return torch.full((input_ids.shape[0],), self.left <= 0, dtype=torch.bool, device=input_ids.device)


def left_out(steps: int) -> int:
    """Returns how many of ``steps`` decode steps, the first ones, do not count: of a long answer ``WARM``, else one if another is left."""
    return WARM if steps > 2 * WARM else min(1, max(steps - 1, 0))


def generate(model: Any, fields: dict[str, Tensor], new_tokens: int, processor: LogitsProcessor | None = None, **options: Any) -> Any:
    """Greedy, exactly ``new_tokens`` tokens, whatever the checkpoint's generation defaults."""
    processors = [] if processor is None else [processor]
    given = answering.settings(model, new_tokens) | {"min_new_tokens": new_tokens, "logits_processor": processors}
    for name in ("stop_strings", "forced_eos_token_id"):
        if getattr(model.generation_config, name, None) is not None:
            given[name] = None
    return model.generate(**fields, **given | options)


def weight_bytes(model: Any) -> int:
    """Weights that a decode step reads: the decoder and the output head, without the embedding table (but for a head tied to it)."""
    return stored_weights(model, embedding=False)


def kv_bytes(model: Any, batch: int, visual: float, text: float, kept: float, k: int) -> int:
    """Live keys and values that one step reads: all rows below layer ``k``, from there on ``kept`` (a fraction) of the visual ones."""
    shape = ModelShape.from_config(model.config)
    rows = k * (visual + text) + (shape.num_layers - k) * (visual * kept + text)
    return int(2 * batch * rows * shape.num_kv_heads * shape.head_dim * next(model.parameters()).element_size())


def visual_tokens(model: Any, fields: dict[str, Tensor]) -> int:
    """Of a sequence; the most where they differ."""
    ids = [model.config.image_token_id, getattr(model.config, "video_token_id", None)]
    return int(sum((fields["input_ids"] == token).sum(1) for token in ids if token is not None).max())


def held_bytes(output: Any) -> int:
    """Bytes of the keys and values in the cache that ``generate(return_dict_in_generate=True)`` of an unpatched model returned."""
    cache = cache_in(output)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)


# ---- whether results are right ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def operators_only() -> Iterator[None]:
    """Within: steps on a CPU go through the reference operators, too."""
    before, cpu_step.enabled = cpu_step.enabled, False
    try:
        yield
    finally:
        cpu_step.enabled = before


@dataclass(frozen=True)
class EvenSchedule(Schedule):
    """A schedule of evenly spaced tokens: which ones stay depends on no score."""

    name: ClassVar[str] = "even schedule"

    def decide(self, view: View) -> Decision:
        decision = super().decide(view)
        decision.score = evenly_spaced(decision.count, able_tokens(view)).to(torch.float32)
        return decision


class Repeat(LogitsProcessor):
    """Lets an answer repeat another one's tokens ``[B, steps]``, so that every step of both can be compared."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[:, self.step : self.step + 1]
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


class Answer(NamedTuple):
    """Tokens ``[B, steps]`` and the logits ``[B, V]`` of each of the first ``GATE_TOKENS`` steps."""

    tokens: Tensor
    logits: tuple[Tensor, ...]


def answer(model: Any, fields: dict[str, Tensor], like: Answer | None = None, new_tokens: int | None = None, **options: Any) -> Answer:
    """Greedy, or with the tokens of another answer; as long as the gate's answers are, unless asked otherwise."""
    new_tokens = new_tokens or (REHEARSED if interpreted() else GATE_TOKENS)
    repeat = None if like is None else Repeat(like.tokens)
    output = generate(model, fields, new_tokens, repeat, output_logits=True, return_dict_in_generate=True, **options)
    # not the output itself: it holds the cache
    return Answer(output.sequences[:, fields["input_ids"].shape[1] :], output.logits[:GATE_TOKENS])


def difference(got: Answer, want: Answer) -> tuple[float, int]:
    """(largest relative error of a step's logits as long as the tokens agree, how many steps were compared). NaN where one is."""
    worst, steps, same = 0.0, 0, torch.ones(got.tokens.shape[0], dtype=torch.bool, device=got.tokens.device)
    for step, (a, b) in enumerate(zip(got.logits, want.logits, strict=True)):
        if not same.any():
            break
        worst, steps = _worse(worst, timing.relative(a[same], b[same])), step + 1
        same &= got.tokens[:, step] == want.tokens[:, step]
    return worst, steps


def _worse(a: float, b: float) -> float:
    """The larger one; NaN where one is (``max`` would lose it)."""
    return a if b <= a or a != a else b


PLAIN: dict[str, Any] = {"cuda_graph": False, "fuse": False}  # arguments of ``patch``: the reference that others are compared with


def switches(fuse: bool | None) -> dict[str, Any]:
    """Returns arguments of ``patch`` for steps that are not captured, fused or not; None: none, ``patch`` chooses."""
    return {} if fuse is None else {"cuda_graph": False, "fuse": fuse}


def logits_gate(
    model: Any, fields: dict[str, Tensor], policy: Policy, retention: str, backend: str, fuse: bool | None = False,
    known: dict[Any, float] | None = None, *, vision: str | None = None, pool: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns whether answers of ``GATE_TOKENS`` tokens (``REHEARSED`` in Triton's interpreter) are right under a policy.
    What they are compared with is never fused.

    - Keeping every token: logits against the unpatched model's, and against the reference operators'.
    - Dropping, in three steps, to evenly spaced tokens: against the reference operators, which read the same rows.
    - Dropping by the policy's own ranking: the same, as long as the tokens agree (``steps_compared``). Both may differ by a few rows:
      random weights attend so evenly that the score of the last kept row and that of the first dropped one are closer than bfloat16
      resolves; there the limit is twice as wide. (Chosen after the first run on an H200, where 0.074 failed the single limit at B=1;
      keeping all gave 0.033.)
    - Retention ``evict``: which rows the cache holds after two steps that moved rows (:func:`compaction_error`).

    Args:
        fuse: None: ``patch`` is given no switch, and chooses.
        known: errors of earlier calls for the same model, fields and backend, which are then not computed again. Written to.
        vision: reducers; with them the policy's own ranking is compared, with the reference operators behind the same reducers.
        pool: share of the visual tokens that retention ``pool`` holds; without a choice, as policy none has none, that is ``recoverable``.
    """
    limit = LIMIT[next(model.parameters()).dtype]
    known = {} if known is None else known
    k = fitting_k(model, policy)
    how: dict[str, Any] = {"retention": retention, "backend": backend, **switches(fuse)}
    pooled = how if pool is None else how | {"pool": pool}
    whole = how if pool is None else how | {"retention": "recoverable"}
    behind = {} if vision is None else {"vision": vision}
    visual = visual_tokens(model, fields)

    def once(find: Callable[[], float], *key: Any) -> float:
        if key not in known:
            known[key] = find()
            timing.release()
        return known[key]

    def against_unpatched() -> float:
        want = answer(model, fields)
        with dk.patch(model, KeepAll(k), **whole):
            got = answer(model, fields, want)
        return difference(got, want)[0]

    def key(what: str, given: dict[str, Any]) -> tuple[Any, ...]:
        return what, k, *given.items()

    errors = {"keeping_all_of_unpatched": once(against_unpatched, *key("unpatched", whole))}
    if not policy.drops:
        errors["keeping_all"] = once(lambda: _reference_error(model, fields, KeepAll(k), whole | behind)[0], *key("all", whole | behind))
        return timing.correctness(limit, **errors)
    even = EvenSchedule(k, [(step, max(visual // part, 1)) for step, part in ((0, 2), (2, 4), (4, 8))])
    errors["same_rows"] = once(lambda: _reference_error(model, fields, even, pooled)[0], *key("even", pooled))
    own, steps = _reference_error(model, fields, policy, pooled | behind, free=True)
    errors["half_of_own_ranking"] = own / 2
    if retention == "evict":
        errors["compacted_rows"] = once(lambda: compaction_error(model, fields, k, backend, fuse), "rows", k, fuse)
    return timing.correctness(limit, **errors) | {"steps_compared": steps}


def fitting_k(model: Any, policy: Policy | None = None) -> int:
    """The policy's k, or its default, but one that the model has layers for."""
    return min((None if policy is None else policy.k) or 3, ModelShape.from_config(model.config).num_layers - 1)


def _reference_error(
    model: Any, fields: dict[str, Tensor], policy: Policy, how: dict[str, Any], free: bool = False
) -> tuple[float, int]:  # fmt: skip
    """:func:`difference` from the reference operators; these repeat the tokens, or with ``free`` find their own."""
    with dk.patch(model, policy, **how):
        got = answer(model, fields)
    with dk.patch(model, policy, **how | PLAIN | {"backend": "reference"}), operators_only():
        want = answer(model, fields, None if free else got)
    return difference(got, want)


def compaction_error(model: Any, fields: dict[str, Tensor], k: int, backend: str, fuse: bool | None = False) -> float:
    """Largest relative error of a visual row of the pruned layers after two steps that moved rows; 1 where tokens other than those chosen
    are held.

    The prompt keeps every token, so the same answer, but stopped before its first decode step, gives an unpruned cache with the same rows,
    to the bit, in every layer. From there those that should be left are gathered on the host: neither an operator nor the cache's own
    list of tokens says which those are.
    """
    how: dict[str, Any] = {"retention": "evict", "backend": backend, **switches(fuse)}
    visual = visual_tokens(model, fields)
    counts = [max(visual // part, 1) for part in (2, 5)]
    even = EvenSchedule(k, [(1, counts[0]), (3, counts[1])])
    with dk.patch(model, even, **how), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was dropped
        store = cache_in(generate(model, fields, 1, return_dict_in_generate=True)).store
    every = store.groups[1].n_visual.tolist()
    if max(every) != visual:
        return 1.0
    order = [tokens[:count].argsort() for tokens, count in zip(store.groups[1].token.cpu(), every, strict=True)]
    layers = store.groups[1].layers
    # on the host, so that both caches need not fit into the GPU's memory at once
    whole = {layer: [rows[index] for rows, index in zip(_visual_rows(store, layer), order, strict=True)] for layer in layers}
    del store
    timing.release()
    with dk.patch(model, even, **how):
        store = cache_in(generate(model, fields, 5, return_dict_in_generate=True)).store
    held = [tokens[:count] for tokens, count in zip(store.groups[1].token.cpu(), store.groups[1].n_visual.tolist(), strict=True)]
    for tokens, whole_count in zip(held, every, strict=True):
        able = torch.ones(1, whole_count, dtype=torch.bool)
        for count in counts:
            able = evenly_spaced(torch.tensor([count]), able)
        if sorted(tokens.tolist()) != able[0].nonzero()[:, 0].tolist():
            return 1.0
    worst = 0.0
    for layer in layers:
        for got, rows, tokens in zip(_visual_rows(store, layer), whole.pop(layer), held, strict=True):
            want = rows[tokens].double()
            error = (got.double() - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30)
            worst = _worse(worst, float(error.max()) if len(error) else 0.0)
    return worst


def _visual_rows(store: RowStore, layer: int) -> list[Tensor]:
    """Of each sequence: the live visual rows of a layer, ``[n, Hkv * 2D]`` with keys and values side by side, on the host."""
    counts = store.group_of[layer].n_visual.tolist()
    buffers = [buffer[:, :, : max(counts)].cpu().transpose(1, 2) for buffer in store.buffers(layer)]
    return [torch.cat(buffers, -1)[sequence, :count].flatten(1) for sequence, count in enumerate(counts)]


def unpatched_gate(model: Any, fields: dict[str, Tensor], new_tokens: int, **options: Any) -> dict[str, Any]:
    """The unpatched model's logits with these options of ``generate()`` against those without: over a DynamicCache, the same tokens. The
    answer ends after ``GATE_TOKENS``, but its cache is one for ``new_tokens``: what is compiled for it is what is timed.
    """

    def ended() -> dict[str, Any]:
        return {"stopping_criteria": StoppingCriteriaList([StopAfter(min(new_tokens, GATE_TOKENS))])}

    want = answer(model, fields, None, new_tokens, **ended())
    got = answer(model, fields, want, new_tokens, **ended(), **options)
    return timing.correctness(LIMIT[next(model.parameters()).dtype], of_dynamic_cache=difference(got, want)[0])


# ---- the unpatched model, captured ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def static_twin(model: Any, fields: dict[str, Tensor], steps: int) -> tuple[Times, Tensor]:
    """(device time of a captured decode step of the unpatched model over a StaticCache, its first logits)."""
    batch, length = fields["input_ids"].shape
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + steps + 8)
    given = {name: value for name, value in fields.items() if name != "attention_mask"}
    logits = model(**given, **{cache_name(): cache}, logits_to_keep=1).logits[:, -1:]
    logits[..., model.config.image_token_id] = float("-inf")
    token = logits.argmax(-1)
    device = token.device
    position = torch.full((1,), length, dtype=torch.int64, device=device)
    live = torch.zeros(batch, 1, 1, length + steps + 8, dtype=torch.bool, device=device)  # a 4D mask is taken as it is: no host sync
    live[..., : length + 1] = True

    def step() -> Tensor:
        return model(
            input_ids=token, **{cache_name(): cache}, position_ids=position.expand(batch, 1), cache_position=position, attention_mask=live,
            logits_to_keep=1,
        ).logits  # fmt: skip

    if device.type != "cuda":
        first = step()
        begin = time.perf_counter()
        step()
        return timing.summary([time.perf_counter() - begin]), first
    recorder = CudaRecorder(device)
    with recorder.warm_up():
        first = step().clone()
        step()
    replay, _ = recorder.record(step)
    marks = []
    for _ in range(min(steps, 20)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        start.record()
        replay()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return timing.summary([start.elapsed_time(end) * 1e-3 for start, end in marks[1:]]), first
