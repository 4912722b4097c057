"""The table of requests of the vLLM plug-in, without vLLM: slots, what lasts in them, and figures counted by hand."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import policies
from dyrate_kernels.engines.vllm import requests
from dyrate_kernels.engines.vllm.requests import Figures, Prompt, RequestTable
from dyrate_kernels.policies.base import ModelShape, Policy, View

SHAPE = ModelShape(6, 4, 2, 8, 32, 64, 100)
WIDTH = 16
ONE = Prompt(9, ((2, 5),))
TWO = Prompt(12, ((1, 3), (6, 8)))
TEXT = Prompt(5, ())
BEGINS = Prompt(7, ((0, 3),))


def table_of(policy: Policy, slots: int = 3) -> RequestTable:
    bound = policy.bind(SHAPE)
    return RequestTable(bound, bound.layer_groups(SHAPE.num_layers), SHAPE.num_layers, slots, WIDTH, torch.device("cpu"))


def slot_of(table: RequestTable, request: str) -> int:
    return table.slots_of([request])[0]


def listed(table: RequestTable, request: str) -> tuple[list[int], list[int], list[int]]:
    """Visual positions, text positions and types of a request; what stands past their ends is checked here."""
    slot, prompt = slot_of(table, request), table.prompts[request]
    n_visual, n_text = prompt.n_visual, prompt.length - prompt.n_visual
    assert table.n_visual[slot] == n_visual and table.prompt[slot] == prompt.length
    assert (table.visual_position[slot, n_visual:] == -1).all() and (table.text_position[slot, n_text:] == -1).all()
    assert (table.text_type[slot, n_text:] == 3).all()
    lines = (table.visual_position[slot, :n_visual], table.text_position[slot, :n_text], table.text_type[slot, :n_text])
    visual, text, types = (line.tolist() for line in lines)
    return visual, text, types


# ---- prompts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "visual", "text", "types"),
    [
        (ONE, [2, 3, 4, 5], [0, 1, 6, 7, 8], [0, 0, 2, 2, 2]),
        (TWO, [1, 2, 3, 6, 7, 8], [0, 4, 5, 9, 10, 11], [0, 2, 2, 2, 2, 2]),
        (TEXT, [], [0, 1, 2, 3, 4], [2, 2, 2, 2, 2]),
        (BEGINS, [0, 1, 2, 3], [4, 5, 6], [2, 2, 2]),
        (Prompt(4, ((0, 3),)), [0, 1, 2, 3], [], []),
        (Prompt(6, ((2, 2), (3, 3), (5, 5))), [2, 3, 5], [0, 1, 4], [0, 0, 2]),
        (Prompt(WIDTH, ((1, 1),)), [1], [0, *range(2, WIDTH)], [0, *[2] * (WIDTH - 2)]),
    ],
)
def test_where_the_tokens_of_a_prompt_stand(prompt, visual, text, types):
    table = table_of(policies.FastV(k=2))
    table.add("other", TWO)
    table.add("it", prompt)
    assert prompt.n_visual == len(visual) and listed(table, "it") == (visual, text, types)
    slot = slot_of(table, "it")
    assert table.n_kept[0][slot] == len(visual) and table.kept[0][slot].tolist() == [*visual, *[-1] * (WIDTH - len(visual))]


@pytest.mark.parametrize(
    ("policy", "groups"),
    [(policies.FastV(k=2), 1), (policies.PyramidDrop(k=2, stages=3), 3), (policies.Fixed(k=2), 0), (policies.ST3(k=2), 0)],
)
def test_lists_are_kept_where_the_prompt_decides_for_the_answer(policy, groups):
    table = table_of(policy)
    assert len(table.kept) == len(table.n_kept) == groups and table.lasts == (groups > 0)


def test_layers_of_the_pruned_groups():
    assert table_of(policies.FastV(k=2)).layers == [4] and table_of(policies.PyramidDrop(k=1, stages=3)).layers == [1, 2, 2]


# ---- slots ----------------------------------------------------------------------------------------------------------------------


def test_slots_are_given_back():
    table = table_of(policies.Fixed(k=2))
    for request in "abc":
        table.add(request, ONE)
    assert sorted(table.slots_of("abc")) == [0, 1, 2] and len(table) == 3 and "b" in table
    table.remove("b")
    table.remove("nobody")
    assert "b" not in table and len(table) == 2
    before = table.slots_of("ca")
    table.add("d", TWO)
    assert table.slots_of("ca") == before and {*before, slot_of(table, "d")} == {0, 1, 2}
    assert listed(table, "d")[0] == [1, 2, 3, 6, 7, 8]


def test_those_that_ended_leave_their_figures_and_their_slots():
    table = table_of(policies.Fixed(k=2))
    for request in "abc":
        table.add(request, ONE)
    table.tally[slot_of(table, "b")] = torch.tensor([1, 4, 60])
    for request in "abz":
        table.remove(request)
    assert [*table.prompts] == ["c"] and sorted(request for request, _, _ in table.ended) == ["a", "b"]
    assert [each.request for each in table.figures()] == ["b"]
    for request in "xy":
        table.add(request, ONE)
    assert sorted(table.slots_of("cxy")) == [0, 1, 2]


@pytest.mark.parametrize("aside", [False, True])
def test_a_request_of_the_same_id_begins_anew(aside):
    table = table_of(policies.FastV(k=2), slots=1)
    table.add("a", ONE)
    table.kept[0][0], table.n_kept[0][0] = -1, 0
    table.tally[0] = torch.tensor([2, 3, 500])
    table.put({"seen": torch.tensor([7.0])}, torch.tensor([0]))
    if aside:
        table.add("b", TEXT)
    table.add("a", TWO)
    assert slot_of(table, "a") == 0 and listed(table, "a")[0] == [1, 2, 3, 6, 7, 8]
    assert table.n_kept[0].tolist() == [6] and table.tally.tolist() == [[0, 0, 0]] and table.state["seen"].tolist() == [0.0]
    assert [each.rows for each in table.figures() if each.request == "a"] == [2]  # of the former one, which has ended
    table.remove("a")
    assert "a" not in table


def fill(table: RequestTable, request: str, number: int) -> None:
    """Marks all that lasts of a request."""
    slot = slot_of(table, request)
    for group, (kept, n_kept) in enumerate(zip(table.kept, table.n_kept, strict=True)):
        kept[slot], n_kept[slot] = 10 * number + group, number
    table.tally[slot] = torch.tensor([number, 2 * number, 300 * number])
    table.put({"seen": torch.tensor([[float(number), -1.0]])}, torch.tensor([slot]))


def marks(table: RequestTable, request: str) -> list:
    slot = slot_of(table, request)
    lists = [int(kept[slot].unique()) for kept in table.kept] + [int(n_kept[slot]) for n_kept in table.n_kept]
    return [*lists, table.tally[slot].tolist(), table.state["seen"][slot].tolist()]


@pytest.mark.parametrize("policy", [policies.PyramidDrop(k=2, stages=2), policies.Fixed(k=2)])
def test_more_requests_than_slots(policy):
    table, prompts = table_of(policy, slots=2), {"a": ONE, "b": TWO, "c": BEGINS, "d": TEXT, "e": Prompt(3, ((1, 1),))}
    for number, (request, prompt) in enumerate(prompts.items(), 1):
        table.add(request, prompt)
        fill(table, request, number)
    numbers = {request: number for number, request in enumerate(prompts, 1)}
    groups = range(len(table.kept))
    for batch in ("ab", "ba", "ca", "de", "eb", "bd", "ca", "a", "ec"):
        slots = table.slots_of([*batch])
        assert sorted(slots) == [0, 1][: len(batch)] or len(batch) == 1
        for request in batch:
            number, prompt = numbers[request], prompts[request]
            of_lists = [*(10 * number + group for group in groups), *(number for _ in groups)]
            assert marks(table, request) == [*of_lists, [number, 2 * number, 300 * number], [number, -1.0]]
            assert listed(table, request)[0] == [place for first, last in prompt.visual for place in range(first, last + 1)]
        assert table.slots_of([*batch]) == slots
    assert {each.request: each.rows for each in table.figures()} == {"a": 1, "b": 2, "c": 3, "e": 5}  # in their slots or not
    table.remove("a")  # one that is set aside
    table.remove("c")
    table.remove("e")
    assert len(table) == 2 and not table._aside.keys() & {"a", "c", "e"}
    assert [each.request for each in table.figures()] == ["a", "c", "e", "b"]


def test_those_of_the_batch_keep_their_slots():
    table = table_of(policies.Fixed(k=2), slots=2)
    table.add("a", ONE)
    table.add("b", ONE)
    before = slot_of(table, "a")
    table.add("c", ONE, ["a", "c"])
    assert table.slots_of(["a"]) == [before] and [*table._aside] == ["b"]
    table.add("d", ONE, ["c", "d"])
    assert sorted(table._aside) == ["a", "b"]


# ---- the policy's state ---------------------------------------------------------------------------------------------------------


def test_the_state_of_a_prompt_begins_as_the_policy_says():
    table = table_of(policies.Depth(k=3, prune=0.5, growth=0.25), slots=4)
    for request in "abc":
        table.add(request, ONE)
    slots = torch.tensor(table.slots_of("ca"))
    table.begin(slots)
    want = table.policy.start(torch.tensor([4, 4], dtype=torch.int32))
    found = table.state_of(slots)
    assert want.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in want.items())
    assert all((tensor[table.slots_of("b")] == 0).all() for tensor in table.state.values())


def test_a_state_that_is_read_is_a_copy():
    table = table_of(policies.Fixed(k=2))
    table.put({"seen": torch.tensor([1.0, 2.0])}, torch.tensor([2, 0]))
    assert table.state["seen"].tolist() == [2.0, 0.0, 1.0]
    table.state_of(torch.tensor([0, 2]))["seen"].zero_()
    assert table.state["seen"].tolist() == [2.0, 0.0, 1.0]


def test_a_state_that_the_policy_sizes_later():
    table = table_of(policies.DyCoke(k=2, similarity=0.9), slots=2)
    table.add("a", ONE)

    def decide(request: str, importance: torch.Tensor, step: int) -> None:
        slots = torch.tensor(table.slots_of([request]))
        if step == 0:
            table.begin(slots)
        state = table.state_of(slots)
        table.policy.decide(View(torch.tensor([step]), torch.zeros(1, 4, 4), importance, table.n_visual[slots], None, state))
        table.put(state, slots)

    def held(request: str) -> torch.Tensor:
        return table.state["reference"][slot_of(table, request)]

    ramp = torch.arange(1.0, WIDTH + 1)[None]
    decide("a", ramp, 0)
    assert torch.equal(held("a"), ramp[0])
    decide("a", 2 * ramp, 1)  # alike: the first selection stays
    assert torch.equal(held("a"), ramp[0])
    table.add("b", TWO)
    assert (held("b") == 0).all()
    decide("b", ramp.flip(1), 0)
    assert torch.equal(held("a"), ramp[0]) and torch.equal(held("b"), ramp[0].flip(0))
    table.add("c", ONE, ["c"])  # one of them is set aside and comes back
    decide("c", ramp * 0, 0)
    assert torch.equal(held("a"), ramp[0]) and torch.equal(held("b"), ramp[0].flip(0)) and torch.equal(held("c"), ramp[0] * 0)


def test_one_set_aside_before_there_was_a_state():
    table = table_of(policies.DyRate(k=2), slots=1)
    table.add("a", ONE)
    table.add("b", ONE)
    table.begin(torch.tensor(table.slots_of("b")))
    table.state["first_mass"][:] = 0.5
    assert table.state_of(torch.tensor(table.slots_of("a")))["first_mass"].tolist() == [0.0]
    assert table.state_of(torch.tensor(table.slots_of("b")))["first_mass"].tolist() == [0.5]


# ---- figures --------------------------------------------------------------------------------------------------------------------


def test_figures_counted_by_hand():
    """Six layers, four of them pruned; three answer rows of a prompt of nine rows, of which four are visual."""
    table = table_of(policies.FastV(k=2))
    table.add("a", ONE)
    table.add("text", TEXT)
    table.add("waits", ONE)
    dense = (10 + 11 + 12) * 6
    kept = (2 + 1 + 0) * 4
    table.tally[slot_of(table, "a")] = torch.tensor([3, kept, dense])
    table.tally[slot_of(table, "text")] = torch.tensor([3, 0, dense])
    read = sum(2 * (5 + new + 4) + 4 * (5 + new + keeps) for new, keeps in ((1, 2), (2, 1), (3, 0)))  # layers before and from k on
    assert table.figures() == [Figures("a", 4, 3, 1.0, pytest.approx(0.75), pytest.approx(read / dense))]
    table.remove("a")
    table.remove("text")
    assert [each.request for each in table.figures()] == ["a"]


def test_figures_of_those_that_ended_come_first_and_the_oldest_are_forgotten():
    table = table_of(policies.Fixed(k=2), slots=1)
    table.ended = type(table.ended)(maxlen=2)
    for request in "abcd":
        table.add(request, ONE)
        table.tally[0] = torch.tensor([1, 8, 60])
        if request != "d":
            table.remove(request)
    assert [each.request for each in table.figures()] == ["b", "c", "d"]
    table.add("e", ONE)
    table.tally[0] = torch.tensor([2, 8, 120])
    assert [(each.request, each.rows) for each in table.figures()] == [("b", 1), ("c", 1), ("d", 1), ("e", 2)]


# ---- lists that grow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aside", [False, True])
def test_lists_grow_with_the_longest_prompt(monkeypatch, aside):
    monkeypatch.setattr(requests, "_FIRST_WIDTH", 9)
    table = table_of(policies.FastV(k=2), slots=1 if aside else 3)
    assert table.width == 9
    table.add("one", ONE)
    table.kept[0][slot_of(table, "one")] = torch.tensor([3, 5, *[-1] * 7])
    table.n_kept[0][slot_of(table, "one")] = 2
    table.add("two", TWO)
    assert table.width == WIDTH and listed(table, "two") == ([1, 2, 3, 6, 7, 8], [0, 4, 5, 9, 10, 11], [0, 2, 2, 2, 2, 2])
    assert listed(table, "one") == ([2, 3, 4, 5], [0, 1, 6, 7, 8], [0, 0, 2, 2, 2])
    slot = slot_of(table, "one")
    assert table.kept[0][slot].tolist() == [3, 5, *[-1] * (WIDTH - 2)] and table.n_kept[0][slot] == 2


def test_lists_of_a_policy_that_remembers_are_wide_at_once(monkeypatch):
    monkeypatch.setattr(requests, "_FIRST_WIDTH", 9)
    assert table_of(policies.DyCoke(k=2)).width == WIDTH
