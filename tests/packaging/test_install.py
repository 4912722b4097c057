"""The package as it is installed here: names, data, mapping of triton_kernels, the native extension."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dyrate_kernels
from dyrate_kernels import native

NO_CUDA = {"cuda": False, "reason": "because", "nvcc": None, "architectures": []}


def run(code: str, tmp_path: Path) -> str:
    """Run code in a fresh interpreter, in a folder that is not the checkout (whose folders would be importable)."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def fresh_native() -> None:
    native.build_info.cache_clear()
    native._import.cache_clear()


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_native: None) -> Path:
    """A build record that a test may write; nothing of it is remembered afterwards."""
    path = tmp_path / "_build_info.json"
    monkeypatch.setattr(native, "_BUILD_INFO", path)
    yield path
    native.build_info.cache_clear()
    native._import.cache_clear()


def test_metadata() -> None:
    found = importlib.metadata.metadata("dyrate-kernels")
    assert found["Version"] == dyrate_kernels.__version__
    requires = importlib.metadata.requires("dyrate-kernels") or []
    hard = [line for line in requires if "extra ==" not in line]
    assert not [line for line in hard if line.startswith(("triton", "torchvision"))]
    extras = {"test", "bench", "train", "eval", "demo", "caption", "quantize", "docs", "vllm", "lmms-eval"}
    assert set(found.get_all("Provides-Extra")) == extras
    scripts = importlib.metadata.entry_points(group="console_scripts", name="dyrate")
    assert [script.value for script in scripts] == ["dyrate_kernels.cli.main:main"]


def test_import_is_light(tmp_path: Path) -> None:
    """Neither torch nor transformers, Triton, NumPy or the extension are imported before they are needed."""
    heavy = "{'torch', 'transformers', 'triton', 'numpy', 'dyrate_kernels._native'}"
    assert run(f"import sys, dyrate_kernels; print({heavy} & set(sys.modules))", tmp_path) == "set()"
    assert run(f"import sys, dyrate_kernels.native; print({heavy} & set(sys.modules))", tmp_path) == "set()"


@pytest.mark.parametrize(
    ("code", "unasked"),
    [
        ("", "torch transformers torchao bitsandbytes peft accelerate ray gradio datasets matplotlib"),
        # transformers itself imports torchao and accelerate
        (
            "[getattr(dyrate_kernels, name) for name in dyrate_kernels.__all__]; dyrate_kernels.patch(dyrate_kernels.load_demo()[0])",
            "bitsandbytes ray gradio datasets matplotlib",
        ),
        ("import dyrate_kernels.cli.main", "torch transformers ray gradio datasets matplotlib"),
        ("from dyrate_kernels import quiet; quiet.import_transformers('trainer')", "ray gradio matplotlib"),  # as `dyrate train`
    ],
)
def test_nothing_unasked_is_imported_or_printed(tmp_path: Path, code: str, unasked: str) -> None:
    """As in an environment with every package of the extras: each of them has something to say when it is imported."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    whole = f"import sys, dyrate_kernels; {code}\nprint(sorted(set({unasked.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", whole], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_only_errors_of_other_packages_pass_while_transformers_is_imported(caplog: pytest.LogCaptureFixture) -> None:
    from dyrate_kernels import quiet

    logger = logging.getLogger("torchao")
    with quiet._errors_alone():
        logger.warning("a library of another Python")
        logger.error("broken")
    logger.warning("afterwards")
    assert [record.message for record in caplog.records] == ["broken", "afterwards"]


@pytest.mark.parametrize("name", dyrate_kernels.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(dyrate_kernels, name) is not None
    assert name in dir(dyrate_kernels)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dyrate_kernels.nothing  # noqa: B018


def test_triton_kernels_is_ours_and_only_below_our_name(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, dyrate_kernels.triton_kernels as t, json;"
        "top = u.find_spec('triton_kernels');"
        "print(json.dumps([t.__name__, t.unavailable_reason(), top and top.origin, t.__file__]))"
    )
    name, reason, top, ours = json.loads(run(code, tmp_path))
    assert name == "dyrate_kernels.triton_kernels"
    needs = {"triton is not installed": importlib.util.find_spec("triton") is None, "no CUDA device": not torch.cuda.is_available()}
    for text, expected in needs.items():
        assert (text in (reason or "")) == expected
    assert top is None or top != ours
    # Not in this process: the checkout is on its path, and egg-info there lists sources, not what is installed.
    listing = "import importlib.metadata as m; print([str(f) for f in m.files('dyrate-kernels') or [] if f.parts[0] == 'triton_kernels'])"
    assert run(listing, tmp_path) == "[]"


def test_the_folder_is_not_taken_for_the_package_of_that_name() -> None:
    """With the checkout's root on sys.path, as here, the folder must not pass for the well-known package."""
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "ImportError" in done.stderr and "dyrate_kernels.triton_kernels" in done.stderr


def test_data_files_are_installed() -> None:
    folder = Path(dyrate_kernels.__file__).parent
    assert (folder / "py.typed").exists()
    assert (folder / "bundled" / "model" / "config.json").exists()
    assert list((folder / "bundled" / "model").glob("*.safetensors"))


# The native extension.


def test_extension_is_there_or_says_why_not() -> None:
    info, reason = native.build_info(), native.missing_reason()
    if reason is None:
        assert info.cuda and info.nvcc and info.architectures and info.reason is None
        assert native.load().__name__ == "dyrate_kernels._native"
    else:
        assert reason == info.reason or "does not import" in reason
        with pytest.raises(RuntimeError, match="native extension is missing"):
            native.load()
    assert (reason is None) == (native.probe() is not None)
    if not torch.cuda.is_available():
        assert dyrate_kernels.backends()["cuda"].startswith("unavailable: ")


PROBE = native.Probe("13.0", "13.0", ("75-real", "90-real", "120"), (native.Device(0, "ACME", (9, 0), 1 << 30, 4),), None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"driver_version": "13.2"}, None),
        ({"driver_version": "12.8", "error": "insufficient"}, "too old.*12.8.*13.0.*update the driver"),
        ({"driver_version": None, "error": "no CUDA driver is installed"}, "no CUDA driver"),
        ({"error": "the CUDA driver sees no device", "devices": ()}, "sees no device"),
        ({"architectures": ("75-real", "80-real")}, "no code for ACME .sm_90.*DYRATE_CUDA_ARCHS=90"),
        ({"architectures": ("80",)}, None),  # its PTX
        ({"architectures": ("100-real", "120")}, "no code"),
    ],
)
def test_why_the_extension_cannot_run_a_kernel(change: dict, expected: str | None) -> None:
    reason = native.unusable_reason(dataclasses.replace(PROBE, **change))
    assert reason is None if expected is None else re.search(expected, reason or "")


@pytest.mark.parametrize(
    ("architectures", "capability", "code"),
    [
        (("75-real", "80-real", "86-real", "90"), (8, 6), 86),
        (("75-real", "80-real", "86-real", "90"), (8, 9), 86),
        (("75-real", "80-real", "86-real", "90"), (8, 0), 80),
        (("75-real", "90"), (12, 0), 90),  # PTX of what came before
        (("75",), (9, 0), 75),
        (("75", "80-virtual"), (8, 0), 80),
        (("80", "90-virtual"), (8, 0), 80),
        (("120-real",), (9, 0), 0),
    ],
)
def test_which_code_runs_on_a_device(architectures: tuple[str, ...], capability: tuple[int, int], code: int) -> None:
    assert native.code_for(architectures, capability) == code


def test_probe_reports_the_machine() -> None:
    seen = native.probe()
    if seen is None:
        pytest.skip(f"no extension: {native.missing_reason()}")
    assert seen.architectures == native.build_info().architectures
    assert seen.runtime_version == native.build_info().nvcc
    assert (seen.error is None) == bool(seen.devices)
    if seen.driver_version is None:
        assert seen.error == "no CUDA driver is installed"
    for device in seen.devices:
        assert device.memory > 0 and device.multiprocessors > 0 and device.name
    json.dumps(seen.to_dict())


def test_launch_without_a_driver_is_a_clear_error() -> None:
    seen = native.probe()
    if seen is None:
        pytest.skip(f"no extension: {native.missing_reason()}")
    with pytest.raises(ValueError, match="out must be the address"):
        native.load().write_architecture(0, 0)
    if seen.driver_version is not None:
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match="no CUDA driver is installed"):
        native.load().write_architecture(8, 0)


@pytest.mark.gpu
def test_the_build_has_code_for_this_device() -> None:
    import torch

    if native.missing_reason() is not None or not torch.cuda.is_available():
        pytest.skip("needs the extension and a CUDA device")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    native.load().write_architecture(out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    major, minor = torch.cuda.get_device_capability()
    assert 0 < out.item() <= 100 * major + 10 * minor


def test_a_build_without_cuda_says_why(recorded: Path) -> None:
    recorded.write_text(json.dumps(NO_CUDA))
    assert native.missing_reason() == "because"
    assert native.probe() is None
    assert native.unusable_reason(native.probe()) == "because"
    with pytest.raises(RuntimeError, match="because"):
        native.load()


def test_the_backends_say_how_to_build_what_was_not_compiled(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through `dyrate info` and `backends()` the build record reaches the user whole."""
    from dyrate_kernels.cli.main import main
    from dyrate_kernels.ops import dispatch

    recorded.write_text(json.dumps({**NO_CUDA, "reason": "nothing was compiled: install with DYRATE_CUDA_ARCHS=all"}))
    dispatch._load.cache_clear()
    try:
        assert dyrate_kernels.backends()["cuda"] == "unavailable: nothing was compiled: install with DYRATE_CUDA_ARCHS=all"
        assert main(["info"]) == 0
        assert capsys.readouterr().out.count("DYRATE_CUDA_ARCHS=all") == 2  # backends, native
    finally:
        dispatch._load.cache_clear()


def test_a_tree_that_was_not_installed_says_so(recorded: Path) -> None:
    assert "not installed" in (native.missing_reason() or "")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cuda": true, "architectures": 3}'])
def test_an_unreadable_record_says_so(recorded: Path, text: str) -> None:
    recorded.write_text(text)
    assert "unreadable" in (native.missing_reason() or "")


def test_an_extension_that_does_not_import_says_why(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.write_text(json.dumps({**NO_CUDA, "cuda": True, "reason": None}))
    monkeypatch.setitem(sys.modules, "dyrate_kernels._native", None)
    assert "does not import" in (native.missing_reason() or "")
    assert native.probe() is None
