"""The bundled model: a small LLaVA that describes drawn scenes, trained by ``dyrate_kernels.training.demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEMO_FOLDER = Path(__file__).parent / "demo_model"


def load_demo(device: str | Any = "cpu", dtype: Any = None) -> tuple[Any, Any]:
    """Loads the model that comes with this package; no download, and no code of this package takes part in the loading.

    Args:
        device: where to put the weights: a string or a ``torch.device``.
        dtype: floating-point type of the weights; None means float32, in which it was trained.

    Returns:
        ``(model, processor)``: a ``LlavaForConditionalGeneration`` in eval mode, and its ``LlavaProcessor`` (tokenizer, chat template and
        image processor; pads on the left).

    Raises:
        FileNotFoundError: the weights are not in this installation.
    """
    if not (DEMO_FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the bundled model is missing: expected model.safetensors in {DEMO_FOLDER}; reinstall dyrate_kernels, "
            "or train it with: python -m dyrate_kernels.training.demo --out DIR"
        )
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(DEMO_FOLDER, dtype=dtype or torch.float32, local_files_only=True)
    processor = AutoProcessor.from_pretrained(DEMO_FOLDER, local_files_only=True)
    return model.to(device).eval(), processor
