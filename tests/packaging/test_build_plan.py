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
    module.real_lacking_tools = module.lacking_tools
    module.lacking_tools = tuple  # the environment of the tests need not have CMake and pybind11
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


# The other tools: build isolation brings them, `pip install --no-build-isolation` may not.


def test_nvcc_without_the_other_tools_is_a_pure_install_that_names_them(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = working_nvcc(tmp_path)
    monkeypatch.setattr(build, "lacking_tools", lambda: ("pybind11", "cmake>=3.24"))
    plan = build.plan_build({"PATH": str(tmp_path)}, [])
    assert not plan.build
    for part in ("without pybind11, cmake>=3.24", "12.4", str(nvcc)):
        assert part in plan.reason
    with pytest.raises(build.CudaBuildError, match=r"DYRATE_CUDA=1 needs pybind11, cmake>=3.24"):
        build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": "1"}, [])


def test_without_nvcc_the_other_tools_are_not_asked_for(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "lacking_tools", lambda: pytest.fail("asked"))
    assert "without nvcc" in build.plan_build({"PATH": str(tmp_path)}, []).reason
    assert not build.plan_build({"PATH": str(working_nvcc(tmp_path).parent), "DYRATE_CUDA": "0"}, []).build


@pytest.mark.parametrize(
    ("tools", "lacking"),
    [
        ({}, ("pybind11", "cmake>=3.24", "ninja")),
        ({"cmake": "echo cmake version 3.24.0", "make": "exit 0"}, ("pybind11",)),
        ({"cmake": "echo cmake version 4.1.0", "ninja": "exit 0"}, ("pybind11",)),
        ({"cmake": "echo cmake version 3.22.1", "ninja": "exit 0"}, ("pybind11", "cmake>=3.24")),
        ({"cmake": "echo cmake version 3.30.1; exit 1", "ninja": "exit 0"}, ("pybind11", "cmake>=3.24")),
    ],
)
def test_what_is_lacking(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: dict[str, str], lacking: tuple[str, ...]
) -> None:
    for name, text in tools.items():
        script(tmp_path, text, name)
    monkeypatch.setenv("PATH", str(tmp_path))
    for module in ("pybind11", "cmake", "ninja"):
        monkeypatch.setitem(sys.modules, module, None)  # import fails
    assert build.real_lacking_tools() == lacking
    monkeypatch.setitem(sys.modules, "pybind11", ModuleType("pybind11"))
    assert build.real_lacking_tools() == lacking[1:]


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


# What is packed.


def test_every_file_of_the_package_is_packed(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build into an empty folder holds each file that the checkout has: a new kind of data file or a folder without
    __init__.py would be left out silently."""
    from setuptools import Distribution
    from setuptools.config.pyprojecttoml import apply_configuration

    given: dict[str, object] = {}
    monkeypatch.setenv("DYRATE_CUDA", "0")
    monkeypatch.setattr(build, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    build.main()
    assert given["ext_modules"] == []
    packages = Distribution({**{key: value for key, value in given.items() if key != "ext_modules"}, "script_name": "setup.py"})
    apply_configuration(packages, ROOT / "pyproject.toml")
    command = packages.get_command_obj("build_py")
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    packed = {Path(target).relative_to(tmp_path).as_posix() for target in command.get_outputs(include_bytecode=False)}
    command.run()
    packed &= {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    made = ("__pycache__", "_build_info.json", "_native.")
    expected = set()
    for folder, target in (("dyrate_kernels", "dyrate_kernels"), ("triton_kernels", "dyrate_kernels/triton_kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not any(word in str(path) for word in made):
                expected.add(f"{target}/{path.relative_to(ROOT / folder).as_posix()}")
    assert expected <= packed, f"not packed: {sorted(expected - packed)}"
    assert "dyrate_kernels/demo_model/model.safetensors" in packed
    assert {name.split("/")[0] for name in packed} == {"dyrate_kernels"}


@pytest.mark.parametrize("name", ["README.md", "model.bin.safetensors", "preprocessor_config.json", "chat_template.jinja", "vocab.txt"])
def test_kinds_of_model_files_that_are_packed(name: str) -> None:
    from setuptools.config.pyprojecttoml import read_configuration

    patterns = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["package-data"]["dyrate_kernels"]
    assert any(Path(f"demo_model/{name}").match(pattern) for pattern in patterns)
