"""Draws the pictures of this folder: three scenes of ``dyrate_kernels.shapes`` and one shaded still life that looks like a photograph.

python examples/make_examples.py [FOLDER]

The still life is ray traced here: balls and blocks on a table, a lamp with soft shadows, a lens that blurs what is far, grain of a sensor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from dyrate_kernels import shapes

SCENE_SEEDS = {"shapes_1.png": 9001, "shapes_2.png": 9017, "shapes_3.png": 9030}
SIDE = 336
LAMP = np.array([-3.2, 5.5, -2.6])
LAMP_RADIUS = 0.7
BALLS = [  # centre, radius, colour, shine
    ((-0.95, 0.75, 0.35), 0.75, (0.80, 0.10, 0.09), 0.7),
    ((0.75, 0.55, -0.35), 0.55, (0.93, 0.70, 0.10), 0.4),
    ((1.65, 0.90, 1.35), 0.90, (0.13, 0.22, 0.75), 0.6),
    ((-0.15, 0.33, -0.95), 0.33, (0.16, 0.52, 0.20), 0.5),
]


def _hit(origin: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest thing along each ray: its distance, and its number (-1: nothing, 0: table, 1: wall, 2..: balls)."""
    far = np.full(ray.shape[:-1], np.inf)
    what = np.full(ray.shape[:-1], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        for number, (axis, place) in enumerate(((1, 0.0), (2, 4.5))):
            along = (place - origin[..., axis]) / ray[..., axis]
            nearer = (along > 1e-4) & (along < far)
            far, what = np.where(nearer, along, far), np.where(nearer, number, what)
    for number, (centre, radius, _, _) in enumerate(BALLS):
        to_ball = origin - np.array(centre)
        b = (to_ball * ray).sum(-1)
        inside = b * b - (to_ball * to_ball).sum(-1) + radius * radius
        along = -b - np.sqrt(np.maximum(inside, 0))
        nearer = (inside > 0) & (along > 1e-4) & (along < far)
        far, what = np.where(nearer, along, far), np.where(nearer, number + 2, what)
    return far, what


def _colour(point: np.ndarray, what: np.ndarray) -> np.ndarray:
    """The surface's own colour: wooden table, plain wall, painted balls."""
    x, z = point[..., 0], point[..., 2]
    grain = 0.5 + 0.5 * np.sin(14 * z + 2.2 * np.sin(1.7 * x + 0.6 * z) + 0.8 * np.sin(9 * x))
    plank = 0.86 + 0.14 * np.cos(2.3 * np.floor(z * 1.4) + 0.7)
    wood = np.array([0.55, 0.35, 0.19]) * (0.75 + 0.25 * grain * plank)[..., None] * np.where((z * 1.4) % 1 < 0.025, 0.45, 1.0)[..., None]
    colour = np.where((what == 0)[..., None], wood, np.array([0.62, 0.66, 0.66]))
    for number, (_, _, paint, _) in enumerate(BALLS):
        colour = np.where((what == number + 2)[..., None], np.array(paint), colour)
    return colour


def _shade(origin: np.ndarray, ray: np.ndarray, rng: np.random.Generator, bounces: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Light that comes along each ray, and the distance it comes from."""
    far, what = _hit(origin, ray)
    point = origin + ray * np.where(np.isfinite(far), far, 0.0)[..., None]
    normal = np.zeros_like(point)
    normal[what == 0] = (0, 1, 0)
    normal[what == 1] = (0, 0, -1)
    shine = np.where(what == 0, 0.12, 0.0)
    for number, (centre, radius, _, gloss) in enumerate(BALLS):
        on = what == number + 2
        normal[on] = (point[on] - np.array(centre)) / radius
        shine = np.where(on, gloss, shine)
    to_lamp = LAMP + LAMP_RADIUS * rng.normal(size=point.shape) - point
    gap = np.linalg.norm(to_lamp, axis=-1, keepdims=True)
    to_lamp = to_lamp / gap
    blocked_at, _ = _hit(point + 1e-3 * normal, to_lamp)
    lit = (blocked_at > gap[..., 0]) * np.maximum((normal * to_lamp).sum(-1), 0) * 42 / gap[..., 0] ** 2
    ambient = 0.11 + 0.10 * np.maximum(normal[..., 1], 0)
    for centre, radius, _, _ in BALLS:  # the table is darker close below a ball
        near = np.hypot(point[..., 0] - centre[0], point[..., 2] - centre[2]) / radius
        ambient = np.where(what == 0, ambient * (1 - 0.6 * np.exp(-2.2 * near**2)), ambient)
    light = _colour(point, what) * (lit + ambient)[..., None] * np.array([1.0, 0.95, 0.86])
    mirror = ray - 2 * (ray * normal).sum(-1, keepdims=True) * normal
    spot = np.maximum((mirror * to_lamp).sum(-1), 0) ** 60 * (lit > 0) * shine
    light += spot[..., None]
    if bounces:
        seen, _ = _shade(point + 1e-3 * normal, mirror, rng, bounces - 1)
        grazing = (1 - np.maximum(-(ray * normal).sum(-1), 0)) ** 4
        light += seen * (shine * (0.06 + 0.4 * grazing))[..., None]
    light[what == -1] = 0.5
    return light, far


def still_life(width: int = 448, height: int = 336, rays: int = 40, seed: int = 5) -> Image.Image:
    """A ray-traced picture of four balls on a table, RGB ``width`` x ``height``."""
    rng = np.random.default_rng(seed)
    eye, target = np.array([0.35, 2.0, -5.6]), np.array([0.3, 0.62, 0.0])
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross((0.0, 1.0, 0.0), ahead)
    right /= np.linalg.norm(right)
    up = np.cross(ahead, right)
    focus = np.linalg.norm(target - eye) - 0.5
    light = np.zeros((height, width, 3))
    rows, columns = np.mgrid[0:height, 0:width]
    for _ in range(rays):
        across = (columns + rng.random((height, width)) - width / 2) / height * 0.78
        upward = -(rows + rng.random((height, width)) - height / 2) / height * 0.78
        aim = eye + focus * (ahead + across[..., None] * right + upward[..., None] * up)
        angle, reach = 2 * np.pi * rng.random((height, width)), 0.055 * np.sqrt(rng.random((height, width)))
        origin = eye + (reach * np.cos(angle))[..., None] * right + (reach * np.sin(angle))[..., None] * up
        ray = aim - origin
        light += _shade(origin, ray / np.linalg.norm(ray, axis=-1, keepdims=True), rng)[0]
    light /= rays
    corner = np.hypot((columns - width / 2) / width, (rows - height / 2) / height)
    light *= (1 - 0.55 * corner**2)[..., None]
    light = 1 - np.exp(-1.05 * light)  # film: bright spots saturate softly
    value = np.clip(light, 0, 1) ** (1 / 2.2)
    value += rng.normal(scale=0.012, size=value.shape) + rng.normal(scale=0.008, size=(*value.shape[:2], 1))
    return Image.fromarray((np.clip(value, 0, 1) * 255).round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


def main() -> None:
    """Writes the pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in SCENE_SEEDS.items():
        shapes.draw(shapes.make_scene(seed, min_objects=4), SIDE).save(folder / name, optimize=True)
    still_life().save(folder / "still_life.jpg", quality=90)


if __name__ == "__main__":
    main()
