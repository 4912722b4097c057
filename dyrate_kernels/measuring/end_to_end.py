"""Whole requests while a model answers them: encode, first token, decode, the whole; throughput, memory; patched and unpatched, each beside
its floor and beside what ``request_model`` predicts.

What is compared, in one run and on the same inputs: the unpatched model through ``generate()`` (SDPA, DynamicCache), the same over a static
cache (which transformers compiles on a GPU; on a GPU also captured by hand), FastV at the same share of tokens, the policy under each
retention, the patched model that keeps everything, the patch without any switch, and each patched one behind reducers. Set-ups take turns
in every round, so that a slow moment of the machine hits all of them. A set-up whose logits are wrong has no speed.

Several lengths of an answer are read off one long run by the clock of its tokens: its first n tokens are those of a request for n, through
the same path (``prefix_of`` says so). A static cache is as long as its answer may be, and every step attends over all of it, so there each
length runs by itself.

The first steps of an answer warm up and are no part of the time of a token (``decoding.left_out``); the times of a request have them all.
``kept``, the floor, and the share that FastV is given are means over the steps that have one; ``kept_by_step`` and ``kept_mean`` are of
all steps.

Floor of a token: the weights and the live keys and values that its step reads, over the bandwidth of a copy measured in the same run
(docs/design.md, section 10). ``predicted_*``: of the request, by that bandwidth and a FLOP rate measured in the same run (docs/costs.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import StoppingCriteriaList

import dyrate_kernels as dk
from dyrate_kernels import request_model
from dyrate_kernels.measuring import decoding, timing
from dyrate_kernels.measuring.decoding import Clock, StopAfter, Timeline, generate
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.request_model import Plan, Rates, Request, VisionShape
from dyrate_kernels.specs import RETENTIONS
from dyrate_kernels.stats import Stats
from dyrate_kernels.triton_kernels import interpreted

Row = dict[str, Any]
UNPATCHED = "unpatched generate(), DynamicCache"
OURS = "dyrate"
NO_SWITCH = "no switch"
WARM_UP = 40  # tokens of an answer that warms up: enough to compile, to capture, and to time replays
PAIRED = "of unpatched: median over the rounds of the ratio within a round; times are medians over all rounds, whose quotient may differ."
COUNTED = "kept, floor: means over the steps whose times count, which leaves out the first ones of an answer."


@dataclass(frozen=True)
class Problem:
    """The task that the model is measured at.

    Attributes:
        name: of the model, as rows carry it.
        model: unpatched.
        make_inputs: batch -> inputs of ``generate`` with so many sequences.
        batch: B.
        new_tokens: of every answer, the longest.
        backend: of the patched model.
        pictures: of each sequence; a picture that is cut into crops is one.
        shorter: numbers of new tokens that are reported beside.
    """

    name: str
    model: Any
    make_inputs: Callable[[int], dict[str, torch.Tensor]]
    batch: int
    new_tokens: int
    backend: str
    pictures: float = 1
    shorter: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """All that is reported, ascending."""
        return sorted({*(each for each in self.shorter if each < self.new_tokens), self.new_tokens})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Setup:
    """One way to run it.

    Attributes:
        label: as rows carry it.
        policy: None for the unpatched model.
        options: more arguments of ``generate``.
        fuse: ``patch(fuse=True)``, and steps are captured on a GPU; None: no switch at all, ``patch`` chooses.
        vision: reducers in front.
        pool: of retention ``pool``.
    """

    label: str
    policy: Policy | None = None
    retention: str = "recoverable"
    options: dict[str, Any] = field(default_factory=dict)
    fuse: bool | None = False
    vision: str | None = None
    pool: float | None = None

    @property
    def name(self) -> str:
        return self.label if self.policy is None else f"{OURS} generate(), {self.label}"

    @property
    def each_length(self) -> bool:
        """Returns whether the length of an answer changes its path, so that none can be read off a longer one."""
        return self.policy is None and bool(self.options)

    def arguments(self, graph: bool, backend: str) -> dict[str, Any]:
        """Returns those of ``patch``."""
        given: dict[str, Any] = {"retention": self.retention, "backend": backend}
        if self.fuse is not None:
            given |= {"cuda_graph": graph, "fuse": self.fuse}
        return given | {name: value for name, value in (("vision", self.vision), ("pool", self.pool)) if value is not None}


@dataclass
class Runs:
    """Results of the rounds of one set-up: their times, and the last round's memory and statistics."""

    setup: Setup
    new_tokens: int
    timelines: list[Timeline] = field(default_factory=list)
    stats: Stats | None = None
    held: int | None = None
    peak: int | None = None
    replays: timing.Times | None = None
    replayed: list[float] = field(default_factory=list)  # the share that each step read which was replayed while the device was timed
    replayed_from: int = 0  # the first of them, counted from 0
    warm: Timeline | None = None
    gate: dict[str, Any] | None = None
    note: str | None = None

    @property
    def wrong(self) -> bool:
        return self.gate is not None and not self.gate["passed"]

    def medians(self, new_tokens: int) -> list[float]:
        """Of each round, the seconds of a token."""
        return [statistics.median(timeline.gaps(new_tokens)) for timeline in self.timelines]

    def seconds(self, new_tokens: int) -> float:
        """A guess of what a run takes, from the one that warmed up."""
        if self.warm is None:
            return 0.0
        token = statistics.median(self.warm.gaps() or [0.0])
        return self.warm.tokens[0] + token * (new_tokens - 1)


def falling_schedule(visual: int, k: int) -> dk.policies.Schedule:
    """The published schedule (288, 144, 72 of 576 from steps 0, 5, 10 on) for ``visual`` tokens."""
    return dk.policies.Schedule(k=k, kept=[(0, max(visual // 2, 1)), (5, max(visual // 4, 1)), (10, max(visual // 8, 1))])


def policies_for(
    model: Any, policy: Policy, label: str, kept: float, fuse: bool = False, vision: str | None = None, pool: float = request_model.POOL
) -> list[Setup]:
    """The patched set-ups.

    Args:
        policy: what is measured.
        kept: the fraction that FastV, which decides once, keeps: the policy's mean over the steps that count.
        fuse: all of them with ``patch(fuse=True)``, and at last the first one without.
        vision: reducers; each set-up comes once more behind them.
        pool: what retention ``pool`` holds, where there is such a one.
    """
    k = decoding.fitting_k(model, policy)
    found = [Setup(f"{label}, recoverable", policy)]
    if not policy.needs_recoverable:
        found.append(Setup(f"{label}, evict", policy, "evict"))
        if "pool" in RETENTIONS and policy.at_decode:
            found.append(Setup(f"{label}, pool of {100 * pool:g} %", policy, "pool", pool=pool))
    if policy.name != "fastv":
        fastv = dk.policies.FastV(k=k, rate=min(max(1 - kept, 0.0), 1.0))
        found.append(Setup(f"FastV at {100 * kept:.1f} %, evict", fastv, "evict"))
    found.append(Setup("dense (policy none)", dk.policies.KeepAll(k=k)))
    plain = found[0]
    if fuse:
        found = [replace(setup, label=f"{setup.label}, fused", fuse=True) for setup in found]
    reduced = [] if vision is None else [replace(setup, label=f"{setup.label}, behind {vision}", vision=vision) for setup in found]
    alone = replace(plain, label=f"{plain.label}, {NO_SWITCH}", fuse=None)
    return [*found, alone, *reduced, *([plain] if fuse else [])]


def unpatched_setups(device: torch.device) -> list[Setup]:
    """Through ``generate()``; on a GPU transformers compiles the steps over a static cache by itself."""
    compiled = ", compiled" if device.type == "cuda" else ", not compiled"
    return [Setup(UNPATCHED), Setup(f"unpatched generate(), StaticCache{compiled}", options={"cache_implementation": "static"})]


def run_once(
    problem: Problem, setup: Setup, fields: dict[str, torch.Tensor], runs: Runs | None, timed_replays: bool = False, stop: int | None = None
) -> None:
    """One answer. With ``runs`` it counts.

    Args:
        timed_replays: the device's time of the steps that are replayed, and nothing else.
        stop: ends after so many tokens, with the room that ``problem.new_tokens`` need.
    """
    cuda = problem.device.type == "cuda"
    if cuda:
        timing.release()
        torch.cuda.reset_peak_memory_stats(problem.device)

    def answer(handle: Any) -> None:
        options = dict(setup.options)
        if stop is not None and stop < problem.new_tokens:
            options["stopping_criteria"] = StoppingCriteriaList([StopAfter(stop)])
        clock = Clock(problem.model, handle if timed_replays else None)
        try:
            output = generate(problem.model, fields, problem.new_tokens, clock, return_dict_in_generate=True, **options)
            timeline = clock.timeline()
        finally:
            clock.close()
        if runs is None:
            return
        if stop is not None:
            runs.warm = timeline
            if timed_replays:
                _note_replays(runs, clock, handle, len(timeline.tokens))
            return
        runs.timelines.append(timeline)
        if handle is None:
            runs.held = decoding.held_bytes(output)
        else:
            runs.stats = handle.stats()
        if cuda:
            runs.peak = torch.cuda.max_memory_allocated(problem.device)

    if setup.policy is None:
        answer(None)
        return
    graph = cuda and problem.backend != "reference"
    with dk.patch(problem.model, setup.policy, **setup.arguments(graph, problem.backend)) as handle:
        answer(handle)


def _note_replays(runs: Runs, clock: Clock, handle: Any, tokens: int) -> None:
    """The device's time of the replays of an answer, and what their steps read."""
    off = None if handle.graph is None else handle.graph.off
    if not clock.marks and off is None and tokens <= 2 * decoding.WARM:
        return  # over before a step was captured
    if off is not None or not clock.marks:
        if runs.setup.fuse is None:
            return  # nobody asked for one; the row's path says why there was none
        raise RuntimeError(f"no captured step: {off}")
    count = min(max(len(clock.marks) - 1, 1), tokens - 1)
    runs.replays, runs.replayed = clock.replays(), kept_over_steps(handle.stats())[-count:]
    runs.replayed_from = tokens - 1 - count


def kept_over_steps(stats: Stats) -> list[float]:
    """Mean over the sequences of the share of visual tokens that the layers from k on read, step by step."""
    total = max(sum(stats.visual_tokens), 1)
    return [sum(step.kept) / total for step in stats.steps]


def kept_while_timed(steps: Sequence[float]) -> float:
    """The mean over the decode steps whose times count, of what :func:`kept_over_steps` found."""
    decode = steps[1:]
    return statistics.mean(decode[decoding.left_out(len(decode)) :] or steps)


def measure(
    problem: Problem, setups: Sequence[Setup], *, rounds: int, bandwidth: float, twin: bool = True, until: float | None = None
) -> Iterator[Row]:
    """The rows of every set-up and length.

    Args:
        rounds: how often each is timed; once more before that, to warm up (and on a GPU to time replays on the device).
        bandwidth: bytes a second of a copy, measured in this run.
        twin: on a GPU also the unpatched model's step over a StaticCache, captured.
        until: ``time.monotonic()`` by which to be done, about: what does not fit into the time is shortened, or left out, and says so.
    """
    backend, cuda = problem.backend, problem.device.type == "cuda"
    products, _ = timing.product_rate(next(problem.model.parameters()).dtype, problem.device)  # now, while there is room
    fields = problem.make_inputs(problem.batch)
    found: list[Runs] = []
    for setup in setups:
        found += [Runs(setup, length) for length in (problem.lengths if setup.each_length else [problem.new_tokens])]
    _gates(problem, fields, found, until)
    for number in range(rounds + 1):
        if number == 1 and until is not None:
            _shorten(problem, found, rounds, until)
        for runs in found:
            setup = runs.setup
            if runs.wrong or runs.note is not None:
                continue
            if _over(until):
                runs.note = None if runs.timelines else OVER
                continue
            captured = number == 0 and cuda and setup.policy is not None and backend != "reference"
            stop = None if number else min(2 if interpreted() else WARM_UP, runs.new_tokens)
            try:
                run_once(replace(problem, new_tokens=runs.new_tokens), setup, fields, runs, captured, stop)
            except Exception as error:
                if setup.policy is not None and not isinstance(error, torch.OutOfMemoryError):
                    raise
                runs.note = _failure(error)
                timing.release()
    base = next((runs for runs in found if runs.setup.name == UNPATCHED), None)
    rates = Rates(bandwidth, products, timing.environment().get("memory_bytes"))
    for runs in found:
        yield from _rows(problem, runs, fields, rates, base)
    if twin and cuda and not _over(until):
        yield _twin_row(problem, fields, bandwidth)


OVER = "the time of this part was over"
GATES = 0.6  # of the time, after which nothing is begun any more that compiles


def _over(until: float | None) -> bool:
    return until is not None and time.monotonic() > until


def _gates(problem: Problem, fields: dict[str, torch.Tensor], found: list[Runs], until: float | None) -> None:
    """Looks whether each set-up's results are right, before any clock runs."""
    few = problem.make_inputs(min(problem.batch, decoding.GATED))
    known: dict[Any, float] = {}
    now = time.monotonic()
    most = None if until is None else now + GATES * (until - now)  # what compiles leaves time to the others
    for runs in found:
        setup = runs.setup
        if _over(most if setup.each_length else until):
            runs.note = OVER
        elif setup.policy is not None:
            runs.gate = decoding.logits_gate(
                problem.model, few, setup.policy, setup.retention, problem.backend, setup.fuse, known, vision=setup.vision, pool=setup.pool
            )
        elif setup.options:
            try:  # as many sequences as are timed, and as long a cache, so that a step that is compiled is compiled once
                runs.gate = decoding.unpatched_gate(problem.model, fields, runs.new_tokens, **setup.options)
            except Exception as error:
                runs.note = _failure(error)
        timing.release()


def _shorten(problem: Problem, found: list[Runs], rounds: int, until: float) -> None:
    """Takes shorter answers, of the lengths that are asked for, until all fit into the time: the longest first, of these the slowest."""
    running = [runs for runs in found if runs.warm is not None and runs.note is None and not runs.setup.each_length]
    others = sum(runs.seconds(runs.new_tokens) for runs in found if runs.setup.each_length)
    while rounds * (others + sum(runs.seconds(runs.new_tokens) for runs in running)) > until - time.monotonic():
        longer = [runs for runs in running if runs.new_tokens > problem.lengths[0]]
        if not longer:
            return
        slowest = max(longer, key=lambda runs: (runs.new_tokens, runs.seconds(runs.new_tokens)))
        slowest.new_tokens = max(length for length in problem.lengths if length < slowest.new_tokens)


def _failure(error: Exception) -> str:
    """Of an unpatched model's path, which is another package's and differs between its versions, or for want of memory."""
    return "does not fit into the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"[:300]


def _wrong(gate: dict[str, Any]) -> str:
    """The note of a row whose gate did not pass."""
    errors = ", ".join(f"{name} {error:.3g}" for name, error in gate["errors"].items() if not error <= gate["limit"])
    return f"wrong, and so it has no speed: {errors}, where at most {gate['limit']:g} is right"


def _facts(problem: Problem, fields: dict[str, torch.Tensor], new_tokens: int) -> Row:
    shape = ModelShape.from_config(problem.model.config)
    parameter = next(problem.model.parameters())
    visual = decoding.visual_tokens(problem.model, fields)
    return {
        "group": "model", "model": problem.name, "B": problem.batch, "N": visual,
        "text": fields["input_ids"].shape[1] - visual, "new_tokens": new_tokens,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}", "layers": shape.num_layers,
        "threads": None if problem.device.type == "cuda" else torch.get_num_threads(),
    }  # fmt: skip


@dataclass(frozen=True)
class _Reads:
    """Reads of the steps of a set-up: ``visual`` tokens of a sequence, of which layers from ``k`` on read the share ``kept``."""

    visual: float
    kept: float = 1.0
    k: int = 1


def _moved(problem: Problem, fields: dict[str, torch.Tensor], reads: _Reads, steps: int, first: int | None = None) -> int:
    """Bytes that a step reads, mean over the ``steps`` from ``first`` on (counted from 0); None: from the first whose time counts."""
    text: float = fields["input_ids"].shape[1] - decoding.visual_tokens(problem.model, fields)
    text += ((decoding.left_out(steps) if first is None else first) + steps) / 2
    kv = decoding.kv_bytes(problem.model, problem.batch, reads.visual, text, reads.kept, reads.k)
    return decoding.weight_bytes(problem.model) + kv


def _rows(problem: Problem, runs: Runs, fields: dict[str, torch.Tensor], rates: Rates, base: Runs | None) -> Iterator[Row]:
    setup, visual = runs.setup, float(decoding.visual_tokens(problem.model, fields))
    lengths = [runs.new_tokens] if setup.each_length else problem.lengths
    more: Row = {"bandwidth": rates.bandwidth, "gate": runs.gate, "vision": setup.vision}
    if runs.stats is not None:
        visual = statistics.mean(runs.stats.visual_tokens)
        more |= {"k": runs.stats.k, "retention": setup.retention, "backend": runs.stats.backend, "path": str(runs.stats.path)}
        if runs.replays is not None:
            reads = _Reads(visual, statistics.mean(runs.replayed), runs.stats.k)
            moved = _moved(problem, fields, reads, runs.replayed_from + len(runs.replayed), runs.replayed_from)
            facts = _facts(problem, fields, min(WARM_UP, problem.new_tokens)) | more
            yield timing.row(f"{OURS} captured step, {setup.label}", runs.replays, **facts, kept=reads.kept, moved=moved)
    for length in lengths:
        facts = _facts(problem, fields, length) | more
        if not runs.timelines or length > runs.new_tokens:
            note = runs.note or (OVER if runs.timelines else "not timed" if not runs.wrong or runs.gate is None else _wrong(runs.gate))
            yield timing.row(setup.name, None, **facts, note=note)
        else:
            yield _row(problem, runs, fields, facts, length, visual, rates, base)


def _row(
    problem: Problem, runs: Runs, fields: dict[str, torch.Tensor], facts: Row, length: int, visual: float, rates: Rates, base: Runs | None
) -> Row:
    """A set-up that answered, at one length."""
    stats, reads, plan = runs.stats, _Reads(visual), Plan()
    if stats is not None:
        steps = kept_over_steps(stats)[:length]
        facts |= {"kept_mean": stats.kept_mean, "kept_by_step": [round(share, 4) for share in steps]}
        reads = _Reads(visual, kept_while_timed(steps), stats.k)
        plan = Plan(runs.setup.retention, stats.k, tuple(steps), runs.setup.pool or 1.0)
    token = statistics.median(runs.medians(length))
    times = timing.summary([gap for timeline in runs.timelines for gap in timeline.gaps(length)])._replace(median=token)
    found = timing.row(runs.setup.name, times, **facts, kept=reads.kept, moved=_moved(problem, fields, reads, length - 1))
    first, request = (statistics.median(each) for each in _requests(runs, length))
    whole = length == runs.new_tokens
    found |= {
        "encode_us": _micro(statistics.median(timeline.encode for timeline in runs.timelines)),
        "first_token_us": _micro(first),
        "decode_us": _micro(statistics.median(timeline.tokens[length - 1] - timeline.tokens[0] for timeline in runs.timelines)),
        "request_us": _micro(request),
        "tokens_per_s": problem.batch / token,
        "images_per_s": problem.batch * problem.pictures / request,
        "request_tokens_per_s": problem.batch * length / request,
        "prefix_of": None if whole else runs.new_tokens,
        "kv_live_bytes": (stats.kv_bytes_live if stats else runs.held) if whole else None,
        "kv_reserved_bytes": (stats.kv_bytes_reserved if stats else runs.held) if whole else None,
        "peak_bytes": runs.peak if whole else None,
    }
    if base is not None and base.timelines and length <= base.new_tokens:  # of the same rounds: what disturbed one disturbed the other
        found["over_unpatched"] = _ratio(runs.medians(length), base.medians(length))
        for name, mine, other in zip(("first_token", "request"), _requests(runs, length), _requests(base, length), strict=True):
            found[f"{name}_over_unpatched"] = _ratio(mine, other)
    return found | _predicted(problem, fields, length, visual, plan, rates)


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _requests(runs: Runs, length: int) -> tuple[list[float], list[float]]:
    """Of each round, the seconds until the first token, and of the whole request."""
    return [timeline.tokens[0] for timeline in runs.timelines], [timeline.request(length) for timeline in runs.timelines]


def _ratio(mine: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=False))


def _predicted(problem: Problem, fields: dict[str, torch.Tensor], length: int, visual: float, plan: Plan, rates: Rates) -> Row:
    """Returns what ``request_model`` says of it, at the share that was kept in fact."""
    parameter = next(problem.model.parameters())
    try:
        vision, crops = VisionShape.from_config(problem.model.config), crops_in(problem.model, fields, problem.batch)
    except ValueError:
        vision, crops = None, None
    request = Request(
        ModelShape.from_config(problem.model.config, dtype=parameter.dtype), problem.batch, visual,
        fields["input_ids"].shape[1] - decoding.visual_tokens(problem.model, fields), length, vision, crops, problem.pictures,
        decoding.weight_bytes(problem.model),
    )  # fmt: skip
    return request_model.predict(request, plan, rates).facts() | {
        "predicted_largest_batch": request_model.largest_batch(request, plan, rates)
    }


def crops_in(model: Any, fields: dict[str, torch.Tensor], batch: int) -> tuple[tuple[int, int], ...]:
    """Returns the pictures that the tower is given for one of ``batch`` sequences which are alike, each by its sides in patches."""
    grids, vision = fields.get("image_grid_thw"), model.config.vision_config
    if grids is not None:
        return tuple((int(high), int(wide)) for _, high, wide in grids[: len(grids) // batch].tolist())
    pixels = fields["pixel_values"]
    count = pixels[..., 0, 0, 0].numel() // batch
    side = vision.image_size // vision.patch_size
    return ((side, side),) * count


def _twin_row(problem: Problem, fields: dict[str, torch.Tensor], bandwidth: float) -> Row:
    name = "unpatched captured step, StaticCache"
    steps = min(problem.new_tokens, WARM_UP)
    reads = _Reads(decoding.visual_tokens(problem.model, fields))
    facts = _facts(problem, fields, steps) | {"bandwidth": bandwidth, "moved": _moved(problem, fields, reads, steps - 1)}
    try:
        output = generate(problem.model, fields, 2, output_logits=True, return_dict_in_generate=True)
        want = output.logits[1].float()
        del output
        timing.release()
        times, first = decoding.static_twin(problem.model, fields, steps)
        gate = timing.correctness(decoding.LIMIT[next(problem.model.parameters()).dtype], of_generate=timing.relative(first[:, -1], want))
        right = gate["passed"]
        note: dict[str, Any] = {} if right else {"note": _wrong(gate)}
        return timing.row(name, times if right else None, **facts, gate=gate, **note)
    except Exception as error:  # another package's path; it differs between versions of transformers
        return timing.row(name, None, **facts, note=f"{type(error).__name__}: {error}"[:300])


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to ``most`` that fits (0: none), by doubling and halving; what fits is taken to fit for every smaller batch."""
    if not fits(1):
        return 0
    good, bad = 1, most + 1
    while good < most and bad > most:
        size = min(2 * good, most)
        if not fits(size):
            bad = size
        else:
            good = size
    while bad - good > max(good // 16, 1):  # to within a sixteenth
        size = (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good


def largest_batch_of(problem: Problem, setup: Setup, most: int) -> int:
    """By generating three tokens for that many sequences, with room for all of ``problem.new_tokens`` where the cache is ours or static."""

    def fits(batch: int) -> bool:
        try:
            fields = problem.make_inputs(batch)
            run_once(replace(problem, batch=batch), setup, fields, None, stop=3)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            timing.release()

    return largest_batch(fits, most)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each patched set-up: what it wins or loses against the unpatched model of the same run."""
    found = []
    for row in rows:
        ratio = row.get("over_unpatched")
        if ratio is None or not row["name"].startswith(OURS):
            continue
        times, label = 1 / ratio, row["name"].removeprefix(f"{OURS} generate(), ")
        result = f"{times:.2f}x as fast a token as" if ratio <= 1 else f"SLOWER a token ({times:.2f}x) than"
        first, request = row["first_token_over_unpatched"], row.get("request_over_unpatched")
        whole = "" if request is None else f"the whole request of {row['new_tokens']} tokens in {request:.2f}x its time; "
        found.append(
            f"B={row['B']}, {label}: {result} the unpatched model; first token after {first:.2f}x its time; {whole}"
            f"{row['times_floor']:.2f}x its own floor"
        )
    return found
