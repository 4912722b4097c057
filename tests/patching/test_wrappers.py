"""``recycle`` and ``klguard`` around other policies, against an oracle by masks that generates token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dyrate_kernels as dk
from dyrate_kernels import flops
from dyrate_kernels.patching import graph
from dyrate_kernels.policies import ModelShape
from tests import models
from tests.checks import METHODS, ROWS, assert_close_logits, greedy, logits, policy
from tests.fake_graph import TapeRecorder
from tests.oracle import Oracle, Step, Turn, keep_count

INNER = ("fixed", "dyrate", "st3", "fastv", "pyramiddrop", "sparsevlm")
STEPS = 9


class Relieved(Oracle):
    """An oracle in which a share of each step's dropped tokens comes back, and some steps read everything."""

    def __init__(self, model: Any, rule: Any) -> None:
        super().__init__(model, rule)
        self.relief: dict[int, list[float]] = {}  # by step, a number a sequence
        self.whole: set[int] = set()

    def _turn(self, b, turn, until, probabilities, state, layers, before):
        visual = [c for c in self.visual[b].nonzero()[:, 0].tolist() if c < turn.end]
        steps = super()._turn(b, turn, until, probabilities, state, layers, before)
        if not visual:
            return steps
        for layer in layers:
            self.hidden[layer][b] = False
        base = steps[0].importance.tolist()
        out = []
        for step in steps:
            if step.step == 0:
                out.append(step)
                continue
            relief = self.relief.get(step.step, [0.0] * len(self.ids))[b]
            if self.rule.decides_while_decoding:
                score = dict(zip(visual, step.importance.tolist(), strict=True))
            else:
                score = dict(zip(visual, base, strict=True))
            within = before[step.step].kept[min(layers) - 1] if before else visual
            kept = {}
            for layer in layers:
                count = keep_count(len(visual), step.rates[layer])
                count = len(visual) - int((len(visual) - count) * (1 - relief) + 1e-6)
                able = sorted(within, key=lambda c: (-score[c], c))
                kept[layer] = sorted(able[:count])
            chosen = Step(step.step, step.rates, kept, step.mass, step.importance)
            out.append(chosen)
            if step.step not in self.whole:
                self._hide(b, [turn.end + step.step - 1], visual, chosen)
        return out


def by_hand(model: Any, rule: Any, fields: dict[str, Tensor], see: Any, checks: Any) -> tuple[list[list[int]], Tensor, list[list[int]]]:
    """Greedy tokens, logits ``[steps, B, V]`` and kept counts of the first pruned layer, by whole passes."""
    oracle = Relieved(model, rule)
    fields = dict(fields)
    turns = [Turn(0, fields["input_ids"].shape[1])]
    batch, found, tokens, counts = fields["input_ids"].shape[0], [], [], []
    relief = torch.zeros(batch, dtype=torch.float64)
    for step in range(STEPS):
        oracle.relief[step] = relief.tolist()
        row = oracle.forward(turns, **fields).logits[:, -1]
        if step > 0:
            counts.append([len(steps[-1].kept[oracle.k]) if steps else 0 for steps in oracle.trace])
        if step > 0 and checks(step):
            oracle.whole.add(step)
            whole = oracle.forward(turns, **fields).logits[:, -1]
            relief = see(row, whole, relief)
            row = whole
        elif not oracle_checks(checks):
            relief = see(row, None, relief)
        found.append(row)
        tokens.append(row.argmax(-1))
        fields["input_ids"] = torch.cat([fields["input_ids"], tokens[-1][:, None]], 1)
        mask = fields["attention_mask"]
        fields["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(tokens, 1).tolist(), torch.stack(found), counts


def oracle_checks(checks: Any) -> bool:
    return any(checks(step) for step in range(1, 100))


@pytest.mark.parametrize("name", INNER)
def test_recycle(make_model, name):
    model, rule = make_model(), METHODS[name]
    fields = models.inputs(model, ROWS)
    between = models_entropy(model, fields).flatten().sort().values
    middle = float(between[len(between) // 2 - 1 : len(between) // 2 + 1].mean())

    def see(row, whole, relief):
        p = row.double().softmax(-1)
        return torch.where(-(p * p.log()).sum(-1) > middle, 0.6, 0.0).double()

    want, rows, counts = by_hand(model, rule, fields, see, lambda step: False)
    with dk.patch(model, dk.policies.Recycle(policy=policy(rule), entropy=middle, share=0.6), record_importance=True) as handle:
        got = model.generate(**fields, **greedy(STEPS))
        stats = handle.stats()
    start = fields["input_ids"].shape[1]
    assert got.sequences[:, start:].tolist() == want
    assert_close_logits(logits(got), rows)
    assert [[len(kept) for kept in step.kept_tokens] for step in stats.steps[1:]] == counts
    seen = {tuple(row) for row in counts}
    assert len(seen) > 1  # some came back, at some steps


def models_entropy(model, fields):
    out = model.generate(**fields, **greedy(STEPS))
    p = logits(out).double().softmax(-1)
    return -(p * p.log()).sum(-1)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("every", [1, 3])
def test_klguard(make_model, name, every):
    model, rule = make_model(), METHODS[name]
    fields = models.inputs(model, ROWS)
    divergences = []

    def run(limit):
        def see(row, whole, relief):
            p, q = whole.double().log_softmax(-1), row.double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            divergences.append(kl)
            return torch.where(kl > limit, 1 - (1 - relief) * 0.4, relief * 0.7)

        return by_hand(model, rule, fields, see, lambda step: step % every == 0)

    run(0.0)
    between = torch.stack(divergences).flatten().sort().values
    limit = float(between[int(0.6 * len(between)) :][:2].mean())  # rows without a picture diverge by 0
    want, rows, counts = run(limit)
    guard = dk.policies.KLGuard(policy=policy(rule), every=every, limit=limit, back=0.6, regain=0.3)
    with dk.patch(model, guard, record_importance=True) as handle:
        got = model.generate(**fields, **greedy(STEPS))
        stats = handle.stats()
    assert got.sequences[:, fields["input_ids"].shape[1] :].tolist() == want
    assert_close_logits(logits(got), rows)
    checked = [step for step in range(1, STEPS) if step % every == 0]
    assert stats.checks == len(checked)
    for step, row in zip(stats.steps[1:], counts, strict=True):
        kept = [len(tokens) for tokens in step.kept_tokens]
        assert kept == (stats.visual_tokens if step.step in checked else row)
    if every == 1:
        assert stats.bytes_read > 1.2 * stats.bytes_read_unpruned or stats.visual_share > 1.2  # each step ran twice


def test_what_a_check_costs(make_model):
    """A step that ran twice is counted twice, on every axis, by hand."""
    model = make_model()
    fields = models.inputs(model, ROWS[:1])
    inner = dk.policies.Fixed(k=2, rate=0.5)
    plain, guarded = {}, {}
    for found, chosen in ((plain, inner), (guarded, dk.policies.KLGuard(policy=inner, every=3, limit=1e9))):
        with dk.patch(model, chosen) as handle:
            model.generate(**fields, **greedy(8, output_logits=False))
            found["stats"] = handle.stats()
    a, b = plain["stats"], guarded["stats"]
    assert (a.checks, b.checks) == (0, 2)  # steps 3 and 6 of 7
    n, layers = a.visual_tokens[0], models.LAYERS
    kept, depth = keep_count(n, 0.5), layers - 2
    share = (2 * n + depth * kept) / (layers * n)
    assert a.visual_share == pytest.approx((1 + 7 * share) / 8)
    assert b.visual_share == pytest.approx((1 + 5 * share + 2 * (1 + share)) / 8)
    shape = ModelShape.from_config(model.config)
    prompt = int(fields["attention_mask"].sum()) - n
    kinds = {"text_rows": [prompt], "visual_tokens": [n], "group_layers": [2, depth], "prefill_shrunk": False}
    each = [[[n], [kept]]] * 7
    once = flops.generation_cost(shape, kept=[[[n], [n]], *each], **kinds)
    assert a.flops == pytest.approx(once.flops) and a.bytes_read == pytest.approx(once.bytes_read)
    # steps 3 and 6 ran pruned, and then unpruned
    rows = [n + prompt + step for step in (3, 6)]
    more = sum(layers * flops.layer_flops(shape, 1.0, row) + flops.head_flops(shape) for row in rows)
    assert b.flops == pytest.approx(once.flops + more)
    assert b.bytes_read == pytest.approx(once.bytes_read + 2 * flops.weight_bytes(shape) + sum(rows) * flops.kv_bytes_per_token(shape))
    whole = [flops.fastv_layer(row, shape.hidden_size, shape.intermediate_size) for row in rows]
    assert b.paper_cost == pytest.approx(a.paper_cost + sum(each / each for each in whole) / 8)


def test_they_need_recoverable(make_model):
    for name in ("recycle", "klguard"):
        with pytest.raises(ValueError, match=r"brings tokens back.*use retention='recoverable'"):
            dk.patch(make_model(), name, retention="evict")


@pytest.mark.parametrize("name", ["recycle", "klguard"])
def test_under_a_captured_step(make_model, monkeypatch, name):
    """Replayed steps, with the checks between them, give what eager steps give."""
    monkeypatch.setattr(graph, "recorder_for", lambda device: TapeRecorder())
    model = make_model()
    fields = models.inputs(model, ROWS)
    options = {"entropy": 2.0} if name == "recycle" else {"every": 4, "limit": 1e-4}
    made = dk.policies.get(name, policy=dk.policies.Fixed(k=2, rate=0.7), **options)
    with dk.patch(model, made, cuda_graph=False) as handle:
        want, kept = model.generate(**fields, **greedy(14)), handle.stats()
    with dk.patch(model, made) as handle:
        got = model.generate(**fields, **greedy(14))
        stats = handle.stats()
        assert handle.graph.replays > 5 and stats.checks == kept.checks and stats.flops == kept.flops
    assert [(step.kept, step.rate) for step in stats.steps] == [(step.kept, step.rate) for step in kept.steps]
    assert got.sequences.tolist() == want.sequences.tolist()
    assert_close_logits(logits(got), logits(want))


@pytest.mark.parametrize("name", ["recycle", "klguard"])
def test_modes(make_model, name):
    """Beams, a chat turn and drafts run; without any reason to act the tokens are the wrapped policy's."""
    model = make_model()
    fields = models.inputs(model, [row for row in ROWS if row.count("image") < 2])
    inner = dk.policies.Fixed(k=2, rate=0.7)
    idle = {"entropy": 1e9} if name == "recycle" else {"every": 1000}
    for options in ({"num_beams": 3}, {}, {"prompt_lookup_num_tokens": 2}):
        given = fields if "prompt_lookup_num_tokens" not in options else models.inputs(model, ROWS[:1])
        outputs = []
        for chosen in (inner, dk.policies.get(name, policy=inner, **idle)):
            with dk.patch(model, chosen):
                outputs.append(model.generate(**given, max_new_tokens=7, do_sample=False, **options))
        assert outputs[0].tolist() == outputs[1].tolist()
        busy = {"entropy": 0.0, "share": 1.0} if name == "recycle" else {"every": 1, "limit": 0.0}
        with dk.patch(model, dk.policies.get(name, policy=inner, **busy)):
            model.generate(**given, max_new_tokens=7, do_sample=False, **options)


def test_everything_back_is_unpruned(make_model):
    """A guard that checks each step gives the unpruned model's tokens, whatever it wraps."""
    model = make_model()
    fields = models.inputs(model, ROWS)
    want = model.generate(**fields, **greedy(8))
    with dk.patch(model, dk.policies.KLGuard(policy=dk.policies.VTW(), every=1)):
        got = model.generate(**fields, **greedy(8))
    assert got.sequences.tolist() == want.sequences.tolist()
    assert_close_logits(logits(got), logits(want))


@pytest.mark.parametrize(
    "name, options, error, words",
    [
        ("recycle", {"entropy": -1}, ValueError, "entropy must be at least 0"),
        ("recycle", {"share": 1.5}, ValueError, "share must be in"),
        ("recycle", {"policy": "poem"}, ValueError, "policy must be one of"),
        ("recycle", {"policy": 3}, TypeError, "policy must be a policy or its name"),
        ("klguard", {"every": 0}, ValueError, "every must be at least 1"),
        ("klguard", {"every": 1.5}, TypeError, "every must be an integer"),
        ("klguard", {"back": 1.5}, ValueError, "back must be in"),
        ("klguard", {"regain": -0.1}, ValueError, "regain must be in"),
        ("klguard", {"limit": float("nan")}, ValueError, "limit must be at least 0"),
    ],
)
def test_bad_options(name, options, error, words):
    with pytest.raises(error, match=words):
        dk.policies.get(name, **options)


def test_k_is_the_wrapped_policys(make_model):
    assert dk.policies.get("recycle", policy="fastv", k=2).bind(ModelShape.from_config(make_model().config)).k == 2
    with pytest.raises(ValueError, match="k must be in"):
        dk.patch(make_model(), dk.policies.Recycle(policy="fastv", k=99))
