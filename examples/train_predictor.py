"""A predictor for your model: train it on pictures with answers, the model frozen, and use it.

python examples/train_predictor.py --out run
python examples/train_predictor.py --out run --model llava-hf/llava-1.5-7b-hf --data llava.json --images DIR --steps 1000

The defaults are a rehearsal of seconds on drawn scenes; `dyrate train` has more options, resumes after a kill and takes several GPUs.
Needs the extra `train`: pip install -e ".[train]".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import dyrate_kernels as dk
from dyrate_kernels.bundled import MODEL_FOLDER
from dyrate_kernels.training.data import ConversationSource, ShapesSource
from dyrate_kernels.training.predictor_training import Options, train_predictor

PICTURE = Path(__file__).parent / "shapes_1.png"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the predictor")
    parser.add_argument(
        "--model", default=str(MODEL_FOLDER), help="folder or id, such as llava-hf/llava-1.5-7b-hf; default: the bundled one"
    )
    parser.add_argument("--data", metavar="FILE", help="LLaVA's JSON: pictures, questions and answers; default: drawn scenes")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures of --data; default: that of the file")
    parser.add_argument(
        "--target-keep", type=float, default=0.25, metavar="SHARE", help="visual tokens kept, on average; default: %(default)s"
    )
    parser.add_argument("--k", type=int, default=3, help="first layer that sees the pruned set; default: %(default)s")
    parser.add_argument("--examples", type=int, default=32, metavar="N", help="drawn scenes; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--image", default=str(PICTURE), metavar="FILE", help="picture that is described at the end; default: shapes_1.png")
    return parser.parse_args(arguments)


def describe(model: Any, processor: Any, image: str, **settings: Any) -> None:
    """Prints the answer under a predictor, and what it kept."""
    content = [{"type": "image", "path": image}, {"type": "text", "text": "Describe the picture."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)
    with dk.patch(model, policy="dyrate", **settings) as handle:
        tokens = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        stats = handle.stats()
    print(f"{stats.predictor}: {100 * stats.kept_mean:.1f} % of the visual tokens kept")
    print(f"  {processor.decode(tokens[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True).strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(given.model)
    model = AutoModelForImageTextToText.from_pretrained(given.model, dtype="auto").to(device).eval()

    source = ConversationSource(given.data, given.images) if given.data else ShapesSource(given.examples)
    options = Options(k=given.k, target_keep=given.target_keep, steps=given.steps, batch_size=given.batch_size)
    trained = train_predictor(model, processor, source, given.out, options)
    print(f"{trained.summary['examples']} examples, {trained.summary['skipped']} skipped; saved in {given.out}\n")

    describe(model, processor, given.image, k=given.k, predictor="closed-form")
    describe(model, processor, given.image, k=given.k, predictor=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
