"""One worker: a patched model that captions what it is given, whatever the pictures are like."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from dyrate_kernels import specs
from dyrate_kernels.captioning.batching import Lengths, batches, detail, key
from dyrate_kernels.captioning.inputs import Source, payloads
from dyrate_kernels.files import printable
from dyrate_kernels.loading import full_name
from dyrate_kernels.pictures import MAX_PIXELS, UnreadableError, read_picture

WINDOW = 4  # batches that a worker is handed at a time, and sorts by visual tokens
READERS = 4  # threads that decode pictures


@dataclass(frozen=True)
class Task:
    """The work on each picture; it is sent to where the worker runs.

    Attributes:
        model, device, dtype, quantize: as ``loading.load_model`` takes them.
        policy, retention, backend, vision: as ``dyrate_kernels.patch`` takes them.
        prompt: what is asked about each picture.
        max_new_tokens: of a caption.
        batch_size: pictures that are generated together, at most.
        images: where the pictures come from, in full: captions of two places do not belong into one file either.
        column: of Parquet files that holds the pictures; None: the pictures are files.
        id_column: of Parquet files that names their rows; None: file and number do.
        max_pixels: of a picture.
        early_leave: captions that have ended leave their batch (``answering.Leave``), which changes none of them; None: on a CPU.
    """

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    policy: Any = "dyrate"
    retention: str = "recoverable"
    backend: str = "auto"
    vision: Any = None
    prompt: str = "Describe the picture."
    max_new_tokens: int = 160
    batch_size: int = 8
    images: str | None = None
    column: str | None = None
    id_column: str | None = None
    max_pixels: int = MAX_PIXELS
    early_leave: bool | None = None

    def setting(self) -> dict[str, str]:
        """Returns the setting that captions depend on: those of another do not belong into one file."""
        reducers = None if self.vision is None else "+".join(map(str, self.vision))
        model = "bundled" if self.model is None else full_name(self.model)
        given = {"images": self.images, "column": self.column, "id_column": self.id_column, "max_pixels": self.max_pixels,
                 "model": model, "dtype": self.dtype, "quantize": self.quantize, "policy": self.policy,
                 "retention": specs.retention(self.retention), "vision": reducers, "prompt": self.prompt,
                 "max_new_tokens": self.max_new_tokens}  # fmt: skip
        return {name: str(value) for name, value in given.items()}


@dataclass
class Caption:
    """Outcome for one picture: a caption, or why there is none.

    Attributes:
        name: of the ``Source``.
        caption: text, or None.
        error, kind: words for a person, and a word to count by; None where there is a caption.
        visual_tokens: of the picture, before any reducer.
        read: of them, as a mean over steps and layers; None where the engine does not tell (vLLM on a cluster).
        tokens: generated, end of sequence included.
        seconds: of its batch, divided by the pictures in it; of engine vllm, of the captions that came with it.
        worker: process that made it.
    """

    name: str
    caption: str | None = None
    error: str | None = None
    kind: str | None = None
    visual_tokens: int = 0
    read: float | None = 0.0
    tokens: int = 0
    seconds: float = 0.0
    worker: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        if (self.caption is None) == (self.error is None):
            raise ValueError(f"{self.name}: there must be a caption, or an error")

    def to_dict(self) -> dict[str, Any]:
        """For JSON and Parquet, which take texts in UTF-8 alone."""
        return {name: printable(value) if isinstance(value, str) else value for name, value in asdict(self).items()}


def read(payload: Any, max_pixels: int) -> Any:
    """Payload of ``inputs.payloads`` -> a PIL picture, or the UnreadableError that says why there is none."""
    if isinstance(payload, UnreadableError):
        return payload
    try:
        return read_picture(payload, max_pixels)
    except UnreadableError as error:
        return error


class Captioner:
    """A model, patched once, that captions pictures as long as it lives.

    Args:
        task: what it does.
        loaded: model and processor; None: they are loaded.
        patched: False: the model generates as it is, and nothing is told of what it reads.

    Raises:
        Whatever loading the model or patching it raises.
    """

    def __init__(self, task: Task, loaded: tuple[Any, Any] | None = None, patched: bool = True) -> None:
        import dyrate_kernels as dk
        from dyrate_kernels.loading import load_model

        self.task, self.lengths = task, Lengths()
        self.model, self.processor = loaded or load_model(task.model, task.device, task.dtype, task.quantize)
        warnings.filterwarnings("ignore", message="nothing was dropped")
        self.early_leave = self.model.device.type == "cpu" if task.early_leave is None else task.early_leave
        self.handle = None if not patched else dk.patch(
            self.model, task.policy, retention=task.retention, backend=task.backend, vision=task.vision or None
        )  # fmt: skip

    def __call__(self, sources: Sequence[Source]) -> list[Caption]:
        """A caption or a failure for each, in order. Pictures of like numbers of visual tokens, whose captions will be of like length by
        those made so far, are generated together (``batching``).
        """
        found: dict[int, Caption] = {}
        pictures: dict[int, Any] = {}
        with ThreadPoolExecutor(READERS) as pool:
            for index, outcome in enumerate(pool.map(partial(read, max_pixels=self.task.max_pixels), payloads(sources, self.task.column))):
                if isinstance(outcome, UnreadableError):
                    found[index] = Caption(sources[index].name, error=str(outcome), kind=outcome.kind)
                else:
                    pictures[index] = outcome
            details = dict(zip(pictures, pool.map(detail, pictures.values()), strict=True))
        keys = {index: key(self._visual_tokens(picture), details[index], self.lengths) for index, picture in pictures.items()}
        for part in batches(pictures, keys.__getitem__, self.task.batch_size):
            names = [sources[index].name for index in part]
            captions = self._generate(names, [pictures.pop(index) for index in part])
            for index, caption in zip(part, captions, strict=True):
                found[index] = caption
                if caption.error is None:
                    self.lengths.see(details[index], caption.tokens)
        return [found[index] for index in range(len(sources))]

    def _visual_tokens(self, picture: Any) -> int:
        """Returns how many the processor will make of it; 0 where it cannot say, or always makes as many."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return 0
        try:
            return int(count(image_sizes=[(picture.height, picture.width)])["num_image_tokens"][0])
        except Exception:  # an estimate to sort by: whatever a processor lacks for it must not stop a run
            return 0

    def _generate(self, names: Sequence[str], pictures: Sequence[Any]) -> list[Caption]:
        """Captions of one batch. Where a batch fails, each half is tried; where a picture fails alone, that is its failure."""
        import torch

        try:
            return self._ask(names, pictures)
        except Exception as error:
            if len(names) == 1:
                kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "model"
                return [Caption(names[0], error=f"{type(error).__name__}: {error}", kind=kind)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(names) // 2
        return self._generate(names[:half], pictures[:half]) + self._generate(names[half:], pictures[half:])

    def _ask(self, names: Sequence[str], pictures: Sequence[Any]) -> list[Caption]:
        from dyrate_kernels import answering, chat

        started = time.perf_counter()
        text = chat.render(self.processor, [chat.user(self.task.prompt, images=1)])
        inputs = chat.encode(self.processor, [text] * len(names), [[picture] for picture in pictures], self.model)
        leaving = self.handle if self.early_leave else None
        rows = answering.generate(self.model, self.processor, inputs, self.task.max_new_tokens, handle=leaving)
        captions = []
        for sequence, (name, row) in enumerate(zip(names, rows, strict=True)):
            caption = Caption(name, self.processor.decode(row, skip_special_tokens=True).strip(), tokens=len(row))
            if self.handle is not None:
                stats = self.handle.stats(sequence, len(row))
                caption.visual_tokens = stats.visual_tokens_in[0]
                caption.read = stats.visual_tokens_in[0] * stats.received * stats.visual_share
            captions.append(caption)
        each = (time.perf_counter() - started) / len(names)
        for caption in captions:
            caption.seconds = each
        return captions
