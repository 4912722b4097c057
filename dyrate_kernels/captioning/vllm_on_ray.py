"""The engine ``vllm`` on a cluster: Ray Data's vLLM processor, one engine a GPU (or a group of them), pictures read by tasks of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dyrate_kernels.answering_vllm import Checkpoint, no_room, sampling
from dyrate_kernels.captioning import on_ray
from dyrate_kernels.captioning.captioner import Caption, Task, read
from dyrate_kernels.captioning.inputs import Source, payloads
from dyrate_kernels.captioning.vllm import check, failure, prompt_ids, setup_for
from dyrate_kernels.files import printable
from dyrate_kernels.pictures import UnreadableError

_BATCH = 64  # rows that an engine is handed at a time, several of them at once
_PICTURE = ("kind", "words", "pixels", "width", "height")  # columns


def run_on_ray(
    task: Task, sources: Sequence[Source], workers: int | None, address: str | None, more: Mapping[str, Any], cpus: int | None = None
) -> Iterator[list[Caption]]:  # fmt: skip
    """Captions, some at a time, as they come. How much of the visual tokens was read is not told: the processor keeps its engines.

    Args:
        workers: engines; None: as many as the GPUs of the cluster have room for.
        address: of the cluster; None: Ray is started on this machine.
        more: arguments of ``vllm.LLM``.
        cpus: cores of an engine that runs on a CPU; None: engines run on GPUs.

    Raises:
        ImportError: ``ray.data.llm`` is not there.
        ValueError: ``vllm.check``; a setting that an engine cannot have; a cluster without enough GPUs.
        ConnectionError: no cluster answers there.
    """
    check(task)
    assert task.model is not None
    checkpoint = Checkpoint(task.model, task.dtype, on_cpu=cpus is not None)
    processor_of = _processor_of()
    config: dict[str, Any] = {
        "model_source": task.model, "engine_kwargs": setup_for(task, checkpoint, more).arguments(), "batch_size": _BATCH,
        "should_continue_on_error": True, "log_engine_metrics": False,
        **{f"{stage}_stage": {"enabled": False} for stage in ("chat_template", "tokenize", "detokenize", "prepare_multimodal")},
    }  # fmt: skip
    if cpus is not None:
        config["placement_group_config"] = {"bundles": [{"CPU": cpus}]}
    with on_ray.connected(address) as ray:
        config["concurrency"] = workers or _room(ray.cluster_resources(), config["engine_kwargs"], cpus)
        ask = _Ask(prompt_ids(task, checkpoint), sampling(checkpoint, task.max_new_tokens))
        rows = on_ray.rows_of(sources)
        data = ray.data.from_items(rows, override_num_blocks=max(min(-(-len(rows) // _BATCH), 20_000), 1))
        data = processor_of(config, ask, _kept_columns)(data.map_batches(_Read(task), batch_size=_BATCH))
        began = time.perf_counter()
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            found = batch.to_pylist()
            now = time.perf_counter()
            each, began = (now - began) / max(len(found), 1), now
            if found:
                yield [_caption(row, checkpoint, each, ask.rules) for row in found]


def _processor_of() -> Callable[[dict[str, Any], Any, Any], Any]:
    """``(configuration, preprocess, postprocess) -> processor`` of Ray Data."""
    if not on_ray.has_ray():
        raise ImportError("--engine vllm with --address needs Ray Data's vLLM processor: pip install 'dyrate-kernels[vllm]' 'ray[llm]'")
    try:
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    except ImportError as error:
        raise ImportError(
            f"--engine vllm with --address needs Ray Data's vLLM processor, which cannot be imported ({error}): pip install 'ray[llm]'"
        ) from error
    return lambda config, before, after: build_processor(vLLMEngineProcessorConfig(**config), preprocess=before, postprocess=after)


def _room(resources: Mapping[str, Any], engine: Mapping[str, Any], cpus: int | None) -> int:
    """Returns how many engines the cluster has room for.

    Raises:
        ValueError: not for one.
    """
    kind, each = ("CPU", cpus) if cpus is not None else ("GPU", int(engine.get("tensor_parallel_size", 1)))
    found = int(resources.get(kind, 0)) // each
    if not found:
        raise ValueError(
            f"--address: an engine of vLLM needs {each} {kind}s, the cluster has {int(resources.get(kind, 0))}; use --engine ray, or local"
        )
    return found


class _Read:
    """A batch of rows of sources -> their pictures, or why there is none."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        columns = zip(batch["name"], batch["file"], batch["row"], strict=True)
        sources = [on_ray.source_of({"name": name, "file": file, "row": row}) for name, file, row in columns]
        found = [self._read(payload) for payload in payloads(sources, self.task.column)]
        return {"name": [source.name for source in sources], **{name: [each[name] for each in found] for name in _PICTURE}}

    def _read(self, payload: Any) -> dict[str, Any]:
        picture = read(payload, self.task.max_pixels)
        if isinstance(picture, UnreadableError):
            return {"kind": picture.kind, "words": printable(str(picture)), "pixels": b"", "width": 0, "height": 0}
        return {"kind": "", "words": "", "pixels": picture.tobytes(), "width": picture.width, "height": picture.height}


class _Ask:
    """A row of pictures -> a request. One without a picture asks for one token about nothing, which is not looked at."""

    def __init__(self, ids: list[int], rules: dict[str, Any]) -> None:
        self.ids, self.rules = ids, rules

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        asked = {"name": row["name"], "kind": row["kind"], "words": row["words"]}
        if row["kind"]:
            return asked | {"tokenized_prompt": self.rules["stop_token_ids"][:1] or [0], "sampling_params": {"max_tokens": 1}}
        picture = Image.frombytes("RGB", (int(row["width"]), int(row["height"])), row["pixels"])
        return asked | {"tokenized_prompt": self.ids, "multimodal_data": {"image": [picture]}, "sampling_params": self.rules}


def _kept_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what the driver needs of an answer."""
    prompt, tokens = row.get("prompt_token_ids"), row.get("generated_tokens")
    return {
        "name": row["name"], "kind": row["kind"], "words": row["words"], "wrong": row.get("__inference_error__") or "",
        "prompt": [int(token) for token in ([] if prompt is None else prompt)],
        "tokens": [int(token) for token in ([] if tokens is None else tokens)],
    }  # fmt: skip


def _caption(row: Mapping[str, Any], checkpoint: Checkpoint, seconds: float, rules: Mapping[str, Any]) -> Caption:
    if row["kind"]:
        return failure(row["name"], UnreadableError(row["kind"], row["words"]))
    if row["wrong"]:
        return Caption(row["name"], error=row["wrong"], kind="model")
    most, tokens = rules["max_tokens"], row["tokens"]
    if len(tokens) < most and not rules["stop"] and not {*tokens[-1:]} & {*rules["stop_token_ids"]}:  # why it ended is not told
        return failure(row["name"], no_room(len(row["prompt"]), len(tokens), most))
    text = checkpoint.processor.decode(row["tokens"], skip_special_tokens=True).strip()
    visual = sum(token == checkpoint.config.image_token_id for token in row["prompt"])
    return Caption(row["name"], text, visual_tokens=visual, read=None, tokens=len(row["tokens"]), seconds=seconds)
