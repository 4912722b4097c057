"""The versions of vLLM that the plug-in was written for: it stands on places that vLLM does not promise to keep."""

from __future__ import annotations

import re

OLDEST, NEWEST = (0, 32), (0, 33)  # 0.32 run on a CPU; 0.33 read


def check(version: str) -> None:
    """Refuses a vLLM that the plug-in was not written for.

    Raises:
        ImportError: names the version, the range, and what to do.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        raise ImportError(
            f"vllm: expected a version from {_text(OLDEST)} to {_text(NEWEST)}, for which dyrate_kernels' plug-in was written, got "
            f"{version}; pip install 'vllm>={_text(OLDEST)},<0.{NEWEST[1] + 1}', or leave dyrate out of additional_config"
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
