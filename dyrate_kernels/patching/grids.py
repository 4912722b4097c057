"""Reducers for towers that are not watched: they work on the grids of visual tokens that come out of the model's own projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.families import names
from dyrate_kernels.patching.reducing import Layout, Run
from dyrate_kernels.vision.base import Visual


def reads(model: Any) -> bool:
    """Returns whether the grids of this model's visual tokens are known."""
    return model.config.model_type in names(lambda family: family.grid)


class GridRun(Run):
    """Every crop, tile or frame is a grid of tokens in raster order. A tile is a picture of its own here: either the prompt has text
    between tiles, or the model is not told which belong together.
    """

    fields: dict[str, Any]
    pixels: Tensor

    def encode(self, encoder: Callable, fields: dict[str, Any], pixels: Tensor) -> Any:
        """Remembers the sizes of what is encoded."""
        self.fields, self.pixels = fields, pixels
        return super().encode(encoder, fields, pixels)

    def layouts(self, output: Any) -> list[Layout]:
        """One for each picture, tile or video."""
        pooled = output.pooler_output
        values = torch.cat([item.reshape(-1, item.shape[-1]) for item in pooled])
        found, start, first = [], 0, 0
        for frames, height, width in self.grids(values.shape[0], pooled):
            patch = torch.arange(frames * height * width, device=values.device)
            frame, patch = patch // (height * width), patch % (height * width)
            item = values[start : start + len(patch)]
            visual = Visual(item, frame, patch // width, patch % width, frame, self.kind == "video")
            found.append(Layout(visual, patch, {}, False, None, first))
            start, first = start + len(patch), first + frames
        if start != values.shape[0]:
            raise ValueError(
                f"the {self.kind}s given should make {start} visual tokens by their sizes, but {self.model.config.model_type} made "
                f"{values.shape[0]}; patch with vision=None, and please report it"
            )
        return found

    def grids(self, total: int, pooled: Any) -> list[tuple[int, int, int]]:
        """Frames, height and width of each picture or video, in visual tokens; ``total`` rows came in all."""
        config, tower = self.model.config, self.model.config.vision_config
        shapes = self.fields.get(f"{self.kind}_grid_thw")
        if shapes is not None:
            side = tower.spatial_merge_size
            return [(frames, height // side, width // side) for frames, height, width in torch.as_tensor(shapes).tolist()]
        sizes = self.fields.get("image_sizes")
        if sizes is not None:
            side = tower.patch_size * getattr(config, "spatial_merge_size", 1)
            return [(1, height // side, width // side) for height, width in torch.as_tensor(sizes).tolist()]
        if hasattr(config, "scale_factor"):  # the pictures of a sequence come as one: Idefics3, SmolVLM
            each = (self.pixels.shape[-2] // tower.patch_size) * (self.pixels.shape[-1] // tower.patch_size) // config.scale_factor**2
        else:
            each = pooled[0].shape[-2]
        side = round(each**0.5)
        return [(1, side, side)] * (total // each)
