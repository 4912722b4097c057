"""What records a step: the tape of the tests, and the calls that a CUDA recorder makes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dyrate_kernels.patching import graph
from tests.fake_graph import Tape


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


class FakeCuda:
    """Notes what a ``CudaRecorder`` asks ``torch.cuda`` for."""

    def __init__(self, monkeypatch):
        self.log = log = []
        self.broken = False

        class Stream:
            def __init__(self, device):
                self.name = "side"

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

        main = Stream(None)
        main.name = "main"
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
