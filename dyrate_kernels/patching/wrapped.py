"""Finding the model inside of what wraps it: ``torch.compile``, PEFT, and whatever passes attributes on to a model of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

_PEFT = ("PeftModel", "PeftMixedModel")


def unwrapped(model: Any) -> Any:
    """The model that ``generate`` of ``model`` comes to: itself, or the one inside of ``torch.compile``'s or PEFT's wrapper.

    Raises:
        TypeError: another wrapper, which is no model itself: names the object to patch instead; or an adapter of PEFT that changes the
            prompt or replaces attention modules.
    """
    path = "model"
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        if _is_peft(model):
            inner = "get_base_model()" if hasattr(model, "get_base_model") else "base_model.model"  # the second: PeftMixedModel
            _check_adapters(model, f"{path}.{inner}")
            peft: Any = model
            model = peft.get_base_model() if hasattr(peft, "get_base_model") else peft.base_model.model
            path = f"{path}.{inner}"
        elif "_orig_mod" in model._modules:
            model, path = model._orig_mod, f"{path}._orig_mod"
        else:
            inside = _generating(model)
            if inside is None:
                break
            raise TypeError(
                f"model is a {type(model).__name__}, which wraps a model: patch that one, {path}.{inside}, and go on using the wrapper if "
                "its generate() calls it"
            )
    if not issubclass(type(model), PreTrainedModel):
        inside = _held(model)
        if inside is not None:
            raise TypeError(f"model is a {type(model).__name__}, which wraps a model: patch that one, {path}{inside}")
    return model


def _is_peft(model: nn.Module) -> bool:
    """A ``PeftModel`` or ``PeftMixedModel``; PEFT need not be installed."""
    return any(kind.__module__.partition(".")[0] == "peft" and kind.__name__ in _PEFT for kind in type(model).__mro__)


def _check_adapters(model: nn.Module, path: str) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise TypeError(
                f"the PEFT adapter {name!r} ({kind}) adds virtual tokens or attention of its own, whose place in the prompt the patch "
                f"cannot know; adapters that change weights work (LoRA, DoRA, IA3). Patch {path} to go without this one"
            )


def _held(wrapper: Any, depth: int = 2) -> str | None:
    """Path of a transformers model among the attributes of ``wrapper``, in lists, tuples and dicts too; None: none was found."""
    named = _own(wrapper)
    for name, value in named.items():
        found = {f".{name}": value}
        if isinstance(value, list | tuple):
            found = {f".{name}[{index}]": each for index, each in enumerate(value)}
        elif isinstance(value, dict):
            found = {f".{name}[{key!r}]": each for key, each in value.items()}
        for path, each in found.items():
            if issubclass(type(each), PreTrainedModel):
                return path
            deeper = _held(each, depth - 1) if depth > 1 and not isinstance(each, type) else None
            if deeper is not None:
                return path + deeper
    return None


def _own(thing: Any) -> dict[str, Any]:
    """The attributes that ``thing`` holds itself, not those that it passes on."""
    try:
        found = dict(object.__getattribute__(thing, "__dict__"))
    except AttributeError:
        found = {}
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            try:
                found[name] = object.__getattribute__(thing, name)
            except AttributeError:
                continue
    return found


def _generating(model: nn.Module) -> str | None:
    """Path of the first module inside that has a ``generate`` of a transformers model; None: there is none."""
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and module.can_generate():
            return name
    return None
