"""``ModelShape``: what a policy is told of a model, read from its configuration."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels.policies.base import ModelShape


def test_shape_from_a_config_that_is_no_decoder():
    from transformers import CLIPVisionConfig

    with pytest.raises(ValueError, match="config must describe a text model with an integer"):
        ModelShape.from_config(CLIPVisionConfig())
    with pytest.raises(ValueError, match="config must describe a text model"):
        ModelShape.from_config(object())


def test_shape_reads_dtype():
    from transformers import LlamaConfig

    assert ModelShape.from_config(LlamaConfig()).dtype == torch.float32
    assert ModelShape.from_config(LlamaConfig(dtype="bfloat16")).dtype == torch.bfloat16
    assert ModelShape.from_config(LlamaConfig(dtype=torch.float16)).dtype == torch.float16
    assert ModelShape.from_config(LlamaConfig(dtype="bfloat16"), dtype=torch.float16).dtype == torch.float16
