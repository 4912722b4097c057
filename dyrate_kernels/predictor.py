"""Linear predictors of the pruning rate from attention mass: the trained one, and a closed form for models without one.

Both are ``argmax(weight @ mass + bias)`` over K rates, so the kernels run either. Weights load from safetensors and
JSON only: nothing in a predictor's files is ever executed.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dyrate_kernels.policies.base import ModelShape

WEIGHTS_FILE = "dyrate_predictor.safetensors"
CONFIG_FILE = "dyrate_predictor.json"
FORMAT = "dyrate-predictor"
VERSION = 1

_TYPES = 4  # token types of mass
_IMAGE = 1
_OTHER = "use a predictor trained for this model, or predictor=None"
_FINGERPRINT = ("model_type", "hidden_size", "num_layers", "num_heads")


@functools.cache
def named_rates(name: str, count: int) -> tuple[float, ...]:
    """The two published sets of K = ``count`` rates: ``"half_open"`` i/K, ``"closed"`` linspace(0, 1, K)
    (docs/methods/dyrate.md).

    Raises:
        ValueError: another name.
    """
    if name == "half_open":
        return tuple(i / count for i in range(count))
    if name == "closed":
        return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.0,)
    raise ValueError(f"rates must be 'half_open', 'closed' or a list of numbers in [0, 1], got {name!r}")


def check_rates(name: str, rates: Any, ascending: bool = False) -> tuple[float, ...]:
    """Rates as a tuple of floats.

    Raises:
        TypeError, ValueError: not a non-empty list of numbers in [0, 1] (ascending, where asked for).
    """
    try:
        values = list(rates.tolist() if isinstance(rates, Tensor) else rates)
    except TypeError:
        raise TypeError(f"{name} must be a list of numbers in [0, 1], got {rates!r}") from None
    if not values:
        raise ValueError(f"{name} must hold at least one number in [0, 1], got none")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be numbers in [0, 1], got {value!r}")
        if value < 0.0 or not value <= 1.0:  # also refuses NaN
            raise ValueError(f"{name} must be in [0, 1] (fractions of visual tokens removed), got {_shorten(value)}")
    if ascending and any(later <= earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError(f"{name} must be ascending, got {values}")
    return tuple(float(value) for value in values)


class ClosedForm:
    """A predictor that needs no training: the rate is the bucket that the visual mass falls into, relative to the
    first step's mass.

    With v the visual mass (mean over heads) of a step and v0 that of step 0, the thresholds are ``t_j v0``, ``t_j =
    (2 (K-1-j) + 1/2) / K`` for j = 0..K-2 [choice]: 1.7, 1.3, .9, .5 for K = 5. So v = v0 gives the middle rate, and
    falling mass prunes more. The half keeps every threshold away from 1, where step 0 stands: without it, rounding
    would choose the rate of step 0 for even K. The buckets are the upper envelope of K lines in v with slopes
    K-1 .. 0, hence an argmax of a linear layer whose bias is ``v0 * bias``. v0 = 0, and NaN, keep the first rate.

    Args:
        num_heads: Hq.
        rates: K fractions removed, ascending.

    Attributes:
        weight: float32 ``[K, Hq*4]``.
        bias: float32 ``[K]``, to be multiplied by v0 ``[B, 1]``.
        rates: tuple of K floats.
    """

    source = "closed-form"

    def __init__(self, num_heads: int, rates: Iterable[float]) -> None:
        self.rates = check_rates("rates", rates, ascending=True)
        count = len(self.rates)
        thresholds = [(2.0 * (count - 1 - j) + 0.5) / count for j in range(count - 1)]
        self.bias = torch.tensor([0.0, *itertools.accumulate(thresholds)], dtype=torch.float32)
        weight = torch.zeros(count, num_heads, _TYPES)
        weight[:, :, _IMAGE] = torch.arange(count - 1, -1, -1)[:, None] / num_heads
        self.weight = weight.flatten(1)

    @staticmethod
    def stretched(rates: Iterable[float], strength: float) -> tuple[float, ...]:
        """Rates to prune less or more by: 0 removes nothing, 0.5 is ``rates``, 1 removes all."""
        less, more = min(2.0 * strength, 1.0), max(2.0 * strength - 1.0, 0.0) * (1.0 - 1e-6)  # ascending still
        return tuple(rate * less + (1.0 - rate) * more for rate in rates) if strength > 0 else (0.0,)


class DyRatePredictor(nn.Module):
    """A trained predictor: ``logits = mass.flatten(1) @ weight.T + bias`` over K rates; a text-aware one adds
    ``hidden @ hidden_weight.T``, of the normalised hidden state that goes into layer k-1's attention.

    Args:
        num_heads: Hq of the model it reads.
        rates: K fractions removed, each in [0, 1].
        k: first pruned layer; mass comes from layer k-1, so a predictor is of use for its own k only.
        model: fingerprint of the text model it was trained for: any of ``model_type``, ``hidden_size``,
            ``num_layers``, ``num_heads``.
        notes: anything JSON, e.g. how it was trained; saved and loaded, never used.
        spread: the ranking it was trained with (``policies.DyRate.spread``).
        text_size: d of the hidden state that a text-aware predictor reads; 0: it reads mass alone, as in the paper.

    Attributes:
        weight: float32 parameter ``[K, Hq*4]``, zero at first.
        bias: float32 parameter ``[K]``, zero at first.
        hidden_weight: float32 parameter ``[K, text_size]``, zero at first, or None.
        source: where it was loaded from.
    """

    def __init__(
        self,
        num_heads: int,
        rates: Iterable[float],
        k: int = 3,
        model: dict[str, Any] | None = None,
        notes: dict[str, Any] | None = None,
        spread: float = 0.0,
        text_size: int = 0,
    ) -> None:
        super().__init__()
        self.rates = _check_numbers(num_heads, rates, k, spread, text_size)
        self.num_heads, self.k = int(num_heads), int(k)
        self.model = {} if model is None else dict(model)
        self.notes = {} if notes is None else dict(notes)
        self.spread = float(spread)
        self.source = "in memory"
        self.weight = nn.Parameter(torch.zeros(len(self.rates), self.num_heads * _TYPES))
        self.bias = nn.Parameter(torch.zeros(len(self.rates)))
        self.text_size = int(text_size)
        self.hidden_weight = nn.Parameter(torch.zeros(len(self.rates), self.text_size)) if text_size else None

    @classmethod
    def for_model(
        cls, shape: ModelShape, rates: Iterable[float], k: int = 3, spread: float = 0.0, text: bool = False
    ) -> DyRatePredictor:  # fmt: skip
        """An untrained predictor for a model, with its fingerprint; text-aware with ``text``."""
        fingerprint = {name: getattr(shape, name) for name in _FINGERPRINT}
        return cls(shape.num_heads, rates, k, fingerprint, spread=spread, text_size=shape.hidden_size if text else 0)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, rates={list(self.rates)}, k={self.k}, spread={self.spread}, source={self.source!r}"

    def forward(self, mass: Tensor, hidden: Tensor | None = None) -> Tensor:
        """mass ``[B, Hq, 4]``, and hidden ``[B, d]`` for a text-aware predictor -> logits ``[B, K]`` in the parameters' dtype."""
        logits = nn.functional.linear(mass.flatten(1).to(self.weight.dtype), self.weight, self.bias)
        if self.hidden_weight is None:
            return logits
        if hidden is None:
            raise ValueError(f"this predictor is text-aware: it needs hidden [B, {self.text_size}], got None")
        return logits + nn.functional.linear(hidden.to(self.weight.dtype), self.hidden_weight)

    def _named(self) -> dict[str, nn.Parameter]:
        """Returns the tensors that are saved, by name."""
        return dict(self.named_parameters())

    def shifted(self, amount: float) -> DyRatePredictor:
        """A copy that prunes more (``amount`` > 0) or less: ``amount * rate`` is added to the logit of each rate, which moves its mean
        rate and leaves its order of steps. Training ends with such a shift, to meet its budget; this one is for another budget.

        Raises:
            ValueError: ``amount`` is not finite.
        """
        if not math.isfinite(amount):
            raise ValueError(f"amount must be a finite number, got {amount}")
        made = DyRatePredictor(
            self.num_heads, self.rates, self.k, self.model, {**self.notes, "shifted": amount}, self.spread, self.text_size
        )
        with torch.no_grad():
            for name, tensor in self._named().items():
                made.get_parameter(name).copy_(tensor)
            made.bias.copy_(self.bias.double() + amount * torch.tensor(self.rates, dtype=torch.float64))
        made.source = f"{self.source}, shifted by {amount:g}" if amount else self.source
        return made

    def check(self, shape: ModelShape, k: int) -> None:
        """The predictor must have been made for this model and this k.

        Raises:
            ValueError: it was not; names what it expects and what came.
        """
        where = f"predictor {self.source!r}"
        if self.num_heads != shape.num_heads:
            raise ValueError(
                f"{where} expects mass of {self.num_heads} heads (weight {list(self.weight.shape)}), the model has "
                f"{shape.num_heads} (weight would be [{len(self.rates)}, {shape.num_heads * _TYPES}]); {_OTHER}"
            )
        for name in _FINGERPRINT:
            if name in self.model and self.model[name] != getattr(shape, name):
                raise ValueError(
                    f"{where} was trained for a model with {name} {self.model[name]!r}, this model has {getattr(shape, name)!r}; {_OTHER}"
                )
        if self.text_size not in (0, shape.hidden_size):
            raise ValueError(f"{where} reads a hidden state of {self.text_size} numbers, the model has {shape.hidden_size}; {_OTHER}")
        if self.k != k:
            raise ValueError(f"{where} was trained for k={self.k} (it reads layer {self.k - 1}), got k={k}; pass k={self.k}")
        _check_finite(self._named(), where)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``dyrate_predictor.safetensors`` and ``dyrate_predictor.json`` into ``folder``, which is made if
        missing.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a weight is not finite.
        """
        from safetensors.torch import save_file

        _check_finite(self._named(), "the predictor")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "version": VERSION,
            "num_heads": self.num_heads,
            "k": self.k,
            "rates": list(self.rates),
            "spread": self.spread,
            "text_size": self.text_size,
            "model": self.model,
            "notes": self.notes,
        }
        tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in self._named().items()}
        text = json.dumps(config, indent=2) + "\n"  # before anything is written: notes may not be JSON
        parts = path / f"{WEIGHTS_FILE}.part", path / f"{CONFIG_FILE}.part"
        save_file(tensors, parts[0], metadata={"format": "pt"})
        parts[1].write_text(text, encoding="utf-8")
        (path / CONFIG_FILE).unlink(missing_ok=True)  # a kill leaves the old one, the new one or none, never half of each
        os.replace(parts[0], path / WEIGHTS_FILE)
        os.replace(parts[1], path / CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **hub_options: Any) -> DyRatePredictor:
        """Loads what ``save_pretrained`` wrote.

        Args:
            source: a folder, the ``dyrate_predictor.json`` in one, or the id of a repository on the Hugging Face hub.
            hub_options: given to ``huggingface_hub.hf_hub_download`` (``revision``, ``cache_dir``, ``token``, ..).

        Raises:
            OSError: there is no such folder, file or repository, or it cannot be reached.
            ValueError: a file is damaged or does not hold a predictor; says what was expected and what came.
        """
        config_path, weights_path = _locate(source, hub_options)
        config = _read_config(config_path)
        heads, rates, k = config["num_heads"], config["rates"], config["k"]
        spread, text_size = config.get("spread", 0.0), config.get("text_size", 0)
        try:
            values = _check_numbers(heads, rates, k, spread, text_size)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path}: {error}") from None
        expected = {"weight": [len(values), heads * _TYPES], "bias": [len(values)]}
        expected |= {"hidden_weight": [len(values), text_size]} if text_size else {}
        tensors = _read_weights(weights_path, expected, f"{len(values)} rates, {heads} heads x {_TYPES} types", config_path)
        predictor = cls(heads, rates, k, config["model"], config["notes"], spread, text_size)
        with torch.no_grad():
            for name, tensor in predictor._named().items():
                tensor.copy_(tensors[name])
        predictor.source = str(source)
        return predictor


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _check_numbers(num_heads: Any, rates: Any, k: Any, spread: Any, text_size: Any) -> tuple[float, ...]:
    """Checks what a predictor's tensors are made from, before any is; returns the rates.

    Raises:
        TypeError, ValueError: a number has no meaning; names it.
    """
    for name, value, least in (("num_heads", num_heads, 1), ("k", k, 1), ("text_size", text_size, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            wanted = "a positive integer" if least else "an integer of at least 0"
            raise ValueError(f"{name} must be {wanted}, got {_shorten(value)}")
    values = check_rates("rates", rates)
    if isinstance(spread, bool) or not isinstance(spread, Real) or spread < 0.0 or not spread <= 1.0:
        raise ValueError(f"spread must be a number in [0, 1], got {_shorten(spread)}")
    return values


def _read_weights(path: Path, expected: dict[str, list[int]], of: str, config: Path) -> dict[str, Tensor]:
    """The file's tensors, read once their names, shapes and types are what ``expected`` says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            if set(slices) != set(expected):
                raise ValueError(f"{path} must hold the tensors {sorted(expected)}, got {sorted(slices)}")
            for name, shape in expected.items():
                found, kind = list(slices[name].get_shape()), slices[name].get_dtype()
                if found != shape:
                    raise ValueError(f"{path}: {name} must be {_shorten(shape)} ({of}, says {config.name}), got {found}")
                if kind not in _FLOATS:
                    raise ValueError(f"{path}: {name} must be a floating point tensor ({', '.join(_FLOATS)}), got {kind}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); save it again with save_pretrained") from None
    _check_finite(tensors, str(path))
    return tensors


def predictor_beside(folder: str | None, k: int | None = None) -> DyRatePredictor | None:
    """The predictor saved in a model's folder, if there is one and it is for this k (None: for any)."""
    if folder is None or not (Path(folder) / CONFIG_FILE).is_file():
        return None
    predictor = DyRatePredictor.from_pretrained(folder)
    predictor.source = f"trained, k={predictor.k}"
    return predictor if k in (None, predictor.k) else None


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        wrong = int((~torch.isfinite(tensor.detach())).sum())
        if wrong:
            raise ValueError(f"{where}: {name} must be finite, got {wrong} NaN or infinite values of {tensor.numel()}")


def _locate(source: str | os.PathLike[str], hub_options: dict[str, Any]) -> tuple[Path, Path]:
    """Paths of the config and the weights, downloaded if ``source`` is a hub id."""
    path = Path(source)
    if path.name == CONFIG_FILE and path.is_file():
        path = path.parent
    if path.is_dir():
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f"predictor folder {str(source)!r} has no {name}; expected what DyRatePredictor.save_pretrained writes"
                )
        return path / CONFIG_FILE, path / WEIGHTS_FILE
    name = os.fspath(source)
    if path.exists():
        raise NotADirectoryError(f"predictor must be a folder, its {CONFIG_FILE} or a hub id, got the file {name!r}")
    if isinstance(source, os.PathLike) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"predictor folder {name!r} does not exist")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        config, weights = (hf_hub_download(name, file, **hub_options) for file in (CONFIG_FILE, WEIGHTS_FILE))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise OSError(
            f"predictor {name!r} is no folder here, and {CONFIG_FILE} with {WEIGHTS_FILE} could not be had from the "
            "hub: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    return Path(config), Path(weights)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} must be a JSON object with format {FORMAT!r}, got {_shorten(config)}")
    if config.get("version") != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {config.get('version')!r}; another release of dyrate_kernels wrote it")
    for key in ("num_heads", "k", "rates"):
        if key not in config:
            raise ValueError(f"{path} must have the key {key!r}, got {sorted(config)}")
    for key in ("model", "notes"):
        if not isinstance(config.setdefault(key, {}), dict):
            raise ValueError(f"{path}: {key} must be an object, got {_shorten(config[key])}")
    if any(isinstance(rate, float) and not math.isfinite(rate) for rate in _as_list(config["rates"])):
        raise ValueError(f"{path}: rates must be in [0, 1], got {config['rates']}")
    unknown = set(config["model"]) - set(_FINGERPRINT)
    if unknown:
        raise ValueError(f"{path}: model must hold only {list(_FINGERPRINT)}, got also {sorted(unknown)}")
    return config


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
