"""Models by what a user calls them: a folder or an id, with a processor."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

QUANTIZATIONS = {"int8": "torchao", "nf4": "bitsandbytes"}  # 8 bits a weight, 4 bits a weight; and the package that does it
_NF4_BLOCK = 64  # weights that share a scale; bitsandbytes reads rows of other lengths wrongly on a CPU


def load_model(
    name: str | None, device: str | None = None, dtype: str | None = None, quantize: str | None = None
) -> tuple[Any, Any]:  # fmt: skip
    """(model, processor), in eval mode.

    Args:
        name: folder or hub id; None: the bundled model.
        device: None: cuda where there is one, else cpu.
        dtype: name of a torch dtype; None: float32 on a CPU, else the model's own.
        quantize: one of ``QUANTIZATIONS``: the language model's weights are rounded as they are loaded, all others are not; None: none are.

    Raises:
        ValueError: ``name`` is a path, and no such folder is there; or ``quantize`` is unknown.
        ImportError: what ``quantize`` needs is not installed; says how.
    """
    import torch
    import transformers

    from dyrate_kernels.quiet import import_transformers

    import_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*requires torchvision.*")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype) if dtype else (torch.float32 if device == "cpu" else "auto")
    check_name(name)
    if quantize is not None:
        from dyrate_kernels.bundled import MODEL_FOLDER

        name = str(MODEL_FOLDER) if name is None else name
        config = quantization_config(quantize, name, kind)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=kind, device_map={"": device}, quantization_config=config
        )
        return model.eval(), transformers.AutoProcessor.from_pretrained(name)
    if name is None:
        from dyrate_kernels import load_demo

        model, processor = load_demo()
    else:
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=kind)
        processor = transformers.AutoProcessor.from_pretrained(name)
    if kind != "auto":
        model = model.to(kind)
    return model.to(device).eval(), processor


def full_name(name: str) -> str:
    """A folder's whole path, for two folders may end alike; a hub id as it is."""
    return os.path.realpath(name) if os.path.isdir(name) else name


def model_name(model: Any) -> str:
    """Enough to tell one model from another: its class, where it is from, its size, its dtype, and how its weights were rounded."""
    from dyrate_kernels.bundled import MODEL_FOLDER, NAME

    config = model.config.get_text_config()
    name = full_name(str(model.config._name_or_path))
    name = NAME if name == full_name(str(MODEL_FOLDER)) else name
    found = f"{type(model).__name__} {name} {config.num_hidden_layers}x{config.hidden_size} {model.dtype}"
    rounded = getattr(model.config, "quantization_config", None)
    if rounded is None:
        return found
    rounded = rounded if isinstance(rounded, dict) else rounded.to_dict()
    method = getattr(rounded.get("quant_method"), "value", rounded.get("quant_method"))
    return f"{found} {method} {hashlib.sha256(json.dumps(rounded, sort_keys=True, default=str).encode()).hexdigest()[:8]}"


def check_name(name: str | None) -> None:
    """ValueError where a path is named and no such folder is there."""
    if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"model {name}: no such folder")


def quantization_config(quantize: str, name: str, dtype: Any) -> Any:
    """Returns a ``quantization_config`` for transformers' ``from_pretrained``: of the language model's linear layers, but not its head.

    Args:
        quantize: a key of ``QUANTIZATIONS``.
        name: folder or hub id of the model.
        dtype: torch dtype of activations, or ``"auto"``.

    Raises:
        ValueError, ImportError: see :func:`load_model`.
    """
    import torch
    import transformers
    from torch import nn

    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")
    for package in (QUANTIZATIONS[quantize], "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"quantize={quantize!r} needs {package}: pip install 'dyrate-kernels[quantize]'")
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(name))
    decoder = {id(module) for module in model.get_decoder().modules()}
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        whole = [path for path, module in linears if id(module) not in decoder]
        return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=whole)
    whole = [path for path, module in linears if id(module) not in decoder or module.in_features % _NF4_BLOCK]
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=whole,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )  # fmt: skip
