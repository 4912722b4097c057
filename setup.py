"""Build of dyrate_kernels: the Python packages always, the native extension where there is nvcc and a GPU to compile for.

Environment variables:
    DYRATE_CUDA        "auto" (default): build the extension if nvcc is found, for the GPUs that nvidia-smi lists; "1": build it, for
                       every architecture where there is no such GPU, and no nvcc is an error; "0": skip it.
    DYRATE_CUDA_ARCHS  what to compile for instead of the GPUs that are here: "all", or architectures, for example "90" or "8.0;9.0+PTX"
                       ("+PTX": also code that later GPUs compile). With nvcc this builds the extension, GPU or not.
    CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is, before PATH and the usual folders.

Compiling takes minutes for all architectures, so nothing is compiled where nobody asked for it and no GPU would run it; the build
record says how to ask. An nvcc that is to be used but does not work is an error: an install that silently lacks its kernels is worse
than one that stops. Where it is to be used but pybind11, CMake or a make program is not (possible only with ``pip install
--no-build-isolation``), the install is one without extension that records why; with DYRATE_CUDA=1 it is an error. torch is
not needed, and no driver or network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "dyrate_kernels"
EXTENSION = f"{PACKAGE}._native"
BUILD_INFO = "_build_info.json"

USUAL_FOLDERS = (Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin"))
NVIDIA_SMI_FOLDERS = (Path("/usr/bin"), Path("/usr/lib/wsl/lib"))  # after PATH; WSL does not put its own there
NVIDIA_SMI_SECONDS = 30.0  # many GPUs without persistence mode take several seconds; a driver that hangs never answers
# One per generation that has its own machine code; code for x.y also runs on x.z with z >= y. The last one is PTX too.
DEFAULT_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
NOTHING_IS_BUILT = ("egg_info", "dist_info", "sdist")  # commands before and beside a build: they ask neither nvcc nor nvidia-smi
SETUPTOOLS = int(setuptools.__version__.split(".")[0])
OLDEST_CMAKE = (3, 24)  # as in CMakeLists.txt


class CudaBuildError(Exception):
    """The native extension was asked for, or can be expected, and cannot be built."""


@dataclass(frozen=True)
class Plan:
    """Whether the native extension is built, with what, and why not. architectures: CMake's form ("90-real", "90")."""

    reason: str | None = None
    nvcc: Path | None = None
    release: str | None = None
    architectures: tuple[str, ...] = ()

    @property
    def build(self) -> bool:
        return self.nvcc is not None

    def info(self) -> dict[str, object]:
        """What dyrate_kernels.native.build_info reads back."""
        return {
            "cuda": self.build,
            "reason": self.reason,
            "nvcc": self.release,
            "architectures": list(self.architectures),
        }


def lacking_tools() -> tuple[str, ...]:
    """What a build with nvcc needs besides it and this environment lacks. Build isolation brings all of it."""
    lacking = []
    try:
        import pybind11  # noqa: F401
    except ImportError:
        lacking.append("pybind11")
    cmake = _tool("cmake", "cmake", "CMAKE_BIN_DIR")
    if cmake is None or _cmake_version(cmake) < OLDEST_CMAKE:
        lacking.append("cmake>=" + ".".join(map(str, OLDEST_CMAKE)))
    if _tool("ninja", "ninja", "BIN_DIR") is None and shutil.which("make") is None:
        lacking.append("ninja")
    return tuple(lacking)


def _cmake_version(cmake: str) -> tuple[int, ...]:
    """(3, 25) for example; () when it does not say."""
    try:
        done = subprocess.run([cmake, "--version"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"version (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found and done.returncode == 0 else ()


def plan_build(
    environ: Mapping[str, str], usual_folders: Sequence[Path] = USUAL_FOLDERS, smi_folders: Sequence[Path] = NVIDIA_SMI_FOLDERS
) -> Plan:
    """Decide from the environment and the GPUs. CudaBuildError where the decision is that the install must stop."""
    wanted = _switch(environ.get("DYRATE_CUDA", ""))
    if wanted is False:
        return Plan(reason="built with DYRATE_CUDA=0")
    nvcc, looked = find_nvcc(environ, usual_folders)
    if nvcc is None:
        if wanted:
            raise CudaBuildError(f"DYRATE_CUDA=1 needs nvcc, and none was found. Looked at: {', '.join(looked)}")
        return Plan(reason=f"built without nvcc (none was found at: {', '.join(looked)})")
    named, here = environ.get("DYRATE_CUDA_ARCHS", "").strip(), Gpus()
    if not named:
        here = find_gpus(environ, smi_folders)
        if not here.capabilities and not wanted:
            why = f"nvcc is at {nvcc}, but no GPU was found to compile for ({here.reason})"
            return Plan(reason=f"nothing was compiled: {why}. {TO_BUILD_IT}")
    release, supported = ask_nvcc(nvcc)
    if named:
        architectures = parse_architectures(named, supported)
    else:
        architectures = architectures_of(here.capabilities, supported)
        if not architectures and not wanted:
            gpus = ", ".join(f"sm_{number}" for number in here.capabilities)
            return Plan(reason=f"nothing was compiled: neither the kernels nor nvcc {release} have code for the GPU here ({gpus})")
    if missing := lacking_tools():
        named = ", ".join(missing)
        if wanted:
            raise CudaBuildError(
                f"DYRATE_CUDA=1 needs {named}, which the building environment lacks: pip install it, or build with isolation"
            )
        return Plan(reason=f"built without {named} (nvcc {release} was found at {nvcc}): pip install it, then this package again")
    return Plan(nvcc=nvcc, release=release, architectures=architectures or parse_architectures("all", supported))


TO_BUILD_IT = "To build it, install with DYRATE_CUDA_ARCHS=all (every GPU, as for a wheel; takes minutes) or with that of one GPU, e.g. 90"


@dataclass(frozen=True)
class Gpus:
    """Compute capabilities of the GPUs here, ascending, each once (90 for 9.0), and why there are none."""

    capabilities: tuple[int, ...] = ()
    reason: str | None = None


def find_gpus(environ: Mapping[str, str], smi_folders: Sequence[Path] = NVIDIA_SMI_FOLDERS) -> Gpus:
    """Ask nvidia-smi. Never raises: whatever keeps it from answering is the reason."""
    path = environ.get("PATH", "")
    places = [path] if path else []
    found = next(filter(None, (shutil.which("nvidia-smi", path=place) for place in [*places, *map(str, smi_folders)])), None)
    if found is None:
        return Gpus(reason="there is no nvidia-smi")
    command = [found, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Gpus(reason=f"{found} does not run: {error}")
    try:
        said = process.communicate(timeout=NVIDIA_SMI_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # not waited for: one that hangs in the driver does not die
        return Gpus(reason=f"{found} did not answer within {NVIDIA_SMI_SECONDS:.0f} s")
    # a line a GPU; "[N/A]" for one that does not say
    matches = [re.fullmatch(r"(\d{1,2})\.(\d)", line.strip()) for line in said.splitlines()]
    capabilities = tuple(sorted({int(match[1] + match[2]) for match in matches if match}))
    if not capabilities:
        return Gpus(reason=f"{found} exits with {process.returncode} and says {said.strip()[:200]!r}")
    return Gpus(capabilities)


def architectures_of(capabilities: Sequence[int], supported: frozenset[int]) -> tuple[str, ...]:
    """What to compile so that each of these GPUs has code, in CMake's form, ascending; nothing for GPUs older than any of the defaults.

    A GPU that this nvcc does not know gets the newest code that it can run: of an older member of its generation, else PTX.
    """
    chosen: dict[int, bool] = {}  # architecture -> with PTX
    for capability in capabilities:
        runs = [number for number in supported if DEFAULT_ARCHITECTURES[0] <= number <= capability]
        if runs:
            best = max(runs)
            chosen[best] = chosen.get(best, False) or best // 10 != capability // 10
    return tuple(f"{number}{'' if ptx else '-real'}" for number, ptx in sorted(chosen.items()))


def _switch(text: str) -> bool | None:
    value = text.strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise CudaBuildError(f"DYRATE_CUDA must be 1, 0 or auto, got {text!r}")


def find_nvcc(environ: Mapping[str, str], usual_folders: Sequence[Path] = USUAL_FOLDERS) -> tuple[Path | None, tuple[str, ...]]:
    """(nvcc or None, the places looked at).

    CUDACXX names a compiler, so a wrong one is an error; the other variables name folders that may lack one.
    """
    path = environ.get("PATH", "")
    if named := environ.get("CUDACXX", "").strip():
        found = shutil.which(named, path=path)
        if found is None:
            raise CudaBuildError(f"CUDACXX names {named!r}, which is not an executable file")
        return Path(found), ("CUDACXX",)
    looked = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environ.get(variable, "").strip():
            looked.append(variable)
            if found := shutil.which("nvcc", path=str(Path(home) / "bin")):
                return Path(found), tuple(looked)
    looked.append("PATH")
    # An empty PATH would make shutil.which look in its own default.
    if path and (found := shutil.which("nvcc", path=path)):
        return Path(found), tuple(looked)
    for folder in usual_folders:
        looked.append(str(folder))
        if found := shutil.which("nvcc", path=str(folder)):
            return Path(found), tuple(looked)
    return None, tuple(looked)


def ask_nvcc(nvcc: Path) -> tuple[str, frozenset[int]]:
    """(release such as "13.0", architectures it knows such as {75, 80}); CudaBuildError when it does not answer."""
    version = _run_nvcc(nvcc, "--version")
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        raise CudaBuildError(f"nvcc at {nvcc} does not tell its release: {version.strip()[-300:]!r}{_WAY_OUT}")
    supported = frozenset(int(number) for number in re.findall(r"compute_(\d+)\b", _run_nvcc(nvcc, "--list-gpu-arch")))
    if not supported:
        raise CudaBuildError(f"nvcc at {nvcc} lists no architectures{_WAY_OUT}")
    return release.group(1), supported


_WAY_OUT = ". Repair it, name another with CUDACXX, or set DYRATE_CUDA=0 to install without the native extension"


def _run_nvcc(nvcc: Path, argument: str) -> str:
    try:
        done = subprocess.run(
            [str(nvcc), argument],
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CudaBuildError(f"nvcc was found at {nvcc} but does not run: {error}{_WAY_OUT}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:] or "nothing"
        raise CudaBuildError(f"nvcc was found at {nvcc} but `nvcc {argument}` exits with {done.returncode} (it says: {said}){_WAY_OUT}")
    return done.stdout


def parse_architectures(text: str, supported: frozenset[int]) -> tuple[str, ...]:
    """DYRATE_CUDA_ARCHS -> CMake's form, ascending. "all": the defaults that this nvcc knows, the last one with PTX.

    "90", "9.0", "sm_90" and "90a" are accepted, separated by spaces, commas or semicolons; "+PTX" may follow each.
    """
    items = [item for item in re.split(r"[\s,;]+", text.strip()) if item]
    if not items:
        raise CudaBuildError(f"DYRATE_CUDA_ARCHS: expected 'all' or for example '90', got {text!r}")
    if [item.lower() for item in items] == ["all"]:
        known = [number for number in DEFAULT_ARCHITECTURES if number in supported]
        if not known:
            raise CudaBuildError(f"nvcc knows none of the architectures {DEFAULT_ARCHITECTURES}: set DYRATE_CUDA_ARCHS")
        return (*(f"{number}-real" for number in known[:-1]), str(known[-1]))
    chosen: dict[tuple[int, str], bool] = {}
    for item in items:
        match = re.fullmatch(r"(?:sm_|compute_)?(?:(\d{1,2})\.(\d)|(\d{2,3}))([af]?)(\+ptx)?", item.lower())
        if match is None:
            raise CudaBuildError(f"DYRATE_CUDA_ARCHS: expected 'all', or for example '90' or '8.0;9.0+PTX', got {item!r}")
        number = int(match[3] or match[1] + match[2])
        if number not in supported:
            known_list = ", ".join(str(other) for other in sorted(supported))
            raise CudaBuildError(f"DYRATE_CUDA_ARCHS: this nvcc does not know {item!r}; it knows {known_list}")
        key = (number, match[4])
        chosen[key] = chosen.get(key, False) or match[5] is not None
    return tuple(f"{number}{letter}{'' if ptx else '-real'}" for (number, letter), ptx in sorted(chosen.items()))


def _tool(name: str, module_name: str, attribute: str) -> str | None:
    """A build tool from the Python environment that builds (it may not be on PATH), else from PATH."""
    try:
        module = __import__(module_name)
        found = shutil.which(name, path=str(getattr(module, attribute)))
    except (ImportError, AttributeError):
        found = None
    return found or shutil.which(name)


class BuildPy(build_py):
    """Python files; starts from an empty folder, and records that there is no extension when none is built."""

    plan = Plan(reason="no plan was made")

    def run(self) -> None:
        if self.editable_mode:
            folder = ROOT / PACKAGE
            (folder / BUILD_INFO).unlink(missing_ok=True)
            if not self.plan.build:
                for stale in folder.glob("_native.*"):
                    if stale.suffix in (".so", ".pyd"):
                        stale.unlink()
        else:
            # setuptools packs whatever lies in its build folder, files of earlier builds included.
            folder = Path(self.build_lib) / PACKAGE
            shutil.rmtree(folder, ignore_errors=True)
        super().run()
        if not self.plan.build:
            _write_info(folder, self.plan)


class BuildExt(build_ext):
    """The native extension, by CMake."""

    plan = Plan(reason="no plan was made")

    def run(self) -> None:
        super().run()
        if self.extensions:
            _write_info(ROOT / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE, self.plan)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            self._cmake(target)
        except CudaBuildError as error:
            raise SystemExit(f"error: {error}") from None

    def _folder(self) -> Path:
        """Where objects are kept for the next install: in the checkout, one folder a Python; else where setuptools says."""
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return Path(self.build_temp).resolve() / "cmake"
        return folder

    def _cmake(self, target: Path) -> None:
        cmake = _tool("cmake", "cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise CudaBuildError("building the native extension needs cmake: pip install cmake, or set DYRATE_CUDA=0")
        try:
            import pybind11
        except ImportError:
            raise CudaBuildError("building the native extension needs pybind11: pip install pybind11, or set DYRATE_CUDA=0") from None
        folder = self._folder()
        ninja = _tool("ninja", "ninja", "BIN_DIR")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{folder}",
            *(["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CUDA_COMPILER={self.plan.nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(self.plan.architectures)}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        build = [cmake, "--build", str(folder), "--parallel", os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(cores)]
        # Tools of an isolated build lie elsewhere each time and may change; what the objects were made with may not.
        made_with = "\n".join([str(ROOT), str(self.plan.nvcc), str(self.plan.release), sys.version, "ninja" if ninja else "make"])
        stamp = folder / "made_with.txt"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != made_with:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(made_with, encoding="utf-8")
        for command in (configure, build):
            if (status := subprocess.run(command, stdin=subprocess.DEVNULL).returncode) != 0:
                stamp.unlink()  # the next build starts anew
                raise CudaBuildError(
                    f"the native extension did not build with nvcc {self.plan.release} at {self.plan.nvcc} "
                    f"(cmake exits with {status}; its messages stand above){_WAY_OUT}"
                )
        if not target.exists():
            raise CudaBuildError(f"CMake made no {target.name}")


def _write_info(folder: Path, plan: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUILD_INFO).write_text(json.dumps(plan.info(), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        plan = Plan(reason="no plan was made") if command in NOTHING_IS_BUILT else plan_build(os.environ)
    except CudaBuildError as error:
        raise SystemExit(f"error: {error}") from None
    if command not in NOTHING_IS_BUILT:
        what = f"nvcc {plan.release} for {', '.join(plan.architectures)}" if plan.build else plan.reason
        print(f"native extension: {what}", file=sys.stderr)
    BuildPy.plan = BuildExt.plan = plan
    packages = find_packages(str(ROOT), include=[PACKAGE, f"{PACKAGE}.*"])
    triton = [f"{PACKAGE}.{name}" for name in ("triton_kernels", *_below("triton_kernels"))]
    setup(
        # pyproject's form of it is an error for setuptools before 77, which `--no-build-isolation` may meet.
        **{"license_expression" if SETUPTOOLS >= 77 else "license": "Apache-2.0"},
        packages=[*packages, *triton],
        # The top-level name triton_kernels belongs to another package, which transformers and vLLM import.
        package_dir={f"{PACKAGE}.triton_kernels": "triton_kernels"},
        ext_modules=[Extension(EXTENSION, sources=[])] if plan.build else [],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )


def _below(folder: str) -> list[str]:
    """Names of the packages below a top-level folder: "triton_kernels.decode" and so on."""
    return [f"{folder}.{name}" for name in find_packages(str(ROOT / folder))]


if __name__ == "__main__":
    main()
