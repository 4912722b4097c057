"""One process of test_parallel.py: generates with a model whose heads are shared among processes, and writes what came.

torchrun --nproc-per-node 2 tests/patching/parallel_worker.py FOLDER
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import transformers

import dyrate_kernels as dk
from dyrate_kernels.patching.lookup import cache_name
from dyrate_kernels.patching.parallel import HeadShards
from tests import models
from tests.checks import METHODS, ROWS, greedy, policy

CASES: dict[
    str, tuple[str, str, Any, dict[str, Any], dict[str, Any]]
] = {}  # name -> model, retention, policy, options of patch, of generate
for _retention in ("recoverable", "evict"):
    for _method in ("none", "dyrate-trained", "dyrate-spread", "fastv", "fastv-mean", "schedule", "threshold", "st3", "dycoke",
                    "pyramiddrop", "layerwise", "sparsevlm", "aim-k1", "uniform"):  # fmt: skip
        CASES[f"{_method} {_retention}"] = ("llava", _retention, METHODS[_method], {}, {})
    CASES[f"random {_retention}"] = ("llava", _retention, dk.policies.get("random", k=2, rate=0.6), {}, {})
    CASES[f"sampling {_retention}"] = ("llava", _retention, METHODS["dyrate"], {}, {"do_sample": True, "temperature": 0.9})
    CASES[f"beams {_retention}"] = ("llava", _retention, METHODS["dyrate"], {}, {"num_beams": 2})
    CASES[f"window {_retention}"] = ("mistral", _retention, METHODS["dyrate"], {}, {})
    CASES[f"reducer {_retention}"] = ("llava", _retention, METHODS["dyrate"], {"vision": "fastervlm:keep=0.6"}, {})
    CASES[f"qwen {_retention}"] = ("qwen", _retention, METHODS["dyrate"], {}, {})
    CASES[f"qwen3 {_retention}"] = ("qwen3", _retention, METHODS["dyrate"], {}, {})
for _method in ("dyrate-trained", "layerwise", "uniform"):
    CASES[f"{_method} pool"] = ("llava", "pool=0.4:by=0.3", METHODS[_method], {}, {})
CASES["recycle"] = ("llava", "recoverable", dk.policies.get("recycle", policy=dk.policies.Fixed(k=2, rate=0.7), entropy=0.1), {}, {})
CASES["klguard"] = ("llava", "recoverable", dk.policies.get("klguard", policy=dk.policies.Fixed(k=2, rate=0.7), every=2), {}, {})
MODELS = {"llava": ("llava", "llama"), "mistral": ("llava", "mistral"), "qwen": ("qwen2_5_vl", "own"), "qwen3": ("qwen3_vl", "own")}
WHOLE = ("qwen3",)  # transformers 5.24 has no plan for this text model: each process holds all of it


def answer(model: Any, retention: str, rule: Any, options: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """Tokens, kept tokens by step, mass, and the tokens of a second turn."""
    fields = models.inputs(model, ROWS)
    chosen = rule if isinstance(rule, dk.policies.Policy) else policy(rule)
    torch.manual_seed(5)
    with dk.patch(model, chosen, retention=retention, record_importance="num_beams" not in generation, **options) as handle:
        output = model.generate(**fields, **greedy(6, **generation))
        stats = handle.stats()
        more = {}
        if not generation and not options and "pixel_values" in fields and model.config.model_type == "llava":
            ids = torch.cat([output.sequences, torch.full((len(ROWS), 3), 7)], dim=1)
            mask = torch.cat([fields["attention_mask"], torch.ones(len(ROWS), ids.shape[1] - fields["attention_mask"].shape[1])], dim=1)
            again = model.generate(input_ids=ids, attention_mask=mask.long(), **{cache_name(): output.past_key_values}, **greedy(3))
            more["second turn"] = again.sequences.tolist()
    return {
        "tokens": output.sequences.tolist(),
        "kept": [step.kept_tokens if step.kept_tokens is not None else step.kept for step in stats.steps],
        "rate": [step.rate for step in stats.steps],
        "mass": [step.mass for step in stats.steps],
        "kv bytes": stats.kv_bytes_live,
        "shared": handle.heads is not None,
        **more,
    }


def load(folder: Path) -> Any:
    """Over all processes, as this version of transformers spells it."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "DistributedConfig") and "tp_size" in inspect.signature(transformers.DistributedConfig).parameters:
        options["distributed_config"] = transformers.DistributedConfig(tp_size=dist.get_world_size())
    else:
        options["tp_plan"] = "auto"
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)
    models._settle(model)
    return model.eval()


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    loaded = {name: load(folder / name) for name in MODELS}
    found: dict[str, Any] = {name: answer(loaded[case[0]], *case[1:]) for name, case in CASES.items()}
    model = loaded["llava"]
    found["unpatched"] = {"tokens": model.generate(**models.inputs(model, ROWS), **greedy(6)).sequences.tolist()}
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    shard = weight.to_local() if hasattr(weight, "to_local") else weight  # older versions of transformers hold the shard alone
    found["heads"] = shard.shape[0] // models.HEAD_DIM
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dk.patch(model, cuda_graph=True) as handle:
            model.generate(**models.inputs(model, ROWS), **greedy(3))
            found["cuda_graph"], found["path"] = str(caught[0].message), str(handle.path)
    shared = HeadShards.statistics
    HeadShards.statistics = lambda self, mass, importance: (
        torch.cat([mass] * self.size, dim=-2),
        importance,
    )  # what if nothing was gathered
    found["broken"] = answer(model, *CASES["fastv recoverable"][1:])
    HeadShards.statistics = shared
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
