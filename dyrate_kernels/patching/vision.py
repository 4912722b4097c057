"""Reducers in a patched model: the tower runs once, its features are reduced, and the prompt's columns of what went are masked.

``prepare`` calls the model's own ``get_image_features`` and ``get_video_features`` before ``generate`` does, in a ``Run``
(``tower.TowerRun`` where the reducers can watch the tower, ``grids.GridRun`` for all others), and hands ``generate`` the same prompt with
an attention mask that is 0 at the placeholders of dropped tokens. So the cache never stores what is masked (``columns.narrow`` also keeps
it out of the layers), and the sequences that come back hold the caller's prompt unchanged. Positions are contiguous, as transformers
itself makes them from the mask; where they have three dimensions (Qwen-VL), every token keeps its own. Where that generation asks for
features, and nowhere else, they are the reduced ones (``features_for``), in the layout of the placeholders.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import families
from dyrate_kernels.patching import grids, tower
from dyrate_kernels.patching.reducing import Run
from dyrate_kernels.vision.base import Reducer

PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


# ---- before a generation ------------------------------------------------------------------------------------------------------------


def check_reducers(model: Any, reducers: Sequence[Reducer]) -> None:
    """Checks that these reducers can work in ``model``.

    Raises:
        TypeError: they know nothing of the family, or read a tower that they do not know.
        ValueError: a reducer that merges between layers, with an attention of the tower that takes no additive mask.
    """
    if not reducers:
        return
    kind, eyes = model.config.model_type, model.config.vision_config
    if not tower.reads(model):
        if not grids.reads(model):
            known = ", ".join(families.names(lambda family: family.tower or family.grid))
            raise TypeError(f"vision reducers know {known}; not {kind} with the tower {eyes.model_type}; patch with vision=None")
        for reducer in reducers:
            if reducer.reads_tower:
                known = ", ".join(families.names(lambda family: family.tower))
                raise TypeError(
                    f"reducer {reducer.name!r} reads the vision tower, which is known of {known} with the towers "
                    f"{', '.join(families.TOWERS)}, not of {kind} with {eyes.model_type}; use aim, divprune, downsample or uniform"
                )
        return
    attention = getattr(eyes, "_attn_implementation", None)
    if reducers[0].in_layers and attention not in ("eager", "sdpa", None):
        raise ValueError(
            f"reducer {reducers[0].name!r} adds log(size) to the tower's attention, which {attention!r} cannot; load the model with "
            "attn_implementation={'vision_config': 'sdpa'}"
        )


def pixel_kinds(arguments: dict[str, Any]) -> list[str]:
    """Of ``image`` and ``video`` those whose pixels are among the arguments of ``generate``."""
    return [kind for kind, names in PIXELS.items() if any(arguments.get(name) is not None for name in names)]


@dataclass
class Features:
    """Reduced features of one kind.

    Attributes:
        output: of ``get_image_features`` or ``get_video_features``.
        pixels: that they are of.
        rows: by picture or video, the sequence of the batch that it is in; ends: where its rows end in ``output``.
    """

    output: Any
    pixels: Tensor
    rows: list[int]
    ends: list[int]


@dataclass
class PreparedPrompt:
    """Reduced features, waiting for the model to ask for them.

    Attributes:
        mask: int64 ``[B, S]``, the prompt's attention mask, 0 at the placeholders of dropped tokens.
        features: by kind.
    """

    mask: Tensor
    features: dict[str, Features] = field(default_factory=dict)


def run_for(model: Any, kind: str, reducers: Sequence[Reducer], backend: str) -> Run:
    """Returns the run that reduces this model's pictures (``kind`` ``image``) or videos."""
    return (tower.TowerRun if tower.reads(model) else grids.GridRun)(model, kind, reducers, backend)


def prepare(model: Any, reducers: Sequence[Reducer], backend: str, arguments: dict[str, Any], ids: Tensor, mask: Tensor) -> PreparedPrompt:
    """Runs the tower and the reducers.

    Args:
        arguments: of ``generate``, by name.
        ids: int64 ``[B, q]``, the new columns of the prompt.
        mask: ``[B, S]``, of all columns so far, the new ones last; not changed.

    Raises:
        ValueError: the placeholders do not match the pictures.
    """
    mask = mask.clone()
    prepared = PreparedPrompt(mask)
    for kind in pixel_kinds(arguments):
        encoder = getattr(model.base_model, f"get_{kind}_features")
        known = {*inspect.signature(encoder).parameters}
        if kind == "image" and "kwargs" in known:
            known.add("image_sizes")  # not named there in older versions of transformers, for a LLaVA with Pixtral's tower
        every = {name for names in PIXELS.values() for name in names}
        fields = {name: arguments[name] for name in known if name not in {"kwargs", *every} and arguments.get(name) is not None}
        pixels = next(arguments[name] for name in PIXELS[kind] if arguments.get(name) is not None)
        # older versions of transformers call a video's pixels, or a picture's, by other names
        fields[next(name for name in (*PIXELS[kind], "pixel_values") if name in known)] = pixels
        placeholder = ids == getattr(model.config, f"{kind}_token_id")
        with torch.no_grad():
            run = run_for(model, kind, reducers, backend)
            output = run.encode(encoder, fields, pixels)
            layouts = run.layouts(output)
            ends = list(accumulate(len(layout.visual.values) + layout.tail for layout in layouts))
            if ends[-1] != int(placeholder.sum()):
                raise ValueError(
                    f"input_ids hold {int(placeholder.sum())} {kind} placeholders, but the {kind}s given make {ends[-1]} visual tokens; "
                    "pass what the model's processor returned"
                )
            row, column = placeholder.nonzero().unbind(1)
            last = torch.tensor(ends, device=row.device) - 1
            units = run.reduce(layouts, row[last].tolist())
        at_the_end = (column[last] == ids.shape[1] - 1).tolist()
        arranged = [unit.arranged(at_end) for unit, at_end in zip(units, at_the_end, strict=True)]
        keep = torch.cat([kept for _, kept in arranged]).to(mask.device)
        new = mask[:, -ids.shape[1] :]
        new[placeholder.to(mask.device)] *= keep.to(mask.dtype)
        values = [values for values, _ in arranged]
        spans = list(accumulate(map(len, values)))
        prepared.features[kind] = Features(_with_values(output, values), pixels, row[last].tolist(), spans)
    return prepared


# ---- while it generates -------------------------------------------------------------------------------------------------------------


def features_for(prepared: PreparedPrompt, kind: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Returns the answer of ``get_image_features`` or ``get_video_features`` (``kind``); None where these pixels were not reduced.

    Args:
        args, kwargs: of that call.
    """
    features = prepared.features.get(kind)
    names = (*PIXELS[kind], "pixel_values")
    pixels = args[0] if args else next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    if features is None or pixels is None or pixels.shape[0] % features.pixels.shape[0]:
        return None
    times = pixels.shape[0] // features.pixels.shape[0]
    # older versions of transformers ask for each beam
    return _repeated(features, times) if times > 1 or _same(pixels, features.pixels) else None


def _same(pixels: Tensor, known: Tensor) -> bool:
    """They are the same pictures, whatever dtype and device the model has brought them to."""
    if pixels is known or (pixels.shape == known.shape and pixels.data_ptr() == known.data_ptr()):
        return True
    return pixels.shape == known.shape and torch.equal(pixels.nan_to_num(), known.to(pixels.device, pixels.dtype).nan_to_num())


def _repeated(features: Features, times: int) -> Any:
    """A copy of the output that holds what belongs to each sequence ``times`` times in a row."""
    output = features.output

    def again(values: Any) -> Any:
        if times == 1:
            return values if isinstance(values, Tensor) else list(values)
        spans = zip([0, *features.ends], features.ends, strict=False)
        items = [values[start:end] for start, end in spans] if _flat(values) else list(values)
        last = list(accumulate(item.shape[:-1].numel() for item in items))
        sequences = [features.rows[next(unit for unit, until in enumerate(features.ends) if end <= until)] for end in last]
        order = [at for one in sorted(set(sequences)) for at in [at for at, of in enumerate(sequences) if of == one] * times]
        items = [items[at] for at in order]
        if not isinstance(values, Tensor):
            return items
        return torch.cat(items) if _flat(values) else torch.stack(items)

    found = copy.copy(output)
    found.pooler_output = again(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        found.deepstack_features = [again(layer) for layer in output.deepstack_features]
    return found


def _flat(values: Any) -> bool:
    """One row a visual token, not an item a picture."""
    return isinstance(values, Tensor) and values.dim() == 2


def _with_values(output: Any, values: list[Tensor]) -> Any:
    """Returns the output of a model's ``get_*_features`` with these values ``[n, d]`` of each picture or video."""
    found, every = output.pooler_output, torch.cat(values)
    pooled = every.view_as(found) if isinstance(found, Tensor) else list(every.split([len(item) for item in found]))
    changed = copy.copy(output)  # in older versions of transformers its class has no such field
    changed.pooler_output = pooled
    return changed
