"""Steps of the vLLM plug-in, without vLLM: which rows are answers, which end prompts, and which vLLM's own kernel takes."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from dyrate_kernels import policies
from dyrate_kernels.engines.vllm.requests import Prompt, RequestTable
from dyrate_kernels.engines.vllm.steps import Planner, Rows, Step
from dyrate_kernels.policies.base import ModelShape, Policy

SHAPE = ModelShape(6, 4, 2, 8, 32, 64, 100)
FIXED = policies.Fixed(k=2)
WIDTH = 200
PROMPTS = {
    "a": Prompt(9, ((2, 5),)),
    "b": Prompt(30, ((1, 9), (12, 20))),
    "c": Prompt(7, ((0, 3),)),
    "d": Prompt(90, ((5, 80),)),
    "text": Prompt(12, ()),
    "words": Prompt(70, ()),
}


def planner_of(policy: Policy = FIXED, slots: int = 6, prompts: dict[str, Prompt] = PROMPTS) -> Planner:
    bound = policy.bind(SHAPE)
    table = RequestTable(bound, bound.layer_groups(SHAPE.num_layers), SHAPE.num_layers, slots, WIDTH, torch.device("cpu"))
    for request, prompt in prompts.items():
        table.add(request, prompt)
    return Planner(table, torch.device("cpu"))


def plan(planner: Planner, batch: list[tuple[str, int, int]]) -> Step | None:
    """The step of these requests: id, rows computed before, rows in it."""
    requests, computed, counts = ([each[place] for each in batch] for place in range(3))
    starts = [sum(counts[:line]) for line in range(len(counts) + 1)]
    lengths = [before + count for before, count in zip(computed, counts, strict=True)]
    return planner.plan(requests, computed, starts, torch.tensor([*lengths, 0, 0], dtype=torch.int32), max(lengths))  # padded as vLLM's


class Told(NamedTuple):
    """The step again, row by row."""

    answers: list[tuple]
    ends: list[tuple]
    others: list[tuple[int, int, int]]


def told(planner: Planner, batch: list[tuple[str, int, int]]) -> Told:
    """By the rule: a row at or behind its prompt's end answers, the one before it ends it; nothing is pruned where there is no picture."""
    found = Told([], [], [])
    row = 0
    for line, (request, computed, count) in enumerate(batch):
        prompt = planner.table.prompts[request]
        for position in range(computed, computed + count):
            slot = planner.table.slots_of([request])[0]
            fields = (row, line, slot, position + 1, prompt.n_visual, position + 1 - prompt.length)
            if prompt.visual and position >= prompt.length:
                found.answers.append(fields)
            else:
                found.others.append((row, line, position + 1))
                if prompt.visual and position == prompt.length - 1:
                    found.ends.append(fields)
            row += 1
    return found


def fields_of(rows: Rows | None) -> list[tuple]:
    return [] if rows is None else list(zip(*(each.tolist() for each in rows[:6]), strict=True))


def check(planner: Planner, batch: list[tuple[str, int, int]]) -> Step | None:
    """The step of a batch, which must be what the rule says."""
    step, want = plan(planner, batch), told(planner, batch)
    if not want.answers and not want.ends:
        assert step is None
        return None
    assert step is not None and step.lines == len(batch) and step.lists == {}
    assert step.row_bound == max(computed + count for _, computed, count in batch)
    assert fields_of(step.answers) == want.answers and fields_of(step.ends) == want.ends
    for rows in (step.answers, step.ends):
        if rows is not None:
            assert [each.dtype for each in rows[:6]] == [torch.int64, torch.int32, torch.int64, torch.int32, torch.int32, torch.int64]
    if not want.others:
        assert step.others is None
    else:
        assert step.others is not None and step.others.row.tolist() == [row for row, _, _ in want.others]
        lines = sorted({line for _, line, _ in want.others})
        assert step.others.lines == lines
        assert step.others.queries == [sum(line == each for _, line, _ in want.others) for each in lines]
        counts = [count for _, _, count in batch]
        assert step.others.behind == [counts[each] - rows for each, rows in zip(lines, step.others.queries, strict=True)]
        assert step.others.lengths == [max(length for _, line, length in want.others if line == each) for each in lines]
    check_lists(planner, step, [request for request, _, _ in batch])
    return step


def check_lists(planner: Planner, step: Step, requests: list[str]) -> None:
    """Each line of a step's lists is that of its request, and none is cut."""
    table = planner.table
    for line, (request, slot) in enumerate(zip(requests, table.slots_of(requests), strict=True)):
        for held, of in (
            (step.visual_position, table.visual_position), (step.text_position, table.text_position), (step.text_type, table.text_type)
        ):  # fmt: skip
            assert torch.equal(held[line], of[slot, : held.shape[1]])
        prompt = table.prompts[request]
        assert step.visual_position.shape[1] >= prompt.n_visual
        assert step.text_position.shape[1] >= prompt.length - prompt.n_visual


def test_chunks_of_prompts_prune_nothing():
    assert check(planner_of(), [("b", 0, 16), ("a", 0, 8), ("text", 3, 9), ("text", 12, 1)]) is None


def test_a_trial_run_with_requests_of_its_own_prunes_nothing():
    planner = planner_of()
    assert plan(planner, [("b", 30, 1)]) is not None
    assert plan(planner, [("b", 30, 1), ("req_0_ab12", 0, 4)]) is None and "req_0_ab12" not in planner.table


def test_the_last_row_of_a_prompt_ends_it():
    step = check(planner_of(), [("b", 16, 14), ("a", 0, 8)])
    assert step is not None and step.answers is None and fields_of(step.ends) == [(13, 0, 1, 30, 18, 0)]
    step = check(planner_of(), [("a", 8, 1)])
    assert step is not None and fields_of(step.ends) == [(0, 0, 0, 9, 4, 0)] and step.others is not None


def test_answers_drafts_and_text():
    step = check(planner_of(), [("a", 9, 1), ("text", 12, 1), ("c", 10, 4), ("b", 29, 1)])
    assert step is not None and fields_of(step.answers)[0] == (0, 0, 0, 10, 4, 1)
    assert [fields[5] for fields in fields_of(step.answers)] == [1, 4, 5, 6, 7]
    step = check(planner_of(), [("a", 9, 1), ("c", 10, 4)])
    assert step is not None and step.others is None


@pytest.mark.parametrize("computed", [0, 4, 8, 9, 11])
def test_answers_that_are_computed_again(computed):
    """After a preemption: from somewhere before the prompt's end, or within the answer where blocks are found in the prefix cache."""
    step = check(planner_of(), [("text", 20, 1), ("a", computed, 15 - computed)])
    assert step is not None and (step.ends is None) == (computed > 8)
    assert [fields[5] for fields in fields_of(step.answers)] == list(range(max(computed - 9, 0) + 1, 7))


@pytest.mark.parametrize("seed", range(30))
def test_random_batches(seed):
    draw = random.Random(seed)
    planner = planner_of(slots=draw.choice([4, 6]))
    for _ in range(6):
        batch = []
        for request in draw.sample([*PROMPTS], draw.randint(1, 4)):
            prompt = PROMPTS[request]
            computed = draw.choice(
                [0, draw.randint(0, prompt.length), prompt.length - 1, prompt.length, prompt.length + draw.randint(0, 20)]
            )
            batch.append((request, computed, draw.choice([1, 1, 2, 5, prompt.length + 3, max(prompt.length - computed, 1)])))
        check(planner, batch)


# ---- rows of one request in turn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_a_policy_that_remembers_take_turns(seed):
    draw = random.Random(seed)
    planner = planner_of(policies.DyCoke(k=2))
    requests = draw.sample([*PROMPTS], 4)
    batch = [(request, PROMPTS[request].length - draw.choice([0, 1, 2]), draw.choice([1, 3, 6])) for request in requests]
    step = check(planner, batch)
    answers = None if step is None else step.answers
    if answers is None or len(set(answers.sequence.tolist())) == len(answers.row):
        assert answers is None or answers.turns is None
        return
    assert answers.turns is not None and step is not None
    seen: dict[int, int] = {}
    for turn in answers.turns:
        rows = answers.at(turn)
        assert rows.turns is None and len(set(rows.sequence.tolist())) == len(turn) and fields_of(rows) == [
            fields_of(answers)[number] for number in turn.tolist()
        ]  # fmt: skip
        for line, number in zip(rows.sequence.tolist(), rows.step.tolist(), strict=True):
            assert number == seen.get(line, number - 1) + 1  # the next one
            seen[line] = number
    assert sorted(torch.cat(answers.turns).tolist()) == list(range(len(answers.row)))
    assert step.ends is None or step.ends.turns is None


def test_there_are_no_turns_where_none_are_needed():
    batch = [("a", 9, 3), ("b", 30, 2)]
    for policy, batch_of, wanted in ((FIXED, batch, 0), (policies.DyCoke(k=2), [("a", 9, 1), ("b", 33, 1)], 0),
                                     (policies.DyCoke(k=2), batch, 3)):  # fmt: skip
        step = plan(planner_of(policy), batch_of)
        assert step is not None and step.answers is not None and len(step.answers.turns or ()) == wanted


# ---- lists that steps share -----------------------------------------------------------------------------------------------------


def lists_of(step: Step | None) -> tuple[torch.Tensor, ...]:
    assert step is not None
    return step.visual_position, step.text_position, step.text_type


def test_steps_of_the_same_requests_share_their_lists():
    planner = planner_of()
    first, second = (check(planner, [("a", 9 + number, 1), ("b", 30 + number, 1)]) for number in range(2))
    assert all(one is other for one, other in zip(lists_of(first), lists_of(second), strict=True))


@pytest.mark.parametrize("batch", ["ba", "a", "abc", "cb"])
def test_lists_follow_the_batch(batch):
    planner = planner_of()
    check(planner, [("a", 9, 1), ("b", 30, 1)])
    check(planner, [(request, PROMPTS[request].length, 1) for request in batch])
    check(planner, [("a", 9, 1), ("b", 30, 1)])


def test_lists_follow_a_slot_that_is_written_anew():
    planner = planner_of()
    check(planner, [("a", 9, 1), ("b", 30, 1)])
    planner.table.add("a", Prompt(11, ((1, 1), (4, 8))))
    planner.forget()
    check(planner, [("a", 11, 1), ("b", 30, 1)])


def test_lists_of_requests_that_were_set_aside():
    planner = planner_of(slots=2)
    for batch in ("ab", "cd", "ba", "ab"):
        check(planner, [(request, PROMPTS[request].length, 1) for request in batch])


@pytest.mark.parametrize(
    ("policy", "batch", "visual", "text"),
    [
        (FIXED, "a", 64, 64),
        (FIXED, "ad", 128, 64),
        (FIXED, ("a", "even"), 64, 64),
        (FIXED, ("alone",), 64, 64),
        (FIXED, ("c", "words"), 64, 128),  # 70 words
        (FIXED, ("c", "full"), 64, WIDTH),
        (FIXED, ("c", "picture"), WIDTH, 64),
        (policies.DyCoke(k=2), "a", WIDTH, 64),  # its state is as wide as the list
    ],
)
def test_widths_are_rounded_up_and_never_past_the_table(policy, batch, visual, text):
    prompts = {
        **PROMPTS,
        "full": Prompt(WIDTH - 1, ()),
        "even": Prompt(128, ((3, 66),)),
        "alone": Prompt(4, ((0, 3),)),
        "picture": Prompt(WIDTH - 1, ((1, WIDTH - 3),)),
    }
    planner = planner_of(policy, 8, prompts)
    step = check(planner, [(request, prompts[request].length, 1) for request in batch])
    assert step is not None and step.visual_position.shape[1] == visual
    assert step.text_position.shape == step.text_type.shape == (len(batch), text)
