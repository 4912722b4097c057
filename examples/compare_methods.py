"""Methods on your own pictures: how much each keeps and reads, and how near its answers stay to those of the unpruned model.

python examples/compare_methods.py
python examples/compare_methods.py --model llava-hf/llava-1.5-7b-hf --image DIR_OR_FILE .. --prompt "What is in the picture?"

Change METHODS to compare others. Nothing is timed here: `dyrate bench e2e` does that. Against right answers: `dyrate eval`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import dyrate_kernels as dk
from dyrate_kernels.bundled import MODEL_FOLDER

HERE = Path(__file__).parent
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METHODS: dict[str, dict[str, Any]] = {  # a row's name, and what `dk.patch` is given for it
    "dyrate": {"policy": "dyrate"},
    "fixed": {"policy": "fixed:rate=0.75"},
    "uniform": {"policy": "uniform:rate=0.75"},
    "fastv": {"policy": "fastv:rate=0.75"},
    "fastv, evict": {"policy": "fastv:rate=0.75", "retention": "evict"},
    "hired": {"policy": "none", "vision": "hired:keep=0.5"},
    "hired, dyrate": {"policy": "dyrate", "vision": "hired:keep=0.5"},
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(MODEL_FOLDER), help="folder or id, such as llava-hf/llava-v1.6-vicuna-7b-hf; default: the bundled one"
    )
    pictures = [str(path) for path in sorted(HERE.glob("shapes_*.png"))]
    parser.add_argument("--image", nargs="+", default=pictures, metavar="FILE_OR_DIR", help="default: the drawn scenes beside this file")
    parser.add_argument("--prompt", default="Describe the picture.", help="default: %(default)r")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="default: %(default)s")
    return parser.parse_args(arguments)


def pictures(named: Sequence[str]) -> Iterator[str]:
    """The files that are named, and those in folders that are named."""
    for path in map(Path, named):
        if path.is_dir():
            yield from (str(each) for each in sorted(path.iterdir()) if each.suffix.lower() in SUFFIXES)
        else:
            yield str(path)


def agreement(answer: list[int], reference: list[int]) -> float:
    """Share of positions at which two answers have the same token."""
    same = [one == other for one, other in zip_longest(answer, reference)]
    return mean(same) if same else 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    files = list(pictures(given.image))
    if not files:
        sys.exit(f"--image: no picture ({', '.join(SUFFIXES)}) in {' '.join(given.image)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(given.model)
    model = AutoModelForImageTextToText.from_pretrained(given.model, dtype="auto").to(device).eval()

    def encoded(file: str) -> Any:
        content = [{"type": "image", "path": file}, {"type": "text", "text": given.prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(device, model.dtype)

    def answered(inputs: Any) -> list[int]:
        tokens = model.generate(**inputs, max_new_tokens=given.max_new_tokens, do_sample=False)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    asked = [encoded(file) for file in files]
    references = [answered(inputs) for inputs in asked]
    print(f"{len(files)} pictures, {asked[0]['input_ids'].shape[1]} tokens in the first prompt\n")
    print(f"{'method':16}{'visual rows read':>18}{'bytes read':>12}{'FLOPs':>9}{'same tokens':>13}")
    for name, settings in METHODS.items():
        with dk.patch(model, **settings) as handle:
            seen = [(answered(inputs), handle.stats()) for inputs in asked]
        rows = mean(stats.visual_share * stats.visual_tokens[0] / stats.visual_tokens_in[0] for _, stats in seen)
        read = mean(stats.bytes_read / max(stats.bytes_read_unreduced, 1) for _, stats in seen)
        flops = mean(stats.flops / stats.flops_unreduced for _, stats in seen)
        same = mean(agreement(answer, reference) for (answer, _), reference in zip(seen, references))
        print(f"{name:16}{100 * rows:16.1f} %{100 * read:10.1f} %{100 * flops:7.1f} %{100 * same:11.1f} %")
    print(
        "\nRows, bytes and FLOPs: shares of the model's without pruning and reducers. Same tokens: at the same place as in its answer, so"
    )
    print("one word more or less counts against all that follow. Read the answers (dyrate compare), or score them (dyrate eval).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
