"""Tensor parallelism over two processes: the tokens of one process, and the same kept sets in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dyrate_kernels.patching.parallel import HeadShards, head_shards
from tests import models
from tests.patching import parallel_worker as worker


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns what each of two processes wrote, and the folder of the models."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, (family, text) in worker.MODELS.items():
        models.build(family, text).save_pretrained(folder / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", worker.__file__, str(folder)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    made = {name: models.build(family, text) for name, (family, text) in worker.MODELS.items()}
    return lambda case: worker.answer(made[case[0]], *case[1:])


@pytest.mark.parametrize("name", worker.CASES)
def test_as_one_process(found, alone, name):
    first, second = (each[name] for each in found)
    assert first == second, "both processes decide the same, bit for bit"
    want = alone(worker.CASES[name])
    assert first["tokens"] == want["tokens"]
    assert first["kept"] == want["kept"]
    assert first.get("second turn") == want.get("second turn")
    assert torch.allclose(torch.tensor(first["mass"]), torch.tensor(want["mass"]), atol=1e-5)
    assert torch.allclose(torch.tensor(first["rate"]), torch.tensor(want["rate"]), atol=1e-6)
    shares = 1 if worker.CASES[name][0] in worker.WHOLE and not first["shared"] else 2
    assert first["kv bytes"] * shares == want["kv bytes"]  # each process holds its own heads


def test_heads_are_really_shared(found, alone):
    assert [each["heads"] for each in found] == [models.HEADS // 2] * 2
    plain = models.build("llava", "llama")
    tokens = plain.generate(**models.inputs(plain, worker.ROWS), **worker.greedy(6)).sequences.tolist()
    assert [each["unpatched"]["tokens"] for each in found] == [tokens, tokens]


def test_without_the_exchange_it_would_show(found, alone):
    """Each process would rank by its own heads: kept sets that are neither equal nor right."""
    want = alone(worker.CASES["fastv recoverable"])
    kept = [each["broken"]["kept"] for each in found]
    assert kept[0] != kept[1] and want["kept"] not in kept


def test_nothing_is_captured_and_that_is_said(found):
    assert all("heads are shared among processes" in each["cuda_graph"] for each in found)
    assert all("heads are shared among processes" in each["path"] for each in found)


# -- without processes ---------------------------------------------------------------------------------------------------------------------


def test_sums_in_one_order(monkeypatch):
    """As many heads here as there: the mean over processes is the mean over heads, and mass stands in the order of the heads."""
    mass, importance = torch.rand(2, 3, 6, 4), torch.rand(2, 3, 6, 9)
    shards = HeadShards(None, 3)
    halves = [(mass[:, :, part : part + 2], importance[:, :, part : part + 2].mean(2)) for part in (0, 2, 4)]
    monkeypatch.setattr(HeadShards, "_gather", lambda self, tensor: [torch.cat([m.flatten(), i.flatten()]) for m, i in halves])
    for own in halves:
        got_mass, got = shards.statistics(*own)
        assert torch.equal(got_mass, mass)
        assert torch.allclose(got, importance.mean(2))
    monkeypatch.setattr(HeadShards, "_gather", lambda self, tensor: [i.square().flatten() for _, i in halves])
    want = torch.stack([i.square() for _, i in halves]).mean(0).sqrt()
    assert torch.allclose(shards.root_mean_square(halves[0][1]), want)


class Mesh:
    def __init__(self, names, sizes):
        self.mesh_dim_names, self.sizes = names, sizes

    def __getitem__(self, name):
        return Mesh((name,), (self.sizes[self.mesh_dim_names.index(name)],))

    def size(self):
        return self.sizes[0]

    def get_group(self):
        return self.mesh_dim_names


def model_of(mesh, size, heads=4, whole=False):
    text = SimpleNamespace(num_attention_heads=8, num_key_value_heads=heads, hidden_size=32)
    config = SimpleNamespace(get_text_config=lambda: text)
    weight = torch.empty(32 if whole or not size else 32 // size, 32)
    layer = SimpleNamespace(self_attn=SimpleNamespace(q_proj=SimpleNamespace(weight=weight)))
    return SimpleNamespace(tp_size=size, _device_mesh=mesh, config=config, get_decoder=lambda: SimpleNamespace(layers=[layer]))


def test_detection():
    assert head_shards(SimpleNamespace(config=None)) is None
    assert head_shards(model_of(None, None)) is None
    assert head_shards(model_of(Mesh(("pp", "fsdp", "tp"), (1, 2, 1)), 1)) is None
    assert head_shards(model_of(Mesh(("pp", "fsdp", "tp"), (1, 1, 2)), 2)) == HeadShards(("tp",), 2)
    assert head_shards(model_of(Mesh(("tp",), (2,)), 2, whole=True)) is None  # transformers left the text model whole
    assert head_shards(model_of(Mesh(("data",), (2,)), 2)) == HeadShards(("data",), 2)  # older versions: a mesh of one dimension
    with pytest.raises(ValueError, match=r"tp_size=4 must divide the 2 key/value heads"):
        head_shards(model_of(Mesh(("tp",), (4,)), 4, heads=2))
    with pytest.raises(ValueError, match=r"pp_size=2"):
        head_shards(model_of(Mesh(("pp", "tp"), (2, 2)), 2))
