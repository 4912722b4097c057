"""Finding the model inside of what wraps it: ``torch.compile``, PEFT, and whatever passes attributes on to a model of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: Any) -> Any:
    """The model that ``generate`` of ``model`` comes to: itself, or the one inside of ``torch.compile``'s or PEFT's wrapper.

    Raises:
        TypeError: another wrapper, which is no model itself: names the object to patch instead; or an adapter of PEFT that changes the
            prompt or replaces attention modules.
    """
    path = "model"
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        if _is_peft(model):
            _check_adapters(model, path)
            model, path = model.get_base_model(), f"{path}.get_base_model()"
        elif "_orig_mod" in model._modules:
            model, path = model._orig_mod, f"{path}._orig_mod"
        else:
            inside = _generating(model)
            if inside is None:
                return model
            raise TypeError(
                f"model is a {type(model).__name__}, which wraps a model: patch that one, {path}.{inside}, and go on using the wrapper if "
                "its generate() calls it"
            )
    if not isinstance(model, nn.Module):
        inside = next((name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, PreTrainedModel)), None)
        if inside is not None:
            raise TypeError(f"model is a {type(model).__name__}, which wraps a model: patch that one, {path}.{inside}")
    return model


def _is_peft(model: nn.Module) -> bool:
    """A ``PeftModel`` or ``PeftMixedModel``; PEFT need not be installed."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__) and hasattr(model, "get_base_model")


def _check_adapters(model: nn.Module, path: str) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise TypeError(
                f"the PEFT adapter {name!r} ({kind}) adds virtual tokens or attention of its own, whose place in the prompt the patch "
                f"cannot know; adapters that change weights work (LoRA, DoRA, IA3). Patch {path}.get_base_model() to go without this one"
            )


def _generating(model: nn.Module) -> str | None:
    """Path of the first module inside that has a ``generate`` of a transformers model; None: there is none."""
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and module.can_generate():
            return name
    return None
