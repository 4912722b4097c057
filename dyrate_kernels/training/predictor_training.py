"""Training of the rate predictor: the model frozen, only ``K x (4 Hq + 1)`` numbers learn (docs/methods/dyrate.md).

    loss = cross-entropy of the answer under pruning + budget_weight * (mean cost - target)^2

The rate of every row is drawn with Gumbel noise and its gradient passes straight through (``masked_pass``); the budget is counted on the
rates that the argmax takes, since that is what runs. ``transformers.Trainer`` does the rest: one CPU, one GPU or several, checkpoints,
resuming, TensorBoard. At the end one number is added to the logits along the rates, so that the budget is met on the training data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from dyrate_kernels.files import locked, write_json
from dyrate_kernels.flops import fastv_layer
from dyrate_kernels.json_files import read_json
from dyrate_kernels.loading import model_name
from dyrate_kernels.policies.base import ModelShape, check_fraction, check_k_range
from dyrate_kernels.predictor import CONFIG_FILE, WEIGHTS_FILE, DyRatePredictor, check_rates, named_rates
from dyrate_kernels.training.data import Collator, EncodedExamples, Example, origin_of
from dyrate_kernels.training.masked_pass import AnswerPass, gumbel, take_likeliest, training_hooks

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SUMMARY = "training.json"
OUTPUTS = (WEIGHTS_FILE, CONFIG_FILE, SUMMARY, *(f"{name}.part" for name in (WEIGHTS_FILE, CONFIG_FILE)), "training.part")
"""Files that a run writes into its folder."""


@dataclass(frozen=True)
class Options:
    """Options of the training of a predictor.

    Attributes:
        k: first pruned layer.
        rates: ``"half_open"``, ``"closed"`` or a list of fractions removed.
        num_rates: K for the two named sets.
        text: text-aware: the predictor reads the hidden state of the text beside the mass (``DyRatePredictor``); not the paper's.
        spread: fraction of the kept tokens that are evenly spaced (``policies.DyRate.spread``).
        target_keep: mean fraction of the visual tokens that stays, over decode steps. One of the two targets is given.
        target_cost: mean paper cost (FastV's formula on the whole sequence, the prompt's own unpruned step included), 1 = unpruned.
        steps: optimiser steps.
        batch_size: sequences a step and device.
        learning_rate: of Adam, on standardised mass; it warms up over a twentieth of the steps and falls to 0 along a cosine.
        budget_weight: lambda.
        tau_start, tau_end: temperature of the Gumbel-Softmax, geometric in between.
        seed: of data order and noise.
        max_length: tokens of prompt and answer together beyond which an example is skipped.
        max_answer: tokens after which an answer is cut.
        save_every: steps between checkpoints.
        log_every: steps between log lines.
        calibrate: shift the logits at the end until the budget is met.
    """

    k: int = 3
    rates: str | Sequence[float] = "half_open"
    num_rates: int = 5
    text: bool = False
    spread: float = 0.0
    target_keep: float | None = None
    target_cost: float | None = None
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 2e-2
    budget_weight: float = 100.0
    tau_start: float = 1.0
    tau_end: float = 0.1
    seed: int = 0
    max_length: int | None = 4096
    max_answer: int | None = 512
    save_every: int = 200
    log_every: int = 20
    calibrate: bool = True

    def __post_init__(self) -> None:
        if (self.target_keep is None) == (self.target_cost is None):
            raise ValueError(
                "one of target_keep and target_cost must be given: what the trained predictor should keep, or cost, on average"
            )
        for name in ("target_keep", "target_cost"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name), "a share of the unpruned model's")
        check_fraction("spread", self.spread, "the fraction of the kept tokens that are evenly spaced")
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("tau_start", "tau_end", "learning_rate"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0.0 <= self.budget_weight < math.inf:
            raise ValueError(f"budget_weight must not be negative, got {self.budget_weight}")

    @property
    def rate_values(self) -> tuple[float, ...]:
        """The K rates."""
        return named_rates(self.rates, self.num_rates) if isinstance(self.rates, str) else check_rates("rates", self.rates, ascending=True)

    @property
    def target(self) -> float:
        """The target that is given."""
        target = self.target_keep if self.target_cost is None else self.target_cost
        assert target is not None
        return target

    def tau(self, step: int) -> float:
        """Temperature of a step."""
        share = min(step / max(self.steps - 1, 1), 1.0)
        return self.tau_start * (self.tau_end / self.tau_start) ** share


class PredictorModule(nn.Module):
    """The module that the Trainer trains and saves: a linear layer on standardised mass. The frozen model is held outside of its tree.

    Attributes:
        mean, scale: of each of the ``4 Hq`` features, or ``4 Hq + d``, measured on the first batches; kept with the weights.
        rates: float64 ``[K]``.
    """

    mean: Tensor
    scale: Tensor
    rates: Tensor

    def __init__(self, shape: ModelShape, options: Options) -> None:
        super().__init__()
        self.options, self.shape = options, shape
        features = shape.num_heads * 4 + (shape.hidden_size if options.text else 0)
        count = len(options.rate_values)
        self.linear = nn.Linear(features, count)
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():  # at first every step takes the constant rate that meets the target
            self.linear.bias.copy_(_bias_for(options, shape))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("rates", torch.tensor(options.rate_values, dtype=torch.float64))
        self.run: Callable[..., AnswerPass] | None = None  # set for the time of the training
        self.tau = options.tau_start

    def features(self, mass: Tensor, hidden: Tensor) -> Tensor:
        """mass ``[n, Hq, 4]``, hidden ``[n, d]`` -> what the linear layer reads, float32."""
        flat = mass.flatten(1).to(self.mean.dtype)
        return torch.cat([flat, hidden.to(self.mean.dtype)], 1) if self.options.text else flat

    def logits(self, mass: Tensor, hidden: Tensor) -> Tensor:
        """mass ``[n, Hq, 4]``, hidden ``[n, d]`` -> ``[n, K]``."""
        return self.linear((self.features(mass, hidden) - self.mean) / self.scale)

    def answer(self, batch: dict[str, Any], choose: Callable[[Tensor], Tensor]) -> AnswerPass:
        """A training pass over a batch of ``data.Collator``."""
        assert self.run is not None
        given = batch["prompt"], batch["answer"], batch["answer_mask"]
        return self.run(*given, self.logits, self.options.k, self.rates, choose, self.options.spread)

    def forward(self, prompt: dict[str, Tensor], answer: Tensor, answer_mask: Tensor) -> dict[str, Tensor]:
        """Losses and what is logged of one batch."""
        batch = {"prompt": prompt, "answer": answer, "answer_mask": answer_mask}
        out = self.answer(batch, gumbel(self.tau))
        real = answer_mask[:, 1:].bool()
        losses = nn.functional.cross_entropy(out.logits.float().transpose(1, 2), answer[:, 1:], reduction="none")
        entropy = (losses * real).sum() / real.sum().clamp(min=1)
        pruned = real & (out.choice.n_visual > 0)[:, None]
        likeliest = take_likeliest(out.choice.logits)
        prompt_rows = prompt["attention_mask"].sum(1)
        cost = self.budget(likeliest, pruned, out.choice.n_visual, prompt_rows)
        loss = entropy + self.options.budget_weight * (cost - self.options.target) ** 2
        weight = pruned.float()[..., None]
        total = weight.sum().clamp(min=1)
        return {
            "loss": loss,
            "entropy": entropy.detach(),
            "cost": cost.detach(),
            "keep": ((likeliest * weight).sum((0, 1)) / total @ (1 - self.rates).float()).detach(),
            "taken": ((likeliest * weight).sum((0, 1)) / total).detach(),
        }

    def budget(self, share: Tensor, real: Tensor, n_visual: Tensor, prompt_rows: Tensor) -> Tensor:
        """The mean kept fraction or paper cost of the rows of ``real`` (bool ``[B, T]``) under a one-hot ``share`` of the rates."""
        if self.options.target_cost is None:
            each = (share * (1 - self.rates).to(share.dtype)).sum(-1)
            return (each * real).sum() / real.sum().clamp(min=1)
        length = prompt_rows[:, None, None] + 1.0 + torch.arange(real.shape[1], device=real.device)[:, None]
        each = (share * step_cost(self.shape, self.options.k, length, n_visual[:, None, None], self.rates).to(share.dtype)).sum(-1)
        rows = real.any(1)
        return ((each * real).sum() + rows.sum()) / (real.sum() + rows.sum()).clamp(min=1)  # the prompt's own step costs 1

    def predictor(self, shift: float = 0.0, notes: dict[str, Any] | None = None) -> DyRatePredictor:
        """As inference takes it: standardisation folded in, ``shift * rate`` added to each logit."""
        made = DyRatePredictor.for_model(self.shape, self.options.rate_values, self.options.k, self.options.spread, self.options.text)
        with torch.no_grad():
            weight = self.linear.weight.double().cpu() / self.scale.double().cpu()
            of_mass = made.weight.shape[1]
            made.weight.copy_(weight[:, :of_mass])
            if made.hidden_weight is not None:
                made.hidden_weight.copy_(weight[:, of_mass:])
            made.bias.copy_(self.linear.bias.double().cpu() - weight @ self.mean.double().cpu() + shift * self.rates.cpu())
        made.notes = dict(notes or {})
        return made


_SHARPNESS = 2.0  # logits between the first rate and one that is as far from it as the rates are apart on average


def _bias_for(options: Options, shape: ModelShape) -> Tensor:
    """A bias ``[K]`` that peaks at the constant rate of the target, and lets the Gumbel noise try its neighbours."""
    rates = torch.tensor(options.rate_values, dtype=torch.float64)
    keep = options.target_keep
    if keep is None:  # the cost is nearly linear in what is kept
        keep = (options.target * shape.num_layers - options.k) / (shape.num_layers - options.k)
    gap = float(rates.max() - rates.min()) / max(len(rates) - 1, 1) or 1.0
    return (-_SHARPNESS * ((rates - (1.0 - keep)) / gap) ** 2).float()


def step_cost(shape: ModelShape, k: int, length: Tensor, n_visual: Tensor, rates: Tensor) -> Tensor:
    """FastV's ``[k f(n) + (L-k) f(n - N r)] / (L f(n))`` for sequences of ``length`` tokens with ``n_visual`` visual ones."""
    length = length.double()
    full = fastv_layer(length, shape.hidden_size, shape.intermediate_size)
    after = fastv_layer(length - n_visual.double() * rates, shape.hidden_size, shape.intermediate_size)
    return (k * full + (shape.num_layers - k) * after) / (shape.num_layers * full)


class _PredictorTrainer(Trainer):
    """Logs what was chosen beside the loss."""

    model: PredictorModule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, Tensor]] = []

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        result = model(**inputs)
        self.seen.append({name: value for name, value in result.items() if name != "loss"})
        return (result["loss"], result) if return_outputs else result["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.seen and "loss" in logs:
            mean = {name: torch.stack([entry[name].float() for entry in self.seen]).mean(0) for name in self.seen[0]}
            self.seen.clear()
            rates = self.model.options.rate_values
            logs |= {name: mean[name].item() for name in ("entropy", "cost", "keep")}
            logs |= {f"rate {rate:g}": share for rate, share in zip(rates, mean["taken"].tolist(), strict=True)}
            logs["tau"] = self.model.tau
        super().log(logs, *args, **kwargs)


class _Temperature(TrainerCallback):
    def __init__(self, module: PredictorModule) -> None:
        self.module = module

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.module.tau = self.module.options.tau(state.global_step)


@dataclass(frozen=True)
class Trained:
    """Result of ``train_predictor``.

    Attributes:
        predictor: saved in ``out``.
        summary: what was measured; also in ``out/training.json`` and the predictor's notes.
    """

    predictor: DyRatePredictor
    summary: dict[str, Any]


def train_predictor(
    model: Any,
    processor: Any,
    source: Sequence[Example],
    out: str | Path,
    options: Options,
    *,
    resume: bool = True,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Trains a predictor for a frozen model and saves it (safetensors and JSON).

    Args:
        model: a supported vision-language model, not patched; unchanged when this returns.
        processor: its processor.
        source: examples (``training.data``).
        out: folder of the run; checkpoints lie below it.
        options: how.
        resume: go on from the newest checkpoint in ``out`` where there is one. It must have been made with the same options, model and
            data; a source of your own tells itself from others by an attribute ``origin``, or else by its class and length.
        quiet: no progress bar and no log lines.
        callbacks: given to the Trainer.

    Raises:
        ValueError: a bad option, a source with nothing usable, or a checkpoint of another run.
        TypeError: the model is not supported.
        RuntimeError: another run is writing to ``out``.
    """
    first = os.environ.get("RANK", "0") == "0"  # of several processes of one run, one writes
    with locked(Path(out)) if first else contextlib.nullcontext():
        return _train(model, processor, source, Path(out), options, resume, quiet, callbacks)


def _train(
    model: Any, processor: Any, source: Sequence[Example], out: Path, options: Options, resume: bool, quiet: bool,
    callbacks: Sequence[TrainerCallback],
) -> Trained:  # fmt: skip
    shape = ModelShape.from_config(model.config)
    check_k_range(options.k, shape.num_layers)
    setting = _setting(model, source, options)
    checkpoint = _checkpoint(out, setting) if resume else None
    examples = EncodedExamples(source, processor, options.max_length, options.max_answer)
    collate = Collator(processor)
    torch.manual_seed(options.seed)
    module = PredictorModule(shape, options)
    arguments = TrainingArguments(
        output_dir=str(out / CHECKPOINTS), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=max(options.steps // 20, 1), weight_decay=0.0,
        max_grad_norm=1.0, seed=options.seed, data_seed=options.seed, logging_steps=options.log_every, save_steps=options.save_every,
        save_total_limit=2, report_to=_reports(), remove_unused_columns=False, dataloader_num_workers=0,
        use_cpu=model.device.type == "cpu", disable_tqdm=quiet, logging_first_step=True, ddp_find_unused_parameters=False,
        label_names=["answer"],
    )  # fmt: skip
    trainer = _PredictorTrainer(
        model=module, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[_Temperature(module), *callbacks]
    )
    if quiet:
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
    if checkpoint is None and trainer.is_world_process_zero():  # what another run has left must not be taken for this one's
        for each in _checkpoints(out / CHECKPOINTS):
            shutil.rmtree(each)
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    write_json(out / CHECKPOINTS / _OPTIONS, setting)
    with training_hooks(model) as run:
        module.run = run
        try:
            if not any(examples[index].images for index in range(len(examples))):
                raise ValueError(
                    f"none of the {len(examples)} examples has a picture that can be read; skipped: {examples.skipped or 'none'}"[:1000]
                )
            first = [
                trainer._prepare_inputs(collate([examples[i] for i in range(start, start + options.batch_size)]))
                for start in _starts(examples, options)
            ]
            _check_reachable(module, first)
            _standardise(module, first)
            saved = _saved_bytes(module, first[0])
            if checkpoint is not None and _step_of(checkpoint) >= options.steps:  # the Trainer would make another step
                module.load_state_dict(load_file(checkpoint / SAFE_WEIGHTS_NAME, device=str(model.device)))
                trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            shift, cost = _calibrate(module, first) if options.calibrate else (0.0, _cost(module, first, 0.0))
        finally:
            module.run = None
    summary = {
        "options": {**dataclasses.asdict(options), "rates": list(options.rate_values)},
        "examples": len(examples),
        "skipped": len(examples.skipped),
        "reasons": sorted(set(examples.skipped.values()))[:20],
        "saved_bytes_per_answer_token": saved,
        "shift": shift,
        "cost_on_calibration": cost,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    notes = {name: summary[name] for name in ("options", "examples", "skipped", "shift", "cost_on_calibration")}
    predictor = module.predictor(shift, notes)
    if trainer.is_world_process_zero():
        predictor.save_pretrained(out)
        write_json(out / SUMMARY, summary)
    if examples.skipped:
        logger.warning("%d of %d examples were skipped", len(examples.skipped), len(examples))
    predictor.source = str(out)
    return Trained(predictor, summary)


CALIBRATION = 64  # examples that the standardisation and the final shift are measured on


def _starts(examples: EncodedExamples, options: Options) -> range:
    size = min(options.batch_size, len(examples))
    return range(0, max(min(CALIBRATION, len(examples)) - size + 1, 1), size)


_SLACK = 0.02  # of the budget: what counts as met


@torch.no_grad()
def _check_reachable(module: PredictorModule, batches: list[dict[str, Any]]) -> None:
    """ValueError where no choice of rates comes near the target on these batches."""
    options = module.options
    steep = 1e6  # a shift beyond any logit: every row takes the lowest or the highest rate
    passes: list = []
    most, least = _cost(module, batches, -steep, passes), _cost(module, batches, steep, passes)
    if not any(bool(real.any()) for _, real, *_ in passes):
        raise ValueError("none of the first examples that can be used shows a picture: there is nothing to learn from; look at the data")
    name, target = "target_keep" if options.target_cost is None else "target_cost", options.target
    if passes and not least - _SLACK <= target <= most + _SLACK:
        raise ValueError(
            f"{name} {target} cannot be met: with k={options.k} and the rates {[round(rate, 4) for rate in options.rate_values]} this data "
            f"costs {least:.3f} at the least and {most:.3f} at the most; give a target in between, or other rates or a smaller k"
        )


@torch.no_grad()
def _standardise(module: PredictorModule, batches: list[dict[str, Any]]) -> None:
    found = []
    for batch in batches:
        choice, real = module.answer(batch, take_likeliest).choice, batch["answer_mask"][:, 1:].bool()
        found.append(module.features(choice.mass[real], choice.hidden[real]))
    features = torch.cat(found).float()
    module.mean.copy_(features.mean(0))
    module.scale.copy_(features.std(0).clamp(min=1e-4) if features.shape[0] > 1 else torch.ones_like(module.scale))


def _saved_bytes(module: PredictorModule, batch: dict[str, Any]) -> int:
    """Bytes that autograd keeps for the backward pass, an answer token: every storage once, the frozen model's left out."""
    frozen = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() not in frozen:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    state = torch.random.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(**batch)
    torch.random.set_rng_state(state)
    return sum(storages.values()) // max(int(batch["answer_mask"].sum()), 1)


@torch.no_grad()
def _cost(module: PredictorModule, batches: list[dict[str, Any]], shift: float, cache: list | None = None) -> float:
    """The mean budget over batches when ``shift * rate`` is added to the logits. The mass does not depend on what was chosen."""
    passes = cache if cache is not None else []
    if not passes:
        for batch in batches:
            choice = module.answer(batch, take_likeliest).choice
            real = batch["answer_mask"][:, 1:].bool() & (choice.n_visual > 0)[:, None]
            passes.append((choice.logits, real, choice.n_visual, batch["prompt"]["attention_mask"].sum(1)))
    total = weight = 0.0
    for logits, real, n_visual, prompt_rows in passes:
        share = take_likeliest(logits + shift * module.rates.to(logits.dtype))
        rows = float(real.sum())
        total += float(module.budget(share, real, n_visual, prompt_rows)) * rows
        weight += rows
    return total / max(weight, 1.0)


def _calibrate(module: PredictorModule, batches: list[dict[str, Any]]) -> tuple[float, float]:
    """(shift, cost with it): the shift along the rates at which the budget is met as nearly as the logits allow."""
    target = module.options.target
    passes: list = []
    before = _cost(module, batches, 0.0, passes)
    spread = max(float(logits.abs().max()) for logits, *_ in passes) + 1.0
    low, high = -100.0 * spread, 100.0 * spread  # the cost falls as the shift grows
    for _ in range(60):
        middle = (low + high) / 2
        if _cost(module, batches, middle, passes) > target:
            low = middle
        else:
            high = middle
    best = min((0.0, low, high), key=lambda shift: (abs(_cost(module, batches, shift, passes) - target), abs(shift)))
    after = _cost(module, batches, best, passes)
    logger.info("calibrated: mean cost %.4f -> %.4f (target %.4f), shift %.4f", before, after, target, best)
    return best, after


def _reports() -> list[str]:
    import importlib.util

    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


_OPTIONS = "options.json"
_ANOTHER = "give another folder (--out), or resume=False (--fresh)"


def _setting(model: Any, source: Sequence[Example], options: Options) -> dict[str, Any]:
    """Returns the setting that a checkpoint depends on, as JSON reads it again."""
    found = {**dataclasses.asdict(options), "rates": list(options.rate_values), "model": model_name(model), "data": origin_of(source)}
    return json.loads(json.dumps(found))


def _checkpoint(out: Path, wanted: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint in ``out``: one that a kill cut in the middle of its writing is passed over.

    Raises:
        ValueError: it was made with other options, of another model or other data, or nothing says with which.
    """
    folder = out / CHECKPOINTS
    found = next((each for each in reversed(_checkpoints(folder)) if _is_whole(each)), None)
    if found is None:
        return None
    try:
        made = read_json(folder / _OPTIONS)
        if not isinstance(made, dict):
            raise ValueError(f"{folder / _OPTIONS} must be an object, got {str(made)[:40]}")
    except (OSError, ValueError) as error:
        raise ValueError(f"the options of the run in {folder} cannot be read ({error}); {_ANOTHER}") from None
    other = sorted(name for name in wanted if made.get(name) != wanted[name])
    if other:
        raise ValueError(
            f"{folder} holds a run with other {', '.join(other)}: "
            f"{', '.join(f'{name} {made.get(name)!r}, now {wanted[name]!r}' for name in other)}; {_ANOTHER}"
        )
    return found


def _checkpoints(folder: Path) -> list[Path]:
    """All, the newest last."""
    found = [each for each in folder.glob("checkpoint-*") if each.name.partition("-")[2].isdecimal() and each.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Returns whether the file that the Trainer writes last is there to its end."""
    try:
        return isinstance(read_json(checkpoint / TRAINER_STATE_NAME), dict)
    except (OSError, ValueError):
        return False
