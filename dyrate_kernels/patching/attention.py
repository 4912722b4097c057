"""Swapping the text attention modules: a subclass of each module's own class, whose ``config`` names our attention function.

The module keeps its parameters, hooks and state_dict keys; the shared config object is not touched, so two models that share a config
do not flip together, and ``print(model)`` shows the swap (design.md, section 5).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyrate_kernels.patching.modules import Attention, Swapped

IMPLEMENTATION = "dyrate"  # name of the attention function in transformers' registry
CARRIER = "dyrate"  # keyword by which a carrier reaches the attention function


class Carrier(Protocol):
    """The object that answers in place of a patched module's attention: ``VisualCache`` in a generation, ``MaskedPass`` in training."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query ``[B, Hq, q, D]``, key and value as the module made them (or as ``update`` of a cache gave them back) -> ``[B, q, Hq, D]``.
        Under autocast they may be of several dtypes (``generation.attend.as_autocast``).
        """
        ...

    def see(self, layer: int, hidden: Tensor) -> None:
        """``[B, q, d]``, the normalised hidden states that go into the layer's attention; before ``attend``, of layers that show them."""
        ...


class ConfigView:
    """A config as the attention module sees it: all of the original, but for the attention implementation."""

    def __init__(self, config: Any) -> None:
        self.__dict__["original"] = config

    _attn_implementation = IMPLEMENTATION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle probe these before the view has its config
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["original"], name, value)


def _get_config(module: nn.Module) -> ConfigView:
    return ConfigView(module.__dict__["config"])


def _set_config(module: nn.Module, config: Any) -> None:
    module.__dict__["config"] = config.__dict__["original"] if isinstance(config, ConfigView) else config


UNPATCH_FIRST = (
    "a patched model cannot be pickled: call dyrate_kernels.unpatch(model) first, or save its weights alone (save_pretrained() and "
    "state_dict() work on a patched model too)"
)


def _refuse_pickling(self: Any, protocol: Any) -> Any:
    raise TypeError(UNPATCH_FIRST)


def _deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    twin = memo[id(module)] = type(module).__new__(type(module))
    twin.__setstate__(copy.deepcopy(module.__dict__, memo))
    return twin


def _copy(module: nn.Module) -> nn.Module:
    twin = type(module).__new__(type(module))
    twin.__setstate__(dict(module.__dict__))
    return twin


@cache
def _swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    members = {
        "config": property(_get_config, _set_config),
        "_dyrate_original": original,
        "__reduce_ex__": _refuse_pickling,  # before pickle says that it cannot find this class
        "__deepcopy__": _deep_copy,
        "__copy__": _copy,
        "__module__": __name__,
        "__doc__": f"{original.__name__}, patched by dyrate_kernels.",
    }
    return type(f"DyRate{original.__name__}", (original,), members)


def sliding_window(module: nn.Module) -> int | None:
    """The sliding window as the module's own forward names it: Mistral's is the config's, Qwen2's its own, Llama has none."""
    if getattr(type(module), "_dyrate_original", type(module)).__name__ == "MistralAttention":
        return getattr(module.config, "sliding_window", None)
    return getattr(module, "sliding_window", None)


def is_swapped(module: nn.Module) -> bool:
    """True for a module that ``swap`` has changed."""
    return "_dyrate_original" in vars(type(module))


def swap(module: nn.Module, shows_hidden: bool = False) -> None:
    """Gives an attention module its patched class. The module is changed in place.

    Args:
        shows_hidden: the carrier sees what goes into it. By a hook, which runs even where accelerate has put a ``forward`` on the instance.
    """
    register()
    kind: type = type(module)
    module.__class__ = _swapped_class(kind)
    if shows_hidden:
        module.register_forward_pre_hook(_show_hidden, with_kwargs=True)


def restore(module: nn.Module) -> None:
    """Undoes ``swap``."""
    if is_swapped(module):
        module.__class__ = vars(type(module))["_dyrate_original"]
        for key, hook in list(module._forward_pre_hooks.items()):  # a deep copy of the model has a hook of its own here
            if hook is _show_hidden:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _show_hidden(module: Attention, args: tuple, kwargs: dict) -> None:
    carrier: Carrier | None = kwargs.get(CARRIER)
    if carrier is not None:
        carrier.see(module.layer_idx, args[0] if args else kwargs["hidden_states"])


@cache
def register() -> None:
    """Makes our attention function known to transformers. Names nothing that another model uses."""
    AttentionInterface.register(IMPLEMENTATION, attention_function)


def attention_function(
    module: Swapped,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query ``[B, Hq, q, D]`` -> (``[B, q, Hq, D]``, weights or None).

    With a carrier in the call that answers; otherwise it does what the unpatched module would have done.
    """
    carrier: Carrier | None = kwargs.pop(CARRIER, None)
    if carrier is None:
        original = _original_function(module)
        return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return carrier.attend(module.layer_idx, query, key, value, scale, kwargs.get("sliding_window")), None


def _original_function(module: Swapped) -> Callable:
    eager = sys.modules[type(module)._dyrate_original.__module__].eager_attention_forward
    name = module.__dict__["config"]._attn_implementation
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
