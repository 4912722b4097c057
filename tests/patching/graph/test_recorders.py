"""What records a step: the tape of the tests, and the calls that a CUDA recorder makes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dyrate_kernels.ops import workspace
from dyrate_kernels.patching import graph
from tests.fake_graph import Race, Tape, TapeRecorder


def test_the_tape_is_a_graph():
    state, weight = torch.zeros(3), torch.arange(3.0)

    def step():
        state.add_(1)
        return (state * weight)[1:] + 1

    tape = Tape()
    with tape:
        result = step()
    tape.put_back()
    tape.spoil()
    assert state.tolist() == [0, 0, 0] and result.isnan().all()
    for turn in (1, 2, 3):
        tape.replay()
        assert state.tolist() == [turn] * 3 and result.tolist() == [turn + 1, 2 * turn + 1]
    weight.mul_(2)
    tape.replay()
    assert result.tolist() == [9, 17]
    for forbidden in (lambda: state.sum().item(), lambda: state[state > 0], lambda: torch.tensor([1.0]), lambda: state.nonzero()):
        with pytest.raises(RuntimeError, match="not permitted"), Tape():
            forbidden()


def forked(main=lambda: None, forked=lambda: None, joins=True, late=False):
    """Records a step of a fork, what the main line does beside it, and the join."""
    recorder = TapeRecorder(late)

    def step():
        with recorder.aside.fork():
            forked()
        main()
        if joins:
            recorder.aside.join()

    return recorder.record(step)[0]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_the_second_line_of_a_tape_runs_at_once_or_late(late):
    mine, source, made = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    replay = forked(lambda: mine.add_(1), lambda: made.copy_(source + 1), late=late)
    ran = []
    with Listed(ran):
        replay()
    assert made.item() == mine.item() == 1
    names = [name for name in ran if name in ("aten::add_.Tensor", "aten::add.Tensor")]
    assert names == ["aten::add_.Tensor", "aten::add.Tensor"][:: 1 if late else -1]


class Listed(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists what is called."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_tape_tells_of_two_lines_in_each_others_way():
    mine, other, made = torch.zeros(3), torch.zeros(3), {}
    with pytest.raises(Race, match=r"aten::add.Tensor of the main line touches what aten::mul_.Tensor of the second line, .*wrote"):
        forked(lambda: mine + 1, lambda: mine.mul_(2))
    with pytest.raises(Race, match=r"touches what aten::mul_.Tensor"):
        forked(lambda: mine[:1].zero_(), lambda: mine[1:].mul_(2))
    with pytest.raises(Race, match=r"aten::add.Tensor of the main line touches what aten::mul.Tensor of the second line, .*wrote"):
        forked(lambda: made["it"] + 1, lambda: made.update(it=mine * 2))
    with pytest.raises(Race, match=r"aten::zero_ of the main line writes what aten::add.Tensor of the second line, .*reads"):
        forked(lambda: mine.zero_(), lambda: other + mine)
    with pytest.raises(Race, match="not joined"):
        forked(lambda: None, lambda: other + mine, joins=False)
    forked(lambda: (mine + 1, other.zero_()), lambda: mine + 1)


@pytest.mark.parametrize("held", [True, False])
def test_a_tape_tells_of_a_tensor_that_dies_before_the_join(held):
    recorder, weight = TapeRecorder(), torch.ones(3)

    def step():
        read = weight * 2
        view = read[1:]
        with recorder.aside.fork():
            made = view + 1
        if not held:
            del read, view
        weight + 1
        recorder.aside.join()
        return made

    if held:
        replay, result = recorder.record(step)
        replay()
        assert result.tolist() == [3, 3]
    else:
        with pytest.raises(Race, match=r"nothing refers any more to what aten::add.Tensor"):
            recorder.record(step)


class FakeCuda:
    """Notes what a ``CudaRecorder`` asks ``torch.cuda`` for."""

    def __init__(self, monkeypatch):
        self.log = log = []
        self.broken = False

        class Stream:
            names = iter(["side", "aside"] * 9)

            def __init__(self, device):
                self.name = next(self.names)

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def capture_begin(this, pool, capture_error_mode):
                log.append(f"begin {capture_error_mode} in {pool}")

            def capture_end(this):
                log.append("end")
                if self.broken:
                    raise RuntimeError("capture was invalidated")

            def replay(this):
                log.append("replay")

        class Generator:
            def clone_state(self):
                return "a state in no capture"

            def graphsafe_set_state(self, state):
                log.append(state)

        @contextlib.contextmanager
        def stream(which):
            log.append(f"on {which.name}")
            try:
                yield
            finally:
                log.append("back")

        main = self.main = Stream(None)
        main.name, Stream.names = "main", iter(["side", "aside"] * 9)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda index, pool, name=name: log.append(f"{name} {index} {pool}"), raising=False)
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "current_stream": lambda device: main,
            "synchronize": lambda device: log.append("synchronize"),
            "graph_pool_handle": lambda: "a pool",
            "default_generators": [Generator()],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def fake_cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_what_the_cuda_recorder_does(fake_cuda):
    recorder = graph.recorder_for(torch.device("cuda", 0))
    assert recorder.stream is not graph.recorder_for(torch.device("cuda", 0)).stream
    with recorder.warm_up():
        fake_cuda.log.append("step")
    assert fake_cuda.log == ["side waits for main", "on side", "step", "back", "main waits for side"]
    fake_cuda.log.clear()
    replay, result = recorder.record(lambda: fake_cuda.log.append("step") or "result")
    assert result == "result"
    assert fake_cuda.log == ["synchronize", "on side", "begin thread_local in a pool", "step", "end", "back"]
    replay()
    assert fake_cuda.log[-1] == "replay"


def test_what_the_cuda_recorder_does_aside(fake_cuda):
    recorder, owner = graph.recorder_for(torch.device("cuda", 0)), workspace.Owner()
    with workspace.owned(owner):
        mine = workspace.for_stream(torch.device("cuda", 0), 0)
        with recorder.aside.fork():
            fake_cuda.log.append("decide")
            assert workspace.for_stream(torch.device("cuda", 0), 0) is not mine
        recorder.aside.join()
    assert fake_cuda.log == ["aside waits for main", "on aside", "decide", "back", "main waits for aside"]


def test_a_broken_cuda_capture_names_its_cause(fake_cuda):
    recorder = graph.recorder_for(torch.device("cuda", 0))
    fake_cuda.broken = True
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 // 0)
    cleaned = ["_cuda_endAllocateToPool 0 a pool", "_cuda_releasePool 0 a pool", "a state in no capture"]
    assert fake_cuda.log[-5:] == ["end", *cleaned, "back"]
    with pytest.raises(RuntimeError, match="invalidated"):  # broken without a word from the step
        recorder.record(lambda: None)
    assert fake_cuda.log[-4:] == [*cleaned, "back"]
    with pytest.raises(graph.CannotCapture, match="'mps'"):
        graph.recorder_for(torch.device("mps"))
