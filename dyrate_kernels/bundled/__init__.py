"""The bundled model: a small LLaVA that describes drawn scenes, trained by ``tools/train_bundled_model.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_FOLDER = Path(__file__).parent / "model"
NAME = "demo_model"  # what files of answers and captions call it


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
    if not (MODEL_FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the bundled model is missing: expected model.safetensors in {MODEL_FOLDER}; reinstall dyrate_kernels, "
            "or train it, in a checkout, with: python -m tools.train_bundled_model --out DIR"
        )
    import torch

    from dyrate_kernels.quiet import import_transformers

    import_transformers()
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_FOLDER, dtype=dtype or torch.float32, local_files_only=True)
    processor = AutoProcessor.from_pretrained(MODEL_FOLDER, local_files_only=True)
    return model.to(device).eval(), processor


def demo_inputs(batch: int = 1, task: str = "describe", device: str | Any = "cpu", dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    """The bundled model and something to ask it: ``(model, inputs)``, for ``model.generate(**inputs)``. Arguments as in :func:`load_demo`
    and :func:`scene_inputs`.
    """
    model, processor = load_demo(device, dtype)
    return model, scene_inputs(model, processor, batch, task)


def scene_inputs(model: Any, processor: Any, batch: int = 1, task: str = "describe") -> dict[str, Any]:
    """Drawn scenes that the bundled model was not trained on, each with its question, ready for ``model.generate``.

    Args:
        batch: scenes.
        task: of ``shapes.make_sample``: ``"describe"``, ``"colour"``, ``"shape"``, ..

    Returns:
        input_ids and attention_mask int64 ``[batch, q]``, left padded; pixel_values ``[batch, 3, H, W]`` in the model's dtype.
    """
    from dyrate_kernels import chat, shapes

    size = processor.image_processor.size["height"]
    samples = [shapes.make_sample(-1 - number, task) for number in range(batch)]
    prompts = [chat.render(processor, [chat.user(sample.prompt, images=1)]) for sample in samples]
    images = [sample.image(size) for sample in samples]
    return chat.encode(processor, prompts, [[image] for image in images], model)
