"""Procedurally drawn scenes: coloured shapes at places in a picture, with two sizes, moderate overlaps and distractors.

Everything follows from a seed, so a data set is a range of seeds and needs no files.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 0.075, "large": 0.145}  # radius as a share of the picture's side
PLACES = (
    "top left", "top centre", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
MIN_OBJECTS, MAX_OBJECTS = 2, 5
_OVERSAMPLING = 3


@dataclass(frozen=True)
class Thing:
    """One object of a scene. ``x``, ``y``, ``radius`` are shares of the picture's side; ``angle`` is in radians."""

    place: str
    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def words(self) -> dict[str, str]:
        """The attributes that an answer can name."""
        return {"place": self.place, "size": self.size, "colour": self.colour, "shape": self.shape}


@dataclass(frozen=True)
class Scene:
    """A picture's content: things in reading order, one at most a place, and distractors that no answer mentions."""

    seed: int
    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    lines: tuple[tuple[float, float, float, float], ...]
    specks: tuple[tuple[float, float], ...]
    noise: float

    def at(self, place: str) -> Thing | None:
        """The thing at a place, if any."""
        return next((thing for thing in self.things if thing.place == place), None)


def make_scene(seed: int, min_objects: int = MIN_OBJECTS, max_objects: int = MAX_OBJECTS) -> Scene:
    """The scene of a seed.

    Raises:
        ValueError: not 0 <= min_objects <= max_objects <= 9.
    """
    if not 0 <= min_objects <= max_objects <= len(PLACES):
        raise ValueError(f"min_objects and max_objects must satisfy 0 <= min <= max <= {len(PLACES)}, got {min_objects} and {max_objects}")
    rng = random.Random(f"scene {seed}")
    cells = sorted(rng.sample(range(len(PLACES)), rng.randint(min_objects, max_objects)))
    things = []
    for cell in cells:
        size = rng.choice(list(SIZES))
        things.append(
            Thing(
                place=PLACES[cell],
                size=size,
                colour=rng.choice(list(COLOURS)),
                shape=rng.choice(SHAPES),
                x=(cell % 3 + 0.5) / 3 + rng.uniform(-0.06, 0.06),
                y=(cell // 3 + 0.5) / 3 + rng.uniform(-0.06, 0.06),
                radius=SIZES[size] * rng.uniform(0.9, 1.1),
                angle=rng.uniform(-0.3, 0.3),
            )
        )
    grey = rng.randint(190, 245)

    def shade() -> int:
        return min(255, max(0, grey + rng.randint(-12, 12)))

    return Scene(
        seed=seed,
        things=tuple(things),
        background=(shade(), shade(), shade()),
        lines=tuple((rng.random(), rng.random(), rng.random(), rng.random()) for _ in range(rng.randint(0, 2))),
        specks=tuple((rng.random(), rng.random()) for _ in range(rng.randint(0, 8))),
        noise=rng.uniform(0, 0.06),
    )


def draw(scene: Scene, size: int = 96) -> Image.Image:
    """The scene as an RGB picture of ``size`` x ``size`` pixels, anti-aliased."""
    side = size * _OVERSAMPLING
    picture = Image.new("RGB", (side, side), scene.background)
    brush = ImageDraw.Draw(picture)
    shade = tuple(max(0, value - 35) for value in scene.background)
    thin = max(1, side // 150)
    for x0, y0, x1, y1 in scene.lines:
        brush.line([x0 * side, y0 * side, x1 * side, y1 * side], fill=shade, width=thin)
    for x, y in scene.specks:
        brush.ellipse([x * side - thin, y * side - thin, x * side + thin, y * side + thin], fill=shade)
    for thing in sorted(scene.things, key=lambda thing: -thing.radius):  # small ones on top, so that none is hidden
        _draw_thing(brush, thing, side)
    picture = picture.reduce(_OVERSAMPLING)
    if scene.noise > 0:
        grains = random.Random(f"noise {scene.seed}").randbytes(size * size)
        grain = Image.frombytes("L", (size, size), grains)
        picture = Image.blend(picture, Image.merge("RGB", (grain, grain, grain)), scene.noise)
    return picture


def _draw_thing(brush: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    cx, cy, r = thing.x * side, thing.y * side, thing.radius * side
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        brush.ellipse([cx - r, cy - r, cx + r, cy + r], fill=colour)
        return
    brush.polygon([(cx + r * x, cy + r * y) for x, y in _outline(thing.shape, thing.angle)], fill=colour)


def _outline(shape: str, angle: float) -> list[tuple[float, float]]:
    """Corners around the origin, within a unit circle (a square and a cross a little beyond, to look equally large)."""
    if shape == "cross":
        w, r = 0.36, 1.05
        corners = [
            (-w, -r),
            (w, -r),
            (w, -w),
            (r, -w),
            (r, w),
            (w, w),
            (w, r),
            (-w, r),
            (-w, w),
            (-r, w),
            (-r, -w),
            (-w, -w),
        ]
    elif shape == "star":
        radii = [1.15, 0.48] * 5
        corners = [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    else:
        count, radius, turn = {"square": (4, 1.2, math.pi / 4), "triangle": (3, 1.2, 0.0)}[shape]
        corners = [
            (radius * math.sin(turn + i * 2 * math.pi / count), -radius * math.cos(turn + i * 2 * math.pi / count)) for i in range(count)
        ]
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]
