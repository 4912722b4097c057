"""Scenes, questions and scorer of ``dyrate_kernels.shapes``."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dyrate_kernels import shapes
from dyrate_kernels.shapes.tasks import NUMBERS, corpus

SEEDS = range(40)


def _with(scene: shapes.Scene, number: int, **changed: str) -> shapes.Scene:
    things = list(scene.things)
    things[number] = dataclasses.replace(things[number], **changed)
    return dataclasses.replace(scene, things=tuple(things))


def _other(values: object, value: str) -> str:
    return next(other for other in values if other != value)  # type: ignore[attr-defined]


# ---- scenes


def test_a_seed_gives_the_same_scene_and_the_same_picture() -> None:
    for seed in SEEDS:
        first, second = shapes.make_scene(seed), shapes.make_scene(seed)
        assert first == second
        assert shapes.draw(first, 96).tobytes() == shapes.draw(second, 96).tobytes()


def test_seeds_give_different_scenes() -> None:
    assert len({shapes.make_scene(seed) for seed in range(-100, 100)}) == 200


def test_scenes_use_every_word_and_every_number_of_things() -> None:
    scenes = [shapes.make_scene(seed) for seed in range(300)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.colour for thing in things} == set(shapes.COLOURS)
    assert {thing.shape for thing in things} == set(shapes.SHAPES)
    assert {thing.size for thing in things} == set(shapes.SIZES)
    assert {thing.place for thing in things} == set(shapes.PLACES)
    assert {len(scene.things) for scene in scenes} == {2, 3, 4, 5}


def test_things_are_in_reading_order_at_different_places_inside_the_picture() -> None:
    for seed in range(200):
        scene = shapes.make_scene(seed, 1, 9)
        cells = [shapes.PLACES.index(thing.place) for thing in scene.things]
        assert cells == sorted(set(cells))
        for thing, cell in zip(scene.things, cells, strict=True):
            assert int(thing.x * 3) == cell % 3 and int(thing.y * 3) == cell // 3


def test_every_thing_can_be_seen() -> None:
    """No thing is hidden by another: at least a quarter of its box's pixels have (nearly) its colour."""
    for seed in range(60):
        scene = dataclasses.replace(shapes.make_scene(seed), noise=0.0)
        picture = shapes.draw(scene, 96)
        for thing in scene.things:
            box = [
                round(96 * v)
                for v in (
                    thing.x - thing.radius,
                    thing.y - thing.radius,
                    thing.x + thing.radius,
                    thing.y + thing.radius,
                )
            ]
            part = picture.crop((max(box[0], 0), max(box[1], 0), min(box[2], 96), min(box[3], 96)))
            wanted = shapes.COLOURS[thing.colour]
            raw = part.tobytes()
            near = sum(
                max(abs(raw[i] - wanted[0]), abs(raw[i + 1] - wanted[1]), abs(raw[i + 2] - wanted[2])) < 8 for i in range(0, len(raw), 3)
            )
            assert near > 0.25 * part.width * part.height, (seed, thing)


@pytest.mark.parametrize("size", [1, 7, 96, 336])
def test_a_picture_has_the_asked_size(size: int) -> None:
    picture = shapes.draw(shapes.make_scene(3), size)
    assert picture.mode == "RGB" and picture.size == (size, size)


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (4, 3), (2, 10)])
def test_wrong_numbers_of_things_are_named(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="min_objects and max_objects"):
        shapes.make_scene(1, low, high)


# ---- questions


@pytest.mark.parametrize("task", shapes.TASKS)
def test_a_question_is_the_same_for_the_same_seed(task: str) -> None:
    for seed in SEEDS:
        assert shapes.make_sample(seed, task) == shapes.make_sample(seed, task)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"task must be one of describe, .*got 'weight'"):
        shapes.make_sample(1, "weight")


def test_a_description_names_every_attribute_once() -> None:
    for seed in SEEDS:
        scene = shapes.make_scene(seed, 1, 9)
        text = shapes.describe(scene)
        assert f" {NUMBERS[len(scene.things)]} object" in text
        assert shapes.parse_description(text) == [thing.words for thing in scene.things]


def test_an_empty_scene_has_a_description_but_no_short_questions() -> None:
    scene = shapes.make_scene(1, 0, 0)
    sample = shapes.make_sample(1, "describe", scene)
    assert "no objects" in sample.answer
    assert shapes.score(sample, sample.answer).fraction == 1.0
    for task in shapes.SHORT_TASKS:
        with pytest.raises(ValueError, match="has none"):
            shapes.make_sample(1, task, scene)


def test_short_answers_agree_with_the_scene() -> None:
    for seed in range(200):
        scene = shapes.make_scene(seed)
        colour = shapes.make_sample(seed, "colour", scene)
        there = [thing for thing in scene.things if f" {thing.shape} " in colour.prompt and thing.place in colour.prompt]
        assert colour.answer in {thing.colour for thing in there}
        shape = shapes.make_sample(seed, "shape", scene)
        there = [thing for thing in scene.things if f" {thing.colour} " in shape.prompt and thing.place in shape.prompt]
        assert shape.answer in {thing.shape for thing in there}
        existence = shapes.make_sample(seed, "existence", scene)
        seen = any(f"{thing.colour} {thing.shape}" in existence.prompt for thing in scene.things)
        assert existence.answer == ("yes" if seen else "no")


def test_yes_and_no_are_about_equally_frequent() -> None:
    answers = [shapes.make_sample(seed, "existence").answer for seed in range(600)]
    assert 0.35 < answers.count("yes") / len(answers) < 0.7


def test_the_corpus_holds_every_word() -> None:
    text = " ".join(corpus())
    for word in [*shapes.COLOURS, *shapes.SHAPES, *shapes.SIZES, *shapes.PLACES, *NUMBERS[:1]]:
        assert word in text


# ---- scorer


@pytest.mark.parametrize("task", shapes.TASKS)
def test_the_true_answer_is_right(task: str) -> None:
    for seed in SEEDS:
        sample = shapes.make_sample(seed, task)
        result = shapes.score(sample, sample.answer)
        assert result.fraction == 1.0 and result.right == result.total
        assert shapes.score(sample, f"  {sample.answer}\n").fraction == 1.0


@pytest.mark.parametrize("attribute", ["size", "colour", "shape"])
def test_each_wrong_attribute_costs_one_point(attribute: str) -> None:
    values = {"size": shapes.SIZES, "colour": shapes.COLOURS, "shape": shapes.SHAPES}[attribute]
    for seed in SEEDS:
        sample = shapes.make_sample(seed, "describe")
        for number, thing in enumerate(sample.scene.things):
            wrong = _with(sample.scene, number, **{attribute: _other(values, thing.words[attribute])})
            result = shapes.score(sample, shapes.describe(wrong))
            assert (result.right, result.total) == (4 * len(sample.scene.things) - 1, 4 * len(sample.scene.things))


def test_a_wrong_place_is_wrong() -> None:
    for seed in SEEDS:
        sample = shapes.make_sample(seed, "describe")
        taken = {thing.place for thing in sample.scene.things}
        wrong = _with(sample.scene, 0, place=_other([p for p in shapes.PLACES if p not in taken], ""))
        assert shapes.score(sample, shapes.describe(wrong)).fraction <= 1 - 1 / len(sample.scene.things)


def test_a_missing_and_an_invented_thing_cost() -> None:
    sample = shapes.make_sample(4, "describe")
    sentences = sample.answer.split(". ")
    assert shapes.score(sample, ". ".join(sentences[:-1])).fraction < 1
    free = next(place for place in shapes.PLACES if sample.scene.at(place) is None and place != "centre")
    assert shapes.score(sample, f"{sample.answer} At the {free} there is a small red circle.").fraction < 1
    assert shapes.score(sample, f"{sample.answer} {sentences[1]}.").fraction < 1, "a thing named twice"


@pytest.mark.parametrize("text", ["", "red", "There are no objects in the picture.", "\x00 ?? \n", "At the top left there is a"])
def test_nothing_useful_said_earns_nothing(text: str) -> None:
    assert shapes.score(shapes.make_sample(4, "describe"), text).right == 0


@pytest.mark.parametrize("task", shapes.SHORT_TASKS)
def test_a_wrong_short_answer_earns_nothing(task: str) -> None:
    for seed in SEEDS:
        sample = shapes.make_sample(seed, task)
        words = {*shapes.COLOURS, *shapes.SHAPES, "yes", "no", *NUMBERS, "at the top left", "in the centre"} - {sample.answer}
        assert all(shapes.score(sample, word).right == 0 for word in words)
        assert shapes.score(sample, "").right == 0
        assert shapes.score(sample, f"not {sample.answer}").right == 0


def test_the_interval_is_wilsons() -> None:
    # Wilson 1927 for 8 of 10 at 95 %: 0.4902 .. 0.9433
    accuracy, low, high = shapes.accuracy_interval(8, 10)
    assert accuracy == 0.8
    assert math.isclose(low, 0.4902, abs_tol=1e-4) and math.isclose(high, 0.9433, abs_tol=1e-4)
    assert shapes.accuracy_interval(10, 10)[2] <= 1.0 and math.isclose(shapes.accuracy_interval(0, 10)[1], 0.0, abs_tol=1e-12)
    for right, total in [(1, 0), (-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match="total"):
            shapes.accuracy_interval(right, total)
