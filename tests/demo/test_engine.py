"""Two answers in turns, without a page: right answers, honest times, nothing left behind."""

from __future__ import annotations

import functools
import threading
import time

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import chat, shapes, specs
from dyrate_kernels.demo.engine import Engine, Side, Wish, twin

QUESTION = "Describe the picture."


@pytest.fixture(scope="module")
def engine():
    return Engine(*dk.load_demo())


@pytest.fixture(scope="module")
def picture():
    return shapes.draw(shapes.make_scene(3))


def alone(engine, picture, wish, patched):
    """The same answer by hand."""
    model, processor = engine.model, engine.processor
    inputs = processor(images=picture, text=chat.render(processor, [chat.user(wish.question, images=1)]), return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": wish.max_new_tokens}
    stats = None
    if patched:
        with dk.patch(model, engine.policy(wish), retention=wish.retention, vision=wish.vision, record_importance=True) as handle:
            tokens = model.generate(**inputs, **options)
            stats = handle.stats()
    else:
        tokens = model.generate(**inputs, **options)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), stats


WISHES = [
    Wish(QUESTION, max_new_tokens=20),
    Wish(QUESTION, "fastv", 0.8, "evict", max_new_tokens=16),
    Wish(QUESTION, "uniform", 0.6, "recoverable", "aim", 12),
    Wish("How many objects are there?", "none", max_new_tokens=40),
]


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: wish.policy)
def test_both_answers_are_those_of_one_generation_alone(engine, picture, wish):
    states = list(engine.compare(picture, wish))
    last = states[-1]
    want, _ = alone(engine, picture, wish, patched=False)
    pruned, stats = alone(engine, picture, wish, patched=True)
    assert (last.plain.text, last.pruned.text) == (want, pruned) and last.plain.done and last.pruned.done
    assert last.visual_tokens == 144 and [len(step) for step in last.kept] == [step.kept[0] for step in stats.steps]
    if wish.vision is None:
        assert last.kept == [step.kept_tokens[0] for step in stats.steps]
    assert all(0 <= place < 144 for step in last.kept for place in step)
    assert last.read == pytest.approx(stats.received * stats.visual_share)
    assert last.plain.seconds > last.plain.first > 0 and last.pruned.per_token > 0
    for before, after in zip(states, states[1:]):  # texts grow, side by side
        assert after.plain.tokens >= before.plain.tokens and after.pruned.tokens >= before.pruned.tokens
        if not (after.plain.done or after.pruned.done):
            assert abs(after.plain.tokens - after.pruned.tokens) <= 1
    assert not hasattr(engine.model, "_dyrate_handle")


def test_frames_are_the_picture_so_many_times(engine, picture):
    last = list(engine.compare(picture, Wish(QUESTION, "uniform", 0.6, max_new_tokens=6, frames=3)))[-1]
    assert last.visual_tokens == 3 * 144 and engine.bundled
    plain, pruned = last.bytes_per_token
    assert pruned / plain == pytest.approx(last.bytes_read) and pruned < plain


def test_a_policy_gets_a_retention_that_it_can_have(engine):
    found = {name: engine.suited(name, "pool") for name in ("dyrate", "fastv", "none")}
    assert (found["dyrate"], found["fastv"]) == ("pool", "evict") and engine.suited("fastv", "recoverable") == "recoverable"
    for name in engine.methods():
        wish = Wish(QUESTION, name, retention=engine.suited(name, "pool"))
        specs.retention(wish.retention).check(engine.policy(wish))


def test_differences_are_marked(engine):
    pytest.importorskip("gradio")
    from dyrate_kernels.demo.app import _aligned
    from dyrate_kernels.demo.engine import Side, State

    state = State(Side("a red <b> star", done=True), Side("a blue <b> star there", done=True))
    assert "a <del>red</del> <ins>blue</ins> &lt;b&gt; star <ins>there</ins>" in _aligned(state)
    assert _aligned(State(Side("same", done=True), Side("same", done=True))) == "" == _aligned(State(Side("a"), Side("b")))


def test_a_real_model_is_shown_one_picture_at_first(engine, monkeypatch):
    """Twenty pictures of 576 tokens would be more than it reads; the bundled one has too few tokens to see the work with one."""
    pytest.importorskip("gradio")
    from dyrate_kernels.demo import app

    def frames():
        parts = app.build(engine).config["components"]
        return next(part["props"]["value"] for part in parts if part["props"].get("elem_id") == "frames")

    assert frames() == app.FRAMES == 20
    monkeypatch.setattr(engine, "bundled", False)
    assert frames() == 1


def test_the_verdict_names_a_loss(engine):
    pytest.importorskip("gradio")
    from dyrate_kernels.demo.app import _now, _verdict
    from dyrate_kernels.demo.engine import Side, State

    fast, slow = Side("a", 3, 0.4, 0.2, (0.1, 0.1), True), Side("b", 3, 1.2, 0.4, (0.4, 0.4), True)
    found = _verdict(State(plain=slow, pruned=fast, bytes_read=0.466))
    assert found == "Pruned was <b>4.00x as fast</b> a token (2.00x to the first one) and read 47 % of the bytes. The answers differ."
    found = _verdict(State(plain=fast, pruned=slow, company=2))
    assert "<b>slower: 0.25x as fast</b>" in found and "cost more than it saved" in found and "Up to 2 visitors" in found
    assert "reads <b>1 of 9</b>" in _now(State(kept=[[1, 2], [3]], visual_tokens=9, bytes_per_token=(2048.0, 1024.0)))


def test_time_is_only_that_of_ones_own_turns(engine, picture, monkeypatch):
    """By a clock that stands still but for a second in every step of one side: the other one's time does not grow."""
    from dyrate_kernels.demo import engine as module

    wish = Wish(QUESTION, "none", max_new_tokens=8)
    original = module.twin
    made, now = [], [0.0]

    def pass_a_second(*_):
        now[0] += 1.0

    def slow_second(model):
        copy = original(model)
        made.append(copy)
        if len(made) == 2:
            copy.register_forward_pre_hook(pass_a_second)
        return copy

    monkeypatch.setattr(module, "twin", slow_second)
    monkeypatch.setattr(module._Step, "_clock", lambda self: now[0])
    last = list(engine.compare(picture, wish))[-1]
    assert last.plain.seconds == 0.0 and last.plain.per_token == 0.0
    assert last.pruned.seconds == last.pruned.tokens and last.pruned.first == last.pruned.per_token == 1.0


def test_time_per_token_is_a_median():
    assert Side("..", 4, 9.5, 2.0, (1.0, 5.5, 1.0)).per_token == 1.0
    assert Side("..", 1, 2.0, 2.0).per_token is None


def test_no_time_holds_what_the_page_draws(engine, picture):
    """A page that computes hard for each state, on the processor that the answers need: neither side's turn overlaps with it."""
    busy, overlaps = threading.Event(), []
    forward = type(engine.model).forward

    @functools.wraps(forward)  # generate() reads its arguments
    def watched(self, *args, **kwargs):
        overlaps.append(busy.is_set())
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(engine.model), "forward", watched)
        for _ in engine.compare(picture, Wish(QUESTION, "fixed", max_new_tokens=8)):
            busy.set()
            time.sleep(0.05)
            busy.clear()
    assert len(overlaps) >= 16 and not any(overlaps)


def test_a_visitor_who_leaves(engine, picture):
    before = threading.active_count()
    states = engine.compare(picture, Wish(QUESTION, max_new_tokens=200))
    for _ in range(6):
        next(states)
    states.close()
    assert threading.active_count() <= before and engine._working == 0
    assert list(engine.compare(picture, WISHES[0]))[-1].plain.done


def test_two_visitors_at_once(engine, picture):
    found = {}

    def visit(number, wish):
        found[number] = list(engine.compare(picture, wish))[-1]

    threads = [threading.Thread(target=visit, args=item) for item in enumerate(WISHES[:3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wish in enumerate(WISHES[:3]):
        assert found[number].pruned.text == alone(engine, picture, wish, patched=True)[0]
    assert max(state.company for state in found.values()) > 1


def test_what_cannot_be(engine, picture):
    for wish, shown, words in (
        (Wish(QUESTION), None, "Choose a picture"),
        (Wish("  "), picture, "Ask something"),
        (Wish("why " * 3000), picture, "Ask something shorter"),
        (Wish(QUESTION, "recycle", retention="evict"), picture, "use retention='recoverable'"),
        (Wish(QUESTION, "nonsense"), picture, "must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            next(engine.compare(shown, wish))
        assert engine._working == 0


def test_a_failing_side_is_told(engine, picture, monkeypatch):
    from dyrate_kernels.demo import engine as module

    def broken(model):
        copy = twin(model)
        copy.register_forward_pre_hook(lambda *_: 1 / 0)
        return copy

    monkeypatch.setattr(module, "twin", broken)
    with pytest.raises(ValueError, match="model failed: division by zero"):
        list(engine.compare(picture, WISHES[0]))


def test_a_twin_shares_weights_and_nothing_else(engine):
    copy = twin(engine.model)
    assert all(a is b for a, b in zip(copy.parameters(), engine.model.parameters(), strict=True))
    with dk.patch(copy, "fixed"):
        assert not hasattr(engine.model, "_dyrate_handle") and type(copy.get_decoder().layers[0].self_attn).__name__.startswith("DyRate")
        assert not type(engine.model.get_decoder().layers[0].self_attn).__name__.startswith("DyRate")


def test_methods_have_one_knob(engine):
    names = engine.methods()
    assert {"dyrate", "fastv", "uniform", "none"} <= set(names) and "schedule" not in names
    for name in names:
        engine.policy(Wish(QUESTION, name, 0.3))
    assert torch.is_tensor(next(engine.model.parameters()))
