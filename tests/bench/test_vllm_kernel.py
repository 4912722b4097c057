"""vLLM's kernel as the benchmarks load it from a folder: two stand-in files, of the form of vLLM's."""

from __future__ import annotations

import sys

import pytest

from bench import vllm_kernel

HELPERS = "from vllm.triton_utils import tl, triton\n\ndef double(x):\n    return 2 * x\n"
KERNEL = """
import torch
import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.v1.attention.ops.triton_attention_helpers import double
from vllm.v1.kv_cache_interface import KVQuantMode

logger = init_logger(__name__)
is_batch_invariant = envs.VLLM_BATCH_INVARIANT
float8_info = torch.finfo(current_platform.fp8_dtype())

def unified_attention(q, kv_quant_mode=KVQuantMode.NONE):
    assert not is_batch_invariant and not current_platform.is_device_capability_family(100)
    return double(q), kv_quant_mode
"""


def test_the_kernel_comes_from_a_folder_and_leaves_nothing_of_vllm_behind(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(vllm_kernel.FOLDER, str(tmp_path))
    assert vllm_kernel.why_not() == f"{vllm_kernel.FOLDER}={tmp_path} holds no triton_attention_helpers.py"
    with pytest.raises(ImportError, match="holds no"):
        vllm_kernel.load()
    for name, text in zip(vllm_kernel.FILES, (HELPERS, KERNEL), strict=True):
        (tmp_path / f"{name}.py").write_text(text)
    before = {name for name in sys.modules if name.startswith("vllm")}
    assert vllm_kernel.load()(3) == (6, 0)
    assert {name for name in sys.modules if name.startswith("vllm")} == before
