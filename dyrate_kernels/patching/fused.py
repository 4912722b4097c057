"""Fused layers: RMSNorm, rotary embedding and the gate of the decoder layers, one launch each instead of about twenty, and at batch 1
matrix products that read their weights faster.

``patch(model)`` decides in each ``generate()`` whether layers are fused (``fuse=None``): where the backend has such kernels and the weights
are float16 or bfloat16. ``fuse=True`` fuses in float32, too, and warns where it cannot.

Around attention a decoder layer of ``transformers`` launches its arithmetic operation by operation. On a GPU that is a third of a decode
step at batch 1 (bench/results/README.md), so pruning cannot win it back. A module keeps its parameters, hooks and state_dict keys; only its
class is swapped, for one that does the same in fewer launches (``ops.layers``) while a generation of this handle reads or writes its
cache. Every other pass is the model's own.

What else is there is off until a device's file turns it on (``ops.layer_settings``): products with several rows, and the sum of a residual
stream with the norm that follows. For that the layer's forward leaves what a norm will be asked for (``_Ready``) or, with one row, what the
product behind that norm needs to make it itself (``_Pending``); both are known by the very tensor that is handed on.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyrate_kernels.families import TEXT_MODELS, TextModel, module_of
from dyrate_kernels.ops import layer_settings
from dyrate_kernels.ops import layers as ops
from dyrate_kernels.patching.attention import CARRIER, sliding_window
from dyrate_kernels.patching.cache import VisualCache
from dyrate_kernels.patching.lookup import decoder_layers, decoder_of
from dyrate_kernels.patching.modules import Decoder, Norm

KNOWN = {module_of(name): row for name, row in TEXT_MODELS.items() if row.fusable}  # by the module that defines them
_SWITCH = "_dyrate_switch"  # attribute of a fused module: its ``Fused``
_NEXT = "_dyrate_next"  # of a fused layer: the norm that reads what it gives, and the next layer (None behind the last one)


class _Ready(NamedTuple):
    """A norm's result, there before the norm is asked for it."""

    asked: Tensor
    version: int
    norm: Norm
    normal: Tensor


class _Pending(NamedTuple):
    """A norm was asked, and gave ``normal``, which nobody has written: a product with one row makes it from x, and writes ``total``."""

    normal: Tensor
    total: Tensor
    x: Tensor
    residual: Tensor
    norm: Norm


class _Pass(threading.local):
    """The pass under way in this thread."""

    of: Fused | None = None
    kernels: ModuleType | None = None  # the functions of ``ops.layers`` that fuse
    settings = layer_settings.LayerSettings()
    ready: _Ready | None = None
    pending: _Pending | None = None


_PASS = _Pass()


class Fused:
    """The fused modules of one patched model. Whether they fuse is a matter of the pass under way in each thread.

    Args:
        automatic: layers are fused where that is faster, and nobody is warned where they cannot be.

    Attributes:
        installed: classes were swapped.
    """

    def __init__(self, automatic: bool = False) -> None:
        self.automatic = automatic
        self.installed = False
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Fused:
        """Of a copied model."""
        twin = memo[id(self)] = type(self)(self.automatic)
        twin.installed = self.installed
        return twin

    def begin(self, model: Any, backend: str, device: torch.device) -> str | None:
        """A generation begins whose passes may be fused; automatic ones are installed now. Returns why they will not be, in words."""
        reason = why_unfused(model, backend, device, half_alone=self.automatic)
        if reason is None:
            with self._lock:
                if not self.installed:
                    self.install(decoder_of(model))
        return reason

    def install(self, decoder: Decoder) -> None:
        """Swaps the classes of a text model whose attention is swapped already."""
        self.installed = True
        on = layer_settings.settings(next(decoder.parameters()).device)
        for module, make in list(_modules(decoder, on.residual_norm or on.norm_prologue)):
            kind: type = type(module)
            vars(module)[_SWITCH] = self
            module.__class__ = _fused_class(kind, make)
        layers = list(decoder.layers)
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            if _is_fused(layer):
                vars(layer)[_NEXT] = (decoder.norm, None) if after is None else (after.input_layernorm, after)

    def remove(self, decoder: nn.Module) -> None:
        """Undoes it; before the attention modules get their own class back."""
        self.off()
        self.installed = False
        for module in decoder.modules():
            if _is_fused(module):
                module.__class__ = vars(type(module))["_dyrate_fused"]
                vars(module).pop(_SWITCH, None)
                vars(module).pop(_NEXT, None)

    def on(self, backend: str, device: torch.device) -> None:
        """The pass that begins is one of ours, on ``device``."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
            return
        _PASS.of, _PASS.kernels = self, ops.fused(backend, device)
        _PASS.settings, _PASS.ready, _PASS.pending = layer_settings.settings(device), None, None
        if _PASS.kernels is None and not self.automatic:
            self.tell(_no_kernels(backend))

    def tell(self, reason: str) -> None:
        """Warns once that nothing is fused."""
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"fuse=True has no effect: {reason}. Results are the same.", stacklevel=2)

    def off(self) -> None:
        """The pass that begins is the model's own."""
        if _PASS.of is self:
            _PASS.of = _PASS.kernels = _PASS.ready = _PASS.pending = None


def _alike(*tensors: Tensor) -> bool:
    """Of one floating dtype that the kernels compute in."""
    return tensors[0].dtype in (torch.float32, torch.float16, torch.bfloat16) and len({tensor.dtype for tensor in tensors}) == 1


def _is_fused(module: nn.Module) -> bool:
    return "_dyrate_fused" in vars(type(module))


def _kernels(module: nn.Module) -> ModuleType | None:
    """Returns the kernels to fuse with in this pass. A forward that accelerate took over while it was fused outlives the patch: None."""
    fused = vars(module).get(_SWITCH)
    return None if fused is None or _PASS.of is not fused else _PASS.kernels


def _bare(module: Any) -> bool:
    """Calling the module does nothing but run its class's forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


# ---- norms, and what joins the residual stream before them ----------------------------------------------------------------------


def _row_of(original: type[nn.Module]) -> TextModel:
    return KNOWN[getattr(original, "_dyrate_original", original).__module__]


def _kind(norm: Any) -> tuple[float, bool]:
    """(eps, multiplies by one more than its weight) of a fused norm."""
    one_plus = _row_of(type(norm)._dyrate_fused).one_plus
    return (norm.eps if one_plus else norm.variance_epsilon), one_plus


def _norm(original: type[nn.Module]) -> dict[str, Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        kernels, ready, pending = _kernels(self), _PASS.ready, _PASS.pending
        if kernels is None or type(self.weight) is not nn.Parameter or not _alike(hidden_states, self.weight):
            return original.forward(self, hidden_states)
        if ready is not None and ready.asked is hidden_states and ready.norm is self and ready.version == hidden_states._version:
            _PASS.ready = None
            return ready.normal
        if pending is not None and pending.total is hidden_states and pending.norm is self:
            return pending.normal
        return kernels.rms_norm(hidden_states, self.weight, *_kind(self))

    return {"forward": forward}


def _joins(norm: Any, x: Tensor, residual: Tensor) -> bool:
    """This norm can be part of a launch that makes ``residual + x``."""
    return (
        _kernels(norm) is not None and _bare(norm) and type(norm.weight) is nn.Parameter and _alike(x, residual, norm.weight)
        and x.shape == residual.shape
    )  # fmt: skip


def _join(residual: Tensor, x: Tensor, then: Any, before: Any = None, product: Callable[[Tensor], bool] | None = None) -> Tensor:
    """``residual + x``, or with ``before`` ``residual + before(x)``; what the norm ``then`` makes of it is prepared.

    product: whether what reads that norm is a product that can make it itself for this row.
    """
    kernels = _PASS.kernels
    if before is not None and not (_joins(before, x, residual) and _joins(then, x, residual) and _kind(before) == _kind(then)):
        x, before = before(x), None
    if torch.is_inference_mode_enabled() or not _joins(then, x, residual):  # nobody could tell whether the sum was changed meanwhile
        return residual + (x if before is None else before(x))
    if _PASS.settings.norm_prologue and before is None and x.numel() == x.shape[-1] and product is not None and product(x):
        total = torch.empty_like(residual)
        _PASS.pending = _Pending(torch.empty_like(total), total, x, residual, then)
        return total
    if not _PASS.settings.residual_norm:
        return residual + (x if before is None else before(x))
    assert kernels is not None  # as ``_joins`` says
    total, normal = kernels.residual_norm(x, residual, then.weight, *_kind(then), None if before is None else before.weight)
    _PASS.ready = _Ready(total, total._version, then, normal)
    return total


def _take(x: Tensor) -> _Pending | None:
    """Returns what is still to be done for x to be right, None: nothing; whoever takes it does it."""
    pending = _PASS.pending
    if pending is None or pending.normal is not x:
        return None
    _PASS.pending = None
    return pending


def _settled(x: Tensor) -> Tensor:
    """x, written."""
    pending = _take(x)
    if pending is None:
        return x
    total, normal = ops.residual_norm(pending.x, pending.residual, pending.norm.weight, *_kind(pending.norm))
    pending.total.copy_(total)
    return normal


def _layer(original: type[nn.Module]) -> dict[str, Any]:
    four_norms = _row_of(original).four_norms

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        settings = _PASS.settings
        if _kernels(self) is None or args or _NEXT not in vars(self) or not (settings.residual_norm or settings.norm_prologue):
            return original.forward(self, hidden_states, *args, **kwargs)
        next_norm, after = vars(self)[_NEXT]
        residual = hidden_states
        x, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)

        def gate_is_next(row: Tensor) -> bool:
            return _kernels(self.mlp) is not None and _bare(self.mlp) and _gate_fits(self.mlp, row)

        def query_is_next(row: Tensor) -> bool:
            return after is not None and _bare(self) and _bare(after) and _attention_fits(after.self_attn, row, kwargs)

        if four_norms:
            residual = _join(residual, x, self.pre_feedforward_layernorm, self.post_attention_layernorm, gate_is_next)
            x = self.mlp(self.pre_feedforward_layernorm(residual))
            return _join(residual, x, next_norm, self.post_feedforward_layernorm, query_is_next)
        residual = _join(residual, x, self.post_attention_layernorm, None, gate_is_next)
        x = self.mlp(self.post_attention_layernorm(residual))
        return _join(residual, x, next_norm, None, query_is_next)

    return {"forward": forward}


# ---- products -------------------------------------------------------------------------------------------------------------------


def _plain(x: Tensor, *linears: Any) -> bool:
    """Calling these modules does nothing but multiply their weights, which lie row by row."""
    for linear in linears:
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
            return False
        if type(linear.weight) is not nn.Parameter:  # quantised or shared out among processes
            return False
        if linear.weight.stride(1) != 1 or not _alike(x, linear.weight, *(() if linear.bias is None else (linear.bias,))):
            return False
    return True


def _fits(kind: str, x: Tensor, *linears: Any) -> bool:
    """Our product takes the place of these modules: with one row, and with as many as the device's file says."""
    size = x.shape[-1]
    rows = x.numel() // size if size else 0
    if rows != 1:
        if not (_PASS.settings.products and 1 < rows <= ops.MOST_ROWS):
            return False
        count = linears[0].out_features if kind == "gated" else sum(linear.out_features for linear in linears)
        if _PASS.settings.tile(kind, count, size, rows) is None:
            return False
    return _plain(x, *linears)


def _products(kernels: ModuleType, x: Tensor, *linears: Any) -> list[Tensor]:
    """Returns what the modules give for x."""
    pending = _take(x)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    if pending is not None:
        eps, one_plus = _kind(pending.norm)
        before = (pending.x, pending.residual, pending.norm.weight, eps)
        return kernels.norm_linears(*before, weights, biases, one_plus=one_plus, total=pending.total)[1]
    if _fits("linear", x, *linears):
        return kernels.linears(x, weights, biases)
    return [linear(x) for linear in linears]


def _gate_fits(module: Any, x: Tensor) -> bool:
    """Gate and up are one launch."""
    gate, up = module.gate_proj, module.up_proj
    return _fits("gated", x, gate, up) and gate.bias is None and up.bias is None


def _feed_forward(original: type[nn.Module]) -> dict[str, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        kernels = _kernels(self)
        if kernels is None:
            return original.forward(self, _settled(x))
        pending, activation = _take(x), _activation(self.act_fn)
        gate, up = self.gate_proj, self.up_proj
        if pending is not None:
            eps, one_plus = _kind(pending.norm)
            before = (pending.x, pending.residual, pending.norm.weight, eps)
            active = kernels.norm_gated(*before, gate.weight, up.weight, activation, one_plus=one_plus, total=pending.total)[1]
        elif _gate_fits(self, x):
            active = kernels.gated(x, gate.weight, up.weight, activation)
        else:
            gated, upped = gate(x), up(x)
            active = kernels.gate_mul(gated, upped, activation) if _alike(gated, upped) else self.act_fn(gated) * upped
        return _products(kernels, active, self.down_proj)[0]

    return {"forward": forward}


# ---- attention ------------------------------------------------------------------------------------------------------------------


def _attention_fits(module: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
    """A call of the module with these arguments multiplies x, normalised, by the weights of query, key and value at once."""
    return (
        _kernels(module) is not None and _bare(module) and isinstance(kwargs.get(CARRIER), VisualCache)
        and kwargs.get("position_embeddings") is not None and _fits("linear", x, module.q_proj, module.k_proj, module.v_proj)
    )  # fmt: skip


def _attention(original: type[nn.Module]) -> dict[str, Any]:
    row = _row_of(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels, carrier = _kernels(self), kwargs.get(CARRIER)
        embeddings = kwargs.get("position_embeddings")
        if kernels is None or args or not isinstance(carrier, VisualCache) or embeddings is None:
            if "hidden_states" in kwargs:
                kwargs["hidden_states"] = _settled(kwargs["hidden_states"])
            return original.forward(self, *args, **kwargs)
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        made = _products(kernels, hidden, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (tensor.view(shape).transpose(1, 2) for tensor in made)
        cos, sin = embeddings
        if not _attention_rotates(self, carrier, query, key, cos, sin, row):
            query, key = _rotated(self, kernels, query, key, cos, sin, row)
        key, value = carrier.update(key, value, self.layer_idx)
        output = carrier.attend(self.layer_idx, query, key, value, self.scaling, sliding_window(self))
        return _products(kernels, output.reshape(*hidden.shape[:-1], -1), self.o_proj)[0], None

    return {"forward": forward}


def _attention_rotates(module: Any, cache: VisualCache, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, row: TextModel) -> bool:
    """The attention of this layer rotates query and new key itself."""
    return (
        _PASS.settings.rotary_in_attention and query.shape[2] == 1 and not row.qk_norm and cos.dim() == 3
        and cos.shape[-1] == module.head_dim and module.head_dim % 2 == 0 and _alike(query, key, cos, sin)
        and cache.rotate(module.layer_idx, cos[:, 0], sin[:, 0])
    )  # fmt: skip


def _rotated(
    module: Any, kernels: ModuleType, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, row: TextModel
) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised where the model does that, and rotated."""
    how: dict[str, Any] = {}
    if cos.dim() == 4:  # a stream each for time, height and width, of which transformers before 5.24 chooses here
        how["sections"] = module.config.rope_parameters["mrope_section"]
    whole = cos.shape[-1] == module.head_dim and module.head_dim % 2 == 0 and _alike(query, key, cos, sin)
    if row.qk_norm:
        norms = (module.q_norm, module.k_norm)
        if whole and all(_kernels(norm) is not None and _bare(norm) and _alike(query, norm.weight) for norm in norms):
            (eps, one_plus), other = map(_kind, norms)
            if (eps, one_plus) == other:
                how |= {"query_norm": norms[0].weight, "key_norm": norms[1].weight, "eps": eps, "one_plus": one_plus}
        if "eps" not in how:
            query, key = norms[0](query), norms[1](key)
    if whole:
        return kernels.rotate(query, key, cos, sin, **how)
    own = sys.modules[type(module)._dyrate_original.__module__]
    if "sections" in how:
        return own.apply_multimodal_rotary_pos_emb(query, key, cos, sin, how["sections"])
    return own.apply_rotary_pos_emb(query, key, cos, sin)


@cache
def _fused_class(original: type[nn.Module], make: Callable[[type[nn.Module]], dict[str, Any]]) -> type[nn.Module]:
    """Of a module's present class, which may be the one that ``attention.swap`` gave it."""
    members = {"_dyrate_fused": original, "__module__": __name__, "__doc__": f"{original.__name__} in fewer launches.", **make(original)}
    return type(f"Fused{original.__name__}", (original,), members)


def _modules(decoder: nn.Module, layers: bool) -> Iterator[tuple[nn.Module, Callable[[type[nn.Module]], dict[str, Any]]]]:
    """(module, what makes its class) of everything in a text model that can be fused; ``layers``: of whole layers, too."""
    for module in decoder.modules():
        kind = getattr(type(module), "_dyrate_original", type(module))
        known = KNOWN.get(kind.__module__)
        if known is None or "forward" in vars(module):  # accelerate has put a forward of its own there
            continue
        if kind.__name__ == known.norm:
            yield module, _norm
        elif kind.__name__ == known.feed_forward and _activation(module.act_fn) is not None:
            yield module, _feed_forward
        elif kind.__name__ == known.attention:
            yield module, _attention
        elif kind.__name__ == known.layer and layers:
            yield module, _layer


def _activation(module: Any) -> str | None:
    """Its name in ``ops.layers.ACTIVATIONS``; None for any other."""
    name, function = type(module).__name__, getattr(module, "act", None)
    if module is nn.functional.silu or name in ("SiLU", "SiLUActivation"):
        return "silu"
    if name == "GELUTanh" and getattr(function, "func", None) is nn.functional.gelu:
        return "gelu_tanh"
    if name == "GELUActivation" and function is nn.functional.gelu:
        return "gelu"
    return None


def fuses(model: Any, backend: str) -> bool:
    """``patch(model, fuse=True)`` has an effect: its layers are known, and the backend has kernels for where the model is."""
    return why_unfused(model, backend, next(model.parameters()).device) is None


def why_unfused(model: Any, backend: str, device: torch.device, half_alone: bool = False) -> str | None:
    """Returns why nothing of a model's layers can be fused, in words; None: something can.

    Args:
        half_alone: only weights in float16 or bfloat16, whose own operations round as coarsely, are fused.
    """
    if ops.fused(backend, device) is None:
        return _no_kernels(backend)
    dtype = decoder_of(model).dtype
    if half_alone and dtype not in (torch.float16, torch.bfloat16):
        return f"the weights are {str(dtype).removeprefix('torch.')}, and fused layers differ from their own by rounding; fuse=True does it"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return unknown_layers(model)


def unknown_layers(model: Any) -> str | None:
    """Returns in words that no part of a model's decoder layers is known here; None: some part is."""
    decoder = decoder_of(model)
    if any(map(_is_fused, decoder.modules())) or any(True for _ in _modules(decoder, layers=False)):
        return None
    known = ", ".join(text.title for text in KNOWN.values())
    kinds = ", ".join(sorted({type(layer).__name__ for layer in decoder_layers(model)}))
    return f"the decoder layers are {kinds}; known are those of {known}"


def _no_kernels(backend: str) -> str:
    return f"the backend is {backend!r} and only 'triton' has such kernels"
