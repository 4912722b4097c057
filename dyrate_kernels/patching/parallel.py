"""Tensor parallelism: how a model that transformers has shared out among processes shares its heads.

transformers shards the projections (``DistributedConfig(tp_size=..)``), so a patched module, its rows and the kernels see its own heads;
``generation.heads`` puts statistics together.
"""

from __future__ import annotations

from typing import Any

from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.patching.lookup import decoder_layers


def head_shards(model: Any) -> HeadShards | None:
    """Returns how a model that was loaded with tensor parallelism shares its heads; None: it was not, or over one process, or transformers
    has no plan for its text model (Qwen3-VL), so that each process holds all heads.

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
