"""Shapes of launches: from capacities, never from the live lengths, so that a captured graph stays valid.

``Settings`` are heuristics unless a measured file is shipped for the device (``dyrate_kernels/devices``). Nothing is tuned at run time; but
how many programs run at once is not known before the kernel is compiled, so it is asked then (``backend._fit_attention``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import triton

from dyrate_kernels import devices

INTERPRETED = "interpreter"
DECISIONS = ("same_launch", "second_launch", "two_launches")


@dataclass(frozen=True)
class Settings:
    """Launch settings of the attention kernel for one kind of problem.

    Attributes:
        block_n: rows a step of the main loop, a power of two; at least 16 where heads are packed.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        programs_per_sm: programs on a multiprocessor at once that the grid is made for: of those that the compiled kernel's registers and
            shared memory let run (``Multiprocessor``), so many at most. None: all of them.
        waves: of such programs, at most, where the pairs of sequence and key/value head do not fit in one.
        min_blocks: row blocks a split has at least.
        most_splits: of a pair.
        combined: numbers of partial outputs that the combination of splits takes at once; the next ones are fetched meanwhile. With 4096
            grouped queries take more registers than their main loop does (154 against 91 for a kept list, Triton 3.6, sm_90).
        combine: ``"same_launch"`` (the last split of a key/value head combines them) or ``"second_launch"`` (of a program a query head:
            more of them, where few sequences have many splits); paged rows, and importance that the attention's launch sums, have the
            former.
        decision: ``"same_launch"`` (the last block done decides), ``"second_launch"`` (of its many programs,
            which sum over heads, the last of a sequence decides) or ``"two_launches"`` (the sum, which then takes few registers, and the
            decision).
        tensor_cores: one query head a key/value head goes through ``tl.dot`` as well, padded to sixteen; several always do.
        warp_rows: where heads go through ``tl.dot``, every warp has rows of its own (at least 16: ``block_n`` grows to that) and a softmax
            that meets the other warps' after the loop.
        logit_bytes: 4, or 2 for logits in float16: half the bytes, importance and the mass of text right to ``2^-11 |z| ln 2`` of
            themselves (z: a logit in base 2), the image's mass to as much of the text's, of which it is the rest; so that tokens of
            nearly the same importance may change places, and mass may sum to a little more than 1.
        max_registers: that a thread of the attention kernel may use; None leaves it to the compiler, but for a bound that makes room for
            ``programs_per_sm`` and spills nothing.
    """

    block_n: int = 32
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int | None = 8
    waves: int = 4
    min_blocks: int = 2
    most_splits: int = 64
    combined: int = 2048
    combine: str = "same_launch"
    decision: str = "second_launch"
    tensor_cores: bool = False
    warp_rows: bool = False
    logit_bytes: int = 4
    max_registers: int | None = None

    def __post_init__(self) -> None:
        if self.combine not in ("same_launch", "second_launch"):
            raise ValueError(f"combine: expected 'same_launch' or 'second_launch', got {self.combine!r}")
        if self.decision not in DECISIONS:
            raise ValueError(f"decision: expected {', '.join(map(repr, DECISIONS[:-1]))} or {DECISIONS[-1]!r}, got {self.decision!r}")
        if self.logit_bytes not in (2, 4):
            raise ValueError(f"logit_bytes: expected 2 or 4, got {self.logit_bytes!r}")
        for name in ("tensor_cores", "warp_rows"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        for name in (
            "block_n",
            "num_warps",
            "num_stages",
            "programs_per_sm",
            "waves",
            "min_blocks",
            "most_splits",
            "combined",
            "max_registers",
        ):
            number = getattr(self, name)
            if number is None and name in ("programs_per_sm", "max_registers"):
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name}: expected a whole number from 1 on, got {number!r}")
            if name in ("block_n", "num_warps") and number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, got {number}")


KINDS = ("plain", "list", "score")  # all rows; the rows of a kept list; with importance
_PROBLEM = re.compile(rf"g[1n]-d(\d+)-b[24]-({'|'.join(KINDS)})")


def problem(group: int, dim: int, itemsize: int, kind: str) -> str:
    """The key of a kind of problem in a device file, e.g. ``"g1-d128-b2-score"``."""
    return f"g{'1' if group == 1 else 'n'}-d{triton.next_power_of_2(max(dim, 16))}-b{itemsize}-{kind}"


def _measured(device_name: str) -> dict[str, Settings]:
    """Those of the device's file, by ``problem``."""
    content = devices.measured(device_name).get("settings", {})
    with devices.named(device_name):
        for name in content:
            found = _PROBLEM.fullmatch(name)
            if found is None or int(found[1]) < 16 or int(found[1]) & (int(found[1]) - 1):
                known = f"(kinds: {', '.join(KINDS)}; head dims: powers of two from 16 on)"
                raise ValueError(f"settings: expected names like 'g1-d128-b2-score' {known}, got {name!r}")
        return {name: devices.build(f"settings: {name}", Settings, entry) for name, entry in content.items()}


@functools.cache
def settings(device_name: str, group: int, dim: int, itemsize: int, kind: str) -> Settings:
    """The settings for heads of ``dim`` elements of ``itemsize`` bytes, ``group`` query heads a key/value head; kind: of ``KINDS``."""
    name = problem(group, dim, itemsize, kind)
    known = _measured(device_name).get(name)
    if known is not None:
        return known
    if device_name == INTERPRETED:
        return Settings(block_n=16, min_blocks=1, programs_per_sm=4, decision="same_launch")
    return heuristic(group, dim, itemsize)


def heuristic(group: int, dim: int, itemsize: int) -> Settings:
    """A key tile of about 8 KiB, so that three stages of keys and values leave room for four programs on a multiprocessor.

    On an H200 (bench/results/2026-11-26-h200/settings.txt) a decode step whose decision is a second launch takes as long (28 heads over 4,
    B=1) or up to 26 % less time, and programs are fastest in whole waves of as many as a multiprocessor holds, which is about four
    (2026-11-27-h200/settings.txt for 28 heads over 4). Other devices, other sizes of head: not measured.

    What a multiprocessor really holds is asked of the compiled kernel, so four is the most that a grid is made for.

    Registers are left to the compiler: with a bound of 168 those of triton 3.4 and 3.6 spill nothing where they set 8 bytes aside now, but
    that of 3.9 spills 152 bytes with seven heads a key/value head (sm_80, bf16, D=128).
    """
    row = triton.next_power_of_2(max(dim, 16)) * itemsize
    block = max(16, min(128, 8192 // row))
    return Settings(block_n=max(block, 32) if group > 1 and row <= 512 else block, programs_per_sm=4)


@dataclass(frozen=True)
class Multiprocessor:
    """Resources that the programs of one multiprocessor share.

    Attributes:
        registers: of 32 bits, handed out by 256 a warp.
        shared: bytes, of which a program takes 1 KiB more than it asks for.
        warps, programs: that may be there at once.
    """

    registers: int = 65536
    shared: int = 228 * 1024
    warps: int = 64
    programs: int = 32

    def holds(self, registers: int, shared: int, warps: int) -> int:
        """Programs at once, of ``warps`` warps with so many registers a thread and bytes of shared memory a program."""
        portion = -(-max(registers, 1) * 32 // 256) * 256
        room = min(self.registers // portion // 4 * 4, self.warps)  # each of its four parts has registers of its own
        return min(room // warps, self.shared // (shared + 1024), self.programs)

    def bound(self, programs: int, warps: int) -> int:
        """Most registers of a thread with which ``programs`` programs of ``warps`` warps fit."""
        of_a_part = -(-programs * warps // 4)
        return min(self.registers // 4 // (of_a_part * 32) // 8 * 8, 255)


@dataclass(frozen=True)
class AttentionPlan:
    """The constants of one attention launch; see ``decode_attention_kernel``."""

    dot: bool
    row_warps: int  # that have rows of their own; 1: all warps share all rows
    block_g: int
    block_c: int
    block_n: int
    block_d: int
    block_v: int
    block_t: int
    splits: int
    max_splits: int
    split_tile: int
    min_blocks: int
    num_warps: int
    num_stages: int
    combine: str
    decision: str
    logit_bytes: int
    max_registers: int | None
    programs: int | None  # on a multiprocessor that are wanted; None: whatever fits


USUAL_PROGRAMS = 4  # on a multiprocessor, where no compiled kernel can be asked


def whole_waves(pairs: int, wave: int, waves: int) -> int:
    """Splits of each of ``pairs`` pairs, where ``wave`` programs run at once and the pairs alone do not fit: the fewest that leave at most
    a twentieth more of the time idle than the best number that makes ``waves`` waves at most."""

    def busy(splits: int) -> float:
        return pairs * splits / (triton.cdiv(pairs * splits, wave) * wave)

    choices = range(1, max(waves * wave // pairs, 1) + 1)
    best = max(map(busy, choices))
    return next(splits for splits in choices if busy(splits) >= best - 0.05)


@functools.cache
def attention(
    device_name: str,
    multiprocessors: int,
    batch: int,
    kv_heads: int,
    group: int,
    dim: int,
    value_dim: int,
    itemsize: int,
    rows: int,
    kind: str,
    chosen: Settings | None = None,
    programs: int | None = None,
    listed: bool = False,
    paged: bool = False,
) -> AttentionPlan:
    """Shapes the launch for ``rows`` rows of capacity a sequence; ``kind``: of ``KINDS``; ``programs``: that a multiprocessor holds at
    once, None where that is not known; ``listed``, ``paged``: a row's address waits for a load of a kept list, and for one of a block
    table.

    Triton shares a loop's stages among such loads and the keys: with three stages and one such load the tensor cores' loop has one buffer
    of keys, so that nothing is under way while they are used (sm_90, 22 against 38 KiB of shared memory). It gets stages for two again;
    not where every warp has rows of its own, whose registers do not suffice (24 and 48 bytes spilled in the loop with 168 of them, a kept
    list and one stage more; Triton 3.6 and 3.4).
    """
    use = chosen or settings(device_name, group, max(dim, value_dim), itemsize, kind)
    dot = group > 1 or use.tensor_cores
    # not over paged rows: their addresses take the registers that it needs (with a kept list: 255, and spills; sm_90, Triton 3.6)
    row_warps = use.num_warps if dot and use.warp_rows and not paged else 1
    waits = listed + paged if dot and row_warps == 1 else 0
    block_n = max(use.block_n, 16 * row_warps) if dot else use.block_n
    at_once = min(use.programs_per_sm or programs or USUAL_PROGRAMS, programs or 1024)
    wave, pairs = at_once * multiprocessors, max(batch * kv_heads, 1)
    wanted = wave // pairs if pairs <= wave else whole_waves(pairs, wave, use.waves)
    most = max(triton.cdiv(max(rows, 1), block_n * use.min_blocks), 1)
    splits = min(wanted, most, use.most_splits)
    max_splits = triton.next_power_of_2(splits)
    block_c = triton.next_power_of_2(group)
    block_v = max(16, triton.next_power_of_2(max(value_dim, 1)))
    return AttentionPlan(
        dot=dot,
        row_warps=row_warps,
        block_g=max(16, triton.next_power_of_2(group)) if dot else 1,
        block_c=block_c,
        block_n=block_n,
        block_d=max(16, triton.next_power_of_2(dim)),
        block_v=block_v,
        block_t=(2 if dot else 4) * block_n,  # text rows whose mass is summed at once: few rounds, few registers
        splits=splits,
        max_splits=max_splits,
        split_tile=min(max_splits, max(triton.next_power_of_2(use.combined) // (block_c * block_v), 1)),
        min_blocks=use.min_blocks,
        num_warps=use.num_warps,
        num_stages=(use.num_stages - 1) * (waits + 1) + 1,
        combine=use.combine,
        decision=use.decision,
        logit_bytes=use.logit_bytes,
        max_registers=use.max_registers,
        programs=use.programs_per_sm,
    )


# Tokens that one pass of the selection holds in registers. Inside the attention launch it is fewer, because the registers of a program are
# those of its greediest phase: 158 with 2048, 255 with 4096 (sm_90, 4 warps, bf16, D=128; tests/aot prints them).
SELECT_BLOCK = 8192
SELECT_WARPS = 8  # alone, and where it follows the sum over heads in a launch of its own: 10.0 us against 11.0, and a step of
DECIDE_WARPS = 4  # 414.8 us against 422.1 with eight (H200, B=32, N=2880, bench/results/2026-11-27-h200/settings.txt)
SELECT_BLOCK_IN_ATTENTION = 1024


def select(tokens: int, largest: int = SELECT_BLOCK) -> tuple[int, int]:
    """(block, chunks) of the selection over ``tokens`` tokens."""
    block = min(max(triton.next_power_of_2(max(tokens, 1)), 16), largest)
    return block, max(triton.cdiv(tokens, block), 1)


def importance(heads: int) -> tuple[int, int]:
    """(rows, columns) of a tile of the sum over heads; one tile holds all rows."""
    block = triton.next_power_of_2(heads)
    return block, max(2048 // block, 16)


COMBINED_APART = 4096  # numbers of partial outputs that a program of the combination alone takes at once
SUMS_PER_SM = 6  # programs of the sum alone that a multiprocessor holds at least, at 128 columns and four warps (tests/ahead_of_time)


def sum_columns(columns: int, tokens: int, batch: int, multiprocessors: int) -> int:
    """Columns of a program of the sum over heads where it is a launch of its own: so many, up to 128, that all run at once."""
    while columns < 128 and triton.cdiv(tokens, columns) * batch > SUMS_PER_SM * multiprocessors:
        columns *= 2
    return columns


_override: Settings | None = None


def override(chosen: Settings | None) -> None:
    """Every later launch uses ``chosen`` (None: the shipped settings again). For ``bench/tune.py`` and tests."""
    global _override
    _override = chosen


def overridden() -> Settings | None:
    """Returns what ``override`` set."""
    return _override


def to_json(device_name: str, chosen: dict[str, Settings], **facts: Any) -> str:
    """The text of a device file."""
    body = {"device": device_name, **facts, "settings": {key: dataclasses.asdict(value) for key, value in chosen.items()}}
    return json.dumps(body, indent=1, sort_keys=True) + "\n"
