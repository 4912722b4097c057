"""``dyrate info``: versions, devices, which backends run and why the others do not, whether policies can run inside of vLLM, what pruning
can gain at most, and what a whole request takes at least: encode, prefill and decode, predicted from shapes alone (docs/costs.md).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

from dyrate_kernels.cli import common, predicted
from dyrate_kernels.units import bytes_text

PACKAGES = ("dyrate-kernels", "torch", "transformers", "triton", "accelerate", "safetensors", "numpy", "pillow")


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("info", help="versions, devices, backends, the byte-model bound", description=__doc__)
    common.add_common(parser)
    what = "named model for the bound; default: llava-1.5-7b"
    parser.add_argument("--config", type=predicted.known, default="llava-1.5-7b", metavar="NAME", help=what)
    parser.add_argument("--batch", type=common.positive, nargs="+", default=[1, 8, 32], metavar="B", help="default: 1 8 32")
    parser.add_argument("--visual", type=int, metavar="N", help="visual tokens; default: what the named model makes of one picture")
    parser.add_argument("--text", type=int, default=128, metavar="N", help="text tokens; default: 128")
    parser.add_argument("--measure", action="store_true", help="measure the copy bandwidth and the rate of a matrix product here")
    parser.add_argument("--predictor", metavar="DIR_OR_ID", help="also show what a predictor of policy dyrate does, and how it was made")
    predicted.add_options(parser)
    parser.set_defaults(run=run)


def collect(given: argparse.Namespace) -> dict[str, Any]:
    """Everything the command tells."""
    import torch

    import dyrate_kernels as dk
    from dyrate_kernels import families, native
    from dyrate_kernels.engines.vllm import presence
    from dyrate_kernels.patching.path import of_machine

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    probe = native.probe()
    build = native.build_info()
    return {
        "versions": versions,
        "device": devices or [f"cpu ({torch.get_num_threads()} threads)"],
        "backends": dk.backends(),
        "native": {
            "built": build.cuda,
            "reason": native.missing_reason(),
            "nvcc": build.nvcc,
            "architectures": list(build.architectures),
            "probe": None if probe is None else probe.to_dict(),
        },
        "path": of_machine(),
        "vllm": presence.state(),
        "policies": dk.policies.names(),
        "reducers": dk.vision.names(),
        "families": families.names(),
        "bound": bound(given),
        "requests": predicted.collect(given),
        **({} if given.predictor is None else {"predictor": _predictor(given.predictor)}),
    }


def _predictor(source: str) -> dict[str, Any]:
    """A predictor's settings, by name, as its file holds them."""
    from dyrate_kernels.predictor import DyRatePredictor

    made = DyRatePredictor.from_pretrained(source)
    reads = "mass and the text's hidden state" if made.text_size else "mass" if bool(made.weight.any()) else "nothing: one rate"
    return {
        "source": source, "k": made.k, "spread": made.spread, "rates": list(made.rates), "reads": reads, "model": made.model,
        "notes": made.notes,
    }  # fmt: skip


def bound(given: argparse.Namespace) -> dict[str, Any]:
    """The byte model for a named configuration (docs/costs.md)."""
    from dyrate_kernels import flops

    model = flops.named_model(given.config)
    visual = model.visual_tokens if given.visual is None else given.visual
    rows = []
    bandwidth = None
    if given.measure:
        from dyrate_kernels.measuring import timing

        bandwidth, _ = timing.copy_bandwidth()
    for batch in given.batch:
        step = flops.decode_bytes(model.shape, batch=batch, visual=visual, text=given.text)
        rows.append({"batch": batch, "bytes": step.total, "bytes_pruned": step.total_pruned, "bound": step.bound})
        if bandwidth is not None:
            rows[-1] |= {"floor_seconds": step.total / bandwidth, "floor_seconds_pruned": step.total_pruned / bandwidth}
    return {
        "config": given.config,
        "visual_tokens": visual,
        "text_tokens": given.text,
        "kv_bytes_per_token": flops.kv_bytes_per_token(model.shape),
        "weight_bytes": flops.weight_bytes(model.shape),
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }


def run(given: argparse.Namespace) -> int:
    """Prints what is installed, what can run, and the bound."""
    found = collect(given)
    if given.json:
        common.print_json(found)
        return 0
    native, limit = found["native"], found["bound"]
    for name, text in (
        ("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())),
        ("device", ", ".join(found["device"])),
        *((name, state) for name, state in found["backends"].items()),
        ("native", _native_text(native)),
        ("path", _path_text(found["path"])),
        ("vllm", _vllm_text(found["vllm"])),
        ("policies", ", ".join(found["policies"])),
        ("reducers", ", ".join(found["reducers"])),
        ("families", ", ".join(found["families"])),
        (
            "bound",
            f"{limit['config']}, {limit['visual_tokens']} visual + {limit['text_tokens']} text tokens, "
            f"{bytes_text(limit['kv_bytes_per_token'])} of KV a token, weights {bytes_text(limit['weight_bytes'])}",
        ),
    ):
        common.say(name, text)
    if "predictor" in found:
        _show_predictor(found["predictor"])
    if limit["copy_bandwidth"] is not None:
        common.say("", f"copy bandwidth {limit['copy_bandwidth'] / 1e9:.1f} GB/s, measured here")
    for row in limit["rows"]:
        floor = f", {1e3 * row['floor_seconds']:.2f} and {1e3 * row['floor_seconds_pruned']:.2f} ms at least" if given.measure else ""
        common.say(
            f"  batch {row['batch']}",
            f"at most {row['bound']:.2f}x: a decode step reads {bytes_text(row['bytes'])}, with no visual token at all "
            f"{bytes_text(row['bytes_pruned'])}{floor}",
        )
    predicted.show(found["requests"])
    return 0


def _show_predictor(found: dict[str, Any]) -> None:
    rates = " ".join(f"{rate:.4g}" for rate in found["rates"])
    of = ", ".join(f"{name} {value}" for name, value in found["model"].items())
    notes = found["notes"]
    made = "by dyrate train" if "options" in notes else "unknown"
    if notes.get("made by") == "calibration":
        loss, low, high = notes["loss"]
        made = f"by dyrate calibrate, {notes['pictures']} pictures at {100 * notes['cost']:g} % of the visual rows: "
        made += f"{loss:.4f} [{low:.4f}, {high:.4f}] nats a token lost"
    common.say("predictor", f"{found['source']}: k={found['k']}, spread {found['spread']:g}, rates {rates}, reads {found['reads']}")
    common.say("  for", of or "any model")
    common.say("  made", made)


def _path_text(path: dict[str, Any]) -> str:
    from dyrate_kernels.stats import Path

    return f"{Path(path['steps'], 0, path['layers'], path['why_not'])}, of a model in half precision on the first device"


def _vllm_text(vllm: dict[str, Any]) -> str:
    if vllm["version"] is None or vllm["why_not"]:
        return vllm["why_not"] if vllm["version"] is None else f"{vllm['version']}, but: {vllm['why_not']}"
    return f"{vllm['version']} on {vllm['platform']}; policies run inside of it, in {' and '.join(vllm['attention_backends'])}"


def _native_text(native: dict[str, Any]) -> str:
    if native["reason"]:
        return f"missing: {native['reason']}"
    probe = native["probe"]
    built = f"built with nvcc {native['nvcc']} for {', '.join(native['architectures'])}; "
    if probe["error"]:
        return built + f"no device: {probe['error']}"
    devices = ", ".join(f"{d['name']} (sm_{d['compute_capability'][0]}{d['compute_capability'][1]})" for d in probe["devices"])
    return built + f"driver {probe['driver_version']}, {devices}"
