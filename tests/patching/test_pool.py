"""Retention ``pool`` against the mask oracle, which chooses the pool itself; what it refuses; what it costs."""

from __future__ import annotations

import copy

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.generation import cpu_step
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import (
    METHODS,
    PICTURES_FIRST,
    ROWS,
    VARIANTS,
    assert_same,
    assert_same_decisions,
    greedy,
    logits,
    patched,
    policy,
    rows_for,
    rows_for_beams,
    single,
)
from tests.oracle import Oracle, Turn

CHOOSE = [name for name, rule in METHODS.items() if rule.decides_while_decoding]  # anew at every step
POOLS = ("pool=0.5", "pool=0.3:by=uniform", "pool=0.6:by=0.4")


def against_oracle(model, fields, rule, retention, options, length=7, frozen=False):
    want = (oracle := Oracle(model, rule, retention, frozen=frozen)).generate(**fields, **greedy(length))
    with patched(model, rule, retention) as handle:
        got = model.generate(**fields, **greedy(length, **options))
        stats = handle.stats()
    assert_same(got, want)
    assert_same_decisions(stats, oracle)
    return stats


@pytest.mark.parametrize("retention", POOLS)
@pytest.mark.parametrize("method", CHOOSE)
def test_method(make_model, method, retention):
    model = make_model()
    stats = against_oracle(model, models.inputs(model, ROWS), METHODS[method], retention, {})
    assert stats.retention == "pool" and f"pool={stats.pool}" == retention.partition(":")[0]


@VARIANTS
def test_family(make_model, family, text):
    model = make_model(family, text)
    against_oracle(model, models.inputs(model, rows_for(family)), METHODS["dyrate"], "pool=0.4:by=0.5", {})


@pytest.mark.parametrize(("family", "text"), models.MORE_VARIANTS, ids=["-".join(v) for v in models.MORE_VARIANTS])
def test_more_families(make_model, family, text):
    model = make_model(family, text)
    against_oracle(model, models.inputs(model, ROWS[:3]), METHODS["dyrate"], "pool=0.5", {})


@pytest.mark.parametrize("method", CHOOSE)
@pytest.mark.parametrize(("family", "text"), [("llava", "mistral"), ("llava_next", "llama")])
def test_a_pool_of_all_is_recoverable(make_model, family, text, method):
    """Bit for bit, the prompt's step too; and every step keeps the same tokens."""
    model = make_model(family, "llama" if method == "dyrate-trained" else text)  # a predictor belongs to one model
    fields = models.inputs(model, rows_for(family))
    found = []
    for retention in ("recoverable", "pool=1"):
        with patched(model, METHODS[method], retention, record_importance=True) as handle:
            got = model.generate(**fields, **greedy())
            found.append((got.sequences.tolist(), [step.kept_tokens for step in handle.stats().steps]))
    assert found[0] == found[1]


@pytest.mark.parametrize("retention", POOLS)
def test_the_pool_holds_a_part_of_each_picture(make_model, retention):
    """Half of 25 tokens is 13, three tenths 8, six tenths 15; tokens come back, and none from outside."""
    model = make_model()
    size = {"pool=0.5": 13, "pool=0.3:by=uniform": 8, "pool=0.6:by=0.4": 15}[retention]
    with dk.patch(model, dk.policies.Random(k=2, rate=0.8), retention=retention, record_importance=True) as handle:
        model.generate(**models.inputs(model, ROWS), **greedy(12))
        stats = handle.stats()
    for b, pictures in enumerate((1, 2, 0, 1)):
        pool = stats.steps[0].kept_tokens[b]
        assert [sum(token // 25 == picture for token in pool) for picture in range(pictures)] == [size] * pictures
        assert all({*step.kept_tokens[b]} <= {*pool} for step in stats.steps)
        assert [step.kept[b] for step in stats.steps[1:]] == [5 * pictures] * 11
    kept = [{*step.kept_tokens[0]} for step in stats.steps]
    assert any(kept[i + 1] - kept[i] for i in range(1, 11))


def test_a_picture_keeps_one_token_at_least(make_model):
    model = make_model()
    with dk.patch(model, "fixed:k=2:rate=0", retention="pool", pool=1e-9) as handle:
        model.generate(**models.inputs(model, ROWS), **greedy(3))
        assert [step.kept for step in handle.stats().steps] == [[1, 2, 0, 1]] * 3


# -- modes ---------------------------------------------------------------------------------------------------------------------------------

MODES = {
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 30},
    "beams": {"num_beams": 3},
    "several-answers": {"do_sample": True, "num_return_sequences": 2},
    "ends-early": {"eos_token_id": list(range(5, 30))},
}


@pytest.mark.parametrize("method", ["dyrate", "uniform", "layerwise", "st3", "dycoke"])
@pytest.mark.parametrize("mode", MODES)
def test_mode(make_model, method, mode):
    model = make_model("llava", "mistral")
    fields = models.inputs(model, rows_for_beams(ROWS) if mode == "beams" else ROWS)
    options = greedy(6, **MODES[mode])
    torch.manual_seed(5)
    want = Oracle(model, METHODS[method], "pool=0.5").generate(**fields, **options)
    with patched(model, METHODS[method], "pool=0.5"):
        torch.manual_seed(5)
        assert_same(model.generate(**fields, **options), want)


@pytest.mark.parametrize("method", ["dyrate", "layerwise", "dycoke", "uniform"])
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_chunked_prefill(make_model, method, chunk):
    if not PICTURES_FIRST:
        pytest.skip("this transformers gives no picture to a prompt in chunks")
    model = make_model("llava", "mistral")
    against_oracle(model, models.inputs(model, ROWS), METHODS[method], "pool=0.4:by=0.5", {"prefill_chunk_size": chunk})


@pytest.mark.parametrize("method", ["dyrate", "layerwise", "dycoke", "st3"])
@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_drafts_decide_for_themselves(make_model, method, way):
    model = make_model()
    fields = single(model, ["text 5", "image", "text 8"])
    fields["input_ids"][0, -6:] = torch.tensor([11, 12, 13, 11, 12, 13])
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": -1}
    if way == "assistant":
        options = {"assistant_model": copy.deepcopy(model)}
        options["assistant_model"].generation_config.assistant_confidence_threshold = 0.0
    against_oracle(model, fields, METHODS[method], "pool=0.5", options, length=12, frozen=True)


@pytest.mark.parametrize("method", ["dyrate", "layerwise"])
@pytest.mark.parametrize("second", [["text 3", "image", "text 4"], ["text 7"]], ids=["a-picture", "text"])
@pytest.mark.parametrize("first", [["text 4", "image", "text 5"], ["text 6"]], ids=["after-a-picture", "after-text"])
def test_chat(make_model, method, first, second):
    """The pool of the first turn stays, the second turn's picture gets one of its own."""
    model, rule = make_model("llava", "qwen2"), METHODS[method]
    fields, more = single(model, first), single(model, second, seed=9)
    pixels = [each["pixel_values"] for each in (fields, more) if "pixel_values" in each]
    oracle = Oracle(model, rule, "pool=0.4")
    want = oracle.generate(**fields, **greedy(5))
    with patched(model, rule, "pool=0.4") as handle:
        got = model.generate(**fields, **greedy(5))
        assert_same(got, want)
        ids = torch.cat([got.sequences, more["input_ids"]], 1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        shown = {"pixel_values": torch.cat(pixels)} if pixels else {}
        start, turn = got.sequences.shape[1] - 1, Turn(0, fields["input_ids"].shape[1])
        want = oracle.generate(before=[turn], start=start, **both, **shown, **greedy(5))
        newest = {name: more[name] for name in ("pixel_values",) if name in more}
        got = model.generate(**both, **newest, **{cache_name(): got.past_key_values}, **greedy(5))
        assert_same(got, want)
        assert handle.stats().steps[0].kept == [10 * len(pixels)]
        if "image" in first:  # else the oracle takes all text before the first picture for system text
            assert_same_decisions(handle.stats(), oracle)


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [1]], ids=str)
def test_sequences_that_change_places_take_their_pool_along(make_model, index):
    model, order = make_model(), torch.tensor(index)
    fields = models.inputs(model, [ROWS[1], ROWS[0]])
    found = []
    with patched(model, METHODS["dyrate"], "pool=0.5"):
        for reorders in (False, True):
            output = model.generate(**fields, **greedy(4))
            mask = torch.ones(2, output.sequences.shape[1], dtype=torch.int64)
            mask[:, : fields["attention_mask"].shape[1]] = fields["attention_mask"]
            ids = output.sequences
            if reorders:
                output.past_key_values.batch_select_indices(order)
                ids, mask = ids[order], mask[order]
            with torch.no_grad():  # a decode step of the same turn
                got = model(input_ids=ids[:, -1:], attention_mask=mask, **{cache_name(): output.past_key_values}).logits
            found.append(got)
    assert torch.allclose(found[0][order], found[1], atol=1e-5)


def test_the_table_of_rows_is_what_a_captured_step_depends_on(make_model):
    model = make_model()
    with patched(model, METHODS["dyrate"], "pool=0.5"):
        session = model.generate(**models.inputs(model, ROWS), **greedy(3)).past_key_values.session
    assert {group.row.data_ptr() for group in session.store.groups[1:]} <= {*session.step_state().lasting}


def test_reducers_before_the_pool(make_model):
    """The pool is a part of what they leave, a picture at a time."""
    model = make_model()
    with dk.patch(model, "fixed:k=2:rate=0.8", retention="pool=0.5", vision="uniform:keep=0.4") as handle:
        model.generate(**models.inputs(model, ROWS), **greedy(4))
        stats = handle.stats()
    assert stats.visual_tokens == [10, 20, 0, 10]
    assert [step.kept for step in stats.steps] == [[5, 10, 0, 5], *[[2, 4, 0, 2]] * 3]


@pytest.mark.parametrize("method", ["dyrate", "dyrate-trained", "fixed", "uniform", "layerwise", "dycoke"])
def test_no_host_sync_in_a_decode_step(make_model, host_sync, method, monkeypatch):
    monkeypatch.setattr(cpu_step, "enabled", False)  # the way that a GPU takes
    model = make_model("llava", "llama" if method == "dyrate-trained" else "mistral")
    fields, inside, steps = models.inputs(model, ROWS), [], 0
    with patched(model, METHODS[method], "pool=0.5"):

        def before(module, args, kwargs):
            if kwargs["input_ids"].shape[1] == 1:
                inside.append(host_sync())
                inside[-1].__enter__()

        def after(module, args, kwargs, output):
            nonlocal steps
            if kwargs["input_ids"].shape[1] == 1:
                inside[-1].__exit__(None, None, None)
                steps += 1

        hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after, with_kwargs=True)]
        model.generate(**fields, **greedy(6))
        for hook in hooks:
            hook.remove()
    assert steps == 5 and not [found for mode in inside for found in mode.ours()]


# -- what it costs -------------------------------------------------------------------------------------------------------------------------


def test_memory_and_prompt_are_those_of_the_pool(make_model):
    """Layers >= k hold the pool, of each picture its rounded part, while steps read a part of that."""
    model, found = make_model(), {}
    fields = models.inputs(model, ROWS)
    for retention in ("recoverable", "pool=0.5", "evict"):
        with dk.patch(model, "fixed:k=2:rate=0.8", retention=retention) as handle:
            model.generate(**fields, **greedy(6))
            found[retention] = handle.stats()
            alone = [handle.stats(b) for b in range(4)]
        assert sum(each.kv_bytes_live for each in alone) == found[retention].kv_bytes_live
    whole, pool, gone = found.values()
    row = 2 * models.KV_HEADS * models.HEAD_DIM * 4
    assert whole.kv_bytes_live - pool.kv_bytes_live == row * 3 * (100 - 13 - 26 - 13)
    assert gone.flops < pool.flops < whole.flops and gone.kv_bytes_live < pool.kv_bytes_live
    assert pool.bytes_read == whole.bytes_read and pool.flops_unpruned == whole.flops_unpruned
    assert pool.to_dict()["pool"] == 0.5 and pool.to_dict()["pool_by"] == "policy" and "pool" not in whole.to_dict()


# -- what it refuses -----------------------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"pool": 0.5}, ValueError, r"pool goes with retention='pool' alone, got pool=0.5 with retention='recoverable'; leave pool out"),
    ({"retention": "evict", "pool_by": "uniform"}, ValueError, "pool_by goes with retention='pool' alone"),
    *(({"retention": "pool", "pool": value}, error, rf"pool must be a number in \(0, 1\].*got {value}; pool=1 holds all")
      for value, error in ((0, ValueError), (1.5, ValueError), (float("nan"), ValueError), (-0.1, ValueError), (True, TypeError))),
    ({"retention": "pool", "pool": "half"}, TypeError, "pool must be a number"),
    *(({"retention": "pool", "pool_by": value}, error, "pool_by must be 'policy', 'uniform' or a number")
      for value, error in (("best", ValueError), (2, ValueError), (float("nan"), ValueError), (False, TypeError), ([], TypeError))),
    ({"retention": "pool=0.5", "pool": 0.5}, ValueError, "pool must be given once"),
    ({"retention": "pools"}, ValueError, "retention must be recoverable, evict or pool, got 'pools'"),
    *(({"retention": "pool", "policy": name}, ValueError, f"retention='pool' needs a policy .*got '{name}', which decides once.*evict")
      for name in ("fastv", "vtw", "depth", "pyramiddrop", "sparsevlm", "aim")),
    ({"retention": "pool", "policy": "klguard"}, ValueError, "brings tokens back, which retention='pool' cannot; use"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "words"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(make_model, options, error, words):
    model = make_model()
    with pytest.raises(error, match=words):
        dk.patch(model, **options)
    dk.patch(model).unpatch()  # nothing is left of it


def test_a_policy_that_merges_or_never_ranks_the_prompt_is_refused(make_model):
    for name, value, why in (
        ("merges", property(lambda self: True), "merges tokens"),
        ("at_prefill", False, "does not rank at the prompt"),
    ):
        odd = type("Odd", (dk.policies.Fixed,), {name: value})
        with pytest.raises(ValueError, match=f"got 'fixed', which {why}"):
            dk.patch(make_model(), odd(k=2), retention="pool")


def test_deepstack_bounds_k(make_model):
    with pytest.raises(ValueError, match="k must be at least 2 .*retention='pool', got 1"):
        dk.patch(make_model("qwen3_vl", "own"), "fixed:k=1", retention="pool")


def test_a_cache_of_another_pool_is_refused(make_model):
    model = make_model()
    fields = single(model, ROWS[0])
    with dk.patch(model, "fixed", retention="pool", pool=0.5):
        got = model.generate(**fields, **greedy(3))
    ids = torch.cat([got.sequences, fields["input_ids"][:, :3]], 1)
    for options in ({"pool": 0.25}, {"pool": 0.5, "pool_by": "uniform"}):
        with (
            dk.patch(model, "fixed", retention="pool", **options),
            pytest.raises(ValueError, match=r"another policy or retention \(pool=0.5\)"),
        ):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{cache_name(): got.past_key_values}, **greedy(3))


def test_none_keeps_everything_and_unpatch_leaves_nothing(make_model):
    model = make_model()
    fields = models.inputs(model, ROWS)
    want = logits(model.generate(**fields, **greedy(4)))
    with dk.patch(model, policy(METHODS["none"]), retention="pool") as handle:
        assert torch.allclose(logits(model.generate(**fields, **greedy(4))), want, atol=1e-4)
        assert handle.stats().kept_mean == 1.0
    assert torch.equal(logits(model.generate(**fields, **greedy(4))), want)
