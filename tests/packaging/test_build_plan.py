"""setup.py's decisions: where nvcc is looked for, what each switch does, which architectures. No compiler is run."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]

ALL_OF_12_4 = ("75-real", "80-real", "86-real", "89-real", "90")
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
    module.NVIDIA_SMI_FOLDERS = ()
    module.plan_build.__defaults__ = (*module.plan_build.__defaults__[:-1], ())  # nor may the GPUs of this machine matter
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


def gpus(folder: Path, *said: str, code: int = 0) -> Path:
    """An nvidia-smi that says so many lines when it is asked for what setup.py needs, and fails when it is asked for anything else."""
    lines = "".join(f"echo '{line}'\n" for line in said)
    asked = "--query-gpu=compute_cap --format=csv,noheader"
    return script(folder, f'[ "$*" = "{asked}" ] || exit 6\n{lines}exit {code}', "nvidia-smi")


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
    environ["DYRATE_CUDA_ARCHS"] = "90"
    names = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", None)
    for name, folder in zip(names, ["cudacxx", "home/bin", "path_variable/bin", "path", "usual"], strict=True):
        plan = build.plan_build(environ, usual)
        assert plan.nvcc == tmp_path / folder / "nvcc"
        environ.pop(name, None)


def test_cudacxx_may_be_a_bare_name(build: ModuleType, tmp_path: Path) -> None:
    named = working_nvcc(tmp_path, "nvcc-12.4")
    assert build.plan_build({"CUDACXX": "nvcc-12.4", "PATH": str(tmp_path), "DYRATE_CUDA_ARCHS": "90"}, []).nvcc == named


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
    script(tmp_path, f"echo > {tmp_path}/was_run; exit 1")
    plan = build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": value, "DYRATE_CUDA_ARCHS": "nonsense"}, [])
    assert not plan.build and plan.reason == "built with DYRATE_CUDA=0"
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("value", ["", "auto", "1"])
def test_a_working_nvcc_is_used_for_the_gpus_that_are_here(build: ModuleType, tmp_path: Path, value: str) -> None:
    nvcc = working_nvcc(tmp_path)
    gpus(tmp_path, "9.0")
    plan = build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": value}, [])
    assert (plan.build, plan.nvcc, plan.release, plan.reason) == (True, nvcc, "12.4", None)
    assert plan.architectures == ("90-real",)


@pytest.mark.parametrize("value", ["", "1"])
def test_a_broken_nvcc_is_an_error_that_says_what_to_do(build: ModuleType, tmp_path: Path, value: str) -> None:
    nvcc = script(tmp_path, "echo libfoo.so: not found >&2; exit 1")
    gpus(tmp_path, "9.0")
    with pytest.raises(build.CudaBuildError) as error:
        build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": value}, [])
    for part in (str(nvcc), "exits with 1", "libfoo.so: not found", "DYRATE_CUDA=0"):
        assert part in str(error.value)


def test_an_nvcc_that_cannot_be_executed_is_an_error(build: ModuleType, tmp_path: Path) -> None:
    nvcc = working_nvcc(tmp_path)
    nvcc.write_bytes(b"\x7fELF not really")
    with pytest.raises(build.CudaBuildError, match="does not run"):
        build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA_ARCHS": "90"}, [])


@pytest.mark.parametrize("text", ["exit 0", 'echo "release 13.0"'])
def test_an_nvcc_that_answers_nothing_useful_is_an_error(build: ModuleType, tmp_path: Path, text: str) -> None:
    script(tmp_path, text)
    with pytest.raises(build.CudaBuildError, match="DYRATE_CUDA=0"):
        build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA_ARCHS": "all"}, [])


def test_an_unknown_switch_is_an_error(build: ModuleType) -> None:
    with pytest.raises(build.CudaBuildError, match="DYRATE_CUDA must be 1, 0 or auto, got 'maybe'"):
        build.plan_build({"DYRATE_CUDA": "maybe"}, [])


# GPUs.


def test_nvcc_without_a_gpu_compiles_nothing_and_says_how_to(build: ModuleType, tmp_path: Path) -> None:
    nvcc = script(tmp_path, f"echo > {tmp_path}/was_run; exit 1")
    plan = build.plan_build({"PATH": str(tmp_path)}, [])
    assert not plan.build and not (tmp_path / "was_run").exists()
    for part in (str(nvcc), "no GPU was found", "there is no nvidia-smi", "DYRATE_CUDA_ARCHS=all"):
        assert part in plan.reason
    assert plan.info() == {"cuda": False, "reason": plan.reason, "nvcc": None, "architectures": []}


@pytest.mark.parametrize("archs, expected", [("all", ALL_OF_12_4), ("ALL ", ALL_OF_12_4), ("90", ("90-real",)), ("8.0+PTX", ("80",))])
@pytest.mark.parametrize("value", ["", "1"])
def test_named_architectures_are_built_whatever_gpu_is_here(
    build: ModuleType, tmp_path: Path, archs: str, expected: tuple[str, ...], value: str
) -> None:
    working_nvcc(tmp_path)
    script(tmp_path, f"echo > {tmp_path}/was_run; echo 8.6", "nvidia-smi")
    plan = build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": value, "DYRATE_CUDA_ARCHS": archs}, [])
    assert plan.build and plan.architectures == expected
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("said", [None, (), ("6.1",)])
def test_one_builds_for_every_architecture_where_no_gpu_can_run_the_kernels(build: ModuleType, tmp_path: Path, said: Any) -> None:
    working_nvcc(tmp_path)
    if said is not None:
        gpus(tmp_path, *said)
    plan = build.plan_build({"PATH": str(tmp_path), "DYRATE_CUDA": "1"}, [])
    assert plan.build and plan.architectures == ALL_OF_12_4


@pytest.mark.parametrize(
    "said, expected",
    [
        (("9.0",), ("90-real",)),
        (("9.0",) * 8, ("90-real",)),  # a server; MIG slices are no GPUs of their own here
        (("8.6", "7.5", "8.9", "8.6"), ("75-real", "86-real", "89-real")),
        ((" 8.0 \r", ""), ("80-real",)),
        (("[N/A]", "9.0", "[Not Supported]"), ("90-real",)),
        (("WARNING: infoROM is corrupted at gpu 0000:00:1E.0", "8.0"), ("80-real",)),
        (("6.1", "8.0"), ("80-real",)),  # an old one beside it
        (("8.7",), ("86-real",)),  # of its generation
        (("12.0",), ("90",)),  # later than this nvcc: by PTX
        (("9.0", "12.0"), ("90",)),
    ],
)
def test_the_gpus_that_are_here_are_compiled_for(
    build: ModuleType, tmp_path: Path, said: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    working_nvcc(tmp_path)
    gpus(tmp_path, *said)
    assert build.plan_build({"PATH": str(tmp_path)}, []).architectures == expected


def test_a_gpu_that_says_its_capability_is_used_although_nvidia_smi_fails_on_another(build: ModuleType, tmp_path: Path) -> None:
    working_nvcc(tmp_path)
    gpus(tmp_path, "9.0", "Unable to determine the device handle for GPU1: Unknown Error", code=15)
    assert build.plan_build({"PATH": str(tmp_path)}, []).architectures == ("90-real",)


@pytest.mark.parametrize(
    "said, code, words",
    [
        ((), 0, "exits with 0 and says ''"),
        (("No devices were found",), 6, "exits with 6 and says 'No devices were found'"),
        (('Field "compute_cap" is not a valid field to query.',), 2, "not a valid field"),
        (("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.",), 9, "could not communicate"),
        (("[N/A]",), 0, "[N/A]"),
        (("compute_cap", "nine", "9", "9.0.1", "-9.0", "9,0", "900.0"), 0, "nine"),
    ],
)
def test_an_nvidia_smi_that_names_no_gpu_compiles_nothing_and_is_quoted(
    build: ModuleType, tmp_path: Path, said: tuple[str, ...], code: int, words: str
) -> None:
    working_nvcc(tmp_path)
    gpus(tmp_path, *said, code=code)
    plan = build.plan_build({"PATH": str(tmp_path)}, [])
    assert not plan.build and words in plan.reason and "DYRATE_CUDA_ARCHS=all" in plan.reason


def test_an_nvidia_smi_that_cannot_be_executed_or_prints_bytes_is_no_gpu(build: ModuleType, tmp_path: Path) -> None:
    working_nvcc(tmp_path)
    gpus(tmp_path).write_bytes(b"\x7fELF not really")
    assert "does not run" in build.plan_build({"PATH": str(tmp_path)}, []).reason
    script(tmp_path, "printf '\\377\\376\\000\\n'", "nvidia-smi")
    assert "exits with 0" in build.plan_build({"PATH": str(tmp_path)}, []).reason


def test_an_nvidia_smi_that_hangs_is_left_behind(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that holds the pipe open is not the one that was started."""
    working_nvcc(tmp_path)
    script(tmp_path, "/bin/sleep 60\necho 9.0", "nvidia-smi")
    monkeypatch.setattr(build, "NVIDIA_SMI_SECONDS", 0.3)
    begin = time.monotonic()
    plan = build.plan_build({"PATH": str(tmp_path)}, [])
    assert time.monotonic() - begin < 20
    assert not plan.build and "did not answer" in plan.reason


def test_nvidia_smi_is_also_looked_for_where_a_subsystem_keeps_it(build: ModuleType, tmp_path: Path) -> None:
    working_nvcc(tmp_path / "path")
    gpus(tmp_path / "wsl", "8.9")
    assert build.plan_build({"PATH": str(tmp_path / "path")}, [], [tmp_path / "none", tmp_path / "wsl"]).architectures == ("89-real",)


def test_a_gpu_that_no_code_can_be_made_for_is_named(build: ModuleType, tmp_path: Path) -> None:
    working_nvcc(tmp_path)
    gpus(tmp_path, "7.0")
    plan = build.plan_build({"PATH": str(tmp_path)}, [])
    assert not plan.build and "sm_70" in plan.reason and "12.4" in plan.reason


@pytest.mark.parametrize("command", ["egg_info", "dist_info", "sdist"])
def test_metadata_and_source_archives_ask_neither_nvcc_nor_nvidia_smi(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name in ("nvcc", "nvidia-smi"):
        script(tmp_path, f"echo > {tmp_path}/was_run; exit 1", name)
    monkeypatch.setattr(build, "setup", lambda **arguments: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DYRATE_CUDA", "1")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", command])
    build.main()
    assert not (tmp_path / "was_run").exists()
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with pytest.raises(SystemExit, match="nvcc"):
        build.main()
    assert (tmp_path / "was_run").exists()


# The other tools: build isolation brings them, `pip install --no-build-isolation` may not.


def test_nvcc_without_the_other_tools_is_a_pure_install_that_names_them(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = working_nvcc(tmp_path)
    monkeypatch.setattr(build, "lacking_tools", lambda: ("pybind11", "cmake>=3.24"))
    gpus(tmp_path, "9.0")
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


def test_all_architectures_are_those_that_nvcc_knows(build: ModuleType) -> None:
    assert build.parse_architectures("all", NVCC_13) == (
        *("75-real", "80-real", "86-real", "89-real", "90-real", "100-real"),
        "120",
    )
    assert build.parse_architectures(" all ", NVCC_12_4) == ALL_OF_12_4


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


@pytest.mark.parametrize("text", ["hopper", "9", "90;x", "90 +PTX", "-real", "", ",", "all 90", "all+PTX"])
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
    assert "dyrate_kernels/bundled/model/model.safetensors" in packed
    assert {name.split("/")[0] for name in packed} == {"dyrate_kernels"}


@pytest.mark.parametrize("name", ["README.md", "model.bin.safetensors", "preprocessor_config.json", "chat_template.jinja", "vocab.txt"])
def test_kinds_of_model_files_that_are_packed(name: str) -> None:
    from setuptools.config.pyprojecttoml import read_configuration

    patterns = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["package-data"]["dyrate_kernels"]
    assert any(Path(f"bundled/model/{name}").match(pattern) for pattern in patterns)
