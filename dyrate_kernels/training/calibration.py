"""Calibration of a predictor on a user's own pictures and prompts, without labels: agreement with the unpruned model's own answers.

The unpruned model answers each prompt once (``own_answers``). Then every candidate reads these answers again (``hard_pass``), each row
under the rate that the candidate gives it: what its decode steps would read. A candidate's loss is what the answers lose of their
log-likelihood. A candidate is k, spread and a rate by step; those that are compared cost the same, a share of the unpruned model's visual
rows (``Stats.visual_share``, the prompt's step included). Its rate follows a signal: ``constant``; ``mass``, what regressions foresee, from
the attention mass, that a step loses at each rate; ``text``, the same from mass and the text's hidden state (``rate_fit``).

Nothing is judged on what it was fitted to. Pictures are in two halves: a predictor is fitted on one and reads the other. And the loss that
is reported is, for each picture, that of what all other pictures choose. What is saved is chosen from, and fitted on, all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyrate_kernels import chat
from dyrate_kernels.evaluation.table import bootstrap
from dyrate_kernels.policies.base import ModelShape, check_k_range
from dyrate_kernels.predictor import DyRatePredictor
from dyrate_kernels.training import rate_fit
from dyrate_kernels.training.data import Example
from dyrate_kernels.training.hard_pass import HardPass, ReadingPass
from dyrate_kernels.training.masked_pass import AnswerPasses, ReadPrompt, training_hooks
from dyrate_kernels.training.own_answers import OwnAnswers, Progress, answer_all

LEAST = 8
"""Pictures below which no interval means anything."""
_LAYERS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40)
_FEW_LAYERS = 9
_PLACES = 2  # (k, spread) of a cost, the best ones at a constant rate, at which rates are fitted
_SLACK = 0.25  # of what counts as safe: candidates that near to the best are as good
_FEWEST = 0.01  # of the visual tokens, kept by a decode step on average
_MOST_ROWS = 3000  # that a regression reads
_HASH = 0  # seed of the control ``random``, as of the policy

Interval = tuple[float, float, float]
"""Mean, low and high of a 95 % bootstrap interval over pictures."""


@dataclass(frozen=True)
class Options:
    """Options of a calibration.

    Attributes:
        costs: budgets, in (0, 1]: mean ``Stats.visual_share`` of the answers.
        layers: first pruned layers to try; None: all of a small model, some of a large one.
        spreads: of the ranking (``policies.DyRate.spread``), to try.
        text: try predictors that read the text's hidden state, too.
        most_loss: of log-likelihood, nats a token, that counts as safe.
        max_new_tokens: of an answer.
        batch_size: answers that are read together.
        seed: of the halves, and of rows that are drawn where there are many.
    """

    costs: Sequence[float] = (0.667, 0.5, 0.333, 0.2)
    layers: Sequence[int] | None = None
    spreads: Sequence[float] = (0.0, 0.5, 1.0)
    text: bool = True
    most_loss: float = 0.02
    max_new_tokens: int = 128
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.costs or not all(0.0 < cost <= 1.0 for cost in self.costs):
            raise ValueError(f"costs must be at least one number in (0, 1], got {list(self.costs)}")
        if not self.spreads or not all(0.0 <= spread <= 1.0 for spread in self.spreads):
            raise ValueError(f"spreads must be at least one number in [0, 1], got {list(self.spreads)}")
        for name, least in (("max_new_tokens", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 <= self.most_loss < math.inf:
            raise ValueError(f"most_loss must be a finite number of nats a token, at least 0, got {self.most_loss}")

    def layers_of(self, count: int) -> tuple[int, ...]:
        """First pruned layers to try on a model of ``count`` layers.

        Raises:
            ValueError: one is none of 1 .. count-1.
        """
        if self.layers is None:
            return tuple(range(1, count)) if count <= _FEW_LAYERS else tuple(k for k in _LAYERS if k < count)
        for k in self.layers:
            check_k_range(k, count)
        return tuple(dict.fromkeys(self.layers))


@dataclass(frozen=True)
class Candidate:
    """A setting that is tried at a cost.

    Attributes:
        cost: the budget.
        k, spread: as of ``policies.DyRate``.
        signal: ``constant``, ``mass`` or ``text``; ``random``: the control, a constant rate over a random ranking. The control ``uniform``
            is ``constant`` with spread 1.
        keep: mean share of the visual tokens that decode steps keep, so that it costs that.
    """

    cost: float
    k: int
    spread: float
    signal: str
    keep: float

    @property
    def is_uniform(self) -> bool:
        """Returns whether it is the control ``uniform``."""
        return self.signal == "constant" and self.spread == 1.0


@dataclass(frozen=True)
class Trial:
    """A candidate with what it runs: one predictor a half, fitted on the other one.

    Attributes:
        candidate: which.
        predictors: by half that reads it.
    """

    candidate: Candidate
    predictors: tuple[DyRatePredictor, DyRatePredictor]


@dataclass(frozen=True)
class Measured:
    """A candidate on every picture, float64 ``[P]`` each.

    Attributes:
        loss: nats a token of log-likelihood that the answer loses, over the tokens that decode steps make.
        same: share of these tokens that are the likeliest still.
        visual: ``Stats.visual_share`` of the answer.
    """

    loss: np.ndarray
    same: np.ndarray
    visual: np.ndarray


@dataclass
class Rows:
    """Rows of the answers, those of decode steps, as a regression reads them; drawn at random where there are many.

    Attributes:
        half: int64 ``[R]``.
        weight: float64 ``[R]``: of each in the mean over pictures of the mean over their steps.
        mass: by k, ``[R, 4 Hq]`` of layer ``k-1``.
        hidden: by k, ``[R, d]``, what goes into the attention of layer ``k-1``; empty where no text is read.
        divergence: by place (k, spread), ``[R, K-1]``: KL(unpruned || pruned) of the next token at each of ``rate_fit.RATES[1:]``.
    """

    half: Tensor
    weight: Tensor
    mass: dict[int, Tensor]
    hidden: dict[int, Tensor]
    divergence: dict[tuple[int, float], Tensor]


@dataclass(frozen=True)
class Control:
    """A control at the same cost, its k chosen as the candidate's was.

    Attributes:
        k: of all pictures.
        loss: its own.
        lead: its loss less that of what was chosen, in pairs; above 0: the choice is better.
    """

    k: int
    loss: Interval
    lead: Interval

    @property
    def told_apart(self) -> bool:
        """Returns whether the interval of ``lead`` leaves out 0."""
        return not self.lead[1] <= 0.0 <= self.lead[2]


@dataclass(frozen=True)
class Level:
    """Outcome at one cost.

    Attributes:
        cost: asked for.
        chosen: of all pictures.
        loss, same: on each picture, of what the others choose.
        visual: what that cost.
        worst: (name, loss) of the picture that loses most.
        controls: ``uniform`` and ``random``.
        safe: the upper end of ``loss`` is at most ``most_loss``.
        tried: every candidate with its mean loss, the best first.
    """

    cost: float
    chosen: Candidate
    loss: Interval
    same: Interval
    visual: float
    worst: tuple[str, float]
    controls: dict[str, Control]
    safe: bool
    tried: list[tuple[Candidate, float]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["tried"] = [{**asdict(candidate), "loss": loss} for candidate, loss in self.tried]
        for name, control in self.controls.items():
            found["controls"][name]["told_apart"] = control.told_apart
        return found


@dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate`.

    Attributes:
        predictor: of the cheapest level that is safe, fitted on all pictures; None: none is.
        level: that one.
        levels: one for each cost that can be had, in the order asked for.
        left_out: why others cannot.
        pictures: how many were used.
        tokens: of an answer, mean.
        skipped: reasons, of what could not be used.
    """

    predictor: DyRatePredictor | None
    level: Level | None
    levels: list[Level]
    left_out: list[str]
    pictures: int
    tokens: float
    skipped: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the predictor as its settings."""
        made = self.predictor
        chosen = None if made is None else {"k": made.k, "spread": made.spread, "rates": list(made.rates), "text": made.text_size > 0}
        return {
            "pictures": self.pictures, "tokens": self.tokens, "skipped": self.skipped, "left_out": self.left_out,
            "cost": None if self.level is None else self.level.cost, "predictor": chosen,
            "levels": [level.to_dict() for level in self.levels],
        }  # fmt: skip


def calibrate(
    model: Any, processor: Any, source: Sequence[Example], options: Options = Options(), *, progress: Progress | None = None
) -> Calibration:
    """Chooses k, spread and rates for a model on pictures and prompts of its user.

    The model is unchanged when this returns. Memory: the keys and values of ``batch_size`` prompts and answers at a time, and at most
    ``3000`` rows of mass and hidden state for each k.

    Args:
        model: a LLaVA-type model, not patched.
        processor: its processor.
        source: pictures and prompts; answers in it are not looked at.
        options: how.
        progress: told of what is done.

    Raises:
        ValueError: a bad option; fewer than ``LEAST`` pictures can be used; no cost can be had; a prompt has no visual token.
        TypeError: predictors cannot be had for this model.
        RuntimeError: the model is patched.
    """
    shape = ModelShape.from_config(model.config)
    layers = options.layers_of(shape.num_layers)
    with training_hooks(model):
        pass  # refuses what it cannot take, before anything is answered
    answers = answer_all(model, processor, source, options.max_new_tokens, options.batch_size, options.seed, progress)
    _check_enough(answers)
    candidates, left_out = _at_constant_rates(shape, layers, answers.tokens, options)
    if not candidates:
        raise ValueError("none of the costs can be had: " + "; ".join(left_out))
    costs = list(dict.fromkeys(each.cost for each in candidates))
    with training_hooks(model) as passes:
        sweeps = Sweeps(model, shape, passes, answers, options, progress)
        measured = sweeps.constant("constant rates", candidates)
        places = [each for cost in costs for each in _places(measured, cost)]
        fits = {}
        if places:
            rows = sweeps.at_all_rates({(each.k, each.spread) for each in places})
            signals = ("mass", "text") if options.text else ("mass",)
            fits = {(*place, signal): _Fit(shape, rows, place, signal) for place in rows.divergence for signal in signals}
            measured |= sweeps.measure("fitted rates", [fit.trial(each) for each in places for fit in _at(fits, each)])
    levels = [_level(cost, measured, answers.names, options.most_loss) for cost in costs]
    safe = min((level for level in levels if level.safe), key=lambda level: level.cost, default=None)
    made = None if safe is None else _final(shape, fits, safe, options, len(answers.names))
    tokens = float(answers.tokens.double().mean())
    return Calibration(made, safe, levels, left_out, len(answers.names), tokens, answers.skipped)


def _check_enough(answers: OwnAnswers) -> None:
    used = len(answers.names)
    if used < LEAST:
        why = "; ".join(answers.skipped[:3])
        more = f" ({len(answers.skipped)} were skipped: {why})" if answers.skipped else ""
        raise ValueError(
            f"a calibration needs at least {LEAST} pictures with answers of two tokens or more, got {used}{more}; give 20 to 50"
        )


def _at_constant_rates(
    shape: ModelShape, layers: Sequence[int], tokens: Tensor, options: Options
) -> tuple[list[Candidate], list[str]]:  # fmt: skip
    """All candidates with a constant rate, and ``random``; and why a cost has none."""
    prompts = float((1.0 / tokens.double()).mean())  # the prompt's own step reads every token
    found: list[Candidate] = []
    left_out = []
    spreads = dict.fromkeys([*options.spreads, 1.0])  # 1: the control uniform
    for cost in dict.fromkeys(options.costs):
        there = len(found)
        for k in layers:
            first = k / shape.num_layers
            keep = ((cost - prompts) / (1.0 - prompts) - first) / (1.0 - first)
            if not _FEWEST <= keep < 1.0:
                continue
            found += [Candidate(cost, k, float(spread), "constant", keep) for spread in spreads]
            found.append(Candidate(cost, k, 0.0, "random", keep))
        if len(found) == there:
            least = prompts + (1.0 - prompts) * (min(layers) / shape.num_layers + _FEWEST)
            left_out.append(
                f"{100 * cost:g} % of the visual rows: answers of {float(tokens.double().mean()):.1f} tokens, whose prompts' steps read "
                f"every token, cost {100 * least:.1f} % at the least with k={min(layers)} of {shape.num_layers} layers"
                if cost < least
                else f"{100 * cost:g} % of the visual rows leaves nothing to prune"
            )
    return found, left_out


class Sweeps:
    """Passes of candidates over the unpruned answers.

    Args:
        model, shape: whose; ``passes``: of ``training_hooks``.
        answers: of it.
        options: of the calibration.
        progress: told of passes.
    """

    def __init__(
        self, model: Any, shape: ModelShape, passes: AnswerPasses, answers: OwnAnswers, options: Options, progress: Progress | None
    ) -> None:
        self.model, self.shape, self.passes, self.answers, self.options = model, shape, passes, answers, options
        self.progress = progress
        self.unpruned: dict[int, Tensor] = {}
        """Log-likelihood of the answers' tokens, float32 ``[B, T-1]``, by number of the batch."""

    def constant(self, name: str, candidates: Sequence[Candidate], noted: _Noted | None = None) -> dict[Candidate, Measured]:
        """Candidates with a constant rate."""
        made = [rate_fit.constant(self.shape, each.k, each.spread, 1.0 - each.keep) for each in candidates]
        return self.measure(name, [Trial(each, (one, one)) for each, one in zip(candidates, made, strict=True)], noted)

    def at_all_rates(self, places: Collection[tuple[int, float]]) -> Rows:
        """Rows that regressions read: the unpruned model's rows, and their divergence at every rate for each k and spread."""
        tokens, batches = self.answers.tokens, self.answers.batches
        reals = [batch.mask[:, 1:].bool() for batch in batches]
        half = torch.cat([tokens.new_full((int(real.sum()),), batch.half) for batch, real in zip(batches, reals, strict=True)])
        each = [(1.0 / tokens[batch.pictures].double())[:, None].expand_as(real)[real] for batch, real in zip(batches, reals, strict=True)]
        drawn = torch.randperm(len(half), generator=torch.Generator().manual_seed(self.options.seed))[:_MOST_ROWS].sort().values
        rows = Rows(half[drawn], torch.cat(each)[drawn], {}, {}, {})
        noted = _Noted(rows, drawn, sorted({k for k, _ in places}), self.options.text)
        rates = rate_fit.RATES[1:]
        self.constant("every rate", [Candidate(0.0, *place, "constant", 1.0 - rate) for place in sorted(places) for rate in rates], noted)
        noted.done()
        return rows

    @torch.no_grad()
    def measure(self, name: str, trials: Sequence[Trial], noted: _Noted | None = None) -> dict[Candidate, Measured]:
        """Every trial on every picture. With ``noted``, what predictors read and divergences go there."""
        count = len(self.answers.names)
        found = {trial.candidate: Measured(np.zeros(count), np.zeros(count), np.zeros(count)) for trial in trials}
        devices = [tuple(each.to(self.model.device) for each in trial.predictors) for trial in trials]
        total, done = len(self.answers.batches) * len(trials), 0
        for number, batch in enumerate(self.answers.batches):
            read = self.passes.read(chat.placed(batch.fields, self.model))
            if not bool(read.visual.any(1).all()):
                raise ValueError("a prompt has no visual token: the processor's chat template puts no mark for the picture into it")
            answer, mask = batch.answer.to(self.model.device), batch.mask.to(self.model.device)
            whole = self._unpruned(number, read, answer, mask, noted)
            for trial, predictors in zip(trials, devices, strict=True):
                if self.progress is not None:
                    self.progress(name, done, total)
                passed = self.passes.over(read, answer, mask, _carrier(trial.candidate, predictors[batch.half]))
                read.again()
                log = passed.logits.float().log_softmax(-1)
                into = found[trial.candidate]
                _reduce(batch.pictures, answer, mask, log, self.unpruned[number], passed.carrier, self.shape.num_layers, into)
                if noted is not None and whole is not None:
                    noted.divergence(trial.candidate, (whole.exp() * (whole - log)).sum(-1)[mask[:, 1:].bool()])
                done += 1
        if self.progress is not None:
            self.progress(name, total, total)
        return found

    def _unpruned(self, number: int, read: ReadPrompt, answer: Tensor, mask: Tensor, noted: _Noted | None) -> Tensor | None:
        """Log-probabilities ``[B, T-1, V]`` where they are noted, along with what predictors read; the answer's own are kept for good."""
        if noted is None and number in self.unpruned:
            return None
        layers = [] if noted is None else noted.layers
        passed = self.passes.over(read, answer, mask, lambda *columns: ReadingPass([k - 1 for k in layers], *columns))
        read.again()
        log = passed.logits.float().log_softmax(-1)
        self.unpruned[number] = log.gather(-1, answer[:, 1:, None])[..., 0]
        if noted is None:
            return None
        assert isinstance(passed.carrier, ReadingPass)
        noted.features(passed.carrier, mask[:, 1:].bool())
        return log


class _Noted:
    """Puts what batches give into ``Rows``, those rows that were drawn.

    Args:
        rows: to fill.
        drawn: int64 ``[R]``, ascending, of all rows.
        layers: k of the mass and hidden states.
        text: hidden states, too.
    """

    def __init__(self, rows: Rows, drawn: Tensor, layers: Sequence[int], text: bool) -> None:
        self.rows, self.drawn, self.layers, self.text = rows, drawn, layers, text
        self.seen, self.mine = 0, drawn
        self.parts: dict[tuple[str, Any], list[Tensor]] = {}

    def features(self, carrier: ReadingPass, real: Tensor) -> None:
        """Of the next batch; real: bool ``[B, T-1]``."""
        count = int(real.sum())
        self.mine = self.drawn[(self.drawn >= self.seen) & (self.drawn < self.seen + count)] - self.seen
        self.seen += count
        for k in self.layers:
            self._add(("mass", k), carrier.mass[k - 1][real].flatten(1))
            if self.text:
                self._add(("hidden", k), carrier.hidden[k - 1][real])

    def divergence(self, candidate: Candidate, values: Tensor) -> None:
        """Of a candidate, in the same batch."""
        self._add(("divergence", candidate), values)

    def _add(self, key: tuple[str, Any], values: Tensor) -> None:
        self.parts.setdefault(key, []).append(values[self.mine.to(values.device)].cpu())

    def done(self) -> None:
        """Fills the rows."""
        by_place: dict[tuple[int, float], list[Tensor]] = {}
        for (name, key), parts in self.parts.items():
            if name == "divergence":  # candidates came in the order of their rates
                by_place.setdefault((key.k, key.spread), []).append(torch.cat(parts))
            else:
                getattr(self.rows, name)[key] = torch.cat(parts)
        self.rows.divergence.update({place: torch.stack(values, 1) for place, values in by_place.items()})


class _Fit:
    """Regressions at a place (k, spread), for all costs.

    Attributes:
        halves: by half that they are for, fitted on the other one.
        whole: fitted on all rows.
    """

    def __init__(self, shape: ModelShape, rows: Rows, place: tuple[int, float], signal: str) -> None:
        self.shape, self.rows, self.place, self.signal = shape, rows, place, signal
        parts = [rows.mass[place[0]].double()] + ([rows.hidden[place[0]].double()] if signal == "text" else [])
        self.features, wanted = torch.cat(parts, 1), rate_fit.target(rows.divergence[place])
        ridge = rate_fit.best_ridge(self.features, wanted, rows.half)
        self.others = [rows.half != half for half in (0, 1)]
        self.halves = [rate_fit.Foreseen.fit(self.features[other], wanted[other], ridge) for other in self.others]
        self.whole = rate_fit.Foreseen.fit(self.features, wanted, ridge)

    def trial(self, at: Candidate) -> Trial:
        """At the cost of a candidate with a constant rate."""
        made = [
            foreseen.predictor(self.shape, *self.place, foreseen.price(self.features[other], self.rows.weight[other], at.keep))
            for foreseen, other in zip(self.halves, self.others, strict=True)
        ]
        return Trial(Candidate(at.cost, *self.place, self.signal, at.keep), (made[0], made[1]))

    def predictor(self, keep: float) -> DyRatePredictor:
        """Fitted on all rows."""
        return self.whole.predictor(self.shape, *self.place, self.whole.price(self.features, self.rows.weight, keep))


def _at(fits: dict[tuple[int, float, str], _Fit], place: Candidate) -> list[_Fit]:
    return [fit for (k, spread, _), fit in fits.items() if (k, spread) == (place.k, place.spread)]


def _carrier(candidate: Candidate, predictor: DyRatePredictor) -> Callable[[Tensor, Tensor, Tensor], HardPass]:
    rates = torch.tensor(predictor.rates, dtype=torch.float64, device=predictor.bias.device)
    random = _HASH if candidate.signal == "random" else None
    return lambda types, valid, columns: HardPass(predictor, candidate.k, rates, types, valid, columns, candidate.spread, random)


def _reduce(
    pictures: list[int], answer: Tensor, mask: Tensor, log: Tensor, unpruned: Tensor, carrier: Any, layers: int, into: Measured
) -> None:  # fmt: skip
    """A batch's part of ``Measured``."""
    real = mask[:, 1:].double()
    steps = real.sum(1)
    lost = (unpruned - log.gather(-1, answer[:, 1:, None])[..., 0]).double()
    same = (log.argmax(-1) == answer[:, 1:]).double()
    kept = carrier.count.double() / (carrier.columns >= 0).sum(1)[:, None]
    read = (carrier.k + (layers - carrier.k) * kept) / layers
    into.loss[pictures] = ((lost * real).sum(1) / steps).cpu().numpy()
    into.same[pictures] = ((same * real).sum(1) / steps).cpu().numpy()
    into.visual[pictures] = ((1.0 + (read * real).sum(1)) / (1.0 + steps)).cpu().numpy()


def _places(measured: dict[Candidate, Measured], cost: float) -> list[Candidate]:
    """The candidates of a cost that lose least at a constant rate, where rates can be chosen around it."""
    least = 1.0 - rate_fit.RATES[-1] + _FEWEST
    found = [each for each in measured if each.cost == cost and each.signal == "constant" and each.keep > least]
    return sorted(found, key=lambda each: float(measured[each].loss.mean()))[:_PLACES]


def _final(
    shape: ModelShape, fits: dict[tuple[int, float, str], _Fit], level: Level, options: Options, pictures: int
) -> DyRatePredictor:  # fmt: skip
    """The predictor that was chosen, fitted on all pictures."""
    at = level.chosen
    if at.signal == "constant":
        made = rate_fit.constant(shape, at.k, at.spread, 1.0 - at.keep)
    else:
        made = fits[at.k, at.spread, at.signal].predictor(at.keep)
    made.notes = {
        "made by": "calibration", "pictures": pictures, "cost": at.cost, "signal": at.signal, "keep": at.keep,
        "loss": list(level.loss), "same": list(level.same), "most_loss": options.most_loss,
    }  # fmt: skip
    return made


def _level(cost: float, measured: dict[Candidate, Measured], names: Sequence[str], most_loss: float) -> Level:
    mine = {each: found for each, found in measured.items() if each.cost == cost}
    able = [each for each in mine if each.signal != "random"]
    chosen, across = _choose(able, mine, most_loss * _SLACK)
    controls = {}
    for name, which in (
        ("uniform", [each for each in mine if each.is_uniform]),
        ("random", [each for each in mine if each.signal == "random"]),
    ):
        best, found = _choose(which, mine)
        controls[name] = Control(best.k, _interval(found.loss), _interval(found.loss - across.loss))
    loss, worst = _interval(across.loss), int(across.loss.argmax())
    tried = sorted(((each, float(mine[each].loss.mean())) for each in mine), key=lambda pair: pair[1])
    return Level(
        cost, chosen, loss, _interval(across.same), float(across.visual.mean()), (names[worst], float(across.loss[worst])), controls,
        loss[2] <= most_loss, tried,
    )  # fmt: skip


def _choose(able: Sequence[Candidate], measured: dict[Candidate, Measured], slack: float = 0.0) -> tuple[Candidate, Measured]:
    """(what loses least over all pictures, on each picture what the others choose). Of what is within ``slack`` nats of the least, one rate
    comes before rates by mass, and those before rates by text: a difference so small is rather chance than worth a signal.
    """
    loss = np.stack([measured[each].loss for each in able])
    total = loss.sum(1, keepdims=True)
    simple = np.array([("constant", "random", "mass", "text").index(each.signal) for each in able])

    def pick(sums: np.ndarray, pictures: int) -> int:
        near = np.flatnonzero(sums <= sums.min() + slack * pictures)
        return int(min(near, key=lambda index: (simple[index], sums[index])))

    picks = np.array([pick(each, loss.shape[1] - 1) for each in (total - loss).T])
    names, pictures = ("loss", "same", "visual"), np.arange(len(picks))
    across = (np.stack([getattr(measured[each], name) for each in able])[picks, pictures] for name in names)
    return able[pick(total[:, 0], loss.shape[1])], Measured(*across)


def _interval(values: np.ndarray) -> Interval:
    return bootstrap(values, np.ones(len(values)))
