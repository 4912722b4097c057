"""How far the prefix cache moves the second turn of a chat: rows of the first answer were computed while pruning.

    python -m tests.engines.vllm.second_turn [--family llava] [--tokens 60]

Each policy answers one prompt, then a second one that holds the first and its answer: without a prefix cache, with one that holds prompts
alone (as the plug-in has it) and with one that holds answers too (``cache_answers``). Printed of the latter two: tokens that came from the
cache, and how far the answer is from that without it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

POLICIES = ({"policy": "dyrate", "k": 2}, {"policy": "fastv", "k": 2, "rate": 0.75}, {"policy": "vtw", "k": 2})


def second_turn(folder: Path, options: dict[str, Any], tokens: int, caching: bool) -> dict[str, Any]:
    """Tokens of the second answer, their log-probabilities, and how many tokens of its prompt came from the cache."""
    from vllm import LLM, SamplingParams

    from tests.engines.vllm import kit, models

    llm = LLM(**{**kit.USUAL, "model": str(folder), "additional_config": {"dyrate": options}, "enable_prefix_caching": caching})
    picture, sampling = models.picture(0), SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    first = {"prompt": models.prompt(folder.name, kit.QUESTIONS[0], 1), "multi_modal_data": {"image": picture}}
    answered = llm.generate([first], sampling, use_tqdm=False)[0].outputs[0].token_ids
    ids = llm.get_tokenizer().encode(first["prompt"])
    more = llm.get_tokenizer().encode(kit.QUESTIONS[1], add_special_tokens=False)
    again = {"prompt_token_ids": [*ids, *answered, *more], "multi_modal_data": {"image": picture}}
    found = llm.generate([again], sampling, use_tqdm=False)[0]
    scores = [next(iter(each.values())).logprob for each in found.outputs[0].logprobs]
    told = {"cached": found.num_cached_tokens, "of": len(found.prompt_token_ids)}
    return {"tokens": list(found.outputs[0].token_ids), "scores": scores, **told}


def main() -> None:
    """Command line; with ``--one`` a single engine, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llava")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        job = json.loads(given.one)
        print("RESULT " + json.dumps(second_turn(Path(job["folder"]), job["options"], given.tokens, job["caching"])))
        return
    from tests.engines.vllm import kit, models

    with tempfile.TemporaryDirectory() as place:
        folder = models.make(given.family, Path(place))
        for options in POLICIES:
            without = _run(folder, options, given.tokens, False, kit.environment())
            for answers in (False, True):
                found = _run(folder, {**options, "cache_answers": answers}, given.tokens, True, kit.environment())
                same = next((i for i, (a, b) in enumerate(zip(found["tokens"], without["tokens"])) if a != b), given.tokens)
                most = max((abs(a - b) for a, b in zip(found["scores"][:same], without["scores"])), default=0.0)
                print(
                    f"{options['policy']:8s} cache_answers={answers!s:5s} {found['cached']} of {found['of']} prompt tokens cached; the "
                    f"first {same} of {given.tokens} tokens alike, their log-probabilities within {most:.6f}", flush=True,
                )  # fmt: skip


def _run(folder: Path, options: dict[str, Any], tokens: int, caching: bool, environment: dict[str, str]) -> dict[str, Any]:
    job = json.dumps({"folder": str(folder), "options": options, "caching": caching})
    command = [sys.executable, "-m", "tests.engines.vllm.second_turn", "--tokens", str(tokens), "--one", job]
    done = subprocess.run(command, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


if __name__ == "__main__":
    main()
