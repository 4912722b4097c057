"""Predicts a whole request from shapes alone: encode, prefill and decode, each by its FLOPs and its bytes (docs/costs.md).

A request is B sequences that are answered together: their pictures go through the vision tower and the projector (*encode*), the prompt
through the language model (*prefill*), then one token after the other (*decode*). A phase lasts as long as the longer of two times: its
FLOPs over a FLOP rate, its bytes over a bandwidth; decode is the sum over its steps. So a prediction is a floor: no launch, no gap
between kernels, no wait for the host, no activation that is written and read again is in it.

FLOPs are those of ``flops`` (axis 2) and, for the tower, the same: all matrix products, two FLOPs a multiply-add, attention over all pairs
of rows. Bytes are the weights once a pass, and the keys and values that are read or written. Nothing here touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dyrate_kernels import flops
from dyrate_kernels.families import TOWERS
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.policies.schedule import Schedule
from dyrate_kernels.retention import DEFAULT_POOL, RETENTIONS

DENSE = "dense"
COMPUTE, BANDWIDTH = "compute", "bandwidth"
ASSUMED_KEPT = 0.2  # of a policy whose share depends on what it sees: the published DyRate removes 0.8 in the mean (docs/costs.md)
POOL = DEFAULT_POOL  # of the visual tokens that retention "pool" holds, unless asked otherwise

# ---- the vision side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionShape:
    """The numbers of a vision tower and of the projector behind it.

    Attributes:
        num_layers, hidden_size, intermediate_size: of the tower.
        patch_numbers: numbers in a patch: channels x height x width (x frames).
        mlp_products: matrices of its MLP: 2, or 3 where it is gated.
        side: patches along a side of a crop, which all have one size; None: pictures of any size.
        cls: the tower has a [CLS] row beside the patches; ``keeps_cls``: that becomes a visual token, too.
        merge: patches along a side that become one visual token.
        window: patches along the side of a window whose patches read each other alone; None: every layer reads the whole crop.
        full_layers: layers that read the whole picture although there are windows.
        projector: (in, out) of each of the projector's products; it runs once a visual token.
        other_parameters: all that is no matrix product: biases, norms, learned positions, [CLS], a line break.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    patch_numbers: int
    projector: tuple[tuple[int, int], ...]
    other_parameters: int = 0
    mlp_products: int = 2
    side: int | None = None
    cls: bool = False
    keeps_cls: bool = False
    merge: int = 1
    window: int | None = None
    full_layers: int = 0

    @classmethod
    def from_config(cls, config: Any) -> VisionShape:
        """Reads the config of a vision-language model with a CLIP or SigLIP tower and LLaVA's projector, or of a Qwen2.5-VL.

        Raises:
            ValueError: the tower is another one.
        """
        vision: Any = getattr(config, "vision_config", None)
        kind, text = getattr(vision, "model_type", None), config.get_text_config().hidden_size
        taken, strategy = getattr(config, "vision_feature_layer", None), getattr(config, "vision_feature_select_strategy", None)
        if kind in TOWERS and strategy is not None and not hasattr(config, "video_seq_length"):  # that has two towers
            has_cls = TOWERS[kind].has_cls
            return (_clip if has_cls else _siglip)(
                vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, vision.image_size, vision.patch_size, text,
                taken=len(taken) if isinstance(taken, list | tuple) else 1, newline=hasattr(config, "image_grid_pinpoints"),
                keeps_cls=strategy == "full" and has_cls,
            )  # fmt: skip
        if hasattr(vision, "fullatt_block_indexes"):
            return _qwen(
                vision.depth, vision.hidden_size, vision.intermediate_size, vision.patch_size, text, len(vision.fullatt_block_indexes),
                vision.window_size, vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size,
            )  # fmt: skip
        raise ValueError(
            f"config must be of a LLaVA with CLIP or SigLIP, or of a Qwen2.5-VL, got {config.model_type!r} with {kind!r}; "
            "without a vision shape a request is predicted from its prefill on"
        )

    @property
    def crop_tokens(self) -> int | None:
        """Visual tokens that the tower makes of one crop, line breaks left out; None where pictures have any size."""
        return None if self.side is None else self.side**2 // self.merge**2 + self.keeps_cls


def _layer_extras(hidden: int, inner: int) -> int:
    """Biases of six products and two layer norms."""
    return 4 * hidden + inner + hidden + 4 * hidden


def _projector(inside: int, text: int) -> tuple[tuple[int, int], ...]:
    return (inside, text), (text, text)


def _clip(
    layers: int, hidden: int, inner: int, size: int, patch: int, text: int, *, taken: int = 1, newline: bool = False,
    keeps_cls: bool = False,
) -> VisionShape:  # fmt: skip
    side = size // patch
    others = hidden + (side**2 + 1) * hidden + 4 * hidden + layers * _layer_extras(hidden, inner) + 2 * text + newline * text
    return VisionShape(
        layers, hidden, inner, 3 * patch**2, _projector(taken * hidden, text), others, side=side, cls=True, keeps_cls=keeps_cls
    )


def _siglip(
    layers: int, hidden: int, inner: int, size: int, patch: int, text: int, *, taken: int = 1, newline: bool = False,
    keeps_cls: bool = False,
) -> VisionShape:  # fmt: skip
    side = size // patch
    others = hidden + side**2 * hidden + 2 * hidden + layers * _layer_extras(hidden, inner) + 2 * text + newline * text
    return VisionShape(layers, hidden, inner, 3 * patch**2, _projector(taken * hidden, text), others, side=side, keeps_cls=keeps_cls)


def _qwen(
    layers: int, hidden: int, inner: int, patch: int, text: int, full: int, window: int, merge: int = 2, channels: int = 6
) -> VisionShape:
    merged = hidden * merge**2
    others = layers * (4 * hidden + 2 * inner + hidden + 2 * hidden) + hidden + merged + text
    return VisionShape(
        layers, hidden, inner, channels * patch**2, ((merged, merged), (merged, text)), others, mlp_products=3, merge=merge,
        window=window // patch, full_layers=full,
    )  # fmt: skip


def vision_parameters(vision: VisionShape) -> int:
    """Parameters of the tower and the projector."""
    h, m = vision.hidden_size, vision.intermediate_size
    layers = vision.num_layers * (4 * h * h + vision.mlp_products * h * m)
    return layers + vision.patch_numbers * h + sum(a * b for a, b in vision.projector) + vision.other_parameters


def nearest_square(tokens: int) -> tuple[int, int]:
    """Returns the sides of the rectangle of so many tokens that is nearest to a square, the shorter one first."""
    low = max(side for side in range(1, math.isqrt(tokens) + 1) if tokens % side == 0)
    return low, tokens // low


def crops_of(vision: VisionShape, visual: int) -> list[tuple[int, int]]:
    """Returns the pictures that so many visual tokens came of, each by its sides in patches: crops of one size, of which there are as many
    as come nearest to the tokens (line breaks count as tokens, and are of no crop), or one picture, as near to a square as can be.
    """
    if visual < 1:
        return []
    if vision.side is None:
        low, high = nearest_square(visual)
        return [(low * vision.merge, high * vision.merge)]
    return [(vision.side, vision.side)] * max(round(visual / (vision.crop_tokens or 1)), 1)


def encode_flops(vision: VisionShape, crops: Sequence[tuple[int, int]]) -> float:
    """FLOPs of the tower and the projector over ``crops``, each by its sides in patches: what ``torch.utils.flop_counter`` counts."""
    h, total = float(vision.hidden_size), 0.0
    products = 4 * h * h + vision.mlp_products * h * vision.intermediate_size
    for high, wide in crops:
        patches = float(high * wide)
        rows = patches + vision.cls
        full = vision.full_layers if vision.window else vision.num_layers
        pairs = full * rows**2
        if vision.window:
            pairs += (vision.num_layers - full) * _squares(high, vision.window) * _squares(wide, vision.window)
        tokens = patches / vision.merge**2 + vision.keeps_cls
        total += 2 * (patches * vision.patch_numbers * h + vision.num_layers * rows * products + 2 * h * pairs)
        total += 2 * tokens * sum(float(a) * b for a, b in vision.projector)
    return total


def _squares(length: int, window: int) -> int:
    """Sum of the squares of the pieces that a length is cut into."""
    return sum(min(window, length - start) ** 2 for start in range(0, length, window))


# ---- a request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Attributes:
        bandwidth: bytes, of memory.
        flops: FLOPs, of matrix products in the weights' dtype.
        memory: bytes that it has; None: not known.
        source: where these come from, for people.
    """

    bandwidth: float
    flops: float
    memory: int | None = None
    source: str = "given"


def _sheet(bandwidth: float, flops_rate: float, gigabytes: int) -> Rates:
    return Rates(bandwidth * 1e9, flops_rate * 1e12, gigabytes * 10**9, "both by the maker's data sheet (peaks that no program reaches)")


# products of 16-bit numbers without sparsity, sums in float32
DEVICES: dict[str, Rates] = {
    "h200": Rates(
        4.28e12, 989e12, 150_109_880_320,
        "bandwidth of a copy as measured (bench/results/2026-11-27-h200), FLOPs by the maker's data sheet (a peak that no program reaches)",
    ),
    "h100": _sheet(3350, 989, 80), "a100": _sheet(2039, 312, 80), "l40s": _sheet(864, 362, 48), "l4": _sheet(300, 121, 24),
}  # fmt: skip


def named_rates(name: str) -> Rates:
    """The rates of a device of ``DEVICES``.

    Raises:
        ValueError: there is none of this name.
    """
    if name.lower() not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}; give bandwidth and FLOP rate of another one")
    return DEVICES[name.lower()]


@dataclass(frozen=True)
class Request:
    """A request to a model.

    Attributes:
        shape: of the text model; ``shape.dtype`` is that of all weights and of the cache.
        batch: B sequences, answered together.
        visual: visual tokens of each that the language model receives.
        text: text tokens of each prompt.
        new_tokens: of each answer.
        vision: None: nothing is encoded.
        crops: what of each the tower is given, by its sides in patches; None: what ``visual`` tokens come of (:func:`crops_of`).
        pictures: of each sequence.
        step_weights: bytes of weights that a pass of the language model reads; None: :func:`step_weight_bytes`.
    """

    shape: ModelShape
    batch: int
    visual: float
    text: float
    new_tokens: int
    vision: VisionShape | None = None
    crops: tuple[tuple[int, int], ...] | None = None
    pictures: float = 1
    step_weights: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.new_tokens < 1:
            raise ValueError(f"batch and new_tokens must be at least 1, got {self.batch} and {self.new_tokens}")
        if self.visual < 0 or self.text < 0:
            raise ValueError(f"visual and text must be at least 0, got {self.visual} and {self.text}")


@dataclass(frozen=True)
class Plan:
    """A way to answer it.

    Attributes:
        retention: ``"dense"`` (every layer reads every token), or one of ``specs.RETENTIONS``.
        k: first layer that reads kept tokens alone.
        kept: share of the visual tokens that layers >= k read: one number, or one a pass, the prompt's first (the last one stays in force).
        pool: share that they hold under ``"pool"``; at least ``kept``.
    """

    retention: str = DENSE
    k: int = 3
    kept: float | tuple[float, ...] = 1.0
    pool: float = POOL

    def __post_init__(self) -> None:
        if self.retention not in (DENSE, *RETENTIONS):
            raise ValueError(f"retention must be one of {DENSE}, {', '.join(RETENTIONS)}; got {self.retention!r}")
        shares = (self.kept,) if isinstance(self.kept, int | float) else self.kept
        if not shares or not all(0 <= share <= 1 for share in (*shares, self.pool)):
            raise ValueError(f"kept and pool must be in [0, 1], got {self.kept} and {self.pool}")

    def read(self, passes: int) -> np.ndarray:
        """float64 ``[passes]``: the share that layers >= k read in each."""
        if self.retention == DENSE:
            return np.ones(passes)
        shares = [self.kept] if isinstance(self.kept, int | float) else list(self.kept)
        found = np.array((shares + [shares[-1]] * passes)[:passes], dtype=np.float64)
        return np.minimum(found, self.pool) if self.retention == "pool" else found

    @property
    def held(self) -> float:
        """The share that layers >= k compute in the prompt, and hold behind it."""
        return float(self.read(1)[0]) if self.retention == "evict" else self.pool if self.retention == "pool" else 1.0


@dataclass(frozen=True)
class Phase:
    """One part of a request.

    Attributes:
        flops, bytes: of all sequences.
        seconds: at the rates it was predicted for.
        bound: ``"compute"`` or ``"bandwidth"``: which of the two it waits for.
    """

    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """A request, phase by phase.

    Attributes:
        encode, prefill, decode: decode is the sum over its ``new_tokens - 1`` steps: the first token is the prefill's.
        weight_bytes: all weights, with the embedding and the vision side.
        kv_bytes: keys and values at the end, where the cache is fullest.
        batch, new_tokens, pictures: of the request.
    """

    encode: Phase
    prefill: Phase
    decode: Phase
    weight_bytes: float
    kv_bytes: float
    batch: int
    new_tokens: int
    pictures: float

    @property
    def seconds(self) -> float:
        return self.first_token + self.decode.seconds

    @property
    def first_token(self) -> float:
        """Seconds until the first token."""
        return self.encode.seconds + self.prefill.seconds

    @property
    def images_per_s(self) -> float:
        return self.batch * self.pictures / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences, over the whole request."""
        return self.batch * self.new_tokens / self.seconds

    @property
    def peak_bytes(self) -> float:
        """Weights, keys and values: what must fit at least, activations left out."""
        return self.weight_bytes + self.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        names = ("seconds", "first_token", "images_per_s", "tokens_per_s", "peak_bytes")
        return asdict(self) | {"first_token_seconds" if name == "first_token" else name: getattr(self, name) for name in names}

    def facts(self) -> dict[str, Any]:
        """Returns what stands in a measured row beside what was measured, ``predicted_`` before each name."""
        found = {
            "encode_us": 1e6 * self.encode.seconds, "first_token_us": 1e6 * self.first_token, "decode_us": 1e6 * self.decode.seconds,
            "request_us": 1e6 * self.seconds, "images_per_s": self.images_per_s, "request_tokens_per_s": self.tokens_per_s,
            "peak_bytes": self.peak_bytes,
        }  # fmt: skip
        bounds = {name: getattr(self, name).bound for name in ("encode", "prefill", "decode")}
        return {f"predicted_{name}": value for name, value in found.items()} | {"predicted_bound": bounds}


def step_weight_bytes(shape: ModelShape) -> int:
    """Bytes of weights that a pass of the text model reads: all but the embedding table, of which it reads a row a token (a head that is
    tied to it is read whole).
    """
    table = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size * flops.item_bytes(shape.dtype)
    return flops.weight_bytes(shape) - table


def _phase(work: Any, moved: Any, rates: Rates) -> Phase:
    """Of one pass, or of one a step (arrays)."""
    compute, memory = np.asarray(work) / rates.flops, np.asarray(moved) / rates.bandwidth
    bound = COMPUTE if compute.sum() > memory.sum() else BANDWIDTH
    return Phase(float(np.sum(work)), float(np.sum(moved)), float(np.maximum(compute, memory).sum()), bound)


def predict(request: Request, plan: Plan, rates: Rates) -> Prediction:
    """Returns what a request takes at least, phase by phase, and what it holds."""
    shape, batch = request.shape, request.batch
    layers, k = shape.num_layers, min(max(plan.k, 0), shape.num_layers)
    row = flops.kv_bytes_per_token(shape) / layers
    weights = float(step_weight_bytes(shape) if request.step_weights is None else request.step_weights)
    rows = np.array([request.visual + request.text] * k + [request.visual * plan.held + request.text] * (layers - k))
    prefill = _phase(batch * flops.prefill_flops(shape, rows), weights + batch * row * float(rows.sum()), rates)
    steps = np.arange(1, request.new_tokens)
    text = request.text + steps  # a step's own token is in the cache when it attends
    whole, pruned = request.visual + text, request.visual * plan.read(request.new_tokens)[1:] + text
    work = batch * (
        k * flops.layer_flops(shape, 1.0, whole) + (layers - k) * flops.layer_flops(shape, 1.0, pruned) + flops.head_flops(shape)
    )
    decode = _phase(work, weights + batch * row * (k * whole + (layers - k) * pruned), rates)
    encoded, eye = 0.0, 0.0
    if request.vision is not None:
        crops = crops_of(request.vision, round(request.visual)) if request.crops is None else request.crops
        encoded = batch * encode_flops(request.vision, crops)
        eye = float(vision_parameters(request.vision) * flops.item_bytes(shape.dtype))
    held = batch * row * (float(rows.sum()) + layers * (request.new_tokens - 1))
    encode = _phase(encoded, eye if encoded else 0.0, rates)
    every = flops.weight_bytes(shape) + eye
    return Prediction(encode, prefill, decode, every, held, batch, request.new_tokens, request.pictures)


def largest_batch(request: Request, plan: Plan, rates: Rates) -> int | None:
    """Returns how many sequences fit at most beside the weights, activations left out; None where the memory's size is not known."""
    if rates.memory is None:
        return None
    found = predict(request, plan, rates)
    return max(int((rates.memory - found.weight_bytes) // (found.kv_bytes / request.batch)), 0)


def kept_of(policy: Policy, visual: int, new_tokens: int) -> tuple[tuple[float, ...], bool]:
    """Returns the share of the visual tokens that a policy keeps in each pass, and whether that is assumed.

    Exact for a schedule and for policies that keep a fixed share; an upper bound where a policy names no more than that
    (``Policy.kept_bound``); ``ASSUMED_KEPT`` where what it keeps depends on what it sees.
    """
    if not policy.decides or not policy.drops:
        return (1.0,), False
    if isinstance(policy, Schedule):
        counts = [min([visual, *(count for step, count in policy.kept if step <= now)][-1], visual) for now in range(new_tokens)]
        return tuple(count / max(visual, 1) for count in counts), False
    share = policy.kept_bound(visual) / max(visual, 1)
    return ((share,), False) if share < 1 else ((ASSUMED_KEPT,), True)


def kept_at_most(policy: Policy, num_layers: int) -> bool:
    """Returns whether a bound policy may keep less than the share of :func:`kept_of`: in later layers, or by what it sees."""
    exact = not policy.decides or not policy.drops or isinstance(policy, Schedule)
    return not exact and not (policy.constant and len(policy.layer_groups(num_layers)) == 1)


# ---- models by name ------------------------------------------------------------------------------------------------


def _clip_336(text: int, newline: bool) -> VisionShape:
    return _clip(24, 1024, 4096, 336, 14, text, newline=newline)


VISION: dict[str, VisionShape] = {
    "llava-1.5-7b": _clip_336(4096, False),
    "llava-1.5-13b": _clip_336(5120, False),
    "llava-next-7b": _clip_336(4096, True),
    "llava-next-13b": _clip_336(5120, True),
    "llava-next-mistral-7b": _clip_336(4096, True),
    "video-llava-7b": _clip(24, 1024, 4096, 224, 14, 4096, keeps_cls=True),
    "llava-onevision-7b": _siglip(26, 1152, 4304, 384, 14, 3584, newline=True),
    "qwen2.5-vl-7b": _qwen(32, 1280, 3420, 14, 3584, 4, 112),
}
CROPS = {"llava-next-7b": 5, "llava-next-13b": 5, "llava-next-mistral-7b": 5, "video-llava-7b": 8, "llava-onevision-7b": 5}


def pictures_of(name: str, visual: int) -> float:
    """Returns how many pictures (of Video-LLaVA: videos) so many visual tokens of a model of ``flops.MODELS`` are."""
    vision = VISION[name]
    return 1 if vision.side is None else len(crops_of(vision, visual)) / CROPS.get(name, 1)


def named_request(name: str, batch: int, new_tokens: int, visual: int | None = None, text: int = 128) -> Request:
    """A request to a model of ``flops.MODELS``.

    Args:
        visual: None: what the model makes of one picture.

    Raises:
        ValueError: there is no such model, or a number is out of range.
    """
    model = flops.named_model(name)
    visual = model.visual_tokens if visual is None else visual
    return Request(model.shape, batch, visual, text, new_tokens, VISION[name], pictures=pictures_of(name, visual))
