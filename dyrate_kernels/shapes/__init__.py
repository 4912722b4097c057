"""Drawn scenes, questions about them, and a scorer: data that needs no download.

>>> from dyrate_kernels import shapes
>>> sample = shapes.make_sample(seed=7, task="describe")
>>> picture = sample.image(336)
>>> shapes.score(sample, sample.answer).fraction
1.0
"""

from dyrate_kernels.shapes.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, draw, make_scene
from dyrate_kernels.shapes.scoring import Score, accuracy_interval, parse_description, score
from dyrate_kernels.shapes.tasks import DESCRIBE_PROMPT, SHORT_TASKS, TASKS, Sample, describe, make_sample

__all__ = [
    "COLOURS",
    "DESCRIBE_PROMPT",
    "PLACES",
    "SHAPES",
    "SHORT_TASKS",
    "SIZES",
    "TASKS",
    "Sample",
    "Scene",
    "Score",
    "Thing",
    "accuracy_interval",
    "describe",
    "draw",
    "make_sample",
    "make_scene",
    "parse_description",
    "score",
]
