"""Sources of captions: pictures in a folder, or rows of Parquet files. Nothing is decoded here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyrate_kernels.files import printable
from dyrate_kernels.journal import is_journal
from dyrate_kernels.pictures import SUFFIXES, UnreadableError, find_picture

LINES, TABLE, REPORT = "captions.jsonl", "captions.parquet", "report.json"
OUTPUTS = (LINES, TABLE, REPORT, "captions.part", "report.part")
"""Files that a run writes into its folder, and those that a kill may leave of it."""
COLUMNS = ("image", "jpg", "jpeg", "png", "bytes", "image_bytes", "img", "path", "file_name", "image_path")


@dataclass(frozen=True)
class Source:
    """One picture.

    Attributes:
        name: what its caption is filed under; unique in a run, and UTF-8 (``files.printable``). Of a file its path below the folder; of
            a row the file's name and the row's number, or what the id column holds.
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
        closed: folders that cannot be listed.
    """

    sources: list[Source]
    column: str | None
    others: int
    closed: tuple[str, ...] = ()


def find(images: str | Path, column: str | None = None, id_column: str | None = None) -> Sources:
    """The pictures of a folder (all below it, through links too, each folder once) or the rows of a Parquet file or a folder of such files.

    What a run has written, into this place or below it, is not taken.

    Args:
        column: of Parquet files; None: the first of ``COLUMNS`` that is there.
        id_column: whose values name the rows; one without a value, or with one that is no text, is named by file and number.

    Raises:
        ValueError: there is no such place, no picture in it, a Parquet file that cannot be read or lacks a column, or two rows have one id;
            says which.
        ImportError: Parquet files need pyarrow.
    """
    root = Path(images).expanduser()
    if root.is_file():
        if root.suffix.lower() != ".parquet":
            raise ValueError(f"--images {images}: must be a folder of pictures or a Parquet file (.parquet)")
        return _rows([root], root.parent, column, id_column)
    if not root.is_dir():
        raise ValueError(f"--images {images}: no such folder or file")
    pictures: dict[str, Source] = {}
    tables: list[Path] = []
    closed: list[str] = []
    others = 0
    for folder, names in _folders(root, closed):
        ours = OUTPUTS if LINES in names and is_journal(folder / LINES) else ()
        for file in (folder / name for name in names if not name.startswith(".") and name not in ours):
            if file.suffix.lower() == ".parquet":
                tables.append(file)
            elif file.suffix.lower() in SUFFIXES:
                name = printable(file.relative_to(root).as_posix())
                while name in pictures:  # a name that looks as another one is written
                    name = name.replace("\\", "\\\\")
                pictures[name] = Source(name, str(file))
            else:
                others += 1
    if pictures and tables:
        raise ValueError(f"--images {images}: holds both pictures and Parquet files; give one of them")
    if tables:
        return _rows(tables, root, column, id_column)
    if not pictures:
        raise ValueError(f"--images {images}: no picture in this folder ({others} other files); endings read: {', '.join(SUFFIXES)}")
    return Sources(list(pictures.values()), None, others, tuple(closed))


def _folders(root: Path, closed: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder below ``root``, with its files in order; first those that are really there, then those that links lead to."""
    seen, starts = set(), [root]
    while starts:
        for name, folders, files in os.walk(starts.pop(0), onerror=lambda error: closed.append(printable(str(error.filename)))):
            folder = Path(name)
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                folders.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            inside = sorted(each for each in folders if not each.startswith("."))
            starts += [folder / each for each in inside if (folder / each).is_symlink()]
            folders[:] = [each for each in inside if not (folder / each).is_symlink()]
            yield folder, sorted(files)


def _rows(files: Sequence[Path], base: Path, column: str | None, id_column: str | None) -> Sources:
    """All rows. Every file is looked into before the first picture is."""
    counts, ids = [], []
    for file in files:
        with _opened(file) as table:
            names = table.schema_arrow.names
            if column is None:
                column = next((name for name in COLUMNS if name in names), None)
            if names.count(column) != 1:
                wanted = f"no single column {column!r}" if column else f"none of the columns {', '.join(COLUMNS)}"
                raise ValueError(f"{file}: {wanted}; it has {', '.join(names)}; name it with --image-column")
            if id_column is not None and names.count(id_column) != 1:
                raise ValueError(f"{file}: no single column {id_column!r} for --id-column; it has {', '.join(names)}")
            counts.append(table.metadata.num_rows)
            ids.append(None if id_column is None else [_id(each) for each in table.read(columns=[id_column]).column(id_column)])
    found: dict[str, Source] = {}
    for file, count, keys in zip(files, counts, ids, strict=True):
        for row in range(count):
            name = f"{file.relative_to(base).as_posix()}:{row}" if keys is None or keys[row] is None else str(keys[row])
            name = printable(name)
            if name in found:
                raise ValueError(f"{file}: --id-column {id_column}: {name!r} stands in two rows; ids must be unique")
            found[name] = Source(name, str(file), row)
    if not found:
        raise ValueError(f"{files[0]}: no rows")
    return Sources(list(found.values()), column, 0)


def _id(cell: Any) -> Any:
    """Returns the value of an id column; None for what Python has no value for: texts that are no UTF-8, times beyond its years."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A Parquet file.

    Raises:
        ValueError: it cannot be read; names it.
    """
    parquet = _parquet()
    import pyarrow

    try:
        with file.open("rb") as stream:  # no path: a name may be no UTF-8
            yield parquet.ParquetFile(stream)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as a Parquet file ({error}); restore it, or take it out of the folder") from error


def payloads(sources: Sequence[Source], column: str | None) -> Iterator[Any]:
    """Yields, in order, what ``read_picture`` takes or an UnreadableError: a file's path, or what a row holds, whose path is taken below
    its file's folder.
    """
    if column is None:
        yield from (Path(source.file) for source in sources)
        return
    file, found = None, iter(())
    for index, source in enumerate(sources):
        if source.file != file:
            file = source.file
            rows = [each.row for each in sources[index:]]  # rows come file by file
            found = _cells(Path(file), column, rows)
        yield next(found)


def _cells(file: Path, column: str, rows: Sequence[int]) -> Iterator[Any]:
    """Pictures of a file's rows. A group of rows that cannot be read is as many failures."""
    group, cells = -1, None
    try:
        with _opened(file) as table:
            for row in rows:
                try:
                    wanted, offset = _locate(table.metadata, row)
                    if wanted != group:
                        group, cells = wanted, None
                        cells = table.read_row_group(group, columns=[column]).column(column)
                    if cells is None:
                        raise ValueError("its group of rows cannot be read")
                    yield find_picture(cells[offset].as_py(), file.parent)
                except UnreadableError as error:
                    yield error
                except Exception as error:  # damaged pages and texts that are none
                    yield UnreadableError("broken", f"row {row} of {printable(file.name)} cannot be read ({error})")
    except ValueError as error:  # gone or damaged since the run began
        while True:
            yield UnreadableError("broken", printable(str(error)))


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
