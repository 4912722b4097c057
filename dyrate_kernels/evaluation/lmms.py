"""lmms-eval (EvolvingLMMs-Lab): a model class for its command line, and its tasks for ``dyrate eval``.

    lmms-eval --model dyrate --model_args pretrained=DIR,policy=fastv,rate=0.75,retention=evict,stats=FILE --tasks gqa --batch_size 8

lmms-eval (0.7 on) finds the class by the entry point ``lmms_eval.models`` of this package. It is imported here and nowhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from transformers import StoppingCriteria

from dyrate_kernels import answering, policies, specs
from dyrate_kernels.evaluation.cider import tokenize
from dyrate_kernels.evaluation.runner import Contender, encode
from dyrate_kernels.evaluation.suite import Item
from dyrate_kernels.files import write_json
from dyrate_kernels.journal import Journal
from dyrate_kernels.json_files import read_json
from dyrate_kernels.loading import load_model, model_name
from dyrate_kernels.pictures import UnreadableError, read_picture, whole_pictures
from dyrate_kernels.vision import chain

OPTIONS = ("pretrained", "policy", "retention", "pool", "pool_by", "vision", "backend", "batch_size", "device", "dtype", "stats")
MOST = 1024  # new tokens where a task does not say
_IGNORED = {"image_aspect_ratio"}  # of the original LLaVA's own preprocessing


def manifest() -> Any:
    """Returns what the entry point ``lmms_eval.models`` gives."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="dyrate", simple_class_path=f"{__name__}.PatchedModel")


@dataclass(frozen=True)
class Request:
    """An answered request and what it cost; a line of the ``stats`` file.

    Attributes:
        key: digest of task, document, prompt and generation settings.
        task, doc_id: whose.
        prompt_tokens, new_tokens: of the sequence; end of sequence included where it was reached.
        ttft_seconds: from ``generate`` to the first token, of its batch.
        seconds_per_token: mean of the decode steps until its last token, of its batch; None for an answer of one token.
        seconds: of its batch, divided by the tokens of the batch, times its own.
        kept_mean: mean fraction of the visual tokens (those before any reducer) that layers >= k read.
        rate: mean over steps.
        visual_tokens: N, before any reducer.
        kv_bytes: of the rows held at the end.
        flops, flops_unpruned: executed.
        text: the answer.
    """

    key: str
    task: str
    doc_id: int
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float
    seconds_per_token: float | None
    seconds: float
    kept_mean: float
    rate: float
    visual_tokens: int
    kv_bytes: int
    flops: float
    flops_unpruned: float
    text: str


class PatchedModel(lmms):
    """A patched model behind lmms-eval's interface; values may be texts, as its command line gives them.

    Args:
        pretrained: folder or hub id of a LLaVA-type model, or ``demo``: the bundled one.
        policy, retention, pool, pool_by, vision, backend: as ``dyrate_kernels.patch`` takes them.
        batch_size: requests that are generated together.
        device, dtype: as ``dyrate generate`` takes them.
        stats: file to which every answer is written with its costs (``Request``) as it comes; requests that it holds already are answered
            from it. With several processes each has its own, ``.rank1`` and so on behind the name.
        options: of the policy.

    Raises:
        ValueError, TypeError: an option has no meaning here, or a value is wrong.
    """

    is_simple = True

    def __init__(
        self, pretrained: str = "demo", policy: str = "dyrate", retention: str = "recoverable", backend: str = "auto",
        vision: str | None = None, pool: float | str | None = None, pool_by: float | str | None = None,
        batch_size: int | str = 1, device: str | None = None, dtype: str | None = None, stats: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        called = specs.call(policy, "policy")
        known = policies.options(called.name)
        for name in options:
            if name not in known:
                raise TypeError(
                    f"dyrate has no option {name!r}; it has {', '.join(OPTIONS)}, and of the policy {called.name}: "
                    f"{', '.join(known) or 'none'}"
                )
        values = {name: specs.value(value) if isinstance(value, str) else value for name, value in options.items()}
        pool, pool_by = (specs.value(given) if isinstance(given, str) else given for given in (pool, pool_by))
        held = str(specs.retention(retention, pool, pool_by))
        contender = Contender(policy, policies.make(called, **values), held, vision=chain(vision))
        local = os.environ.get("LOCAL_RANK")
        if device in (None, "cuda") and local is not None and torch.cuda.is_available():
            device = f"cuda:{local}"
        loaded = load_model(None if pretrained == "demo" else pretrained, device, dtype)
        self._set_up(*loaded, contender, batch_size, backend, stats)

    @classmethod
    def of(
        cls, model: Any, processor: Any, contender: Contender, batch_size: int = 1, backend: str = "auto", stats: str | Path | None = None
    ) -> PatchedModel:  # fmt: skip
        """Around a model that is loaded already."""
        made = cls.__new__(cls)
        made._set_up(model, processor, contender, batch_size, backend, stats)
        return made

    def _set_up(
        self, model: Any, processor: Any, contender: Contender, batch_size: int | str, backend: str, stats: str | Path | None
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        contender = replace(contender, retention=str(specs.retention(contender.retention)))
        self.model, self.processor, self.contender = model, processor, contender
        self.batch_size, self.backend, self.device = int(batch_size), backend, model.device
        with contender.patch(model, backend):
            pass  # what cannot run is an error now, not after the data sets are loaded
        self.stats = None if stats is None else Path(stats)
        self.answered: list[Request] = []

    @property
    def setting(self) -> dict[str, str]:
        """Returns the settings that a ``stats`` file is of."""
        found = {"policy": str(self.contender.policy), "retention": self.contender.retention, "model": model_name(self.model)}
        return found | ({"vision": str(self.contender.vision)} if self.contender.vision else {})

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests. Requests of the same generation settings are generated together, ``batch_size`` at a time.

        Raises:
            ValueError: a task asks for something that is not supported (beams, videos), or ``stats`` is of another setting.
            Whatever the model raises: an answer that cannot be had is an error, never an empty text.
        """
        path = self.stats
        if path is not None and self.rank:
            path = path.with_name(f"{path.name}.rank{self.rank}")
        journal = None if path is None else Journal(path, self.setting)
        earlier = _by_key(journal)
        answers: dict[int, Request] = {}
        groups: dict[str, list[int]] = {}
        keys = []
        for index, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True, default=str)
            keys.append(_key(request, settings))
            if earlier[keys[-1]]:
                answers[index] = earlier[keys[-1]].pop(0)
            else:
                groups.setdefault(settings, []).append(index)
        settings_of = {group: _generation(requests[indices[0]]) for group, indices in groups.items()}
        if groups:
            with (
                whole_pictures,
                self.contender.patch(self.model, self.backend) as handle,
            ):
                for group, indices in groups.items():
                    for start in range(0, len(indices), self.batch_size):
                        part = indices[start : start + self.batch_size]
                        found = self._ask(handle, [requests[index] for index in part], [keys[index] for index in part], *settings_of[group])
                        if journal is not None:
                            journal.add(*map(asdict, found))
                        answers.update(zip(part, found, strict=True))
        ordered = [answers[index] for index in range(len(requests))]
        self.answered += ordered
        _log(ordered)
        return [GenerationResult(each.text, TokenCounts(each.prompt_tokens, each.new_tokens)) for each in ordered]

    @torch.no_grad()
    def _ask(self, handle: Any, requests: list[Instance], keys: list[str], settings: dict[str, Any], until: list[str]) -> list[Request]:
        inputs = encode(self.processor, [self._item(request) for request in requests], self.model)
        clock = _Clock()
        started = time.perf_counter()
        rows = answering.generate(self.model, self.processor, inputs, stop=until, stopping_criteria=[clock], **settings)
        times = np.array(clock.times) - started
        each = float(times[-1]) / sum(len(row) for row in rows)
        found = []
        for sequence, (request, key, row) in enumerate(zip(requests, keys, rows, strict=True)):
            text = self.processor.decode(row, skip_special_tokens=True)
            text = text[: min((text.find(stop) for stop in until if stop in text), default=None)].strip()
            stats = handle.stats(sequence, len(row))
            _, _, _, doc_id, task, _ = request.args
            last = len(row) - 1
            found.append(
                Request(
                    key,
                    task,
                    int(doc_id),
                    int(inputs["attention_mask"][sequence].sum()),
                    len(row),
                    float(times[0]),
                    float(times[last] - times[0]) / last if last else None,
                    each * len(row),
                    stats.kept_mean * stats.received,
                    float(np.mean([step.rate[0] for step in stats.steps])),
                    stats.visual_tokens_in[0],
                    stats.kv_bytes_live,
                    stats.flops,
                    stats.flops_unreduced,
                    text,
                )  # fmt: skip
            )
        return found

    def _item(self, request: Instance) -> Item:
        """The question of a request: its pictures stand before the text, or where ``<image>`` stands in it."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        name = f"task {task}, document {doc_id}"
        try:
            pictures = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        except OSError as error:
            raise OSError(f"{name}: its picture cannot be read ({error}); answers so far are kept where stats names a file") from error
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise ValueError(f"{name}: dyrate takes pictures (PIL), got {type(picture).__name__}; videos and sounds are not supported")
        texts = context.split("<image>")
        if len(texts) == 1:
            texts = [*[""] * len(pictures), context]
        elif len(texts) != len(pictures) + 1:
            raise ValueError(f"{name}: its text has {len(texts) - 1} <image> marks for {len(pictures)} pictures")
        content: list[dict[str, Any]] = []
        for index, text in enumerate(texts):
            content += [{"type": "image"}] if index else []
            content += [{"type": "text", "text": text.strip()}] if text.strip() else []
        try:
            pictures = [read_picture(picture) for picture in pictures]
        except UnreadableError as error:
            raise OSError(f"{name}: its picture cannot be read ({error}); answers so far are kept where stats names a file") from error
        return Item(name, task, [{"role": "user", "content": content}], pictures, MOST)

    def loglikelihood(self, requests: list[Instance]) -> Any:
        """Not supported: a method that prunes while it generates has no likelihood of a given text to speak of."""
        raise NotImplementedError(
            "dyrate scores no given texts (loglikelihood): it prunes while it generates; choose a task of output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        """Not supported."""
        raise NotImplementedError("dyrate answers in one round; choose a task of output_type generate_until")


class _Clock(StoppingCriteria):
    """Notes when each token is there; ends nothing. transformers' own loop waits for the device at the same place."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _generation(request: Instance) -> tuple[dict[str, Any], list[str]]:
    """(arguments for ``generate``, stop strings) of a request."""
    given = {name: value for name, value in request.args[1].items() if value is not None and name not in _IGNORED}
    where = f"task {request.args[4]}: generation_kwargs"
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    most = int(given.pop("max_new_tokens", given.pop("max_gen_toks", MOST)))
    if most < 1:
        raise ValueError(f"{where}: max_new_tokens must be at least 1, got {most}")
    if int(given.pop("num_beams", 1)) != 1:
        raise ValueError(f"{where}: num_beams must be 1: what each beam costs is not measured")
    temperature = float(given.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
    sampling = {name: given.pop(name) for name in ("top_p", "top_k") if name in given}
    sample = bool(given.pop("do_sample", temperature > 0)) and temperature > 0
    if given:
        raise ValueError(f"{where}: {', '.join(sorted(given))} not supported; leave it out, e.g. in a task of your own (include_path)")
    settings = {"max_new_tokens": most, "sample": sample, **({"temperature": temperature, **sampling} if sample else {})}
    return settings, [stop for stop in until if stop]


def _key(request: Instance, settings: str) -> str:
    context, _, _, doc_id, task, split = request.args
    return hashlib.sha256(json.dumps([task, split, str(doc_id), context, settings]).encode()).hexdigest()[:16]


def _by_key(journal: Journal | None) -> defaultdict[str, list[Request]]:
    found = defaultdict(list)
    for request in [] if journal is None else journal.read(Request):
        found[request.key].append(request)
    return found


def _log(requests: Sequence[Request]) -> None:
    """Tells lmms-eval's throughput summary."""
    if not requests:
        return
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    tokens, seconds = sum(each.new_tokens for each in requests), sum(each.seconds for each in requests)
    costs = costs_of(requests)
    shown = {name: costs[name] for name in ("ttft_seconds", "seconds_per_token", "kept_mean", "rate", "visual_tokens", "kv_bytes")}
    log_metrics(seconds, tokens, tokens / max(seconds, 1e-12), {"num_requests": len(requests), **shown})


def costs_of(requests: Iterable[Request]) -> dict[str, float | None]:
    """Means over requests; ``seconds_per_token`` over those of two tokens or more (None: there are none), ``flops_share`` of sums."""
    each = list(requests)
    names = ("prompt_tokens", "new_tokens", "ttft_seconds", "kept_mean", "rate", "visual_tokens", "kv_bytes")
    steps = [one.seconds_per_token for one in each if one.seconds_per_token is not None]
    return {
        "questions": len(each),
        **{name: float(np.mean([getattr(one, name) for one in each])) for name in names},
        "seconds_per_token": float(np.mean(steps)) if steps else None,
        "flops_share": sum(one.flops for one in each) / sum(one.flops_unpruned for one in each),
    }


def stem_of(contender: Contender, task: str) -> str:
    """The name of the two files of a contender's answers to a task, without their endings."""
    return f"{contender.label}.{re.sub(r'[^-+.@=a-zA-Z0-9_]+', '_', task)}"


def evaluate(
    model: Any, processor: Any, contenders: Sequence[Contender], tasks: Sequence[str], folder: Path, *, batch_size: int = 8,
    backend: str = "auto", limit: int | None = None, include_path: str | None = None, progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """lmms-eval's tasks under each contender; ``folder`` holds ``{contender}.{task}.jsonl`` (answers, as they come), ``.json`` (results).

    Without Java, METEOR is left out of the metrics of captions, and CIDEr, BLEU and ROUGE count the words of ``evaluation.cider``.

    Args:
        limit: the first so many questions of each task.
        include_path: a folder with more tasks (YAML).

    Returns:
        contender's label -> task (for a group of tasks: each of its tasks) -> ``{"metrics": {name: (value, standard error or None)},
        "costs": costs_of(..)}``.

    Raises:
        ValueError: an unknown task (names those alike), a task without questions, or ``folder`` holds answers of another setting.
        Whatever lmms-eval or the model raises.
    """
    from lmms_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {include_path}: no such folder; give the one that holds your task's YAML file")
    with contextlib.redirect_stdout(sys.stderr):
        manager = TaskManager("WARNING", include_path=include_path, model_name="dyrate")
    for task in tasks:
        if task not in manager.all_tasks:
            alike = difflib.get_close_matches(task, manager.all_tasks, n=6, cutoff=0.5)
            raise ValueError(
                f"lmms-eval knows no task {task!r}; "
                + (f"alike: {', '.join(alike)}" if alike else f"it knows {len(manager.all_tasks)}: lmms-eval --tasks list")
            )
    found: dict[str, dict[str, dict[str, Any]]] = {contender.label: {} for contender in contenders}
    for task in tasks:
        for contender in contenders:
            if contender.side is not None:
                raise ValueError(f"{contender.label}: a coarser picture is not run by lmms-eval; leave it out")
            if progress is not None:
                progress(f"{task}: {contender.label}")
            stem = stem_of(contender, task)
            runner = PatchedModel.of(model, processor, contender, batch_size, backend, folder / f"{stem}.jsonl")
            found[contender.label] |= _evaluate_one(runner, task, manager, folder / f"{stem}.json", limit)
    return found


def _evaluate_one(runner: PatchedModel, task: str, manager: Any, path: Path, limit: int | None) -> dict[str, dict[str, Any]]:
    import lmms_eval.evaluator

    setting = {"task": task, "limit": limit, **runner.setting}
    if path.exists():
        try:
            held = read_json(path)
            if held["setting"] == setting:
                return held["tasks"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no results of this version ({error}); give another folder, or remove the file") from None
    try:
        with contextlib.redirect_stdout(sys.stderr), _without_java():
            results = lmms_eval.evaluator.simple_evaluate(
                model=runner, tasks=[task], task_manager=manager, limit=limit, batch_size=runner.batch_size, log_samples=False,
                bootstrap_iters=1000, verbosity="WARNING",
                cli_args=argparse.Namespace(output_path=str(path.with_suffix("")), process_with_media=False),
            )  # fmt: skip
    except Exception as error:
        attempt = getattr(error, "last_attempt", None)  # tenacity's RetryError, whose own text hides the cause
        if attempt is None:
            raise
        cause = attempt.exception()
        raise RuntimeError(f"task {task}: lmms-eval cannot load its data set ({cause!r}); is it there, and has it questions?") from cause
    tasks = {}
    for name in dict.fromkeys(each.task for each in runner.answered):
        metrics = {}
        for key, value in results["results"][name].items():
            metric, separator, kept = key.partition(",")
            if separator and isinstance(value, int | float) and not re.search("_stderr(_clt|_clustered)?$", metric):
                spread = results["results"][name].get(f"{metric}_stderr,{kept}")
                label = metric if kept == "none" else f"{metric},{kept}"
                metrics[label] = (float(value), float(spread) if isinstance(spread, int | float) else None)
        tasks[name] = {"metrics": metrics, "costs": costs_of(each for each in runner.answered if each.task == name)}
    if not tasks:
        raise ValueError(f"task {task} has no questions; look at its data set and its split")
    write_json(path, {"setting": setting, "tasks": tasks})
    return read_json(path)["tasks"]


@contextlib.contextmanager
def _without_java() -> Iterator[None]:
    """Where Java is missing, captions are split into words by ``evaluation.cider``, and METEOR and SPICE, Java programs, are left out."""
    if shutil.which("java") is not None or importlib.util.find_spec("pycocoevalcap") is None:
        yield
        return
    from lmms_eval.api.task import ConfigurableTask
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(self: Any, captions: dict[Any, list[dict[str, str]]]) -> dict[Any, list[str]]:
        return {key: [" ".join(tokenize(each["caption"])) for each in texts] for key, texts in captions.items()}

    def metrics(self: Any) -> dict[str, Any]:
        return {name: function for name, function in every(self).items() if not name.endswith(("METEOR", "SPICE"))}

    every = ConfigurableTask.aggregation
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (PTBTokenizer, "tokenize", tokens), (Meteor, "__init__", lambda self: None), (Meteor, "__del__", lambda self: None),
            (ConfigurableTask, "aggregation", metrics),
        ):  # fmt: skip
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
