"""The tower's statistics with ``backend="triton"`` are the reference backend's."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels.patching.tower import attention_received
from tests import models


@pytest.mark.parametrize(("tokens", "crops"), [(2, 1), (26, 3), (145, 2)])
@torch.no_grad()
def test_attention_received_from_cls(tokens, crops):
    tower = models.build("llava").model.vision_tower
    module = (tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder).layers[1].self_attn
    hidden = torch.randn(crops, tokens, 32, generator=torch.Generator().manual_seed(tokens))
    got, want = (attention_received(module, hidden, True, backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(got, want)
