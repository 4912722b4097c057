"""Builds and installs for real, in virtual environments of their own: ``pytest -m packaging`` (minutes, needs a package index).

Everything but the whole install is done without dependencies: none of it needs torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.slow, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parents[2]
HAS_NVCC = bool(shutil.which("nvcc") or os.environ.get("CUDA_HOME") or os.environ.get("CUDACXX"))
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")

REPORT = """
import importlib.util, json
from dyrate_kernels import native
import dyrate_kernels, dyrate_kernels.triton_kernels as t
seen = native.probe()
print(json.dumps({
    "reason": native.missing_reason(),
    "probe": seen and seen.to_dict(),
    "package": dyrate_kernels.__file__,
    "triton_kernels": t.__file__,
    "top_level": importlib.util.find_spec("triton_kernels") is not None,
}))
"""


def sources(folder: Path) -> Path:
    """A copy of what git would carry, so that builds leave nothing in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """pip install; the environment has no DYRATE_ variable but those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DYRATE_")}
    return subprocess.run([str(python), "-m", "pip", "install", *arguments], env={**clean, **environ}, capture_output=True, text=True)


def report(python: Path, cwd: Path) -> dict:
    done = subprocess.run([str(python), "-c", REPORT], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def path_with(tmp_path: Path):
    """A PATH that holds first a folder with the given nvcc script."""

    def make(script: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvcc").chmod(0o755)
        return f"{folder}{os.pathsep}{os.environ['PATH']}"

    return make


@pytest.mark.parametrize("editable", [False, True])
def test_without_cuda(checkout: Path, python: Path, tmp_path: Path, editable: bool) -> None:
    done = install(python, "--no-deps", *(["-e"] if editable else []), str(checkout), DYRATE_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = report(python, tmp_path)
    assert seen["reason"] == "built with DYRATE_CUDA=0" and seen["probe"] is None
    assert not seen["top_level"]
    assert Path(seen["package"]).is_relative_to(checkout) == editable
    assert Path(seen["triton_kernels"]).is_relative_to(checkout) == editable
    assert not list((checkout / "dyrate_kernels").glob("_native.*.so"))


def test_an_nvcc_without_a_gpu_is_not_run(checkout: Path, python: Path, tmp_path: Path, path_with) -> None:
    """The plain install, on a machine with a toolkit and no GPU: it says how to build, and leaves no extension."""
    environ = {"PATH": path_with(f"touch {tmp_path}/was_run; exit 1"), "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": ""}
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    done = install(python, "--no-deps", "-e", str(checkout), **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "was_run").exists()
    reason = report(python, tmp_path)["reason"]
    assert "No devices were found" in reason and "DYRATE_CUDA_ARCHS=all" in reason


@needs_nvcc
@pytest.mark.parametrize("editable", [False, True])
def test_with_cuda_then_without(checkout: Path, python: Path, tmp_path: Path, editable: bool) -> None:
    where = [*(["-e"] if editable else []), str(checkout)]
    done = install(python, "--no-deps", *where, DYRATE_CUDA="1", DYRATE_CUDA_ARCHS="8.0;9.0+PTX")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = report(python, tmp_path)
    assert seen["reason"] is None
    assert seen["probe"]["architectures"] == ["80-real", "90"]
    objects = {path: path.stat().st_mtime_ns for path in (checkout / "build").rglob("*.cu.o")}
    assert objects
    (checkout / "csrc" / "rows.cu").touch()
    done = install(python, "--no-deps", "--force-reinstall", *where, DYRATE_CUDA="1", DYRATE_CUDA_ARCHS="8.0;9.0+PTX")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path, made in objects.items() if path.stat().st_mtime_ns != made} == {"rows.cu.o"}
    assert report(python, tmp_path)["reason"] is None
    done = install(python, "--no-deps", "--force-reinstall", *where, DYRATE_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(python, tmp_path)["reason"] == "built with DYRATE_CUDA=0"
    folder = Path(seen["package"]).parent
    assert not list(folder.glob("_native.*.so"))


@pytest.mark.parametrize("switch", ["", "1"])
def test_without_isolation_and_without_pybind11(checkout: Path, python: Path, tmp_path: Path, path_with, switch: str) -> None:
    """As on a machine with no network. A wheel rather than an editable install: the checkout stays as it is."""
    assert install(python, "setuptools>=77").returncode == 0
    answers = 'case "$1" in --version) echo release 12.4;; *) echo compute_90;; esac'
    environ = {"PATH": path_with(answers), "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": "", "PIP_NO_INDEX": "1", "DYRATE_CUDA": switch}
    environ["DYRATE_CUDA_ARCHS"] = "90"
    done = install(python, "--no-deps", "--no-build-isolation", str(checkout), **environ)
    if switch:
        assert done.returncode != 0
        assert "DYRATE_CUDA=1 needs pybind11" in done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert report(python, tmp_path)["reason"].startswith("built without pybind11")


def test_a_broken_nvcc_stops_the_install(checkout: Path, python: Path, path_with) -> None:
    environ = {"PATH": path_with("exit 1"), "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": "", "DYRATE_CUDA_ARCHS": "all"}
    done = install(python, "--no-deps", str(checkout), **environ)
    assert done.returncode != 0
    assert "exits with 1" in done.stdout + done.stderr


@needs_nvcc
def test_an_nvcc_that_cannot_compile_stops_the_install(checkout: Path, python: Path, path_with) -> None:
    """It tells its version, so only the build itself shows that it is broken."""
    real = shutil.which("nvcc")
    if real is None:
        pytest.skip("needs nvcc on PATH")
    broken = f'case "$1" in --version|--list-gpu-arch) exec {real} "$1";; esac; echo no compiler here >&2; exit 1'
    environ = {"PATH": path_with(broken), "CUDA_HOME": "", "CUDA_PATH": "", "CUDACXX": "", "DYRATE_CUDA_ARCHS": "90"}
    done = install(python, "--no-deps", str(checkout), **environ)
    assert done.returncode != 0
    assert "did not build with nvcc" in done.stdout + done.stderr
    assert "DYRATE_CUDA=0" in done.stdout + done.stderr


def test_what_a_wheel_and_a_source_archive_hold(checkout: Path, python: Path, tmp_path: Path) -> None:
    assert install(python, "build").returncode == 0
    environ = {**os.environ, "DYRATE_CUDA": "0"}
    # Without options, build makes the source archive and then the wheel from it: what it lacks shows.
    subprocess.run([str(python), "-m", "build", "-o", str(tmp_path / "dist"), str(checkout)], env=environ, check=True)
    (wheel,) = (tmp_path / "dist").glob("*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {"dyrate_kernels/_build_info.json"}
    for folder, target in (("dyrate_kernels", "dyrate_kernels"), ("triton_kernels", "dyrate_kernels/triton_kernels")):
        for path in (checkout / folder).rglob("*"):
            if path.is_file() and not path.name.startswith(("_native.", "_build_info")) and path.suffix != ".pyc":
                expected.add(f"{target}/{path.relative_to(checkout / folder).as_posix()}")
    assert "dyrate_kernels/bundled/model/model.safetensors" in expected
    assert expected <= set(names), sorted(expected - set(names))
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "dyrate_kernels" in tops
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    carried = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    made = ("build/", ".egg-info/", "__pycache__/", "dyrate_kernels/_native.", "dyrate_kernels/_build_info")  # by installs before this one
    built = {name for name in carried if any(part in name for part in made)}
    assert carried - built - packed == {".gitignore"}


def test_the_whole_install_keeps_a_torch_in_range(checkout: Path, python: Path, tmp_path: Path) -> None:
    done = install(python, "-e", f"{checkout}[test]", DYRATE_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    version = subprocess.run(
        [str(python), "-c", "import torch; print(torch.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (2, 8) <= tuple(int(part) for part in version.split(".")[:2]) < (2, 14)
    done = subprocess.run([str(python.with_name("dyrate")), "info", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["native"]["reason"] == "built with DYRATE_CUDA=0"
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "tests/packaging"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
