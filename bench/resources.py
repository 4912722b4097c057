"""Resources that each kernel of the native extension takes: registers, shared memory, and local memory, which means spills.

    python -m bench.resources [--arch sm_90]

Reads the built extension with ``cuobjdump``: that of the CUDA toolkit, or the one in Triton's wheel. Needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dyrate_kernels import native

_ELEMENTS = {"f": "float32", "7Float16": "float16", "8BFloat16": "bfloat16"}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. architecture: e.g. "sm_90". registers: a thread. shared, local: bytes a block, bytes a thread."""

    architecture: str
    name: str
    registers: int
    shared: int
    local: int


def find_cuobjdump() -> str | None:
    """cuobjdump on PATH, beside nvcc, in the CUDA folder that the environment names, or in Triton's wheel."""
    folders = [Path(found).resolve().parent for found in [shutil.which(os.environ.get("CUDACXX", "nvcc"))] if found]
    folders += [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump") or next((str(f / "cuobjdump") for f in folders if os.access(f / "cuobjdump", os.X_OK)), None)


def readable(symbol: str) -> str:
    """``AttentionKernel float16 D<=128 G=4 aligned`` or ``StagedKernel float16 D<=128 G<=8 bulk`` from the mangled name of its entry."""
    found = re.search(r"NS_\d+([A-Z][A-Za-z]*Kernel)(?:I(?:NS_)?(f|7Float16|8BFloat16)E?Li(\d+)ELi(\d+)ELb([01])E)?E", symbol)
    if found is None:
        return "write_architecture" if "write_architecture" in symbol else symbol
    name, element, dim, group, aligned = found.groups()
    if element is None:
        return name
    if name == "StagedKernel":
        return f"{name} {_ELEMENTS[element]} D<={dim} G<={group}{' bulk' if aligned == '1' else ''}"
    return f"{name} {_ELEMENTS[element]} D<={dim} G={group} {'aligned' if aligned == '1' else 'unaligned'}"


def kernels(extension: Path, cuobjdump: str) -> list[Kernel]:
    """Every kernel in the extension, for every architecture that it holds machine code for."""
    text = subprocess.run([cuobjdump, "--dump-resource-usage", str(extension)], capture_output=True, text=True, check=True).stdout
    found, architecture, symbol = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):$", line):
            symbol = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Kernel(architecture, readable(symbol), registers, shared, stack + local))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="architecture to list (default: %(default)s)")
    arch = parser.parse_args(arguments).arch
    cuobjdump = find_cuobjdump()
    if native.missing_reason() is not None or cuobjdump is None:
        print(native.missing_reason() or "no cuobjdump: it comes with the CUDA toolkit, and with Triton's wheel", file=sys.stderr)
        return 1
    library = native.load().__file__
    assert library is not None
    found = kernels(Path(library), cuobjdump)
    print(f"{'kernel on ' + arch:54} {'registers':>9} {'shared':>7} {'local':>6}")
    for kernel in sorted((k for k in found if k.architecture == arch), key=lambda k: k.name):
        print(f"{kernel.name:54} {kernel.registers:9} {kernel.shared:7} {kernel.local:6}")
    spilling = sorted({(k.name, k.architecture) for k in found if k.local})
    print(f"spills on any of {', '.join(sorted({k.architecture for k in found}))}:")
    print("\n".join(f"  {name}: {architecture}" for name, architecture in spilling) or "  none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
