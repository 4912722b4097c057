"""A whole run: what is left to do, one writer for all workers, and what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyrate_kernels.captioning import engines
from dyrate_kernels.captioning.captioner import Caption, Task
from dyrate_kernels.captioning.compare import compare
from dyrate_kernels.captioning.inputs import LINES, REPORT, TABLE, Sources
from dyrate_kernels.files import locked, write_json
from dyrate_kernels.journal import Journal


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        done, total: pictures, those of earlier runs included.
        failed: of them.
        new, seconds: pictures of this run, and its time since the first of them could be asked for.
    """

    done: int
    total: int
    failed: int
    new: int
    seconds: float


def run(
    task: Task, sources: Sources, out: Path, *, engine: str = "local", workers: int | None = None, address: str | None = None,
    engine_options: Mapping[str, Any] | None = None, retry_failed: bool = False, progress: Callable[[Progress], None] | None = None,
    compare_dense: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Captions everything that ``out`` does not hold yet; returns the report.

    ``out/captions.jsonl`` gets a line a picture as it comes, written by this process alone, so a killed worker, or a killed run that is
    started again, leaves each picture there once. ``captions.parquet`` (with pyarrow) and ``report.json`` are written at the end.

    Args:
        engine, workers, address, engine_options: ``engines.run``.
        compare_dense: the first so many captioned pictures are captioned again by this process, in turns with the unpruned model, for the
            speed of both (``compare``); 0: none are.

    Raises:
        ValueError: ``out`` holds captions of another setting, lines that are no captions, or files of others that would be overwritten.
        RuntimeError: another run is writing there.
        Whatever the engine raises: what was written until then stays.
    """
    with locked(out):
        foreign = [name for name in (TABLE, REPORT) if (out / name).exists() and not (out / LINES).exists()]
        if foreign:
            raise ValueError(f"{out} holds {' and '.join(foreign)} without a {LINES}: not of this run; move them, or give another --out")
        journal = Journal(out / LINES, task.setting())
        known = {caption.name: caption.to_dict() for caption in journal.read(Caption)}
        wanted = {source.name for source in sources.sources}
        known = {name: line for name, line in known.items() if name in wanted}
        if retry_failed:
            known = {name: line for name, line in known.items() if line["error"] is None}
        todo = [source for source in sources.sources if source.name not in known]
        started, new = time.perf_counter(), 0
        failed = sum(line["error"] is not None for line in known.values())
        if todo:
            for captions in engines.run(engine, task, todo, workers, address, engine_options):
                fresh = [caption for caption in captions if caption.name not in known]
                journal.add(*(caption.to_dict() for caption in fresh))
                known.update((caption.name, caption.to_dict()) for caption in fresh)
                new += len(fresh)
                failed += sum(caption.error is not None for caption in fresh)
                if progress is not None:
                    progress(Progress(len(known), len(wanted), failed, new, time.perf_counter() - started))
        lost = [source.name for source in todo if source.name not in known]
        if lost:
            raise RuntimeError(f"{len(lost)} pictures got no answer, the first is {lost[0]!r}; start the run again, it goes on")
        ordered = [known[source.name] for source in sources.sources]
        found = report(ordered, sources, new, time.perf_counter() - started)
        like = [source for source in sources.sources if known[source.name]["error"] is None][:compare_dense]
        if like:
            found["dense"] = compare(task, like)
        write_table(out / TABLE, ordered)
        write_json(out / REPORT, {"setting": task.setting(), **found})
        return found


def report(lines: list[dict[str, Any]], sources: Sources, new: int, seconds: float) -> dict[str, Any]:
    """Counts and rates of all lines; the time is this run's alone."""
    good = [line for line in lines if line["error"] is None]
    failed = [line for line in lines if line["error"] is not None]
    tokens = sum(line["visual_tokens"] for line in good)
    told = [line for line in good if line["read"] is not None]
    of_told = sum(line["visual_tokens"] for line in told)
    return {
        "pictures": len(lines),
        "captioned": len(good),
        "failed": len(failed),
        "failures": dict(Counter(line["kind"] for line in failed).most_common()),
        "first_failure": f"{failed[0]['name']}: {failed[0]['error']}" if failed else None,
        "other_files": sources.others,
        "closed_folders": list(sources.closed),
        "generated_tokens": sum(line["tokens"] for line in good),
        "visual_tokens": tokens,
        "visual_rows_read": sum(line["read"] for line in told) / of_told if of_told else None if len(told) < len(good) else 1.0,
        "new": new,
        "seconds": seconds,
        "pictures_per_second": new / seconds if new else None,
    }


def write_table(path: Path, lines: list[dict[str, Any]]) -> None:
    """All lines as one Parquet file, whole or not there; nothing where pyarrow is missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        return
    schema = pa.schema([
        ("name", pa.string()), ("caption", pa.string()), ("error", pa.string()), ("kind", pa.string()), ("visual_tokens", pa.int64()),
        ("read", pa.float64()), ("tokens", pa.int64()), ("seconds", pa.float64()), ("worker", pa.int64()),
    ])  # fmt: skip
    part = path.with_suffix(".part")
    with part.open("wb") as file:  # no path: a name may be no UTF-8
        parquet.write_table(pa.Table.from_pylist(lines, schema=schema), file)
    part.replace(path)


__all__ = ["LINES", "REPORT", "TABLE", "Caption", "Progress", "report", "run"]
