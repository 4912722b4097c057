"""Public data sets as suites: each reads the data set's own file beside a folder of its pictures; nothing is downloaded."""

from __future__ import annotations

import os

from dyrate_kernels.evaluation.suites.captions import COCO, Flickr30k, NoCaps
from dyrate_kernels.evaluation.suites.file_suite import FileSuite
from dyrate_kernels.evaluation.suites.pope import POPE
from dyrate_kernels.evaluation.suites.scienceqa import ScienceQA
from dyrate_kernels.evaluation.suites.vqa import GQA, TextVQA, VizWiz

_BY_NAME: dict[str, type[FileSuite]] = {cls.name: cls for cls in (GQA, VizWiz, ScienceQA, TextVQA, POPE, NoCaps, Flickr30k, COCO)}


def names() -> list[str]:
    """The names that :func:`get` knows."""
    return list(_BY_NAME)


def get(name: str, data: str | os.PathLike[str], images: str | os.PathLike[str] | None = None, limit: int | None = None) -> FileSuite:
    """The suite ``name`` over a data set's file; arguments and errors as ``FileSuite`` says.

    Raises:
        ValueError: no suite has this name.
    """
    if name not in _BY_NAME:
        raise ValueError(f"suite must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name](data, images, limit)
