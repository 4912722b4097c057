"""Resources of the compiled kernels (``bench/resources.py``): no spills where speed counts, and blocks that fit."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import resources
from dyrate_kernels import native

CSRC = Path(__file__).parents[2] / "csrc"

NAMES = {
    "15AttentionKernelINS_8BFloat16ELi256ELi8ELb0EEENS_13AttentionCallE": "AttentionKernel bfloat16 D<=256 G=8 unaligned",
    "15AttentionKernelIfLi64ELi1ELb1EEENS_13AttentionCallE": "AttentionKernel float32 D<=64 G=1 aligned",
    "12SelectKernelENS_10SelectCallE": "SelectKernel",
    "12StagedKernelINS_7Float16ELi128ELi8ELb1EEENS_13AttentionCallE": "StagedKernel float16 D<=128 G<=8 bulk",
    "12StagedKernelINS_8BFloat16ELi64ELi16ELb0EEENS_13AttentionCallE": "StagedKernel bfloat16 D<=64 G<=16",
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[resources.Kernel]:
    """Those of the extension; where it was not built and nvcc is here, of its sources, compiled for one architecture."""
    cuobjdump = resources.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    if native.missing_reason() is None:
        return resources.kernels(Path(native.load().__file__), cuobjdump)
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        pytest.skip(f"no nvcc, and no extension: {native.missing_reason()}")
    folder = tmp_path_factory.mktemp("objects")

    def made(source: Path) -> list[resources.Kernel]:
        target = folder / f"{source.stem}.o"
        how = ["-std=c++17", "--generate-code=arch=compute_90,code=sm_90", f"-I{CSRC}"]
        done = subprocess.run([nvcc, "-c", *how, str(source), "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return resources.kernels(target, cuobjdump)

    with ThreadPoolExecutor(2) as pool:
        return [kernel for found in pool.map(made, sorted(CSRC.glob("*.cu"))) for kernel in found]


def test_every_kernel_is_there(kernels: list[resources.Kernel]) -> None:
    names = {kernel.name for kernel in kernels}
    types = ("float16", "bfloat16", "float32")
    wanted = {f"AttentionKernel {element} D<={dim} G={group} aligned" for element in types for dim in (64, 128) for group in (1, 4, 8)}
    wanted |= {f"AttentionKernel {element} D<=256 G=8 {how}" for element in types for how in ("aligned", "unaligned")}
    for half in types[:2]:
        wanted |= {f"StagedKernel {half} D<={dim} G<={unit}" for dim in (64, 128) for unit in (1, 8, 16)}
        wanted |= {f"StagedKernel {half} D<={dim} G<={unit} bulk" for dim in (64, 128) for unit in (1, 8)}
    wanted |= {"DecideKernel", "SelectKernel", "PredictKernel", "CompactKernel", "ReorderKernel", "write_architecture"}
    assert names == wanted
    built = {f"sm_{text.removesuffix('-real')}" for text in native.build_info().architectures or ("90-real",)}
    assert {kernel.architecture for kernel in kernels} == built
    assert len(kernels) == len(wanted) * len(built)


def test_no_spills_in_the_main_configurations(kernels: list[resources.Kernel]) -> None:
    """Heads of up to 128 elements whose rows start at multiples of 16 bytes, and everything that follows the attention."""
    main = [kernel for kernel in kernels if "unaligned" not in kernel.name and "D<=256" not in kernel.name]
    spilling = [(kernel.name, kernel.architecture, kernel.local) for kernel in main if kernel.local]
    assert main and not spilling


HELD = {"G<=1": (4, 512), "G<=8": (3, 1536), "G<=16": (2, 1536), "G=1": (3, None), "G=4": (3, None), "G=8": (2, None)}


@pytest.mark.parametrize("heads", HELD)
def test_registers_leave_room_for_as_many_blocks_as_the_plan_counts_on(kernels: list[resources.Kernel], heads: str) -> None:
    """``staged_blocks``, ``staged_rest`` and ``resident_blocks`` of csrc/calls.h. A warp takes registers by 256, from a fourth of all."""
    blocks, rest = HELD[heads]
    those = [kernel for kernel in kernels if heads in kernel.name.split()]
    for kernel in those:
        warp = -(-kernel.registers * 32 // 256) * 256
        assert 16384 // warp >= blocks, kernel
        assert rest is None or kernel.shared <= rest + 1024, kernel  # cuobjdump counts what the system takes of it
    assert those


def test_shared_memory_fits_without_being_asked_for(kernels: list[resources.Kernel]) -> None:
    assert max(kernel.shared for kernel in kernels) <= 48 * 1024


@pytest.mark.parametrize("symbol", NAMES)
def test_readable_names(symbol: str) -> None:
    assert resources.readable(f"_ZN6dyrate5entryINS_{symbol}EEvT0_") == NAMES[symbol]
