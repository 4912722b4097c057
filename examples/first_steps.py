"""First steps: a picture, a question, the answer with every visual token and with fewer, and what the second one read.

python examples/first_steps.py
python examples/first_steps.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --prompt "What is on the table?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import dyrate_kernels as dk
from dyrate_kernels.bundled import MODEL_FOLDER

PICTURE = Path(__file__).parent / "shapes_1.png"
SHOWN = 6  # steps in the table


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(MODEL_FOLDER), help="folder or id, such as Qwen/Qwen2.5-VL-7B-Instruct; default: the bundled one"
    )
    parser.add_argument("--image", default=str(PICTURE), metavar="FILE", help="default: shapes_1.png, beside this file")
    parser.add_argument("--prompt", default="Describe the picture.", help="default: %(default)r")
    parser.add_argument("--policy", default="dyrate", help="with options, such as fastv:rate=0.75; default: %(default)s")
    parser.add_argument("--retention", default="recoverable", help="recoverable, evict or pool; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(given.model)
    model = AutoModelForImageTextToText.from_pretrained(given.model, dtype="auto").to(device).eval()

    content = [{"type": "image", "path": given.image}, {"type": "text", "text": given.prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(device, model.dtype)
    prompt = inputs["input_ids"].shape[1]

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=given.max_new_tokens, do_sample=False)
        return processor.decode(tokens[0, prompt:], skip_special_tokens=True).strip()

    print(f"not pruned: {answer()}\n")
    with dk.patch(model, policy=given.policy, retention=given.retention) as handle:  # undone at the end of the block
        print(f"{given.policy}: {answer()}\n")
        stats = handle.stats()

    print("step  kept  rate  attention: system  image  instruction  response")
    for step in stats.steps[:: max(1, len(stats.steps) // SHOWN)]:
        system, image, instruction, response = (f"{100 * share:.0f} %" for share in step.mass[0])
        print(f"{step.step:4}  {step.kept[0]:4}  {step.rate[0]:4.2f}  {system:>17}  {image:>5}  {instruction:>11}  {response:>8}")
    print(f"\n{100 * stats.kept_mean:.1f} % of {stats.visual_tokens[0]} visual tokens kept on average, from layer {stats.k} on")
    print(f"{100 * stats.bytes_read / max(stats.bytes_read_unpruned, 1):.1f} % of the bytes read in decode steps, weights included")
    print(f"path: {stats.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
