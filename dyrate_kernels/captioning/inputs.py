"""What is to be captioned: pictures in a folder, or rows of Parquet files. Nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyrate_kernels.pictures import SUFFIXES

COLUMNS = ("image", "jpg", "jpeg", "png", "bytes", "image_bytes", "img", "path", "file_name", "image_path")


@dataclass(frozen=True)
class Source:
    """One picture.

    Attributes:
        name: what its caption is filed under; unique in a run. Of a file its path below the folder; of a row the file's name and the
            row's number, or what the id column holds.
        file: the picture, or the Parquet file.
        row: of the Parquet file; -1 for a picture.
    """

    name: str
    file: str
    row: int = -1


@dataclass(frozen=True)
class Sources:
    """All of a run.

    Attributes:
        sources: in a fixed order.
        column: of the Parquet files that holds pictures; None for a folder.
        others: files of the folder that are no pictures by their names.
    """

    sources: list[Source]
    column: str | None
    others: int


def find(images: str | Path, out: Path, column: str | None = None, id_column: str | None = None) -> Sources:
    """The pictures of a folder (all below it, but not below ``out``) or the rows of a Parquet file or a folder of such files.

    Args:
        column: of Parquet files; None: the first of ``COLUMNS`` that is there.
        id_column: whose values name the rows.

    Raises:
        ValueError: there is no such place, no picture in it, no such column, or two rows have one id; says which.
        ImportError: Parquet files need pyarrow.
    """
    place = Path(images).expanduser()
    if place.is_file():
        if place.suffix != ".parquet":
            raise ValueError(f"--images {images}: must be a folder of pictures or a Parquet file (.parquet)")
        return _rows([place], place.parent, column, id_column)
    if not place.is_dir():
        raise ValueError(f"--images {images}: no such folder or file")
    pictures, tables, others = [], [], 0
    skipped = out.resolve()
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (Path(folder) / name).resolve() != skipped)
        for name in sorted(names):
            file = Path(folder) / name
            if name.startswith("."):
                continue
            if file.suffix.lower() == ".parquet":
                tables.append(file)
            elif file.suffix.lower() in SUFFIXES:
                pictures.append(Source(file.relative_to(place).as_posix(), str(file)))
            else:
                others += 1
    if pictures and tables:
        raise ValueError(f"--images {images}: holds both pictures and Parquet files; give one of them")
    if tables:
        return _rows(tables, place, column, id_column)
    if not pictures:
        raise ValueError(f"--images {images}: no picture in this folder ({others} other files); endings read: {', '.join(SUFFIXES)}")
    return Sources(pictures, None, others)


def _rows(files: Sequence[Path], base: Path, column: str | None, id_column: str | None) -> Sources:
    parquet = _parquet()
    names = parquet.ParquetFile(files[0]).schema_arrow.names
    if column is None:
        column = next((name for name in COLUMNS if name in names), None)
    if column not in names:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise ValueError(f"{files[0]}: {wanted}; it has {', '.join(names)}; name it with --image-column")
    if id_column is not None and id_column not in names:
        raise ValueError(f"{files[0]}: no column {id_column!r} for --id-column; it has {', '.join(names)}")
    found, seen = [], set()
    for file in files:
        table = parquet.ParquetFile(file)
        ids = None if id_column is None else table.read(columns=[id_column]).column(0).to_pylist()
        for row in range(table.metadata.num_rows):
            name = f"{file.relative_to(base).as_posix()}:{row}" if ids is None else str(ids[row])
            if name in seen:
                raise ValueError(f"--id-column {id_column}: {name!r} stands in two rows; ids must be unique")
            seen.add(name)
            found.append(Source(name, str(file), row))
    if not found:
        raise ValueError(f"{files[0]}: no rows")
    return Sources(found, column, 0)


def payloads(sources: Sequence[Source], column: str | None) -> Iterator[Any]:
    """What ``read_picture`` takes, in order: a file's path, or a row's bytes. A row's path is taken below its file's folder."""
    if column is None:
        yield from (source.file for source in sources)
        return
    parquet, groups = _parquet(), {}
    for source in sources:
        if source.file not in groups:
            groups = {source.file: parquet.ParquetFile(source.file)}  # one open at a time: rows come file by file
            cached: dict[int, list[Any]] = {}
        group, offset = _locate(groups[source.file].metadata, source.row)
        if group not in cached:
            cached = {group: groups[source.file].read_row_group(group, columns=[column]).column(0).to_pylist()}
        yield _payload(cached[group][offset], Path(source.file).parent)


def _payload(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):  # Hugging Face's image feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return str(folder / value)
    return value if isinstance(value, bytes) else b""


def _locate(metadata: Any, row: int) -> tuple[int, int]:
    """(row group, row in it)."""
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < rows:
            return group, row
        row -= rows
    raise IndexError(row)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'dyrate-kernels[caption]'") from error
    return pyarrow.parquet
