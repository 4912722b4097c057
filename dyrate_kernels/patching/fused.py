"""``patch(model, fuse=True)``: RMSNorm, rotary embedding and gated SiLU of the decoder layers, one launch each instead of about twenty,
and at batch 1 matrix products that read their weights faster.

Around attention a decoder layer of ``transformers`` launches its arithmetic operation by operation. On a GPU that is a third of a decode
step at batch 1 (bench/results/README.md), so pruning cannot win it back. A module keeps its parameters, hooks and state_dict keys; only its
class is swapped, for one that does the same in fewer launches (``ops.layers``) while a generation of this handle reads or writes its
cache. Every other pass is the model's own.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dyrate_kernels.cache import VisualCache
from dyrate_kernels.ops import layers as ops
from dyrate_kernels.patching.attention import CARRIER, sliding_window
from dyrate_kernels.patching.families import decoder_layers

# text models whose layers are known to compute what ``ops.layers`` does, by the module that defines them: the names in it of
# normalisation, feed-forward block, attention
KNOWN = {
    f"transformers.models.{name}.modeling_{name}": (f"{title}RMSNorm", f"{title}MLP", f"{title}Attention")
    for name, title in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
}
_SWITCH = "_dyrate_switch"  # attribute of a fused module: its ``Fused``
_PASS = threading.local()  # .of: the ``Fused`` of the pass under way in this thread, .kernels: the functions of ``ops.layers`` that fuse


class Fused:
    """The fused modules of one patched model. Whether they fuse is a matter of the pass under way in each thread."""

    def __init__(self) -> None:
        self._told = False

    def install(self, decoder: nn.Module) -> None:
        """Swaps the classes of a text model whose attention is swapped already."""
        for module, make in list(_modules(decoder)):
            vars(module)[_SWITCH] = self
            module.__class__ = _fused_class(type(module), make)

    def remove(self, decoder: nn.Module) -> None:
        """Undoes it; before the attention modules get their own class back."""
        self.off()
        for module in decoder.modules():
            if "_dyrate_fused" in vars(type(module)):
                module.__class__ = type(module)._dyrate_fused
                vars(module).pop(_SWITCH, None)

    def on(self, backend: str, device: torch.device) -> None:
        """The pass that begins is one of ours, on ``device``."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
            return
        _PASS.of, _PASS.kernels = self, ops.fused(backend, device)
        if _PASS.kernels is None and not self._told:
            self._told = True
            warnings.warn(
                f"fuse=True has no effect: the backend is {backend!r} and only 'triton' has such kernels. Results are the same.",
                stacklevel=2,
            )

    def off(self) -> None:
        """The pass that begins is the model's own."""
        if getattr(_PASS, "of", None) is self:
            _PASS.of = _PASS.kernels = None


def _alike(*tensors: Tensor) -> bool:
    """Of one floating dtype that the kernels compute in."""
    return tensors[0].dtype in (torch.float32, torch.float16, torch.bfloat16) and len({tensor.dtype for tensor in tensors}) == 1


def _kernels(module: nn.Module) -> ModuleType | None:
    """What to fuse with in this pass. A forward that accelerate took over while the module was fused outlives the patch: then None."""
    fused = vars(module).get(_SWITCH)
    return None if fused is None or getattr(_PASS, "of", None) is not fused else _PASS.kernels


def _norm(original: type[nn.Module]) -> dict[str, Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        kernels = _kernels(self)
        if kernels is None or type(self.weight) is not nn.Parameter or not _alike(hidden_states, self.weight):
            return original.forward(self, hidden_states)
        return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return {"forward": forward}


def _one_row(x: Tensor, *linears: Any) -> bool:
    """x is a single row, and calling these modules does nothing but multiply their weights, which lie row by row."""
    if x.numel() != x.shape[-1]:
        return False
    for linear in linears:
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
            return False
        if type(linear.weight) is not nn.Parameter:  # quantised or shared out among processes
            return False
        if linear.weight.stride(1) != 1 or not _alike(x, linear.weight, *(() if linear.bias is None else (linear.bias,))):
            return False
    return True


def _products(kernels: ModuleType, x: Tensor, *linears: Any) -> list[Tensor]:
    """What the modules give for x."""
    if _one_row(x, *linears):
        return kernels.linears(x, [linear.weight for linear in linears], [linear.bias for linear in linears])
    return [linear(x) for linear in linears]


def _feed_forward(original: type[nn.Module]) -> dict[str, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        kernels = _kernels(self)
        if kernels is None:
            return original.forward(self, x)
        if _one_row(x, self.gate_proj, self.up_proj) and self.gate_proj.bias is None and self.up_proj.bias is None:
            active = kernels.gated(x, self.gate_proj.weight, self.up_proj.weight)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
            active = kernels.gate_mul(gate, up) if _alike(gate, up) else self.act_fn(gate) * up
        return _products(kernels, active, self.down_proj)[0]

    return {"forward": forward}


def _attention(original: type[nn.Module]) -> dict[str, Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels, carrier = _kernels(self), kwargs.get(CARRIER)
        embeddings = kwargs.get("position_embeddings")
        if kernels is None or args or not isinstance(carrier, VisualCache) or embeddings is None:
            return original.forward(self, *args, **kwargs)
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        made = _products(kernels, hidden, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (tensor.view(shape).transpose(1, 2) for tensor in made)
        cos, sin = embeddings
        whole = cos.shape[-1] == self.head_dim and self.head_dim % 2 == 0 and cos.dim() == 3
        rotate = kernels.rotate if whole and _alike(query, key, cos, sin) else _own_rotary(type(self)._dyrate_original)
        query, key = rotate(query, key, cos, sin)
        key, value = carrier.update(key, value, self.layer_idx)
        output = carrier.attend(self.layer_idx, query, key, value, self.scaling, sliding_window(self))
        return _products(kernels, output.reshape(*hidden.shape[:-1], -1), self.o_proj)[0], None

    return {"forward": forward}


def _own_rotary(original: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]]:
    return sys.modules[original.__module__].apply_rotary_pos_emb


@cache
def _fused_class(original: type[nn.Module], make: Callable[[type[nn.Module]], dict[str, Any]]) -> type[nn.Module]:
    """Of a module's present class, which may be the one that ``attention.swap`` gave it."""
    members = {"_dyrate_fused": original, "__module__": __name__, "__doc__": f"{original.__name__} in fewer launches.", **make(original)}
    return type(f"Fused{original.__name__}", (original,), members)


def _modules(decoder: nn.Module) -> Iterator[tuple[nn.Module, Callable[[type[nn.Module]], dict[str, Any]]]]:
    """(module, what makes its class) of everything in a text model that can be fused."""
    for module in decoder.modules():
        kind = getattr(type(module), "_dyrate_original", type(module))
        names = KNOWN.get(kind.__module__)
        if names is None or "forward" in vars(module):  # accelerate has put a forward of its own there
            continue
        norm, feed_forward, attention = names
        if kind.__name__ == norm:
            yield module, _norm
        elif kind.__name__ == feed_forward and _is_silu(module.act_fn):
            yield module, _feed_forward
        elif kind.__name__ == attention:
            yield module, _attention


def _is_silu(activation: Any) -> bool:
    return activation is nn.functional.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")


def fuses(model: Any, backend: str) -> bool:
    """``patch(model, fuse=True)`` has an effect: its layers are known, and the backend has kernels for where the model is."""
    try:
        check_fusable(model)
    except TypeError:
        return False
    return ops.fused(backend, next(model.parameters()).device) is not None


def check_fusable(model: Any) -> None:
    """Raises TypeError where ``fuse=True`` does not know the model's decoder layers."""
    kinds = {type(layer.self_attn) for layer in decoder_layers(model)}
    unknown = sorted(kind.__name__ for kind in kinds if kind.__name__ not in KNOWN.get(kind.__module__, ()))
    if unknown:
        known = ", ".join(names[2] for names in KNOWN.values())
        raise TypeError(f"fuse=True knows decoder layers with {known}; this model's have {', '.join(unknown)}: leave fuse out")
