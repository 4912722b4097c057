"""The compiled extension ``dyrate_kernels._native``: is it there, why not, and what it sees of the machine.

The extension is built by ``setup.py`` where nvcc and a GPU are found, or where it is told to. It links the CUDA runtime
statically and loads the driver on the first call, so it imports on a machine with no driver. It holds the kernels
of the ``cuda`` backend (``ops/cuda.py``) and a probe. Nothing here imports torch, and nothing asks the driver before ``probe`` or
``unusable_reason`` is called.
"""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["BuildInfo", "Device", "Probe", "build_info", "code_for", "load", "missing_reason", "probe", "unusable_reason"]

_BUILD_INFO = Path(__file__).with_name("_build_info.json")  # written by setup.py


@dataclass(frozen=True)
class BuildInfo:
    """Facts on the native extension that the install recorded.

    cuda: it was built. reason: why not, when it was not. nvcc: release of the compiler, e.g. "13.0".
    architectures: in CMake's form, e.g. ("75-real", .., "120"): "-real" is machine code, no suffix is that and PTX.
    """

    cuda: bool
    reason: str | None = None
    nvcc: str | None = None
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """One CUDA device. compute_capability is (major, minor), memory is in bytes."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory: int
    multiprocessors: int


@dataclass(frozen=True)
class Probe:
    """The machine as the extension sees it.

    driver_version, runtime_version: CUDA's own, e.g. "13.0"; driver_version is None when there is no driver.
    architectures: what the extension was compiled for. error: why there are no devices, None when there are some.
    """

    driver_version: str | None
    runtime_version: str
    architectures: tuple[str, ...]
    devices: tuple[Device, ...]
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, for JSON."""
        return asdict(self)


@functools.cache
def build_info() -> BuildInfo:
    """Returns the record of setup.py. Never raises: a source tree that was not installed says so in ``reason``."""
    try:
        recorded = json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
        return BuildInfo(
            cuda=bool(recorded["cuda"]),
            reason=recorded.get("reason"),
            nvcc=recorded.get("nvcc"),
            architectures=tuple(recorded.get("architectures", ())),
        )
    except FileNotFoundError:
        return BuildInfo(False, "this source tree was not installed: run `pip install -e .`")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return BuildInfo(False, f"the build information is unreadable ({error}): install again")


@functools.cache
def _import() -> tuple[ModuleType | None, str | None]:
    """(the extension, None) or (None, why it is missing)."""
    info = build_info()
    if not info.cuda:
        return None, info.reason or "built without CUDA"
    try:
        return importlib.import_module("dyrate_kernels._native"), None
    except ImportError as error:
        return None, f"the native extension was built but does not import: {error}"


def missing_reason() -> str | None:
    """Why the compiled extension is missing, or None when it is there (a machine without a driver has it too)."""
    return _import()[1]


def load() -> ModuleType:
    """The compiled extension. RuntimeError that says why when it is missing."""
    module, reason = _import()
    if module is None:
        raise RuntimeError(f"the native extension is missing: {reason}")
    return module


def probe() -> Probe | None:
    """Ask the driver what is there; None when the extension is missing (``missing_reason`` says why).

    Never raises for a machine without driver or device: ``Probe.error`` names the cause. Starts no CUDA context, but
    initialises the driver: a process forked afterwards cannot use CUDA.
    """
    module, _ = _import()
    if module is None:
        return None
    seen = module.probe()
    return Probe(
        driver_version=_release(seen["driver_version"]),
        runtime_version=_release(seen["runtime_version"]) or "unknown",
        architectures=tuple(seen["architectures"]),
        devices=tuple(Device(**device) for device in seen["devices"]),
        error=seen["error"],
    )


DRIVER_TOO_OLD = "the driver is too old"


def unusable_reason(seen: Probe | None) -> str | None:
    """Why the extension's kernels cannot run on the first device of a machine that was probed, or None when they can."""
    if seen is None:
        return missing_reason() or "the native extension was not probed"
    if seen.driver_version is None:
        return "no CUDA driver is installed"
    if _major(seen.driver_version) < _major(seen.runtime_version):
        return (
            f"{DRIVER_TOO_OLD}: it supports CUDA {seen.driver_version}, the extension was built with {seen.runtime_version}; update the "
            "driver, or install with an nvcc of its version (CUDACXX=/path/to/nvcc pip install -e .)"
        )
    if seen.error is not None:
        return seen.error
    device = seen.devices[0]
    if not any(_runs(text, device.compute_capability) for text in seen.architectures):
        major, minor = device.compute_capability
        return (
            f"the extension has no code for {device.name} (sm_{major}{minor}), only for {', '.join(seen.architectures)}; install with "
            f"DYRATE_CUDA_ARCHS={major}{minor}"
        )
    return None


def _major(version: str) -> int:
    return int(version.split(".")[0]) if version[:1].isdigit() else 0


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Code for an architecture in CMake's form runs on a device: machine code on its generation, PTX on everything later."""
    digits = "".join(character for character in architecture.split("-")[0] if character.isdigit())
    major, minor = int(digits[:-1]), int(digits[-1])
    if major == capability[0] and minor <= capability[1]:
        return True
    return not architecture.endswith("-real") and (major, minor) <= capability


def code_for(architectures: tuple[str, ...], capability: tuple[int, int]) -> int:
    """The architecture, e.g. 90, that the extension's code on a device was compiled for: the best machine code of the device's generation,
    else PTX of the latest architecture that is not later than the device; 0 where there is neither.
    """
    ours = [name for name in architectures if _runs(name, capability)]
    machine = [number for name in ours if (number := _number(name)) // 10 == capability[0] and not name.endswith("-virtual")]
    return max(machine or [_number(name) for name in ours], default=0)


def _number(architecture: str) -> int:
    return int("".join(character for character in architecture.split("-")[0] if character.isdigit()))


def _release(version: int) -> str | None:
    """13000 -> "13.0"; 0, CUDA's word for no driver, -> None."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else None
