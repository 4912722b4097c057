"""How the Triton backend starts kernels, shapes their launches and keeps scratch memory; kernels are stood in for, nothing is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import threading
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from dyrate_kernels import devices, ops
from dyrate_kernels.ops import workspace
from dyrate_kernels.ops.forms import Prepared
from dyrate_kernels.triton_kernels import backend, plan
from dyrate_kernels.triton_kernels.launch import Launch

DEVICE = torch.device("cpu")


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.log = log

    def run(self, *arguments):
        self.log.append(("direct", arguments))


class Kernel:
    def __init__(self):
        self.log = []

    def run(self, *arguments, **options):
        self.log.append(("triton", arguments, options))
        return Compiled(self.log)


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return Launch(Kernel(), (2, 3, 4), (7, 0.5), num_warps=8, num_stages=2)


def ways(launch):
    return [entry[0] for entry in launch.kernel.log]


def test_the_second_start_goes_straight_to_the_driver(launch):
    first, second = torch.zeros(8), torch.zeros(8)
    launch.start(DEVICE, 5, (first, None))
    launch.start(DEVICE, 6, (second, None))
    assert ways(launch) == ["triton", "direct"]
    _, arguments, options = launch.kernel.log[0]
    assert arguments[0] is first and arguments[1:] == (None, 7, 0.5, False)
    assert (options["grid"], options["num_warps"], options["num_stages"]) == ((2, 3, 4), 8, 2)
    assert launch.kernel.log[1][1] == (2, 3, 4, 6, "function", "metadata", None, None, None, second.data_ptr(), None, 7, 0.5, False)


def test_an_unaligned_tensor_takes_tritons_way_each_time(launch):
    aligned, unaligned = torch.zeros(8), torch.zeros(8)[1:]
    for tensor in (unaligned, unaligned, aligned, unaligned, aligned):
        launch.start(DEVICE, 0, (tensor, None))
    assert ways(launch) == ["triton", "triton", "triton", "triton", "direct"]


def test_a_profilers_hook_sees_every_launch(launch):
    tensors = (torch.zeros(8), None)
    launch.start(DEVICE, 0, tensors)
    before = knobs.runtime.launch_enter_hook
    hook = lambda metadata: None  # noqa: E731
    if hasattr(before, "add"):
        before.add(hook)
    else:
        knobs.runtime.launch_enter_hook = hook
    try:
        launch.start(DEVICE, 0, tensors)
    finally:
        if hasattr(before, "remove"):
            before.remove(hook)
        else:
            knobs.runtime.launch_enter_hook = before
    launch.start(DEVICE, 0, tensors)
    assert ways(launch) == ["triton", "triton", "direct"]


def attention(**changed):
    usual = {
        "device_name": "unknown", "multiprocessors": 132, "batch": 1, "kv_heads": 32, "group": 1, "dim": 128, "value_dim": 128,
        "itemsize": 2, "rows": 3008, "kind": "plain",
    }  # fmt: skip
    return plan.attention(**usual | changed)


def test_plans_follow_capacities():
    assert attention(rows=64).splits == attention(batch=256).splits == 1
    few, many = attention(), attention(rows=16512)
    assert 1 < few.splits <= many.splits <= plan.heuristic(1, 128, 2).most_splits
    for how in (few, many, attention(group=7, kv_heads=4), attention(dim=80), attention(dim=5, itemsize=4), attention(dim=256, itemsize=4)):
        for number in (how.block_n, how.block_d, how.block_v, how.max_splits, how.split_tile, how.block_g, how.block_c):
            assert number & (number - 1) == 0
        assert how.splits <= how.max_splits < 2 * how.splits and how.split_tile <= how.max_splits
    assert attention(group=7).dot and attention(group=7).block_g == 16 and attention(group=20).block_g == 32
    assert attention(batch=8).splits == 2  # 256 pairs: one wave of four programs on each of 132 multiprocessors
    assert attention(batch=8, programs=3).splits == 1  # or three
    assert attention(batch=8, programs=7).splits == 2  # more than the four that are wanted
    assert attention(batch=32).splits == 1  # 1024 pairs do not fit in one, but fill two
    assert attention(batch=20, kv_heads=32).splits == 3  # 640 pairs would fill 1.2 waves: 3.6
    three = attention(batch=11, kv_heads=16)
    assert (three.splits, three.max_splits) == (3, 4)  # 176 pairs: any number of splits, not the next power of two
    assert not attention().dot and attention(dim=80).block_d == 128 and attention(dim=5).block_d == 16


def test_loads_that_rows_wait_for_deepen_the_tensor_cores_pipeline():
    ways = [{}, {"listed": True}, {"paged": True}, {"listed": True, "paged": True}]
    for stages in (2, 3, 4):
        chosen, own = plan.Settings(num_stages=stages), plan.Settings(num_stages=stages, warp_rows=True)
        deep = [stages, 2 * stages - 1, 2 * stages - 1, 3 * stages - 2]
        assert [attention(group=7, chosen=chosen, **way).num_stages for way in ways] == deep
        assert [attention(group=1, chosen=chosen, **way).num_stages for way in ways] == [stages] * 4
        made = [attention(group=7, chosen=own, **way) for way in ways]
        assert [one.row_warps for one in made] == [4, 4, 1, 1]
        assert [one.num_stages for one in made] == [stages, stages, *deep[2:]]


def test_a_plan_fills_whole_waves_with_as_few_splits_as_it_can():
    for wave in (5, 12, 132, 396, 528):
        for pairs in range(wave + 1, 5 * wave, max(wave // 7, 1)):
            for waves in (1, 2, 4, 8):
                splits = plan.whole_waves(pairs, wave, waves)
                shares = {s: pairs * s / (-(-pairs * s // wave) * wave) for s in range(1, max(waves * wave // pairs, 1) + 1)}
                assert shares[splits] >= max(shares.values()) - 0.05
                assert all(shares[s] < max(shares.values()) - 0.05 for s in range(1, splits))
    assert [plan.whole_waves(1024, 528, waves) for waves in (1, 2, 4)] == [1, 1, 1]
    assert [plan.whole_waves(640, 528, waves) for waves in (1, 2, 4, 8)] == [1, 1, 3, 4]


def test_settings_of_a_device_file_cap_splits_waves_and_what_is_combined():
    usual = plan.heuristic(1, 128, 2)
    capped = attention(chosen=dataclasses.replace(usual, most_splits=5))
    assert attention().splits > 5 == capped.splits and capped.max_splits == 8
    assert attention(batch=20, kv_heads=32, chosen=dataclasses.replace(usual, waves=2)).splits == 1
    wide = attention(group=7, kv_heads=4, chosen=dataclasses.replace(usual, combined=8192, most_splits=32))
    narrow = attention(group=7, kv_heads=4, chosen=dataclasses.replace(usual, most_splits=32))
    assert wide.max_splits == narrow.max_splits == 32 and wide.split_tile == 4 * narrow.split_tile == 8
    for name in ("programs_per_sm", "waves", "min_blocks", "most_splits", "combined"):
        for wrong in (0, -1, 2.0):
            with pytest.raises(ValueError, match=name):
                plan.Settings(**{name: wrong})
    with pytest.raises(ValueError, match="waves"):
        plan.Settings(waves=None)


H200 = plan.Multiprocessor()


@pytest.fixture
def compiled(monkeypatch):
    """A device whose compiler answers ``says(launch)``: (registers, spilled, bytes shared); ``seen`` is what it was asked."""
    asked = types.SimpleNamespace(seen=[], says=lambda launch: (128, 0, 32896), launched=[])

    def resources(launch, device, dtypes):
        asked.seen.append((launch.grid, launch.options.get("maxnreg"), tuple(dtypes)))
        return asked.says(launch)

    monkeypatch.setattr(backend, "_attentions", {})
    monkeypatch.setattr(backend, "_device_facts", lambda device: ("unknown", 132))
    monkeypatch.setattr(backend, "_multiprocessor", lambda device: H200)
    monkeypatch.setattr(Launch, "resources", resources)
    monkeypatch.setattr(Launch, "start", lambda launch, device, stream, tensors: asked.launched.append((launch, tensors)))
    return asked


def call(batch=8, chosen=None, prepared=None, mass=False, importance=False, **more):
    """``decode_attention`` over 32 heads with a new row, as a model calls it; returns nothing that anybody computed."""
    key = torch.empty(batch, 32, 400 + 64, 128, dtype=torch.bfloat16)
    lengths = torch.zeros(batch, dtype=torch.int32)
    plan.override(chosen)
    try:
        rows = ops.Rows(key[:, :, 0], key, key, lengths, lengths, 400, 0.1, new_key=key[:, :, 1], new_value=key[:, :, 2], **more)
        backend.decode_attention(rows, mass=mass, importance=importance, prepared=prepared)
    finally:
        plan.override(None)


def test_what_a_call_has_prepared_is_taken_for_calls_of_the_same_forms_until_the_settings_change(compiled, monkeypatch):
    kept, looked_at = Prepared(), []
    form = backend.form
    monkeypatch.setattr(backend, "form", lambda tensor: looked_at.append(tensor) or form(tensor))
    call(prepared=kept)
    first, looks = kept.launches, len(looked_at)
    assert first is not None and looks
    call(prepared=kept)
    assert kept.launches is first and len(looked_at) == looks
    call(prepared=kept, chosen=plan.Settings(block_n=64))
    assert kept.launches is not first and kept.launches.launch.rest != first.launch.rest
    call(prepared=kept)
    assert kept.launches is first  # the shipped settings again


def splits(asked):
    return [launch.grid[0] for launch, _ in asked.launched]


def test_a_grid_is_the_usual_one_where_a_triton_does_not_say_what_it_compiled(compiled):
    def says(launch):
        raise AttributeError("n_regs")

    compiled.says = says
    call()
    assert splits(compiled) == [2]


def test_a_grid_is_made_for_the_programs_that_the_compiled_kernel_lets_run(compiled):
    call()
    assert splits(compiled) == [2] and len(compiled.seen) == 1  # four fit, as planned
    _, _, dtypes = compiled.seen[0]
    launch, tensors = compiled.launched[0]
    floats, integers = torch.float32, torch.int32
    assert [d is None for d in dtypes] == [t is None for t in tensors]
    assert all(t is None or t.dtype == d for t, d in zip(tensors, dtypes, strict=True))
    first = launch.kernel.arg_names.index("part_ptr")
    assert dtypes[first : first + 5] == (floats, floats, floats, integers, None)
    call()
    assert len(compiled.seen) == 1  # known
    backend._attentions.clear()
    compiled.says = lambda launch: (150, 0, 32896)  # three fit, whatever the grid; and a bound is of no use
    call()
    assert splits(compiled)[-1] == 1 and compiled.launched[-1][0].options.get("maxnreg") is None


def test_a_bound_on_registers_that_spills_nothing_makes_room_for_the_programs_that_are_wanted(compiled):
    compiled.says = lambda launch: (144, 0, 32896) if "maxnreg" not in launch.options else (launch.options["maxnreg"], 0, 32896)
    call()
    assert splits(compiled) == [2] and compiled.launched[0][0].options["maxnreg"] == 128
    backend._attentions.clear()
    compiled.says = lambda launch: (144, 0, 32896) if "maxnreg" not in launch.options else (128, 2, 32896)
    call()
    assert splits(compiled)[-1] == 1 and "maxnreg" not in compiled.launched[-1][0].options  # it would spill
    backend._attentions.clear()
    call(chosen=plan.Settings(programs_per_sm=4, max_registers=144))  # somebody's own bound stays
    assert compiled.launched[-1][0].options["maxnreg"] == 144
    backend._attentions.clear()
    compiled.says = lambda launch: (96, 0, 80 * 1024)  # shared memory is what lacks
    call()
    assert splits(compiled)[-1] == 1 and "maxnreg" not in compiled.launched[-1][0].options


def test_more_programs_than_wanted_run_only_where_the_settings_leave_it_open(compiled):
    compiled.says = lambda launch: (72, 0, 21760)
    call(batch=1)
    call(batch=1, chosen=plan.Settings(programs_per_sm=None, min_blocks=1))
    call(batch=1, chosen=plan.Settings(programs_per_sm=4, min_blocks=1))
    open_, four = splits(compiled)[1:]
    assert (four, open_) == (15, 15)  # rows for no more splits than that
    call(batch=4, chosen=plan.Settings(programs_per_sm=None, min_blocks=1))
    call(batch=4, chosen=plan.Settings(programs_per_sm=4, min_blocks=1))
    assert splits(compiled)[3:] == [7, 4]
    compiled.says = lambda launch: (72, 0, 21760) if launch.grid[0] <= 4 else (128, 0, 21760)  # where more splits take more
    backend._attentions.clear()
    call(batch=4, chosen=plan.Settings(programs_per_sm=None, min_blocks=1))
    assert splits(compiled)[-1] == 4


def test_the_programs_of_a_multiprocessor_are_counted_as_the_hardware_does():
    assert [H200.holds(registers, 0, 4) for registers in (32, 126, 128, 129, 147, 168, 169, 255)] == [16, 4, 4, 3, 3, 3, 2, 2]
    assert H200.holds(32, 0, 1) == 32 and H200.holds(32, 0, 8) == 8
    assert [H200.holds(64, shared * 1024, 4) for shared in (37, 56, 57, 75, 113, 227)] == [6, 4, 3, 3, 2, 1]
    assert H200.holds(147, 0, 2) == 6  # each quarter's registers hold three warps
    assert [H200.bound(programs, 4) for programs in (1, 2, 3, 4, 8)] == [255, 255, 168, 128, 64]
    for programs in range(2, 17):
        for warps in (1, 2, 4, 8):
            bound = H200.bound(programs, warps)
            assert warps * programs > H200.warps or H200.holds(bound, 0, warps) >= programs or bound == 255


def test_a_compiled_kernel_is_asked_without_tensors(monkeypatch):
    class Asked:
        n_regs, n_spills, metadata = None, None, types.SimpleNamespace(shared=7)

        def _init_handles(self):
            self.n_regs, self.n_spills = 96, 3

    class Kernel:
        def warmup(self, *arguments, **options):
            self.arguments, self.options = arguments, options
            return Asked()

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    launch = Launch(Kernel(), (2, 3, 4), (7, 0.5), num_warps=8, max_registers=96)
    assert launch.resources(DEVICE, (torch.float16, None)) == (96, 3, 7)
    assert launch.kernel.arguments == (torch.float16, None, 7, 0.5, False)
    assert launch.kernel.options["grid"] == (2, 3, 4) and launch.kernel.options["maxnreg"] == 96


@pytest.mark.parametrize(
    "tokens, want", [(0, (16, 1)), (1, (16, 1)), (17, (32, 1)), (4096, (4096, 1)), (4097, (8192, 1)), (8193, (8192, 2)), (16384, (8192, 2))]
)
def test_selections_cover_every_token(tokens, want):
    assert plan.select(tokens) == want


def test_the_sum_over_heads_runs_in_one_wave_where_it_can():
    assert plan.sum_columns(64, 2880, 32, 132) == 128 and plan.sum_columns(64, 2880, 8, 132) == 64
    assert plan.sum_columns(64, 16384, 64, 132) == 128 and plan.sum_columns(256, 2880, 32, 132) == 256


def test_a_device_file_is_used_and_checked(tmp_path, monkeypatch):
    chosen = plan.Settings(block_n=64, num_warps=8, decision="second_launch")
    key = plan.problem(1, 128, 2, "score")
    (tmp_path / devices.file_name("ACME GPU (80 GB)")).write_text(plan.to_json("ACME GPU (80 GB)", {key: chosen}, commit="0"))
    assert json.loads(next(tmp_path.iterdir()).read_text())["commit"] == "0"
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    for cached in (devices.measured, plan.settings, plan.attention):
        cached.cache_clear()
    how = attention(device_name="ACME GPU (80 GB)", kind="score")
    assert (how.block_n, how.num_warps, how.decision) == (64, 8, "second_launch")
    assert attention(device_name="ACME GPU (80 GB)").num_warps == plan.heuristic(1, 128, 2).num_warps  # no entry: the heuristic
    for cached in (devices.measured, plan.settings, plan.attention):
        cached.cache_clear()
    for wrong in ({"block_n": 48}, {"decision": "third"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            plan.Settings(**wrong)


def test_an_outgrown_buffer_stays_alive():
    space = workspace.Workspace(DEVICE)
    (small,) = space.buffers_for({"part": 10})
    assert space.buffers_for({"part": 8, "logits": None}) == [small, None]
    address = small.data_ptr()
    (large,) = space.buffers_for({"part": 11})
    assert large.numel() >= 20 and large.data_ptr() != address
    assert any(kept is small for kept in space._outgrown)  # a captured graph may point at it
    (counters,) = space.buffers_for({"counters": 3})
    assert counters.dtype == torch.int32 and not counters.any()


def test_a_captured_step_has_its_own_scratch_whatever_its_stream():
    """torch hands the same 32 streams out again and again."""
    first, second = workspace.Owner(), workspace.Owner()
    with workspace.owned(first):
        mine = workspace.for_stream(DEVICE, 1)
        with workspace.owned(second):
            assert workspace.for_stream(DEVICE, 1) is not mine
        assert workspace.for_stream(DEVICE, 2) is mine
        other_thread = []
        thread = threading.Thread(target=lambda: other_thread.append(workspace.for_stream(DEVICE, 1)))
        thread.start()
        thread.join()
    assert other_thread[0] is not mine  # the owner's launches are this thread's
    buffer = weakref.ref(mine.buffers_for({"part": 4})[0])
    assert mine in workspace.living()
    first.release()
    del mine
    gc.collect()
    assert buffer() is None


def test_what_runs_beside_a_captured_step_has_scratch_memory_of_its_own():
    owner = workspace.Owner()
    with workspace.owned(owner):
        mine = workspace.for_stream(DEVICE, 1)
        with workspace.beside():
            other = workspace.for_stream(DEVICE, 2)
            assert other is not mine and workspace.for_stream(DEVICE, 3) is other
        assert workspace.for_stream(DEVICE, 2) is mine
    buffer = weakref.ref(other.buffers_for({"part": 4})[0])
    owner.release()
    del other
    gc.collect()
    assert buffer() is None


def test_tables_of_a_capture_go_with_its_owner(monkeypatch):
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    described = ((4096, 64, 32, 8, 2, 8, 2),)
    owner, before = workspace.Owner(), len(workspace._tables)
    with workspace.owned(owner):
        table = weakref.ref(backend._table(DEVICE, described)[0])
    backend._make_table.cache_clear()  # what eager calls remember is bounded
    assert table() is not None and len(workspace._tables) == before
    owner.release()
    gc.collect()
    assert table() is None
    backend._table(DEVICE, described)  # captured by somebody else: nobody tells when that graph ends
    assert len(workspace._tables) == before + 1
    workspace._tables.clear()


def test_each_stream_has_its_own_scratch():
    assert workspace.for_stream(DEVICE, 1) is workspace.for_stream(DEVICE, 1)
    assert workspace.for_stream(DEVICE, 1) is not workspace.for_stream(DEVICE, 2)


def test_each_thread_has_its_own_scratch():
    """Two threads launch on one stream: what a step's first launch leaves for its second must not be another thread's."""
    found = []
    thread = threading.Thread(target=lambda: found.append(workspace.for_stream(DEVICE, 1)))
    thread.start()
    thread.join()
    assert found[0] is not workspace.for_stream(DEVICE, 1)


def test_a_list_of_rows_takes_stages_from_the_keys(compiled):
    """Of the loop on tensor cores, which gets as many more; the other one has them as they are asked for."""
    listed = {"kept": torch.zeros(8, 50, dtype=torch.int32), "n_kept": torch.zeros(8, dtype=torch.int32)}
    for tensor_cores in (True, False):
        for more in ({}, listed):
            call(chosen=plan.Settings(tensor_cores=tensor_cores), **more)
    assert [launch.options["num_stages"] for launch, _ in compiled.launched] == [3, 5, 3, 3]
