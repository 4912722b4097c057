"""Tensor parallelism: each process attends with a share of the heads, and all of them keep the same visual tokens.

transformers shards the projections (``DistributedConfig(tp_size=..)``), so a patched module, its cache and the kernels see its own heads.
What decides, mass and importance, is of all heads: it is gathered from all processes at each layer that decides, in one collective, and
summed in the same order everywhere. So every process decides on the same numbers, bit for bit, and no decision needs to be sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dyrate_kernels.patching.families import decoder_layers


@dataclass(frozen=True)
class HeadShards:
    """The processes that share a model's heads, in the order of their heads.

    Attributes:
        group: their process group.
        size: how many they are.
    """

    group: Any
    size: int

    def statistics(self, mass: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of all heads: mass ``[.., Hq / size, 4]`` -> ``[.., Hq, 4]``; importance ``[.., N]``, the mean over these heads -> over all."""
        parts = self._gather(mass if importance is None else torch.cat([mass.flatten(), importance.flatten().to(mass.dtype)]))
        masses = torch.cat([part[: mass.numel()].view_as(mass) for part in parts], dim=-2)
        if importance is None:
            return masses, None
        return masses, self._mean([part[mass.numel() :].view_as(importance) for part in parts]).to(importance.dtype)

    def mean(self, importance: Tensor) -> Tensor:
        """The mean over this process's heads -> over all."""
        return self._mean([part.view_as(importance) for part in self._gather(importance)])

    def root_mean_square(self, importance: Tensor) -> Tensor:
        """Likewise of a root of a mean of squares."""
        return self.mean(importance.square()).sqrt()

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """``tensor``, flat, of every process, in their order."""
        flat = tensor.contiguous().view(-1)
        out = flat.new_empty(self.size * flat.numel())
        dist.all_gather_into_tensor(out, flat, group=self.group)
        return list(out.view(self.size, -1))

    def _mean(self, parts: list[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / self.size


def head_shards(model: Any) -> HeadShards | None:
    """How a model that was loaded with tensor parallelism shares its heads; None: it was not, or over one process, or transformers has no
    plan for its text model (Qwen3-VL), so that each process holds all heads.

    Raises:
        ValueError: its key/value heads cannot be shared out evenly, or its layers lie in several processes.
    """
    size = getattr(model, "tp_size", None) or 1
    mesh = getattr(model, "_device_mesh", None)
    if size == 1 or mesh is None or _holds_all_heads(model):
        return None
    names = mesh.mesh_dim_names or ()
    if "pp" in names and mesh["pp"].size() > 1:
        raise ValueError(f"pipeline parallelism (pp_size={mesh['pp'].size()}) is not supported; load the model with tp_size alone")
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % size:
        raise ValueError(f"tp_size={size} must divide the {heads} key/value heads of this model; load it over fewer processes")
    return HeadShards((mesh["tp"] if "tp" in names else mesh).get_group(), size)


def _holds_all_heads(model: Any) -> bool:
    weight = getattr(getattr(decoder_layers(model)[0].self_attn, "q_proj", None), "weight", None)
    if weight is None:
        return False
    config = model.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    here = weight.to_local() if hasattr(weight, "to_local") else weight
    return here.shape[0] == config.num_attention_heads * dim
