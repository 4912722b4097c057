"""Compiles what the Triton backend would launch, for any architecture, and reads the result."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = ("bfloat16", "float16", "float32")
MULTIPROCESSORS = 132  # of an H200
TEXT = 64  # rows of text of a case
TENSOR_CORES = (("tensor_cores", True),)
WARP_ROWS = (("warp_rows", True), ("num_stages", 2), ("max_registers", 168))
LISTED_WARP_ROWS = WARP_ROWS[:2]  # without a bound: as many registers (Triton 3.6 and 3.9), and no spills in the loop
HALF_LOGITS = (("logit_bytes", 2),)
APART = (("decision", "two_launches"), ("combine", "second_launch"))
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Case:
    """One call of an operator: ``plain | append | rotary | list | window | statistics | score_last_query | step | step_count`` are
    attention launches, all but ``plain``, ``score_last_query`` and ``step_count`` with a new row, as in a model; ``paged | paged_window |
    paged_list | paged_statistics | paged_step`` those over paged rows, ``batch`` query rows; the others name their operator.
    """

    operator: str
    architecture: int
    dtype: str = "bfloat16"
    dim: int = 128
    group: int = 1
    tokens: int = 2880
    second_launch: bool = False
    batch: int = 2  # with the heads it says how many splits a program combines, and so how many registers it takes
    kv_heads: int = 8
    chosen: tuple[tuple[str, Any], ...] = ()  # settings other than the heuristic's
    dependent: bool = False  # programmatic dependent launches


@dataclass(frozen=True)
class Compiled:
    """One kernel of a case."""

    case: Case
    kernel: str
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    async_copies: int
    spills_in_loops: tuple[str, ...]  # spill instructions between a label and a branch back to it
    loop_barriers: int | None  # of the loop that copies and multiplies; None where it was not looked at
    unguarded: tuple[str, ...]  # release atomics with no barrier between them and the stores before
    waits: bool  # for the launches before it
    early: tuple[str, ...]  # what touches global memory before that
    tensor_products: tuple[int, int]  # instructions of warp groups (``wgmma``) and of warps (``mma``)
    grid: tuple[int, int, int]

    def programs_per_sm(self) -> int:
        """How many of them a multiprocessor of sm_90 holds at once."""
        from dyrate_kernels.triton_kernels import plan

        assert self.case.architecture == 90
        return plan.Multiprocessor().holds(self.registers, self.shared, self.warps)


def _compile(launch: Any, tensors: Any, case: Case) -> Compiled:
    """The kernel that ``launch.start`` would start with these tensors."""
    signature, constants, attributes = {}, {}, {}
    arguments = [*tensors, *launch.rest]
    parameters = launch.kernel.params
    assert len(arguments) == len(parameters), "the launch does not fill the kernel's signature"
    for number, (parameter, value) in enumerate(zip(parameters, arguments, strict=True)):
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=launch.options)
    return _read(case, launch, compiled)


def _read(case: Case, launch: Any, compiled: Any) -> Compiled:
    name, grid = launch.kernel.fn.__name__, launch.grid
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(tools / "cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert numbers, usage
        registers, stack, local = map(int, numbers.groups())
        spills: tuple[str, ...] = ()
        barriers = None
        if stack or local or case in form_cases():
            sass = subprocess.run([str(tools / "nvdisasm"), file.name], capture_output=True, text=True, check=True).stdout
            spills, barriers = spills_in_loops(sass), barriers_of_main_loop(sass)
    ptx = compiled.asm["ptx"]
    copies = len(re.findall(r"cp\.async\.c[ag]", ptx))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    tensor_products = (ptx.count("wgmma.mma_async"), ptx.count("mma.sync"))
    waits = WAIT in ptx
    early = before_the_wait(ptx) if waits else ()
    return Compiled(
        case, name, registers, stack, local, shared, warps, copies, spills, barriers, unguarded_atomics(ptx), waits, early, tensor_products,
        grid,
    )  # fmt: skip


WAIT = "griddepcontrol.wait"


def before_the_wait(ptx: str) -> tuple[str, ...]:
    """Instructions that read or write global memory and come before the wait for earlier launches; fetching into a cache is none."""
    found = []
    for line in ptx.partition(WAIT)[0].splitlines():
        touched = re.search(r"(?<![\w.%])(ld|st|atom|red|cp\.async|cp\.reduce|ldu|tex|surf)\.[\w.:]+", line)
        if touched and (touched[1].startswith("cp.") or not re.search(r"\.(param|shared|local|const)\b", touched[0])):
            found.append(line.strip())
    return tuple(found)


def spills_in_loops(sass: str) -> tuple[str, ...]:
    """Loads and stores of spilled registers that lie between a label and a branch back to it."""
    labels: dict[str, int] = {}
    spilled: list[tuple[int, str]] = []
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(sass.splitlines()):
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = number
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            loops.append((labels[branch[1]], number))
        if re.search(r"\b(STL|LDL)\b", line):
            spilled.append((number, line.strip()))
    # the last instruction of a kernel branches to itself; barriers and votes branch back a line or two
    return tuple(text for number, text in spilled if any(first < number < last for first, last in loops))


def barriers_of_main_loop(sass: str) -> int | None:
    """Barriers between a label and the branch back to it that enclose asynchronous copies and products of tensor cores."""
    labels: dict[str, int] = {}
    lines = sass.splitlines()
    for number, line in enumerate(lines):
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = number
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            loop = "\n".join(lines[labels[branch[1]] : number])
            if "LDGSTS" in loop and "HMMA" in loop:
                return len(re.findall(r"\bBAR\b", loop))
    return None


def unguarded_atomics(ptx: str) -> tuple[str, ...]:
    """Release atomics that a store to global memory precedes with no barrier between."""
    found, stored = [], False
    for line in ptx.splitlines():
        instruction = line.strip()
        if "bar.sync" in instruction or "barrier.sync" in instruction:
            stored = False
        elif "st.global" in instruction:
            stored = True
        elif re.search(r"\batom\.[a-z.]*(acq_rel|release)|\batom\.(acq_rel|release)", instruction) and stored:
            found.append(instruction)
    return tuple(found)


def compile_case(case: Case) -> list[Compiled]:
    """Every kernel that the case launches; for sm_90 what was compiled is asked for the programs of a multiprocessor, as on a GPU."""
    from dyrate_kernels.triton_kernels import backend, plan
    from dyrate_kernels.triton_kernels.launch import Launch, override_dependent_launch

    found: list[Compiled] = []
    start, resources, facts, here = Launch.start, Launch.resources, backend._device_facts, backend._multiprocessor

    def asked(launch: Any, device: Any, dtypes: Any) -> tuple[int, int, int]:
        compiled = _compile(launch, [None if dtype is None else torch.empty(0, dtype=dtype) for dtype in dtypes], case)
        return compiled.registers, (compiled.stack + compiled.local) // 4, compiled.shared

    try:
        Launch.start = lambda self, device, stream, tensors: found.append(_compile(self, tensors, case))
        Launch.resources = asked
        backend._device_facts = lambda device: ("a device that no file knows", MULTIPROCESSORS)
        backend._multiprocessor = lambda device: plan.Multiprocessor() if case.architecture == 90 else None
        size = getattr(torch, case.dtype).itemsize
        usual = plan.heuristic(case.group, case.dim, size)
        decision = "second_launch" if case.second_launch else "same_launch"
        plan.override(dataclasses.replace(usual, **{"decision": decision, **dict(case.chosen)}))
        override_dependent_launch(case.dependent)
        _call(backend, case)
    finally:
        override_dependent_launch(None)
        Launch.start, Launch.resources, backend._device_facts, backend._multiprocessor = start, resources, facts, here
        plan.override(None)
    assert found, f"{case} launched nothing"
    return found


def _call(backend: Any, case: Case) -> None:
    dtype = getattr(torch, case.dtype)
    if case.operator in ("select_tokens", "predict_rate"):
        _call_decision(backend, dtype, case)
    elif case.operator == "layer":
        _call_layer(dtype, case)
    elif case.operator.startswith("products"):
        _call_products(dtype, case)
    elif case.operator in ("compact_", "reorder_"):
        _call_rows(backend, _key(dtype, case), case)
    elif case.operator.startswith("paged"):
        heads = case.kv_heads * case.group
        _call_paged(backend, case, torch.zeros(case.batch, heads, case.dim, dtype=dtype), torch.zeros(case.batch, TEXT, dtype=torch.uint8))
    else:
        _call_attention(backend, _key(dtype, case), case)


def _key(dtype: torch.dtype, case: Case) -> torch.Tensor:
    """Never touched. An odd number of rows, so that nothing is aligned by luck."""
    return torch.empty(case.batch, case.kv_heads, case.tokens + TEXT, case.dim, dtype=dtype)


def _call_decision(backend: Any, dtype: torch.dtype, case: Case) -> None:
    batch = case.batch
    if case.operator == "predict_rate":
        backend.predict_rate(torch.zeros(batch, 32, 4), torch.zeros(5, 128), torch.zeros(batch, 5), torch.zeros(5, dtype=torch.float64))
    else:
        lengths, alive = torch.zeros(batch, dtype=torch.int32), torch.ones(batch, case.tokens, dtype=torch.bool)
        backend.select_tokens(torch.zeros(batch, case.tokens, dtype=dtype), lengths, lengths, alive=alive)


def _call_rows(backend: Any, key: torch.Tensor, case: Case) -> None:
    if case.operator == "reorder_":
        backend.reorder_([key, key.clone()], torch.zeros(case.batch, dtype=torch.int64))
    else:
        lengths = torch.zeros(case.batch, dtype=torch.int32)
        backend.compact_([key, key.clone()], torch.zeros(case.batch, case.tokens, dtype=torch.int32), lengths, lengths)


def _call_attention(backend: Any, key: torch.Tensor, case: Case) -> None:
    from dyrate_kernels.ops import Decide, Rows

    batch, heads, dtype = case.batch, case.kv_heads * case.group, key.dtype
    lengths, types = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, TEXT, dtype=torch.uint8)
    rows = (torch.zeros(batch, heads, case.dim, dtype=dtype), key, torch.empty_like(key), lengths, lengths)
    common: dict[str, Any] = {"visual_capacity": case.tokens, "scale": 0.1}
    new = {"new_key": key[:, :, 0], "new_value": key[:, :, 0]}

    def attend(statistics: bool = False, **more: Any) -> None:
        backend.decode_attention(Rows(*rows, **common, **more), mass=statistics, importance=statistics)

    if case.operator == "plain":
        attend()
    elif case.operator == "append":
        attend(**new)
    elif case.operator == "rotary":
        rotation = torch.zeros(batch, case.dim, dtype=dtype)
        attend(**new, cos=rotation, sin=rotation)
    elif case.operator == "list":
        attend(**new, kept=torch.zeros(batch, case.tokens // 8, dtype=torch.int32), n_kept=lengths)
    elif case.operator == "window":
        position = torch.zeros(batch, key.shape[2], dtype=torch.int32)
        attend(**new, position=position, query_position=lengths, window=4096)
    elif case.operator == "statistics":
        attend(**new, text_type=types, statistics=True)
    elif case.operator == "score_last_query":
        backend.score_last_query(Rows(*rows, **common, text_type=types))
    elif case.operator == "step":
        predictor = {"weight": torch.zeros(5, heads * 4), "bias": torch.zeros(batch, 5), "rates": torch.zeros(5, dtype=torch.float64)}
        backend.decode_step(Rows(*rows, **common, **new, text_type=types), Decide(**predictor))
    elif case.operator == "step_count":
        alive = torch.ones(batch, case.tokens, dtype=torch.bool)
        backend.decode_step(Rows(*rows, **common, text_type=types), Decide(count=lengths, alive=alive, max_kept=lengths))
    else:
        raise ValueError(f"operator: unknown {case.operator!r}")


def _call_layer(dtype: torch.dtype, case: Case) -> None:
    from dyrate_kernels.triton_kernels import layers

    size = 32 * case.dim
    x, weight = torch.zeros(1, 1, size, dtype=dtype), torch.zeros(size, size, dtype=dtype)
    query, key = torch.zeros(1, 32, 1, case.dim, dtype=dtype), torch.zeros(1, 32 // case.group, 1, case.dim, dtype=dtype)
    norm = weight[0]
    layers.rms_norm(x, norm, 1e-5)
    layers.residual_norm(x, x, norm, 1e-5)
    layers.gate_mul(x, x)
    layers.rotate(query, key, query[:, 0], query[:, 0])
    layers.linears(x, [weight] * 3, [norm] * 3)
    layers.linears(x, [weight], [None])
    layers.gated(x, weight, weight)
    layers.linears(x.expand(8, 1, size), [weight], [norm])
    if case.architecture == 90:
        layers.norm_linears(x, x, norm, 1e-5, [weight] * 3, [norm] * 3)
        layers.norm_gated(x, x, norm, 1e-5, weight, weight, "gelu_tanh", True)
        layers.residual_norm(x, x, norm, 1e-5, True, norm)
        layers.rotate(query, key, query[:, 0], query[:, 0], norm[: case.dim], norm[: case.dim], 1e-6)
        layers.rotate(
            query, key, *[torch.zeros(3, 1, 1, case.dim, dtype=dtype)] * 2, sections=(case.dim // 8, 3 * case.dim // 16, 3 * case.dim // 16)
        )


def _call_products(dtype: torch.dtype, case: Case) -> None:
    """The products of Vicuna-7B's layer with ``case.batch`` rows; ``products_split``: with the columns of a block shared out."""
    from dyrate_kernels.ops.layer_settings import Tile
    from dyrate_kernels.triton_kernels.few_rows import few_rows

    tile = Tile(splits=4) if case.operator == "products_split" else None
    x, weight = torch.empty(case.batch, 1, 4096, dtype=dtype), torch.empty(11008, 4096, dtype=dtype)
    few_rows(x, [weight[:4096]] * 3, [None] * 3, tile=tile)
    few_rows(x, [weight, weight], [None, None], "silu", tile)


def _call_paged(backend: Any, case: Case, query: torch.Tensor, types: torch.Tensor) -> None:
    """Over vLLM's layout: blocks of sixteen rows, keys beside values."""
    from dyrate_kernels.ops import Decide, PagedRows

    rows, heads, dim = query.shape
    text = types.shape[1]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    pool = torch.empty(8, case.kv_heads, 16, 2 * dim, dtype=query.dtype)
    table = zeros(rows, (case.tokens + text) // 16)
    key, value = pool[..., :dim].transpose(1, 2), pool[..., dim:].transpose(1, 2)
    given = (query, key, value, table, zeros(rows))
    common: dict[str, Any] = {"scale": 0.1, "sequence": zeros(rows)}
    tokens = {"n_visual": zeros(rows), "text_position": zeros(rows, text), "text_type": types}
    every = {**common, **tokens, "visual_position": zeros(rows, case.tokens)}
    nothing = {"mass": False, "importance": False}
    if case.operator == "paged":
        backend.paged_attention(PagedRows(*given, **common), **nothing)
    elif case.operator == "paged_window":
        backend.paged_attention(PagedRows(*given, **common, window=4096), **nothing)
    elif case.operator == "paged_list":
        kept = zeros(rows, case.tokens // 8)
        backend.paged_attention(PagedRows(*given, **common, **tokens, kept=kept, n_kept=zeros(rows)), **nothing)
    elif case.operator == "paged_statistics":
        backend.paged_attention(PagedRows(*given, **every), mass=True, importance=True)
    elif case.operator == "paged_step":
        predictor = {"weight": torch.zeros(5, heads * 4), "bias": torch.zeros(rows, 5), "rates": torch.zeros(5, dtype=torch.float64)}
        backend.paged_step(PagedRows(*given, **every), Decide(**predictor))
    else:
        raise ValueError(f"operator: unknown {case.operator!r}")


def main_cases(architecture: int) -> list[Case]:
    """The configurations that matter most: LLaVA-1.5-7B and its kin (G = 1), Qwen2-7B text models (G = 7), bfloat16."""
    return [Case(operator, architecture, group=group) for operator in ("append", "list", "statistics", "step") for group in (1, 7)] + [
        Case("window", architecture),
        Case("score_last_query", architecture),
        Case("step_count", architecture),
        Case("step", architecture, second_launch=True),
        Case("step", architecture, second_launch=True, chosen=APART),
        Case("select_tokens", architecture, "float32"),
        Case("select_tokens", architecture, "float32", tokens=16384),
        Case("predict_rate", architecture),
        Case("compact_", architecture),
        Case("reorder_", architecture),
        Case("layer", architecture),
    ]


def occupancy_cases() -> list[Case]:
    """Heads and batches that an H200 was measured with: 32 heads at B=8 and 32, 28 heads over 4 at B=8 and 32; sm_90."""
    sizes = ((1, 32, 8), (1, 32, 32), (7, 4, 8), (7, 4, 32))  # group, key/value heads, sequences
    return [
        Case(operator, 90, group=group, batch=batch, kv_heads=kv_heads, second_launch=True)
        for operator in ("append", "list", "statistics", "step", "rotary")
        for group, kv_heads, batch in (sizes if operator != "rotary" else sizes[::2])
    ]


def paged_cases() -> list[Case]:
    """Paged rows: every form of the main loop in both groups as an H200 would be given them, and two other devices."""
    sizes = ((1, 32, 8), (7, 4, 32))  # group, key/value heads, query rows
    return [
        Case(operator, 90, group=group, batch=batch, kv_heads=kv_heads, second_launch=True)
        for operator in ("paged", "paged_list", "paged_statistics")
        for group, kv_heads, batch in sizes
    ] + [Case("paged_step", 90), Case("paged_window", 80), Case("paged_list", 80), Case("paged", 120, group=7)]


def product_cases() -> list[Case]:
    """Products with few rows: the narrowest, those of a batch, and the widest tile, on tensor cores of either kind."""
    return [Case("products", 90, batch=rows) for rows in (2, 32, 64)] + [
        Case("products_split", 90, batch=32),
        Case("products", 80, batch=32),
    ]


def dependent_cases() -> list[Case]:
    """Every kernel as a programmatic dependent launch."""
    operators = ("append", "step", "predict_rate", "select_tokens", "compact_", "reorder_", "layer", "products_split")
    return [Case(operator, 90, second_launch=True, dependent=True) for operator in operators] + [
        Case("step", 90, second_launch=True, dependent=True, chosen=APART)
    ]


def form_cases() -> list[Case]:
    """The main loop's other forms, at sizes that an H200 was measured with, beside the usual one of seven heads."""
    operators = ("append", "list", "statistics")
    sizes: dict[str, Any] = {"second_launch": True, "batch": 8}
    found = [Case("append", 90, group=7, kv_heads=4, **sizes), Case("statistics", 90, group=7, kv_heads=4, chosen=HALF_LOGITS, **sizes)]
    for architecture in (80, 90):
        some = operators if architecture == 90 else operators[:1]
        for operator in some:
            rows = LISTED_WARP_ROWS if operator == "list" else WARP_ROWS
            found.append(Case(operator, architecture, group=7, kv_heads=4, chosen=rows, **sizes))
        found += [Case(operator, architecture, kv_heads=32, chosen=TENSOR_CORES, **sizes) for operator in some]
    return found


GROUPS = (2, 3, 4, 5, 6, 7, 8, 16)
GROUPED_DIMS = (64, 80, 96, 128, 256)


def group_cases(full: bool) -> list[Case]:
    """Query heads a key/value head with head dims: every one of both, or every pair in every dtype."""
    if full:
        return [
            Case(operator, architecture, dtype, dim, group, second_launch=True)
            for operator in ("append", "statistics")
            for architecture in (80, 90)
            for dtype in DTYPES
            for group in GROUPS
            for dim in GROUPED_DIMS
        ]
    pairs = [(group, GROUPED_DIMS[number % len(GROUPED_DIMS)]) for number, group in enumerate(GROUPS)]
    return [Case("statistics", 90, DTYPES[number % 2], dim, group, second_launch=True) for number, (group, dim) in enumerate(pairs)]


def matrix(operator: str, architecture: int) -> list[Case]:
    """Every dtype, head dim and form of the main loop."""
    return [Case(operator, architecture, dtype, dim, group) for dtype in DTYPES for dim in HEAD_DIMS for group in (1, 4)]


def some_of_matrix(architecture: int) -> list[Case]:
    """Every dtype with every head dim; both forms in bfloat16, one of them in float16 (which is compiled alike) and in float32, whose
    widest tiles are there too."""
    forms = {("bfloat16", 1), ("bfloat16", 4), ("float16", 4), ("float32", 1)}
    widest = ("float32", 256)
    return [c for c in matrix("append", architecture) if (c.dtype, c.group) in forms or (c.dtype, c.dim) == widest]


def all_cases(full: bool) -> list[Case]:
    """``full``: everything for every architecture. Else every kernel, head dim and dtype for every one, and more of that for sm_90; the
    slowest to compile (seven heads a key/value head, the decision in the attention's own launch) for sm_80, sm_90 and sm_120."""
    cases = occupancy_cases() + dependent_cases() + product_cases() + form_cases() + paged_cases()
    cases += group_cases(full)
    for architecture in ARCHITECTURES:
        if full:
            cases += main_cases(architecture) + matrix("append", architecture) + matrix("step", architecture)
        elif architecture == 90:
            seen = {("append", 1), ("append", 7), ("list", 1), ("list", 7), ("statistics", 1), ("statistics", 7)}  # occupancy_cases
            cases += [case for case in main_cases(architecture) if (case.operator, case.group) not in seen]
            cases += [Case("plain", architecture), *some_of_matrix(architecture)]
            cases += [Case("step", architecture, dim=dim) for dim in (16, 80, 256)]
        else:
            like_80 = architecture in (86, 89)
            skipped = {("statistics", 1), ("statistics", 7), ("step", 7), ("list", 7)}
            if architecture not in (80, 120):
                skipped |= {("append", 7), ("step", 1), ("step_count", 1)}
            found = [case for case in main_cases(architecture) if case.second_launch or (case.operator, case.group) not in skipped]
            if architecture not in (80, 120):  # the decision in launches of its own, whose kernels are more
                found = [case for case in found if not case.second_launch or case.chosen]
            cases += [case for case in found if architecture == 80 or case.tokens == Case.tokens]
            for number, dim in enumerate(HEAD_DIMS):
                cases.append(Case("append", architecture, DTYPES[number % len(DTYPES)], dim, 4 if number % 2 == like_80 else 1))
        cases.append(Case("select_tokens", architecture, "float64"))
    return list(dict.fromkeys(cases))


def _worker(case: Case) -> list[Compiled] | str:
    torch.set_num_threads(1)
    try:
        return compile_case(case)
    except Exception as error:
        return f"{case}: {type(error).__name__}: {str(error)[-1500:]}"


def compile_all(cases: list[Case], processes: int = 2) -> tuple[list[Compiled], list[str]]:
    """(what was compiled, what failed)."""
    with Pool(processes) as pool:
        results = pool.map(_worker, cases, chunksize=4)
    return [kernel for r in results if not isinstance(r, str) for kernel in r], [r for r in results if isinstance(r, str)]


@functools.cache
def version() -> str:
    return triton.__version__


def version_before(*numbers: int) -> bool:
    return tuple(int(part) for part in version().split(".")[: len(numbers)]) < numbers


if __name__ == "__main__":
    made, failed = compile_all(
        [case for architecture in (80, 90, 120) for case in main_cases(architecture)]
        + occupancy_cases() + product_cases() + form_cases() + paged_cases()
    )  # fmt: skip
    print(f"triton {version()}")
    for kernel in made:
        c = kernel.case
        print(
            f"sm_{c.architecture} {kernel.kernel:24} {c.operator:16} B={c.batch} G={c.group} {c.dtype} D={c.dim} N={c.tokens}: "
            f"{kernel.registers} registers, "
            f"{kernel.stack + kernel.local} bytes spilled, {kernel.shared} bytes shared, {kernel.async_copies} asynchronous copies"
            + (", {} wgmma and {} mma".format(*kernel.tensor_products) if any(kernel.tensor_products) else "")
            + (f", {kernel.programs_per_sm()} on a multiprocessor" if c.architecture == 90 else "")
        )
    print("\n".join(failed))
