"""``dyrate generate``: one picture or several, streamed text, what was saved and what that means, what was kept at each step."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from dyrate_kernels import specs
from dyrate_kernels.cli import common, contenders, saved
from dyrate_kernels.units import bytes_text, flops_text


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("generate", help="describe a picture or answer a question about it", description=__doc__)
    common.add_common(parser)
    common.add_input(parser)
    add_policy(parser)
    parser.add_argument("--plot", metavar="OUT.png", help="draw the dropped patches and the curves of kept tokens and mass over steps")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="lines of the per-step table at most; 0 = all; default: 16")
    parser.set_defaults(run=run)


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Options that choose a policy."""
    parser.add_argument(
        "--policy", default="dyrate", metavar="NAME[:NAME=VALUE..]", help="default: dyrate; `dyrate info` lists them; e.g. fastv:rate=0.75"
    )
    parser.add_argument("--k", type=int, help="first layer that sees the pruned set")
    parser.add_argument("--rate", type=float, help="fraction of the visual tokens removed, 0 .. 1, for policies with a constant rate")
    parser.add_argument(
        "--predictor", metavar="DIR_OR_ID", help="of policy dyrate; default: the one in the model's folder, else closed-form"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any other option, e.g. ranking=mean; repeatable"
    )


def policy_from(given: argparse.Namespace) -> Any:
    """The policy that the options ask for."""
    from dyrate_kernels import policies

    options = {"k": given.k, "rate": given.rate, "predictor": given.predictor}
    options |= dict(specs.pair(item, "--option must be") for item in given.option)
    return policies.parse(given.policy, **{name: value for name, value in options.items() if value is not None})


def run(given: argparse.Namespace) -> int:
    """Generates, and prints what was kept."""
    from dyrate_kernels import vision

    images = common.load_images(given.image)
    common.check_plot("--plot", given.plot)
    policy, reducers, retention = policy_from(given), vision.chain(given.vision), common.retention_from(given)
    model, processor = common.load_model(given)
    settings = contenders.settings(model.config, policy, retention, given.backend, model.device, reducers)
    odd = contenders.not_followed(model, given.sample)

    from transformers import TextStreamer

    import dyrate_kernels as dk

    inputs = common.prepare(processor, images, given.prompt, model.device, model.dtype)
    with dk.patch(
        model,
        policy,
        retention=retention,
        backend=given.backend,
        record_importance=bool(given.plot),
        vision=reducers,
        **common.path_from(given),
    ) as handle:
        if not given.json:
            common.say("with", contenders.words(settings))
            if odd:
                common.say("but", odd)
        streamer = None if given.json else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        started = time.perf_counter()
        new_tokens = common.answer(model, processor, inputs, given, streamer)
        seconds = time.perf_counter() - started
        stats, shape = handle.stats(), handle.shape
    text = processor.decode(new_tokens, skip_special_tokens=True).strip()
    if given.plot:
        from dyrate_kernels import plots

        plots.generation(images, stats, given.plot)
    if given.json:
        result = {"text": text, **stats.to_dict(), "new_tokens": len(new_tokens), "seconds": seconds}
        for step in result["steps"]:  # per-token detail is for the plot
            step.pop("importance", None)
            step.pop("kept_tokens", None)
        result |= {"settings": settings | ({"not_followed": odd} if odd else {})}
        common.print_json(result | ({"plot": given.plot} if given.plot else {}))
        return 0
    sys.stdout.flush()
    rows = saved.text_rows(inputs["input_ids"].shape[1], stats.visual_tokens_in[0], len(new_tokens))
    common.say("saved", saved.totals(stats))
    common.say("means", saved.meaning(shape, stats.visual_tokens[0], rows, stats.backend))
    _print_steps(stats, given.steps)
    _print_totals(stats, len(new_tokens), seconds)
    if given.plot:
        print(f"plot: {given.plot}")
    return 0


def chosen_steps(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``count`` steps, evenly spread, first and last among them; 0 = all."""
    if limit <= 0 or count <= limit:
        return list(range(count))
    if limit == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def _print_steps(stats: Any, limit: int) -> None:
    from rich import box
    from rich.table import Table

    screen = common.console()
    short = screen.width < 72
    who = f"policy {stats.policy}" + (f", {stats.predictor} predictor" if stats.predictor else "")
    table = Table(title=f"{who}; right: attention mass", title_justify="left", box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    types = ("image", "sys.", "instr.", "resp.") if short else ("image", "system", "instruction", "response")
    for heading in ("step", "rate", "kept", *types):
        table.add_column(heading, justify="right", no_wrap=True)
    total = stats.visual_tokens[0]
    for index in chosen_steps(len(stats.steps), limit):
        step = stats.steps[index]
        system, visual, instruction, response = step.mass[0]
        name = "0 (prefill)" if step.step == 0 else str(step.step)
        shares = [f"{value:.3f}" for value in (visual, system, instruction, response)]
        table.add_row(name, f"{step.rate[0]:.2f}", f"{step.kept[0]} of {total}", *shares)
    screen.print(table)


def _print_totals(stats: Any, new_tokens: int, seconds: float) -> None:
    speed = new_tokens / max(seconds, 1e-9)
    if stats.vision:
        common.say("reducers", f"{stats.visual_tokens_in[0]} visual tokens -> {stats.visual_tokens[0]} ({stats.vision})")
    for name, text in (
        ("KV cache", f"{bytes_text(stats.kv_bytes_live)} live, {bytes_text(stats.kv_bytes_reserved)} reserved"),
        ("FLOPs", f"{flops_text(stats.flops)}; unpruned {flops_text(stats.flops_unpruned)}"),
        ("read", f"{bytes_text(stats.bytes_read)} by the decode steps; unpruned {bytes_text(stats.bytes_read_unpruned)}"),
        ("paper cost", f"{100 * stats.paper_cost:.1f} % (FastV's formula on the whole sequence, mean over steps)"),
        ("path", str(stats.path)),
        ("time", f"{new_tokens} tokens in {seconds:.2f} s ({speed:.1f} tokens/s), backend {stats.backend}, {stats.retention}"),
    ):
        common.say(name, text)
