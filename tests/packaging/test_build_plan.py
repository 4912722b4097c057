"""setup.py's decisions: where nvcc is looked for, what each switch does, which architectures. No compiler is run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]

NVCC_13 = frozenset({75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121})
NVCC_12_4 = frozenset({50, 52, 60, 61, 70, 75, 80, 86, 87, 89, 90})


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dyrate_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def script(folder: Path, text: str, name: str = "nvcc") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def working_nvcc(folder: Path, name: str = "nvcc") -> Path:
    return script(
        folder,
        'case "$1" in\n'
        '--version) echo "Cuda compilation tools, release 12.4, V12.4.131";;\n'
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n';;\n"
        "*) exit 2;; esac",
        name,
    )


# Where nvcc is looked for.


def test_hidden_nvcc_is_a_pure_install_that_says_where_it_looked(build: ModuleType, tmp_path: Path) -> None:
    environ = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "nowhere")}
    plan = build.plan_build(environ, [tmp_path / "usual"])
    assert not plan.build
    assert "without nvcc" in plan.reason
    for place in ("CUDA_HOME", "PATH", str(tmp_path / "usual")):
        assert place in plan.reason
    assert plan.info() == {"cuda": False, "reason": plan.reason, "nvcc": None, "architectures": []}


@pytest.mark.parametrize("environ", [{}, {"PATH": ""}])
def test_no_path_at_all(build: ModuleType, tmp_path: Path, environ: dict[str, str]) -> None:
    assert not build.plan_build(environ, []).build


def test_order_of_the_places(build: ModuleType, tmp_path: Path) -> None:
    for name in ("cudacxx", "home/bin", "path_variable/bin", "path", "usual"):
        working_nvcc(tmp_path / name)
    environ = {
        "CUDACXX": str(tmp_path / "cudacxx/nvcc"),
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path_variable"),
        "PATH": str(tmp_path / "path"),
    }
    usual = [tmp_path / "usual"]
    for name, folder in zip([*environ, None], ["cudacxx", "home/bin", "path_variable/bin", "path", "usual"], strict=True):
        plan = build.plan_build(environ, usual)
        assert plan.nvcc == tmp_path / folder / "nvcc"
        environ.pop(name, None)


def test_cudacxx_may_be_a_bare_name(build: ModuleType, tmp_path: Path) -> None:
    named = working_nvcc(tmp_path, "nvcc-12.4")
    assert build.plan_build({"CUDACXX": "nvcc-12.4", "PATH": str(tmp_path)}, []).nvcc == named


def test_cudacxx_that_does_not_exist_is_an_error(build: ModuleType, tmp_path: Path) -> None:
    working_nvcc(tmp_path)
    with pytest.raises(build.CudaBuildError, match="CUDACXX names '/no/nvcc'"):
        build.plan_build({"CUDACXX": "/no/nvcc", "PATH": str(tmp_path)}, [])


# The switch.


def test_one_makes_a_missing_nvcc_an_error(build: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(build.CudaBuildError, match=r"DYRATE_CUDA=1 needs nvcc.*PATH"):
        build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": "1"}, [])


@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_zero_skips_without_running_nvcc(build: ModuleType, tmp_path: Path, value: str) -> None:
    script(tmp_path, f"touch {tmp_path}/was_run; exit 1")
    plan = build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": value, "DYRATE_CUDA_ARCHS": "nonsense"}, [])
    assert not plan.build and plan.reason == "built with DYRATE_CUDA=0"
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("value", ["", "auto", "1"])
def test_a_working_nvcc_is_used(build: ModuleType, tmp_path: Path, value: str) -> None:
    nvcc = working_nvcc(tmp_path)
    plan = build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": value}, [])
    assert (plan.build, plan.nvcc, plan.release, plan.reason) == (True, nvcc, "12.4", None)
    assert plan.architectures == ("75-real", "80-real", "86-real", "89-real", "90")


@pytest.mark.parametrize("value", ["", "1"])
def test_a_broken_nvcc_is_an_error_that_says_what_to_do(build: ModuleType, tmp_path: Path, value: str) -> None:
    nvcc = script(tmp_path, "echo libfoo.so: not found >&2; exit 1")
    with pytest.raises(build.CudaBuildError) as error:
        build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": value}, [])
    for part in (str(nvcc), "exits with 1", "libfoo.so: not found", "DYRATE_CUDA=0"):
        assert part in str(error.value)


def test_an_nvcc_that_cannot_be_executed_is_an_error(build: ModuleType, tmp_path: Path) -> None:
    nvcc = working_nvcc(tmp_path)
    nvcc.write_bytes(b"\x7fELF not really")
    with pytest.raises(build.CudaBuildError, match="does not run"):
        build.plan_build({"PATH": str(tmp_path)}, [])


@pytest.mark.parametrize("text", ["exit 0", 'echo "release 13.0"'])
def test_an_nvcc_that_answers_nothing_useful_is_an_error(build: ModuleType, tmp_path: Path, text: str) -> None:
    script(tmp_path, text)
    with pytest.raises(build.CudaBuildError, match="DYRATE_CUDA=0"):
        build.plan_build({"PATH": str(tmp_path)}, [])


def test_an_unknown_switch_is_an_error(build: ModuleType) -> None:
    with pytest.raises(build.CudaBuildError, match="DYRATE_CUDA must be 1, 0 or auto, got 'maybe'"):
        build.plan_build({"DYRATE_CUDA": "maybe"}, [])


# Architectures.


def test_default_architectures_are_those_that_nvcc_knows(build: ModuleType) -> None:
    assert build.parse_architectures("", NVCC_13) == (
        *("75-real", "80-real", "86-real", "89-real", "90-real", "100-real"),
        "120",
    )
    assert build.parse_architectures(" ", NVCC_12_4)[-2:] == ("89-real", "90")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", ("90-real",)),
        ("9.0", ("90-real",)),
        ("sm_90", ("90-real",)),
        ("90a", ("90a-real",)),
        ("8.0;9.0+PTX", ("80-real", "90")),
        ("120, 75 10.0", ("75-real", "100-real", "120-real")),
        ("90 90+ptx 90", ("90",)),
    ],
)
def test_architectures_of_ones_own(build: ModuleType, text: str, expected: tuple[str, ...]) -> None:
    assert build.parse_architectures(text, NVCC_13) == expected


@pytest.mark.parametrize("text", ["hopper", "9", "90;x", "90 +PTX", "-real"])
def test_unreadable_architectures(build: ModuleType, text: str) -> None:
    with pytest.raises(build.CudaBuildError, match="DYRATE_CUDA_ARCHS: expected"):
        build.parse_architectures(text, NVCC_13)


def test_an_architecture_that_nvcc_does_not_know(build: ModuleType) -> None:
    with pytest.raises(build.CudaBuildError, match=r"does not know '120'; it knows .*90$"):
        build.parse_architectures("120", NVCC_12_4)


# What a skipped build leaves.


@pytest.mark.parametrize("editable", [False, True])
def test_a_skipped_build_leaves_no_extension_of_an_earlier_one(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool
) -> None:
    from setuptools import Distribution

    root, build_lib = tmp_path / "root", tmp_path / "lib"
    folder = (root if editable else build_lib) / "dyrate_kernels"
    for made in {root / "dyrate_kernels", folder}:
        made.mkdir(parents=True)
        (made / "__init__.py").touch()
    stale = folder / "_native.cpython-311-x86_64-linux-gnu.so"
    stale.touch()
    monkeypatch.chdir(root)
    monkeypatch.setattr(build, "ROOT", root)
    command = build.BuildPy(Distribution({"packages": ["dyrate_kernels"], "script_name": "setup.py"}))
    command.build_lib = str(build_lib)
    command.ensure_finalized()
    command.editable_mode = editable
    command.plan = build.Plan(reason="because")
    command.run()
    assert not stale.exists()
    assert (folder / "__init__.py").exists()
    assert json.loads((folder / "_build_info.json").read_text())["reason"] == "because"
