"""How the Triton backend starts kernels, shapes their launches and keeps scratch memory; kernels are stood in for, nothing is compiled."""

from __future__ import annotations

import gc
import json
import threading
import weakref

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from dyrate_kernels import devices
from dyrate_kernels.ops import workspace
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
    assert arguments[0] is first and arguments[1:] == (None, 7, 0.5)
    assert (options["grid"], options["num_warps"], options["num_stages"]) == ((2, 3, 4), 8, 2)
    assert launch.kernel.log[1][1] == (2, 3, 4, 6, "function", "metadata", None, None, None, second.data_ptr(), None, 7, 0.5)


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
    assert 1 < few.splits <= many.splits <= plan.MOST_SPLITS
    for how in (few, many, attention(group=7, kv_heads=4), attention(dim=80), attention(dim=5, itemsize=4), attention(dim=256, itemsize=4)):
        for number in (how.block_n, how.block_d, how.block_v, how.max_splits, how.split_tile, how.block_g, how.block_c):
            assert number & (number - 1) == 0
        assert how.splits <= how.max_splits < 2 * how.splits and how.split_tile <= how.max_splits
    assert attention(group=7).dot and attention(group=7).block_g == 16 and attention(group=20).block_g == 32
    assert attention(batch=8).splits == 2  # 256 pairs: one wave of four programs on each of 132 multiprocessors
    assert attention(batch=32).splits == 2  # 1024 pairs do not fit in one: four waves
    three = attention(batch=11, kv_heads=16)
    assert (three.splits, three.max_splits) == (3, 4)  # 176 pairs: any number of splits, not the next power of two
    assert not attention().dot and attention(dim=80).block_d == 128 and attention(dim=5).block_d == 16


@pytest.mark.parametrize(
    "tokens, want", [(0, (16, 1)), (1, (16, 1)), (17, (32, 1)), (4096, (4096, 1)), (4097, (8192, 1)), (8193, (8192, 2)), (16384, (8192, 2))]
)
def test_selections_cover_every_token(tokens, want):
    assert plan.select(tokens) == want


def test_a_device_file_is_used_and_checked(tmp_path, monkeypatch):
    chosen = plan.Settings(block_n=64, num_warps=8, decision="second_launch")
    key = plan.problem(1, 128, 2, "score")
    (tmp_path / devices.file_name("ACME GPU (80 GB)")).write_text(plan.to_json("ACME GPU (80 GB)", {key: chosen}, commit="0"))
    assert json.loads(next(tmp_path.iterdir()).read_text())["commit"] == "0"
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    for cached in (devices.measured, plan.settings, plan.attention):
        cached.cache_clear()
    how = attention(device_name="ACME GPU (80 GB)", kind="score")
    assert (how.block_n, how.num_warps, how.second_launch) == (64, 8, True)
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
