"""The operators of ``dyrate_kernels.ops`` in Triton: the functions of ``dyrate_kernels.ops.contract`` over the kernels of this folder.

Arguments are taken as valid (``dyrate_kernels.ops`` checks them). Everything is launched on the current stream, allocates only its results,
reads no device value on the host and can be captured in a graph, after one call with the same buffers on the stream of the capture (scratch
memory and tables are made then). float64 inputs go to the reference: no kernel here accumulates in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dyrate_kernels.ops import reference, workspace
from dyrate_kernels.ops.contract import Decide, PagedRows, Rows
from dyrate_kernels.ops.forms import Prepared, Step, empty_step, form, last_contiguous, readable_list, remember, stream_of, strides, vector

from . import interpreted, interpreter, plan
from . import rows as moving
from .attention import combine_kernel, decide_kernel, decide_rows_kernel, decode_attention_kernel
from .decision import predict_rate_kernel, select_tokens_kernel
from .launch import Launch, dependent_launch, start

if interpreted():
    interpreter.prepare()


@functools.cache
def _device_facts(device: torch.device) -> tuple[str, int]:
    """(name, multiprocessors)."""
    if device.type != "cuda":
        return plan.INTERPRETED, 4
    facts = torch.cuda.get_device_properties(device)
    return facts.name, facts.multi_processor_count


# Programs that a multiprocessor holds at most, where it is not 32
_FEWER_PROGRAMS = {(7, 5): 16, (8, 6): 16, (8, 7): 16, (8, 9): 24, (12, 0): 24, (12, 1): 24}


@functools.cache
def _multiprocessor(device: torch.device) -> plan.Multiprocessor | None:
    """None where no compiled kernel can be asked what it takes."""
    if device.type != "cuda" or interpreted():
        return None
    facts = torch.cuda.get_device_properties(device)
    return plan.Multiprocessor(
        getattr(facts, "regs_per_multiprocessor", 65536), facts.shared_memory_per_multiprocessor,
        facts.max_threads_per_multi_processor // 32, _FEWER_PROGRAMS.get((facts.major, facts.minor), 32),
    )  # fmt: skip


@dataclass(frozen=True)
class _Attention:
    """Everything about an attention call that its tensors' forms decide.

    Attributes:
        launch: of ``decode_attention_kernel``.
        combine: of ``combine_kernel``, where splits are combined in a launch of their own.
        decide: of ``decide_kernel``, where the decision takes a launch of its own.
        select: of ``decide_rows_kernel``, where it takes two.
        scratch: elements of each scratch buffer, by name; None where it is not used.
        programs: on a multiprocessor that the plan wants; None: whatever fits.
    """

    launch: Launch
    combine: Launch | None
    decide: Launch | None
    select: Launch | None
    scratch: dict[str, int | None]
    programs: int | None


class Pages(NamedTuple):
    """Arguments of an attention over paged rows beside the others.

    Attributes:
        block_table: int32 ``[S, M]``.
        sequence: int32 ``[B]``, of each query row; None: the row's own number.
        text_position: int32 ``[S, T]``; None where no list is read, nor ``n_visual``.
        shared_list: the list is the sequence's ``[S, N]``, not the query row's ``[B, N]``.
        row_bound: rows that no sequence has more of.
    """

    block_table: Tensor
    sequence: Tensor | None
    text_position: Tensor | None
    shared_list: bool
    row_bound: int

    def form(self) -> Hashable:
        """All that a launch depends on but addresses."""
        return form(self.block_table), self.sequence is None, form(self.text_position), self.shared_list, self.row_bound


_attentions: dict[Hashable, _Attention] = {}


def _fit_attention(shape: Callable[..., _Attention], device: torch.device, before: tuple, after: tuple) -> _Attention:
    """``shape(programs, max_registers)`` for the programs that a multiprocessor really holds of the compiled kernel.

    Where fewer fit than the plan wants, a bound on registers comes first, the one that lets most of them fit of those for which nothing is
    spilled; else the grid is made for those that fit. (Fewer splits may take fewer registers, so that more would fit again: the number that
    was asked for first stays.)
    ``before`` and ``after``: the launch's tensors, but for the scratch memory between them.
    """
    made, here = shape(None, None), _multiprocessor(device)
    if here is None:
        return made

    def ask(made: _Attention) -> tuple[int, int]:
        scratch = [None if size is None else workspace.dtype_of(name) for name, size in made.scratch.items()]
        dtypes = [*(t if t is None else t.dtype for t in before), *scratch, *(t if t is None else t.dtype for t in after)]
        registers, spilled, shared = made.launch.resources(device, dtypes)
        return max(here.holds(registers, shared, made.launch.options["num_warps"]), 1), spilled

    try:
        fits, _ = ask(made)
    except AttributeError:  # a version of Triton that tells it elsewhere: the grid is made as if nobody could be asked
        return made
    wanted = made.programs or fits
    if "maxnreg" not in made.launch.options:
        for programs in range(wanted, fits, -1):
            bounded = shape(programs, here.bound(programs, made.launch.options["num_warps"]))
            fits_so, spilled = ask(bounded)
            if fits_so >= programs and not spilled:
                return bounded
    planned = made.programs or plan.USUAL_PROGRAMS
    if made.programs is None and fits > planned:
        made = shape(fits, None)
        planned, (fits, _) = fits, ask(made)
    while fits < planned:
        made = shape(fits, None)
        planned, (fits, _) = fits, ask(made)
    return made


def shared_stride(rotation: Tensor | None) -> int:
    """From one sequence's row to the next one's; 0 where all of them share it."""
    return 0 if rotation is None or rotation.shape[0] == 1 else rotation.stride(0)


def _prepare_attention(
    rows: Rows, mass: bool, importance: bool, output: bool, decide: Decide | None, pages: Pages | None, programs: int | None,
    max_registers: int | None,
) -> _Attention:  # fmt: skip
    query, key, value, kept, visual_capacity = rows.query, rows.key, rows.value, rows.kept, rows.visual_capacity
    batch, heads, dim = query.shape
    kv_heads, block_rows, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    listed, has_window = kept is not None, rows.window is not None
    places = max(kept.shape[1] if kept is not None else visual_capacity, 1)
    if pages is None:
        capacity = places + block_rows - visual_capacity
        kept_logits = (places if importance else 0) + (block_rows - visual_capacity if mass else 0)
        paging = (0, 0, 0, 0, False, False)
    else:
        capacity = max(pages.row_bound, 1)
        kept_logits = capacity if mass else places if importance else 0
        text_position = pages.text_position
        text_listed = 0 if text_position is None else text_position.shape[1]
        same = (key.stride(0), key.stride(2)) == (value.stride(0), value.stride(2))
        paging = (text_listed, pages.block_table.stride(0), strides(text_position, 2)[0], block_rows, pages.shared_list, same)
    logit_capacity = triton.cdiv(kept_logits, 16) * 16  # rows of logits start at a multiple of 64 bytes
    device_name, multiprocessors = _device_facts(query.device)
    how = plan.attention(
        device_name, multiprocessors, batch, kv_heads, heads // kv_heads, dim, value_dim, query.element_size(),
        capacity, "score" if importance else "list" if listed else "plain", plan.overridden(),
        programs, listed, pages is not None,
    )  # fmt: skip
    second = importance and how.decision != "same_launch" and (pages is not None or not listed)
    weight, bias, _, _, score, alive, max_kept = decide or Decide()
    features, classes = heads * 4, 0 if weight is None else weight.shape[0]
    choice = (*strides(weight, 2), *strides(bias, 2), *strides(score, 2), *strides(alive, 2))
    wide = score is not None and score.dtype == torch.float64
    flags = (weight is not None, score is not None, alive is not None, max_kept is not None, wide)
    block_h, block_i = plan.importance(heads if second else kv_heads)
    if second and how.decision == "two_launches":
        block_i = plan.sum_columns(block_i, visual_capacity, batch, multiprocessors)
    block_s, chunks = plan.select(visual_capacity, plan.SELECT_BLOCK if second else plan.SELECT_BLOCK_IN_ATTENTION)
    blocks = (block_h, block_i, max(triton.next_power_of_2(features), 16), block_s, chunks)
    combined = how.combine == "second_launch" and how.max_splits > 1 and pages is None and (second or not importance)
    rest = (
        rows.scale, rows.window or 0, dim, value_dim, heads, visual_capacity, logit_capacity, how.min_blocks, features, classes, paging[0],
        *query.stride(), *key.stride(), *value.stride(),
        strides(kept, 2)[0], strides(rows.text_type, 2)[0], strides(rows.position, 2)[0], strides(rows.query_position, 1)[0],
        *strides(rows.new_key, 3)[:2], *strides(rows.new_value, 3)[:2], shared_stride(rows.cos), shared_stride(rows.sin), *paging[1:3],
        *choice,
        heads // kv_heads, how.block_g, how.block_c, how.dot, how.row_warps, how.block_n, how.block_d, how.block_v,
        how.max_splits, how.split_tile, how.num_stages, how.block_t,
        output, mass, importance, listed, has_window, rows.new_key is not None, rows.cos is not None, not combined,
        importance and not second,
        decide is not None and not second, *flags, *blocks, *paging[3:],
    )  # fmt: skip
    grid = (how.splits, kv_heads, batch)
    dependent = dependent_launch(query.device)
    launch = Launch(decode_attention_kernel, grid, rest, how.num_warps, how.num_stages, how.max_registers or max_registers, dependent)
    combining = deciding = selecting = None
    if combined:
        tile = min(how.max_splits, max(plan.COMBINED_APART // how.block_v, 1))
        rest = (
            value_dim, logit_capacity, how.min_blocks, how.splits, strides(rows.text_type, 2)[0], output, mass, importance, listed,
            how.max_splits, tile, how.block_n, how.block_v, how.block_t,
        )  # fmt: skip
        combining = Launch(combine_kernel, (heads, batch, 1), rest, how.num_warps, dependent=dependent)
    if second:
        apart = decide is not None and how.decision == "two_launches"
        rest = (
            heads, kv_heads + 1, visual_capacity, logit_capacity, features, classes, strides(kept, 2)[0], *choice,
            decide is not None, not apart, *flags, *blocks, pages is not None, paging[4],
        )  # fmt: skip
        grid = (max(triton.cdiv(visual_capacity, block_i), 1), batch, 1)
        deciding = Launch(decide_kernel, grid, rest, plan.DECIDE_WARPS, dependent=dependent)
        if apart:
            rest = (visual_capacity, features, classes, strides(kept, 2)[0], *choice, *flags, *blocks[2:], pages is not None, paging[4])
            selecting = Launch(decide_rows_kernel, (batch, 1, 1), rest, plan.SELECT_WARPS, dependent=dependent)
    scratch = {
        "part": batch * heads * how.max_splits * how.block_v if output else None,
        "part_stat": batch * heads * how.max_splits * 2,
        "head_stat": batch * heads * 2,
        "counters": batch * (kv_heads + 1),
        "logits" if how.logit_bytes == 4 else "logits16": batch * heads * logit_capacity if importance or mass else None,
    }
    return _Attention(launch, combining, deciding, selecting, scratch, how.programs)


def _run_attention(
    rows: Rows, *, mass: bool, importance: bool, output: bool = True, decide: Decide | None = None, pages: Pages | None = None,
    out: Tensor | None = None, prepared: Prepared | None = None,
) -> Step:  # fmt: skip
    """One launch of ``decode_attention_kernel``, and of ``decide_kernel`` where the plan says so.

    With ``pages``: key and value ``[blocks, Hkv, rows, D]``, n_text counts all rows of a query row's sequence, kept holds positions.
    ``out``: contiguous, takes the output.
    """
    (
        query, key, value, n_visual, n_text, visual_capacity, scale, kept, n_kept, text_type, position, query_position, window, _, _, _,
        new_key, new_value, cos, sin,
    ) = rows  # fmt: skip
    device = query.device
    batch, heads, _ = query.shape
    made = empty_step(
        query, value, visual_capacity, output=output and out is None, mass=mass, importance=importance, decide=decide is not None
    )
    if out is not None:
        made = made._replace(output=out)
    result, masses, scores, chosen, chosen_count, rate = made
    if batch == 0 or heads == 0:
        return made
    weight, bias, rates, count, score, alive, max_kept = decide or Decide()
    if decide is not None:
        rates, count, max_kept = vector(rates), vector(count), vector(max_kept)
        if bias is not None and bias.dim() == 1:
            bias = bias.expand(batch, -1)
        if alive is not None:
            alive = alive.view(torch.uint8)
    kept, n_kept = readable_list(last_contiguous(kept), n_kept)
    n_text, n_kept = vector(n_text), vector(n_kept)
    text_type = last_contiguous(text_type) if mass else None
    position, query_position = (None, None) if window is None else (last_contiguous(position), query_position)
    new_key, new_value, cos, sin = last_contiguous(new_key), last_contiguous(new_value), last_contiguous(cos), last_contiguous(sin)
    table, sequence, text_position = (None, None, None) if pages is None else pages[:3]
    counted = None if pages is not None and text_position is None else vector(n_visual)
    before = (
        query, key, value, result, counted, n_text, kept, n_kept, text_type, position, query_position, new_key, new_value,
        table, sequence, text_position, cos, sin,
    )  # fmt: skip
    after = (masses, scores, weight, bias, rates, count, score, alive, max_kept, chosen, chosen_count, rate)
    settings = (plan.overridden(), dependent_launch(device))
    known = prepared.launches if prepared is not None and prepared.settings == settings else None
    if known is None:
        forms = (
            device, visual_capacity, scale, window, mass, importance, output, settings, form(query), form(key), form(value), form(kept),
            form(text_type), form(position), form(query_position), form(new_key), form(new_value), form(cos), form(sin), decide is None,
            form(weight), form(bias), form(score), form(alive), max_kept is None, None if pages is None else pages.form(),
        )  # fmt: skip
        known = _attentions.get(forms)
        if known is None:
            readable = rows._replace(
                kept=kept, text_type=text_type, position=position, query_position=query_position, new_key=new_key, new_value=new_value,
                cos=cos, sin=sin,
            )  # fmt: skip
            by = None if decide is None else Decide(weight, bias, rates, count, score, alive, max_kept)
            shape = functools.partial(_prepare_attention, readable, mass, importance, output, by, pages)
            known = remember(_attentions, forms, _fit_attention(shape, device, before, after))
        if prepared is not None:
            prepared.launches, prepared.settings = known, settings
    stream = stream_of(device)
    part, part_stat, head_stat, counters, logits = workspace.for_stream(device, stream).buffers_for(known.scratch)
    known.launch.start(device, stream, (*before, part, part_stat, head_stat, counters, logits, *after))
    if known.combine is not None:
        parts = (part, part_stat, head_stat, logits)
        known.combine.start(device, stream, (counted, n_text, n_kept, text_type, result, *parts, masses))
    if known.decide is not None:
        counted = counted if pages is None else n_kept
        known.decide.start(device, stream, (counted, kept, sequence, head_stat, counters, logits, *after))
        if known.select is not None:
            known.select.start(device, stream, (counted, kept, sequence, *after))
    return made


def decode_attention(rows: Rows, *, mass: bool, importance: bool, prepared: Prepared | None = None) -> tuple[Tensor, Any, Any]:
    """See ``dyrate_kernels.ops.decode_attention``. The bounds and ``clean`` are not needed: lengths are read on the device."""
    if rows.query.dtype == torch.float64:
        return reference.decode_attention(rows, mass=mass, importance=importance)
    return _run_attention(rows, mass=mass, importance=importance, prepared=prepared)[:3]


def score_last_query(rows: Rows) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.score_last_query``: the same kernel, without values and output."""
    if rows.query.dtype == torch.float64:
        return reference.score_last_query(rows)
    return _run_attention(rows, mass=True, importance=True, output=False)[1:3]


def decode_step(rows: Rows, decide: Decide, *, prepared: Prepared | None = None) -> Step:
    """See ``dyrate_kernels.ops.decode_step``: one launch, two or three, as the plan says."""
    if rows.query.dtype == torch.float64:
        return Step(*reference.decode_step(rows, decide))
    return _run_attention(rows, mass=True, importance=True, decide=decide, prepared=prepared)


# ---- paged rows -------------------------------------------------------------------------------------------------------------------


def _run_paged(paged: PagedRows, *, mass: bool, importance: bool, out: Tensor | None = None, decide: Decide | None = None) -> Step:
    """``_run_attention`` over blocks. The bound on rows is rounded up, so that a batch that grows row by row prepares few launches."""
    most = paged.block_table.shape[1] * paged.key.shape[1]
    bound = most if paged.row_bound is None else min(triton.next_power_of_2(max(paged.row_bound, 16)), most)
    listed, n_listed, text_position = None, None, None
    if paged.kept is not None:
        listed, n_listed, text_position = paged.kept, paged.n_kept, paged.text_position
    elif mass or importance:
        listed, n_listed, text_position = paged.visual_position, paged.n_visual, paged.text_position
    pages = Pages(last_contiguous(paged.block_table), vector(paged.sequence), last_contiguous(text_position), paged.kept is None, bound)
    rows = Rows(
        paged.query, paged.key.transpose(1, 2), paged.value.transpose(1, 2),
        paged.n_rows if paged.n_visual is None else paged.n_visual, paged.n_rows, 0 if listed is None else listed.shape[1], paged.scale,
        kept=listed, n_kept=n_listed, text_type=paged.text_type, window=paged.window,
    )  # fmt: skip
    return _run_attention(rows, mass=mass, importance=importance, decide=decide, pages=pages, out=out)


def paged_attention(rows: PagedRows, *, mass: bool, importance: bool, out: Tensor | None = None) -> tuple[Tensor, Any, Any]:
    """See ``dyrate_kernels.ops.paged_attention``."""
    run = reference.paged_attention if rows.query.dtype == torch.float64 else _run_paged
    return run(rows, mass=mass, importance=importance, out=out)[:3]


def paged_step(rows: PagedRows, decide: Decide) -> Step:
    """See ``dyrate_kernels.ops.paged_step``: one launch (two where the plan says so)."""
    if rows.query.dtype == torch.float64:
        return Step(*reference.paged_step(rows, decide))
    return _run_paged(rows, mass=True, importance=True, decide=decide)


def predict_rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.predict_rate``."""
    if mass.dtype == torch.float64:
        return reference.predict_rate(mass, weight, bias, rates)
    batch = mass.shape[0]
    rate = torch.empty(batch, dtype=torch.float64, device=mass.device)
    index = torch.empty(batch, dtype=torch.int64, device=mass.device)
    mass, rates = mass.contiguous(), rates.contiguous()
    bias = bias.expand(batch, -1) if bias.dim() == 1 else bias
    features = mass.shape[1] * 4
    rest = (features, weight.shape[0], *weight.stride(), *bias.stride(), max(triton.next_power_of_2(features), 16))
    if batch:
        tensors = (mass, weight, bias, rates, rate, index)
        start(predict_rate_kernel, mass.device, (batch, 1, 1), rest, 1, tensors, mass.dtype, weight.dtype, bias.dtype)
    return rate, index


def select_tokens(score: Tensor, count: Tensor, n_visual: Tensor, *, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.select_tokens``."""
    batch, tokens = score.shape
    kept = torch.empty(batch, tokens, dtype=torch.int32, device=score.device)
    n_kept = torch.empty(batch, dtype=torch.int32, device=score.device)
    if tokens == 0:
        return kept, n_kept.zero_()
    alive = None if alive is None else alive.view(torch.uint8)
    block, chunks = plan.select(tokens)
    wide = score.dtype == torch.float64
    rest = (tokens, *score.stride(), *strides(alive, 2), alive is not None, wide, block, chunks)
    if batch:
        tensors = (score, vector(count), vector(n_visual), alive, kept, n_kept)
        start(select_tokens_kernel, score.device, (batch, 1, 1), rest, plan.SELECT_WARPS, tensors, score.dtype)
    return kept, n_kept


def keep_count(n_visual: Tensor, rate: Tensor) -> Tensor:
    """See ``dyrate_kernels.ops.keep_count``: a few elements, left to torch."""
    return reference.keep_count(n_visual, rate)


# ---- rows that move ---------------------------------------------------------------------------------------------------------------

MOVERS = 8192  # programs of a compaction, about, where there is so much to move

# a described tensor: address, strides of sequence, head and row, heads, elements of a row, bytes of an element
_Description = tuple[int, int, int, int, int, int, int]


def _table(device: torch.device, described: tuple[_Description, ...]) -> tuple[Tensor, int, bool, int]:
    """(table on the device, bytes of a word, aligned, most words of a row).

    The table is kept: a decode step describes the same buffers again and again. A description that is new inside a capture would be a copy
    from the host there, which CUDA refuses: call once before the capture.
    """
    found = _make_table(device, described)
    if workspace.capturing(device):
        workspace.keep((device, described), found[0])
    return found


@functools.lru_cache(maxsize=4096)
def _make_table(device: torch.device, described: tuple[_Description, ...]) -> tuple[Tensor, int, bool, int]:
    word = 4
    for address, stride_b, stride_h, stride_r, _, words, itemsize in described:
        while any(part * itemsize % word for part in (stride_b, stride_h, stride_r, words)) or address % word:
            word //= 2
    entries, aligned, most = [], True, 1
    for address, stride_b, stride_h, stride_r, heads, words, itemsize in described:
        line = [address, *(stride * itemsize // word for stride in (stride_b, stride_h, stride_r)), heads, words * itemsize // word]
        aligned &= address % 16 == 0 and all(part * itemsize % 64 == 0 for part in (stride_b, stride_h, stride_r))
        aligned &= words * itemsize % 16 == 0
        most = max(most, line[-1])
        entries.append(line)
    with torch.inference_mode(False):
        return torch.tensor(entries, dtype=torch.int64).to(device), word, aligned and word == 4, most


def _describe(tensor: Tensor) -> _Description | None:
    """None where a row's elements are not next to each other."""
    if tensor.dim() == 2:
        return tensor.data_ptr(), tensor.stride(0), 0, tensor.stride(1), 1, 1, tensor.element_size()
    (_, heads, _, words), (sequence, head, row, word) = tensor.shape, tensor.stride()
    if word != 1 and words != 1:
        return None
    return tensor.data_ptr(), sequence, head, row, heads, words, tensor.element_size()


class _Movable(NamedTuple):
    """Tensors whose rows move: those that a kernel can move, described; the others; the most rows of one."""

    addresses: list[int]
    described: tuple[_Description, ...]
    others: list[int]
    most: int


def _movable(rows: list[Tensor], addresses: list[int]) -> _Movable:
    described, others, most = [], [], 0
    for number, tensor in enumerate(rows):
        if tensor.numel():
            line = _describe(tensor)
            others.append(number) if line is None else described.append(line)
            most = max(most, tensor.shape[-1 if tensor.dim() == 2 else -2])
    return _Movable(addresses, tuple(described), others, most)


def compact_(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor, *, prepared: Prepared | None = None) -> None:
    """See ``dyrate_kernels.ops.compact_``: one launch for all tensors."""
    batch, width = kept.shape
    if batch == 0 or width == 0:
        return
    kept = last_contiguous(kept)
    addresses = [tensor.data_ptr() for tensor in rows]
    movable: _Movable | None = None if prepared is None else prepared.launches
    if movable is None or movable.addresses != addresses:
        movable = _movable(rows, addresses)
        if prepared is not None:
            prepared.launches = movable
    described = movable.described
    if movable.others:
        reference.compact_([rows[number] for number in movable.others], kept, n_kept, n_visual)
    if not described:
        return
    table, word, aligned, words = _table(kept.device, described)
    block_w = min(max(triton.next_power_of_2(words), 1), 128)
    block_m = max(min(4096 // block_w, 64), 1)
    most = max(min(width, movable.most // 2), 1)
    movers = max(min(triton.cdiv(most, block_m), triton.cdiv(MOVERS, batch * len(described))), 1)
    rest = (kept.stride(0), word, aligned, block_m, block_w, max(width.bit_length() + 1, 1))
    tensors = (table, kept, vector(n_kept), vector(n_visual))
    start(moving.compact_kernel, kept.device, (batch, movers, len(described)), rest, 4, tensors)


def reorder_(rows: list[Tensor], index: Tensor) -> None:
    """See ``dyrate_kernels.ops.reorder_``: one launch for all tensors."""
    batch = index.shape[0]
    described, others = [], []
    for tensor in rows:
        if tensor.numel() == 0:
            continue
        if not tensor.is_contiguous():
            others.append(tensor)
            continue
        size = tensor[0].numel()
        described.append((tensor.data_ptr(), size, 0, 0, 1, size, tensor.element_size()))
    if others:
        reference.reorder_(others, index)
    if not described:
        return
    table, word, aligned, words = _table(index.device, tuple(described))
    block_b = triton.next_power_of_2(batch)
    block_w = max(min(4096 // block_b, 512, triton.next_power_of_2(words)), 1)
    rest = (batch, word, aligned, block_b, block_w)
    blocks = max(min(triton.cdiv(words, block_w), 1024), 1)
    start(moving.reorder_kernel, index.device, (blocks, len(described), 1), rest, 4, (table, index.contiguous()))
