"""``--policies`` as contenders, and in words what a policy does on a model."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyrate_kernels import specs
from dyrate_kernels.files import check_file

if TYPE_CHECKING:
    from dyrate_kernels.evaluation.runner import Contender

HELP = (
    "names, with options, reducers and retention if wanted: fastv:k=2:rate=0.75@evict, none+hired:keep=0.5, dyrate+aim@evict, "
    "dyrate@pool=0.5; also coarse:side=7, a coarser picture; ' as NAME' names a row"
)
COARSE = ("coarse", "downsample")  # a row's control of picture size; the second name is its older one


def parse(text: str, retention: str = "recoverable", vision: str | None = None, files: bool = False) -> list[Contender]:
    """``fastv:rate=0.75@evict,random as chance`` (``specs.rows``) -> contenders, in order.

    Args:
        retention, vision: of those that name none.
        files: labels are names of files, too.

    Raises:
        ValueError, TypeError: there is none, one is unknown or has wrong options, or two have one name, or another than
            the unpruned model is named ``none``.
    """
    from dyrate_kernels import policies, vision as reducers  # isort: skip
    from dyrate_kernels.evaluation.runner import Contender

    found: list[Contender] = []
    for row in specs.rows(text, reducers.names()):
        if row.label == "none" and row.written != "none":
            raise ValueError(f"--policies: 'none' is the unpruned model's row; give {row.written!r} another name behind ' as '")
        label = row.label or row.written
        label = re.sub(r"[^\w.=@+-]+", "_", label) if files else label
        if row.policy.name in COARSE:
            found.append(Contender(label, policies.KeepAll(), side=_side(row)))
            continue
        chain = reducers.chain(row.reducers or vision)
        policy, held = policies.make(row.policy), row.retention or retention
        try:
            specs.retention(held).check(policy)
        except ValueError as error:
            raise ValueError(f"--policies: {row.written}: {error}") from None
        found.append(Contender(label, policy, held, vision=chain))
    if not found:
        raise ValueError("--policies is empty; name at least one, e.g. dyrate,fastv")
    if len({contender.label for contender in found}) < len(found):
        raise ValueError(f"--policies names one twice: {text}; ' as NAME' names a row")
    return found


def _side(row: specs.Row) -> int:
    """``coarse:side=7`` -> 7; ``coarse`` -> 6."""
    side = row.policy.options.get("side", 6)
    if {*row.policy.options} - {"side"} or row.reducers or not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise ValueError(f"--policies: {row.policy.name} takes one option, side (an integer of at least 1), got {row.written!r}")
    return side


def settings(
    config: Any, policy: Any, retention: str, backend: str, device: Any, vision: Any = (), side: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """Returns a policy's settings on a model, every default resolved, for JSON.

    Args:
        config: of the model.
        policy: as it was asked for; it is bound here.

    Raises:
        ValueError: ``Policy.bind`` and ``Retention.check``: before any engine starts.
    """
    from dyrate_kernels.ops import dispatch
    from dyrate_kernels.policies.base import ModelShape

    kind = specs.retention(retention)
    shape = ModelShape.from_config(config).replace(trained_by_default=not kind.moves)
    bound = policy.bind(shape)
    kind.check(bound)
    return {
        "policy": policy.name,
        "k": bound.layer_groups(shape.num_layers)[0] if bound.decides else None,
        "layers": shape.num_layers,
        "options": bound.settings(),
        "predictor": bound.predictor_words(policy, shape, retention),
        "retention": retention,
        "backend": dispatch.name_for(backend, device),
        "vision": "+".join(map(str, vision)) if vision else None,
        **({} if side is None else {"side": side}),
    }


def settings_by_name(name: str | None, policy: Any, retention: str, backend: str, device: str | None, vision: Any) -> dict[str, Any]:
    """:func:`settings` for a model that is loaded elsewhere; ``name`` and ``device`` as ``loading.load_model`` takes them."""
    import torch
    from transformers import AutoConfig

    from dyrate_kernels.bundled import MODEL_FOLDER
    from dyrate_kernels.loading import check_name

    check_name(name)
    config = AutoConfig.from_pretrained(MODEL_FOLDER if name is None else name)
    return settings(config, policy, retention, backend, device or ("cuda" if torch.cuda.is_available() else "cpu"), vision or ())


def words(found: dict[str, Any]) -> str:
    """:func:`settings` in a line."""
    from dyrate_kernels.bundled import MODEL_FOLDER

    first = "every visual token" if found["policy"] == "none" else found["policy"]
    parts = [first if found.get("side") is None else f"the picture averaged to {found['side']} x {found['side']} tokens"]
    if found["k"] is not None:
        parts.append(f"k={found['k']} of {found['layers']} layers")
    parts += [f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in found["options"].items()]
    if found["predictor"] is not None:
        parts.append(f"predictor {found['predictor'].replace(str(MODEL_FOLDER), 'the bundled model')}")
    if found["vision"] is not None:
        parts.append(f"reducers {found['vision']}")
    return ", ".join([*parts, f"retention {found['retention']}", f"backend {found['backend']}"])


def not_followed(model: Any, sample: bool = False) -> str | None:
    """Returns what a user should know of the checkpoint's own generation defaults; None: nothing."""
    from dyrate_kernels import answering

    quiet = ("max_length", "output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    odd = {name: value for name, value in answering.overridden(model, sample).items() if name not in quiet}
    if not odd:
        return None
    how = "sampled" if sample else "greedy"
    return f"the checkpoint's {', '.join(f'{name}={value}' for name, value in odd.items())} not followed: one {how} answer a prompt"


def check_labels(labels: list[str], paths: list[Path]) -> None:
    """ValueError where two rows would have one name, or a row's answers cannot be written to the file that has its name."""
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"--policies, --also and --cost make two rows of one name: {', '.join(twice)}; ' as NAME' names a row")
    for path in paths:
        try:
            check_file("--policies", path)
        except ValueError as error:
            raise ValueError(f"{error}; ' as NAME' names a row and its file") from None


def introduce(given: argparse.Namespace, model: Any, chosen: list[Any]) -> dict[str, Any]:
    """Says what each contender is on this model, before it is asked; the same for JSON."""
    found = {
        each.label: settings(model.config, each.policy, each.retention, given.backend, model.device, each.vision, each.side)
        for each in chosen
    }
    odd = not_followed(model)
    if not given.json:
        lines = [f"{label}: {words(setting)}" for label, setting in found.items()]
        print(*lines, *([f"but: {odd}"] if odd else []), sep="\n", flush=True)
    return found | ({"not_followed": odd} if odd else {})
