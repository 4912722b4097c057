"""Whole models while they answer: time to the first token, time per token, throughput, memory; patched and unpatched, each beside its
floor.

What is compared, in one run and on the same inputs: the unpatched model through ``generate()`` (SDPA, DynamicCache), the same over a static
cache (which transformers compiles on a GPU; on a GPU also captured by hand), FastV at the same share of tokens, the policy under both
retentions, and the patched model that keeps everything. Set-ups take turns in every round, so that a slow moment of the machine hits all of
them. A set-up whose logits are wrong has no speed.

The first steps of an answer warm up and have no time (``decoding.left_out``). ``kept``, the floor, and the share that FastV is given are
means over the steps that have one; ``kept_by_step`` and ``kept_mean`` are of all steps.

Floor of a token: the weights and the live keys and values that its step reads, over the bandwidth of a copy measured in the same run
(docs/design.md, section 10).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import dyrate_kernels as dk
from dyrate_kernels.measuring import decoding, timing
from dyrate_kernels.measuring.decoding import Clock, generate
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.stats import Stats

Row = dict[str, Any]
UNPATCHED = "unpatched generate(), DynamicCache"
OURS = "dyrate"
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
        new_tokens: of every answer.
        backend: of the patched model.
        pictures: of each sequence.
    """

    name: str
    model: Any
    make_inputs: Callable[[int], dict[str, torch.Tensor]]
    batch: int
    new_tokens: int
    backend: str
    pictures: int = 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Setup:
    """One way to run it.

    Attributes:
        label: as rows carry it.
        policy: None for the unpatched model.
        fuse: ``patch(fuse=True)``.
        options: more arguments of ``generate``.
    """

    label: str
    policy: Policy | None = None
    retention: str = "recoverable"
    options: dict[str, Any] = field(default_factory=dict)
    fuse: bool = False

    @property
    def name(self) -> str:
        return self.label if self.policy is None else f"{OURS} generate(), {self.label}"


@dataclass
class Runs:
    """Results of the rounds of one set-up: seconds, and the last round's memory and statistics."""

    gaps: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    stats: Stats | None = None
    held: int | None = None
    peak: int | None = None
    replays: timing.Times | None = None
    replayed: int = 0  # the last so many steps
    note: str | None = None


def falling_schedule(visual: int, k: int) -> dk.policies.Schedule:
    """The published schedule (288, 144, 72 of 576 from steps 0, 5, 10 on) for ``visual`` tokens."""
    return dk.policies.Schedule(k=k, kept=[(0, max(visual // 2, 1)), (5, max(visual // 4, 1)), (10, max(visual // 8, 1))])


def policies_for(model: Any, policy: Policy, label: str, kept: float, fuse: bool = False) -> list[Setup]:
    """The patched set-ups.

    Args:
        policy: what is measured.
        kept: the fraction that FastV, which decides once, keeps: the policy's mean over the steps that count.
        fuse: all of them with ``patch(fuse=True)``, and at last the first one without.
    """
    k = decoding.fitting_k(model, policy)
    found = [Setup(f"{label}, recoverable", policy)]
    if not policy.needs_recoverable:
        found.append(Setup(f"{label}, evict", policy, "evict"))
    if policy.name != "fastv":
        fastv = dk.policies.FastV(k=k, rate=min(max(1 - kept, 0.0), 1.0))
        found.append(Setup(f"FastV at {100 * kept:.1f} %, evict", fastv, "evict"))
    found.append(Setup("dense (policy none)", dk.policies.KeepAll(k=k)))
    return [*(replace(setup, label=f"{setup.label}, fused", fuse=True) for setup in found), found[0]] if fuse else found


def unpatched_setups(device: torch.device) -> list[Setup]:
    """Through ``generate()``; on a GPU transformers compiles the steps over a static cache by itself."""
    compiled = ", compiled" if device.type == "cuda" else ", not compiled"
    return [Setup(UNPATCHED), Setup(f"unpatched generate(), StaticCache{compiled}", options={"cache_implementation": "static"})]


def run_once(problem: Problem, setup: Setup, fields: dict[str, torch.Tensor], runs: Runs | None, timed_replays: bool = False) -> None:
    """One answer. With ``runs`` it counts."""
    cuda = problem.device.type == "cuda"
    if cuda:
        timing.release()
        torch.cuda.reset_peak_memory_stats(problem.device)

    def answer(handle: Any) -> None:
        clock = Clock(handle if timed_replays else None)
        output = generate(problem.model, fields, problem.new_tokens, clock, return_dict_in_generate=True, **setup.options)
        if runs is None:
            return
        if timed_replays:
            if not clock.marks and handle.graph.off is None and problem.new_tokens <= 2 * decoding.WARM:
                return  # over before a step was captured
            if handle.graph.off is not None or not clock.marks:
                raise RuntimeError(f"no captured step: {handle.graph.off}")
            runs.replays, runs.replayed = clock.replays(), min(max(len(clock.marks) - 1, 1), problem.new_tokens - 1)
            return
        gaps = clock.gaps()
        runs.gaps += gaps
        runs.medians.append(statistics.median(gaps))
        runs.first.append(clock.first_token)
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
    options: dict[str, Any] = {"retention": setup.retention, "backend": problem.backend, "cuda_graph": graph, "fuse": setup.fuse}
    with dk.patch(problem.model, setup.policy, **options) as handle:
        answer(handle)


def kept_over_steps(stats: Stats) -> list[float]:
    """Mean over the sequences of the share of visual tokens that the layers from k on read, step by step."""
    total = max(sum(stats.visual_tokens), 1)
    return [sum(step.kept) / total for step in stats.steps]


def kept_while_timed(steps: Sequence[float]) -> float:
    """The mean over the decode steps whose times count, of what :func:`kept_over_steps` found."""
    decode = steps[1:]
    return statistics.mean(decode[decoding.left_out(len(decode)) :] or steps)


def measure(problem: Problem, setups: Sequence[Setup], *, rounds: int, bandwidth: float, twin: bool = True) -> Iterator[Row]:
    """The rows of every set-up.

    Args:
        rounds: how often each is timed; once more before that, to warm up (and on a GPU to time replays on the device).
        bandwidth: bytes a second of a copy, measured in this run.
        twin: on a GPU also the unpatched model's step over a StaticCache, captured.
    """
    model, backend = problem.model, problem.backend
    cuda = problem.device.type == "cuda"
    fields = problem.make_inputs(problem.batch)
    few = problem.make_inputs(min(problem.batch, decoding.GATED))
    gates: dict[str, dict[str, Any] | None] = {}
    found = {setup.name: Runs() for setup in setups}
    known: dict[Any, float] = {}
    for setup in setups:
        gates[setup.name] = None
        if setup.policy is not None:
            gates[setup.name] = decoding.logits_gate(model, few, setup.policy, setup.retention, backend, setup.fuse, known)
        elif setup.options:
            try:
                # as large and as long as what is timed, so that a step that is compiled is compiled once
                gates[setup.name] = decoding.unpatched_gate(model, fields, problem.new_tokens, **setup.options)
            except Exception as error:
                found[setup.name].note = _failure(error)
        timing.release()
    wrong = {name for name, gate in gates.items() if gate is not None and not gate["passed"]}
    for number in range(rounds + 1):
        for setup in setups:
            runs = found[setup.name]
            if setup.name in wrong or runs.note is not None:
                continue
            captured = number == 0 and cuda and setup.policy is not None and backend != "reference"
            try:
                run_once(problem, setup, fields, runs if number or captured else None, timed_replays=captured)
            except Exception as error:
                if setup.policy is not None and not isinstance(error, torch.OutOfMemoryError):
                    raise
                runs.note = _failure(error)
                timing.release()
    base = found.get(UNPATCHED)
    for setup in setups:
        yield from _rows(problem, setup, found[setup.name], gates[setup.name], fields, bandwidth, base)
    if twin and cuda:
        yield _twin_row(problem, fields, bandwidth)


def _failure(error: Exception) -> str:
    """Of an unpatched model's path, which is another package's and differs between its versions, or for want of memory."""
    return "does not fit into the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"[:300]


def _wrong(gate: dict[str, Any]) -> str:
    """The note of a row whose gate did not pass."""
    errors = ", ".join(f"{name} {error:.3g}" for name, error in gate["errors"].items() if not error <= gate["limit"])
    return f"wrong, and so it has no speed: {errors}, where at most {gate['limit']:g} is right"


def _facts(problem: Problem, fields: dict[str, torch.Tensor]) -> Row:
    shape = ModelShape.from_config(problem.model.config)
    parameter = next(problem.model.parameters())
    visual = decoding.visual_tokens(problem.model, fields)
    return {
        "group": "model", "model": problem.name, "B": problem.batch, "N": visual,
        "text": fields["input_ids"].shape[1] - visual, "new_tokens": problem.new_tokens,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}", "layers": shape.num_layers,
        "threads": None if problem.device.type == "cuda" else torch.get_num_threads(),
    }  # fmt: skip


def _moved(problem: Problem, fields: dict[str, torch.Tensor], kept: float, k: int, first: int | None = None) -> int:
    """Bytes that a step reads, mean over the steps from ``first`` on (counted from 0); None: from the first whose time counts."""
    visual, steps = decoding.visual_tokens(problem.model, fields), problem.new_tokens - 1
    text = fields["input_ids"].shape[1] - visual + ((decoding.left_out(steps) if first is None else first) + steps) / 2
    return decoding.weight_bytes(problem.model) + decoding.kv_bytes(problem.model, problem.batch, visual, text, kept, k)


def _rows(
    problem: Problem, setup: Setup, runs: Runs, gate: dict[str, Any] | None, fields: dict[str, torch.Tensor], bandwidth: float,
    base: Runs | None,
) -> Iterator[Row]:  # fmt: skip
    facts = _facts(problem, fields) | {"bandwidth": bandwidth, "gate": gate}
    if not runs.medians:
        note = runs.note or ("not timed" if gate is None else _wrong(gate))
        yield timing.row(setup.name, None, **facts, note=note)
        return
    kept, k = 1.0, 1
    if runs.stats is not None:
        steps = kept_over_steps(runs.stats)
        facts |= {"kept_mean": runs.stats.kept_mean, "kept_by_step": [round(share, 4) for share in steps], "k": runs.stats.k}
        facts |= {"retention": setup.retention, "backend": runs.stats.backend}
        kept, k = kept_while_timed(steps), runs.stats.k
        if runs.replays is not None:
            share, before = statistics.mean(steps[-runs.replayed :]), problem.new_tokens - 1 - runs.replayed
            replayed = facts | {"kept": share, "moved": _moved(problem, fields, share, k, before)}
            yield timing.row(f"{OURS} captured step, {setup.label}", runs.replays, **replayed)
    facts |= {"kept": kept, "moved": _moved(problem, fields, kept, k)}
    first, token = statistics.median(runs.first), statistics.median(runs.medians)
    whole = first + token * (problem.new_tokens - 1)
    times = timing.summary(runs.gaps)._replace(median=token)
    found = timing.row(setup.name, times, **facts)
    found |= {
        "first_token_us": round(1e6 * first, 3),
        "tokens_per_s": problem.batch / token,
        "images_per_s": problem.batch * problem.pictures / whole,
        "kv_live_bytes": runs.stats.kv_bytes_live if runs.stats else runs.held,
        "kv_reserved_bytes": runs.stats.kv_bytes_reserved if runs.stats else runs.held,
        "peak_bytes": runs.peak,
    }
    if base is not None and base.medians:  # of the same rounds: what disturbed one disturbed the other
        found["over_unpatched"] = statistics.median(a / b for a, b in zip(runs.medians, base.medians, strict=False))
        found["first_token_over_unpatched"] = statistics.median(a / b for a, b in zip(runs.first, base.first, strict=False))
    yield found


def _twin_row(problem: Problem, fields: dict[str, torch.Tensor], bandwidth: float) -> Row:
    name = "unpatched captured step, StaticCache"
    facts = _facts(problem, fields) | {"bandwidth": bandwidth, "moved": _moved(problem, fields, 1.0, 1)}
    try:
        output = generate(problem.model, fields, 2, output_logits=True, return_dict_in_generate=True)
        want = output.logits[1].float()
        del output
        timing.release()
        times, first = decoding.static_twin(problem.model, fields, problem.new_tokens)
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
    """By generating: two tokens for that many sequences, with room for all of ``problem.new_tokens`` where the cache is ours or static."""

    def fits(batch: int) -> bool:
        try:
            fields = problem.make_inputs(batch)
            run_once(replace(problem, batch=batch, new_tokens=3), setup, fields, None)
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
        first = row["first_token_over_unpatched"]
        found.append(
            f"B={row['B']}, {label}: {result} the unpatched model; first token after {first:.2f}x its time; "
            f"{row['times_floor']:.2f}x its own floor"
        )
    return found
