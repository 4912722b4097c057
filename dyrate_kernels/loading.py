"""What a user names in text, as objects: a model with its processor, an option's value."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any


def parse_value(text: str) -> Any:
    """An option's value: a number, a list, True, None, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def load_model(name: str | None, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """(model, processor), in eval mode.

    Args:
        name: folder or hub id; None: the bundled model.
        device: None: cuda where there is one, else cpu.
        dtype: name of a torch dtype; None: float32 on a CPU, else the model's own.

    Raises:
        ValueError: ``name`` is a path, and no such folder is there.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*requires torchvision.*")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype) if dtype else (torch.float32 if device == "cpu" else "auto")
    if name is None:
        from dyrate_kernels import load_demo

        model, processor = load_demo()
    else:
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise ValueError(f"model {name}: no such folder")
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=kind)
        processor = transformers.AutoProcessor.from_pretrained(name)
    if kind != "auto":
        model = model.to(kind)
    return model.to(device).eval(), processor
