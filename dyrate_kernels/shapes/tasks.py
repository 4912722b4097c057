"""Questions about a scene and their answers: one long task (describe) and five short ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from dyrate_kernels.shapes.scenes import COLOURS, PLACES, SHAPES, Scene, Thing, draw, make_scene

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DESCRIBE_PROMPT = "Describe the picture."


@dataclass(frozen=True)
class Sample:
    """One question: the scene, its picture on request, the prompt and the true answer."""

    scene: Scene
    task: str
    prompt: str
    answer: str

    def image(self, size: int = 96) -> Image.Image:
        """The picture to show, RGB ``size`` x ``size``."""
        return draw(self.scene, size)


def at_place(place: str) -> str:
    """A place as a phrase: ``at the top left``, ``in the centre``."""
    return "in the centre" if place == "centre" else f"at the {place}"


def _count_of(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun}" + ("" if number == 1 else "s")


def describe(scene: Scene) -> str:
    """The long answer: how many, then each thing in reading order: place, size, colour, shape."""
    verb = "is" if len(scene.things) == 1 else "are"
    sentences = [f"There {verb} {_count_of(len(scene.things), 'object')} in the picture."]
    for thing in scene.things:
        phrase = at_place(thing.place)
        sentences.append(f"{phrase[0].upper()}{phrase[1:]} there is a {thing.size} {thing.colour} {thing.shape}.")
    return " ".join(sentences)


def _describe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return DESCRIBE_PROMPT, describe(scene)


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    return f"What colour is the {thing.shape} {at_place(thing.place)}?", thing.colour


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    return f"What shape is the {thing.colour} object {at_place(thing.place)}?", thing.shape


def _unique(scene: Scene) -> list[Thing]:
    kinds = [(thing.colour, thing.shape) for thing in scene.things]
    return [thing for thing in scene.things if kinds.count((thing.colour, thing.shape)) == 1]


def _place(scene: Scene, rng: random.Random) -> tuple[str, str]:
    unique = _unique(scene)
    if not unique:
        return _count(scene, rng)
    thing = rng.choice(unique)
    return f"Where is the {thing.colour} {thing.shape}?", at_place(thing.place)


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(("object", "colour", "shape"))
    if kind == "object":
        return "How many objects are there?", NUMBERS[len(scene.things)]
    names = list(COLOURS) if kind == "colour" else list(SHAPES)
    present = [getattr(thing, kind) for thing in scene.things]
    name = rng.choice(present) if present and rng.random() < 0.7 else rng.choice(names)
    asked = f"{name} objects" if kind == "colour" else f"{name}s" if name != "cross" else "crosses"
    return f"How many {asked} are there?", NUMBERS[present.count(name)]


def _existence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    kinds = [(thing.colour, thing.shape) for thing in scene.things]
    if rng.random() < 0.5:
        colour, shape = rng.choice(kinds)
    else:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if rng.random() < 0.5:  # the hard kind of no: colour and shape are both there, on different things
            colour, shape = rng.choice(kinds)[0], rng.choice(kinds)[1]
    return f"Is there a {colour} {shape}?", "yes" if (colour, shape) in kinds else "no"


_TASKS: dict[str, Callable[[Scene, random.Random], tuple[str, str]]] = {
    "describe": _describe,
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "count": _count,
    "existence": _existence,
}
TASKS = tuple(_TASKS)
SHORT_TASKS = TASKS[1:]


def make_sample(seed: int, task: str, scene: Scene | None = None) -> Sample:
    """The question of a seed, about ``scene`` or the scene of the same seed.

    Raises:
        ValueError: unknown task, or a short task about an empty scene.
    """
    if task not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    scene = make_scene(seed) if scene is None else scene
    if task != "describe" and not scene.things:
        raise ValueError(f"task {task!r} asks about things, and this scene has none; use 'describe'")
    prompt, answer = _TASKS[task](scene, random.Random(f"{task} {seed}"))
    return Sample(scene, task, prompt, answer)


def corpus() -> list[str]:
    """Every sentence form with every word: what a tokenizer is trained on."""
    lines = []
    for seed in range(400):
        scene = make_scene(seed, 1, 9)
        for task in TASKS:
            sample = make_sample(seed, task, scene)
            lines += [f"USER: {sample.prompt}", f" ASSISTANT: {sample.answer}"]
    lines += [f" {at_place(place)} {place}" for place in PLACES] + [f" {number}" for number in NUMBERS]
    return lines
