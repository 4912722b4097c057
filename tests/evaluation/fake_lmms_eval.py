"""The part of lmms-eval 0.7.3 that the plugin touches, for where it is not installed: same names, same shapes of arguments.

``simple_evaluate`` does what the original does between tasks and model: requests ``(context, generation_kwargs, doc_to_visual, doc_id,
task, split)``, ``task_dict[task][split]``, ``clean()``, metrics under ``"name,filter"``. Its tasks are ``TASKS``: name -> Task.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


class lmms:
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)

    def clean(self):
        for name in list(vars(self)):
            if isinstance(getattr(self, name), torch.nn.Module):
                delattr(self, name)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Task:
    docs: list[dict[str, Any]]
    prompt: Any
    visual: Any
    score: Any
    generation: dict[str, Any]


TASKS: dict[str, Task] = {}
LOGGED: list[tuple] = []


class TaskManager:
    def __init__(self, verbosity="INFO", include_path=None, include_defaults=True, model_name=None):
        self.all_tasks = sorted(TASKS)


def simple_evaluate(
    model, tasks, task_manager, limit=None, batch_size=None, log_samples=True, bootstrap_iters=100000, verbosity="INFO", cli_args=None
):
    results = {}
    for name in tasks:
        task = TASKS[name]
        docs = task.docs[:limit]
        model.task_dict[name] = {"test": task.docs}
        requests = [
            Instance("generate_until", (task.prompt(doc), dict(task.generation), task.visual, i, name, "test"), 0, {"repeats": 1})
            for i, doc in enumerate(docs)
        ]
        answers = model.generate_until(requests)
        scores = [task.score(doc, answer.text) for doc, answer in zip(docs, answers, strict=True)]
        results[name] = {"alias": name, "accuracy,none": sum(scores) / max(len(scores), 1), "accuracy_stderr,none": "N/A"}
        results[name]["accuracy_stderr_clt,none"] = 0.25
    model.clean()
    return {"results": results}


def install(monkeypatch):
    """Makes ``import lmms_eval`` find it."""
    contents = {
        "": {}, ".api": {}, ".api.instance": {"TokenCounts": TokenCounts, "GenerationResult": GenerationResult, "Instance": Instance},
        ".api.model": {"lmms": lmms}, ".models": {}, ".models.registry_v2": {"ModelManifest": ModelManifest}, ".models.model_utils": {},
        ".models.model_utils.gen_metrics": {"log_metrics": lambda *given: LOGGED.append(given)},
        ".tasks": {"TaskManager": TaskManager}, ".evaluator": {"simple_evaluate": simple_evaluate},
    }  # fmt: skip
    for name, members in contents.items():
        module = ModuleType(f"lmms_eval{name}")
        module.__dict__.update(members, __path__=[], __spec__=ModuleSpec(module.__name__, None))
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", module)
        if name:
            parent, _, child = f"lmms_eval{name}".rpartition(".")
            setattr(sys.modules[parent], child, module)
    monkeypatch.delitem(sys.modules, "dyrate_kernels.evaluation.lmms", raising=False)
