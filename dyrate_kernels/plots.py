"""Pictures of a generation: which patches were kept when, and the curves behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyrate_kernels.stats import Stats

# Okabe-Ito colours: told apart by readers who see colours differently
COLOURS = {"system": "#999999", "image": "#D55E00", "instruction": "#0072B2", "response": "#009E73"}
_INK = "#222222"


def generation(image: Any, stats: Stats, path: str | Path, panels: int = 5, sequence: int = 0) -> None:
    """Draws one sequence's generation: the picture with each dropped patch greyed at several steps, kept tokens, and mass by type.

    Args:
        image: PIL picture that was shown, or a list of those that were.
        stats: from a generation under ``patch(..., record_importance=True)``.
        path: file to write; its ending chooses the format (png, pdf, svg).
        panels: how many steps to show.
        sequence: which sequence of the batch.

    Raises:
        ValueError: the sequence has no visual tokens, or the stats hold no kept tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = stats.visual_tokens[sequence]
    if total == 0:
        raise ValueError("there is nothing to plot: this sequence has no visual tokens")
    if stats.steps[0].kept_tokens is None:
        raise ValueError("stats hold no kept tokens; generate under patch(..., record_importance=True)")
    figure = Figure(figsize=(2.3 * panels, 6.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 * panels, height_ratios=[1.0, 1.05])
    shown = _spread(len(stats.steps), panels)
    for panel, index in enumerate(shown):
        axes = figure.add_subplot(grid[0, 2 * panel : 2 * panel + 2])
        step = stats.steps[index]
        assert step.kept_tokens is not None  # as those of the first step
        kept = step.kept_tokens[sequence]
        if stats.visual_places is not None:  # what reducers left out is dropped from the first panel on
            kept = [stats.visual_places[sequence][token] for token in kept]
        _draw_kept(axes, image, kept, stats.visual_tokens_in[sequence])
        when = "prefill" if step.step == 0 else f"step {step.step}"
        axes.set_title(f"{when}\n{step.kept[sequence]} of {total} kept", fontsize=9, color=_INK)
    _draw_counts(figure.add_subplot(grid[1, :panels]), stats, sequence, [stats.steps[i].step for i in shown])
    _draw_mass(figure.add_subplot(grid[1, panels:]), stats, sequence)
    predictor = f", {stats.predictor} predictor" if stats.predictor else ""
    figure.suptitle(
        f"{stats.policy}{predictor}, {stats.retention}, layers >= {stats.k}: "
        f"{100 * stats.kept_mean:.1f} % of the visual tokens kept on average",
        fontsize=10.5, color=_INK,
    )  # fmt: skip
    figure.savefig(path)


def check_ending(name: str, path: str | Path) -> None:
    """Checks with a small drawing that matplotlib is here and draws into the format that a file's ending names.

    Args:
        name: of the option, for messages.

    Raises:
        ValueError: it does not; names the endings that matplotlib knows.
        ImportError: there is no matplotlib.
    """
    import io

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(f"{name} needs matplotlib: pip install matplotlib") from None
    ending = Path(path).suffix.lower().removeprefix(".")
    canvas = FigureCanvasAgg(Figure(figsize=(1, 1)))
    known = sorted(canvas.get_supported_filetypes())
    if ending not in known:
        got = f"ends in .{ending}" if ending else "has no ending"
        raise ValueError(f"{name} {path}: the name {got}; its ending chooses the format, one of {', '.join(known)}")
    canvas.figure.text(0, 0, "a")
    try:
        canvas.print_figure(io.BytesIO(), format=ending)
    except Exception as error:  # some formats need programs of their own
        raise ValueError(f"{name} {path}: a .{ending} file cannot be drawn here ({error}); take .png, .pdf or .svg") from error


def _spread(count: int, panels: int) -> list[int]:
    if count <= panels:
        return list(range(count))
    return sorted({round(i * (count - 1) / (panels - 1)) for i in range(panels)})


def _draw_kept(axes: Any, image: Any, kept: list[int], total: int) -> None:
    """The picture as the model divides it; dropped patches are greyed. Tokens that make no square are drawn as a strip below it."""
    import numpy as np

    axes.set_xticks([])
    axes.set_yticks([])
    keep = np.zeros(total, dtype=bool)
    keep[kept] = True
    shown = kept_picture(image, kept, total)
    if shown is None:
        columns = math.ceil(math.sqrt(total))
        cells = np.full(math.ceil(total / columns) * columns, np.nan)
        cells[:total] = keep
        axes.imshow(cells.reshape(-1, columns), cmap="viridis", vmin=0, vmax=1)
        return
    axes.imshow(shown)
    if isinstance(image, list) and len(image) > 1:
        return
    side = math.isqrt(total)
    cell = shown.shape[0] // side
    for line in range(1, side):
        axes.axhline(line * cell - 0.5, color="white", linewidth=0.25, alpha=0.45)
        axes.axvline(line * cell - 0.5, color="white", linewidth=0.25, alpha=0.45)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def kept_picture(image: Any, kept: Sequence[int], total: int, size: int = 336) -> Any:
    """The picture as a model divides it into ``total`` patches, those that were dropped greyed.

    Args:
        image: PIL picture, RGB; or a list of pictures that have equally many patches: they are drawn side by side, in rows.
        kept: indices of the patches that stay.
        size: of the result, about.

    Returns:
        float32 array ``[S, S, 3]`` in 0 .. 1 (several pictures: ``[H, W, 3]``); None where the tokens are no square of patches.
    """
    import numpy as np

    if isinstance(image, list):
        return _kept_pictures(image, kept, total, size)
    side = math.isqrt(total)
    if side == 0 or side * side != total:
        return None
    keep = np.zeros(total, dtype=bool)
    keep[list(kept)] = True
    cell = max(1, size // side)
    pixels = np.asarray(image.convert("RGB").resize((cell * side, cell * side)), dtype=np.float32) / 255
    mask = np.kron(keep.reshape(side, side), np.ones((cell, cell)))[..., None]
    grey = 0.30 * pixels.mean(-1, keepdims=True) + 0.30  # darker than most pictures' background, so that a dropped patch shows on it
    return np.where(mask > 0, pixels, grey).astype(np.float32)


def _kept_pictures(images: list[Any], kept: Sequence[int], total: int, size: int) -> Any:
    import numpy as np

    each, rest = divmod(total, max(len(images), 1))
    if len(images) == 1 or each == 0 or rest:
        return kept_picture(images[0], kept, total, size) if len(images) == 1 else None
    columns = math.ceil(math.sqrt(len(images) * 1.25))
    parts = []
    for number, image in enumerate(images):
        own = [token - number * each for token in kept if number * each <= token < (number + 1) * each]
        part = kept_picture(image, own, each, 2 * size // columns)
        if part is None:
            return None
        parts.append(np.pad(part, ((0, 4), (0, 4), (0, 0)), constant_values=1.0))
    parts += [np.ones_like(parts[0])] * (-len(parts) % columns)
    return np.concatenate([np.concatenate(parts[row : row + columns], 1) for row in range(0, len(parts), columns)])


def _style(axes: Any, label: str) -> None:
    axes.set_xlabel("generation step (0 = prefill)", fontsize=9, color=_INK)
    axes.set_ylabel(label, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_counts(axes: Any, stats: Stats, sequence: int, shown: list[int]) -> None:
    steps = [step.step for step in stats.steps]
    kept = [step.kept[sequence] for step in stats.steps]
    axes.fill_between(steps, kept, step="post", color=COLOURS["image"], alpha=0.15, linewidth=0)
    axes.step(steps, kept, where="post", color=COLOURS["image"], linewidth=1.4)
    axes.plot(shown, [stats.steps[i].kept[sequence] for i in shown], "o", markersize=3.5, color=COLOURS["image"])
    axes.set_ylim(0, 1.06 * stats.visual_tokens[sequence])
    axes.axhline(stats.visual_tokens[sequence], color="#888888", linewidth=0.8, linestyle="--")
    _style(axes, "visual tokens kept (dots: shown above)")


def _draw_mass(axes: Any, stats: Stats, sequence: int) -> None:
    steps = [step.step for step in stats.steps]
    for index, (name, colour) in enumerate(COLOURS.items()):
        values = [step.mass[sequence][index] for step in stats.steps]
        axes.plot(steps, values, color=colour, linewidth=1.4, label=name)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    _style(axes, f"attention mass at layer {stats.k - 1}, mean over heads")
