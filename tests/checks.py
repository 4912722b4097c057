"""Parts shared by the patching tests: the methods and inputs they go through, and the comparison of two generations."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests import models
from tests.oracle import Oracle, Rule

RETENTIONS = ("recoverable", "evict")
VARIANTS = pytest.mark.parametrize(("family", "text"), models.VARIANTS, ids=["-".join(v) for v in models.VARIANTS])
TOLERANCE = 2e-5  # of the largest logit, float32

_PREDICTOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(5, models.HEADS * 4, generator=_PREDICTOR) * 6
BIAS = torch.randn(5, generator=_PREDICTOR)

METHODS: dict[str, Rule] = {
    "none": Rule("none"),
    "dyrate": Rule("dyrate", k=3),
    "dyrate-closed-k1": Rule("dyrate", k=1, rates="closed"),
    "dyrate-spread": Rule("dyrate", k=2, rates="closed", spread=0.5),
    "dyrate-trained": Rule("dyrate", k=2, weight=WEIGHT, bias=BIAS),
    "fixed": Rule("fixed", k=2, rate=0.5),
    "fixed-last-layer": Rule("fixed", k=models.LAYERS - 1, rate=0.8),
    "fixed-nothing-left": Rule("fixed", k=2, rate=1.0),
    "fastv": Rule("fastv", k=2, rate=0.75),
    "fastv-mean": Rule("fastv", k=2, rate=0.75, ranking="mean"),
    "vtw": Rule("vtw"),
    "depth": Rule("depth", k=2, prune=0.4, growth=0.5),
    "schedule": Rule("schedule", k=2, kept=((0, 12), (3, 7), (6, 3))),
    "schedule-grows": Rule("schedule", k=2, kept=((1, 5), (4, 11), (6, 2))),
    "uniform": Rule("uniform", k=1, rate=0.6),
    "threshold": Rule("threshold", k=2, share=0.6),
    "st3": Rule("st3", k=2, rate=0.2, growth=0.4, least=0.3, horizon=5, stages=2),
    "dycoke": Rule("dycoke", k=2, rate=0.6, similarity=0.8),
    "pyramiddrop": Rule("pyramiddrop", keep=0.6),
    "pyramiddrop-k2": Rule("pyramiddrop", k=2, keep=0.7, stages=2),
    "layerwise": Rule("layerwise", k=1, stages=3),
    "sparsevlm": Rule("sparsevlm"),
    "aim": Rule("aim"),
    "aim-k1": Rule("aim", k=1, end=6),
    "sparsevlm-k2": Rule("sparsevlm", k=2, shares=(0.8, 0.3, 0.3)),
}
FEW = ("dyrate", "fixed", "fastv-mean", "vtw", "depth", "schedule", "sparsevlm")

# unequal lengths, one, two and no pictures, the same picture count in different places
ROWS: list[list[str]] = [
    ["text 4", "image", "text 6"],
    ["text 3", "image", "text 2", "image", "text 9"],
    ["text 7"],
    ["text 2", "image", "text 3"],
]
VIDEO_ROWS: list[list[str]] = [["text 2", "image", "text 3", "video", "text 4"], ["text 4", "video", "text 5"]]


def rows_for(family: str) -> list[list[str]]:
    """The ragged batch, with videos where a LLaVA has them."""
    builder = models.BUILDERS[family]
    return ROWS[:3] + VIDEO_ROWS if builder.videos and builder.llava else ROWS


# Newer versions of transformers (5.23, not 5.17) encode pictures before they expand a batch to beams and cut a prompt into chunks.
# Older ones mix up the pictures of a row's beams where the row has several, and give no picture at all to a prompt in chunks.
PICTURES_FIRST = "mm_encoder_outputs" in inspect.getsource(transformers.generation.utils)


def rows_for_beams(rows: list[list[str]]) -> list[list[str]]:
    """The rows that this version of transformers can search with beams."""
    return rows if PICTURES_FIRST else [row for row in rows if row.count("image") < 2]


# options that a rule holds under another name, or not at all
OTHERWISE = {"layerwise": {"groups": "stages", "num_rates": "buckets"}, "sparsevlm": {"keep": "shares"}, "aim": {"least": ""}}


def policy(rule: Rule) -> Any:
    """The policy of the package that ``rule`` describes."""
    import dyrate_kernels as dk

    options: dict[str, Any] = {"recycle": 0} if rule.name == "sparsevlm" else {}
    for name in dk.policies.options(rule.name):
        held = getattr(rule, OTHERWISE.get(rule.name, {}).get(name, name), None)
        if held is not None:
            options[name] = list(held) if isinstance(held, tuple) else held
    if rule.weight is not None:
        options["predictor"] = trained_predictor(rule)
    return dk.policies.get(rule.name, **options)


def trained_predictor(rule: Rule) -> Any:
    """A predictor with the rule's weights."""
    import dyrate_kernels as dk
    from tests.oracle import rate_values

    assert rule.weight is not None and rule.bias is not None
    shape = dk.policies.ModelShape.from_config(models.config("llava"))
    predictor = dk.DyRatePredictor.for_model(shape, rate_values(rule.rates, rule.buckets), k=rule.k or 3)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(rule.weight if parameter.ndim == 2 else rule.bias)
    return predictor


def patched(model: Any, rule: Rule, retention: str = "recoverable", **options: Any) -> Any:
    """``with patched(model, rule, retention) as handle``."""
    import dyrate_kernels as dk

    return dk.patch(model, policy=policy(rule), retention=retention, **options)


def greedy(length: int = 8, **options: Any) -> dict[str, Any]:
    """Options of a greedy ``generate`` that returns everything the comparison reads."""
    return {
        "max_new_tokens": length,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }


def assert_same(got: Any, want: Any, *, tolerance: float = TOLERANCE, scores: bool = True) -> None:
    """Equal token ids, and raw logits within ``tolerance`` of the largest one."""
    assert got.sequences.tolist() == want.sequences.tolist(), first_difference(got, want)
    if scores:
        assert_close_logits(logits(got), logits(want), tolerance)


def logits(output: Any) -> Tensor:
    """``[steps, B, V]``."""
    return torch.stack([step.float() for step in output.logits])


def assert_close_logits(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    scale = want.abs().max().clamp(min=1.0)
    worst = ((got - want).abs().flatten(1).max(1).values / scale).tolist()
    assert max(worst) <= tolerance, f"relative error of the logits by step: {[f'{w:.1e}' for w in worst]}"


def first_difference(got: Any, want: Any) -> str:
    a, b = got.sequences, want.sequences
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    row, column = (a != b).nonzero()[0].tolist()
    note = f"row {row} differs first at column {column} of {a.shape[1]}"
    if got.logits is not None and len(got.logits) == len(want.logits):
        error = (logits(got) - logits(want)).abs().flatten(2).max(2).values
        note += f"; largest logit error by step and row: {[[f'{e:.0e}' for e in step] for step in error.tolist()]}"
    return note


def assert_same_decisions(stats: Any, oracle: Oracle) -> None:
    """Kept counts, rates and mass of every step, for the sequences with an image. A recoverable prefill drops nothing."""
    for b, trace in enumerate(oracle.trace):
        assert stats.visual_tokens[b] == (len(trace[0].importance) if trace else 0)
        for entry, step in zip(stats.steps, trace, strict=False):
            whole = entry.step == 0 and stats.retention == "recoverable"
            if whole:
                assert entry.kept[b] == stats.visual_tokens[b]
            elif oracle.rule.name != "depth":
                assert entry.kept[b] == step.count, (b, entry.step)
            if not whole and oracle.rule.decides_while_decoding and stats.retention != "evict":
                assert abs(entry.rate[b] - step.rate) < 1e-6, (b, entry.step)
            assert torch.allclose(torch.tensor(entry.mass[b]).double(), step.mass, atol=1e-5), (b, entry.step)


def single(model: Any, row: Sequence[str], **options: Any) -> dict[str, Tensor]:
    """Inputs of one row alone."""
    return models.inputs(model, [row], **options)


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything about a model that patching could leave a mark on: module types and attributes, hooks, configs, parameters, registries."""
    import transformers
    from torch.nn.modules import module as module_globals
    from transformers.masking_utils import AttentionMaskInterface

    marks: dict[str, Any] = {}
    for name, module in model.named_modules():
        marks[f"type of {name}"] = type(module)
        marks[f"attributes of {name}"] = sorted(module.__dict__)
        for attribute, value in module.__dict__.items():
            if "hooks" in attribute and hasattr(value, "__len__"):
                marks[f"{attribute} of {name}"] = [id(hook) for hook in value.values()] if hasattr(value, "values") else len(value)
            elif attribute.startswith("_") or isinstance(value, int | float | str | bool | type(None)):
                if isinstance(value, int | float | str | bool | type(None)):
                    marks[f"{attribute} of {name}"] = value
            elif callable(value):
                marks[f"{attribute} of {name}"] = id(value)
        if hasattr(module, "config"):
            marks[f"config of {name}"] = (
                id(module.config),
                type(module.config),
                module.config.to_dict(),
                module.config._attn_implementation,
            )
    for name, tensor in model.state_dict(keep_vars=True).items():
        marks[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad)
    marks["generation config"] = model.generation_config.to_dict()
    classes = {cls for module in model.modules() for cls in type(module).__mro__} | {type(model.config)}
    for cls in classes:
        if cls is not object:
            marks[f"class {cls.__module__}.{cls.__qualname__}"] = {
                k: id(v) for k, v in vars(cls).items() if callable(v) and not k.startswith("_abc")
            }
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
        marks[kind] = len(getattr(module_globals, kind, {}))
    marks["cache"] = {k: id(v) for k, v in vars(transformers.DynamicCache).items() if callable(v)}
    for registry in (transformers.AttentionInterface, AttentionMaskInterface):
        for key, function in registry._global_mapping.items():
            marks[f"{registry.__name__} {key}"] = id(function)
    return marks


def assert_unmarked(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Nothing changed; new names in the attention registries change no other model and may stay."""
    changed = {key for key in before if key not in after or after[key] != before[key]}
    added = {key for key in after if key not in before and not key.startswith(("AttentionInterface", "AttentionMaskInterface", "class "))}
    assert not changed and not added, f"changed: {sorted(changed)[:10]}; added: {sorted(added)[:10]}"
