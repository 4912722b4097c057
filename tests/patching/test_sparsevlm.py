"""SparseVLM with recycling, against a forward pass of its own: layer by layer, in float64, sequence by sequence (``tests.recycling``)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import dyrate_kernels as dk
from dyrate_kernels.patching.lookup import cache_name
from dyrate_kernels.patching.shrink import merge_columns
from tests import models
from tests.checks import PICTURES_FIRST, ROWS, assert_close_logits, assert_same, greedy, logits, single
from tests.recycling import recycle

SHARES, STARTS = (0.6, 0.4, 0.2), (1, 2, 3)  # what stays, and the first layers of the stages, of models of five layers
RECYCLE = {"recycle": 0.9, "clusters": 0.25}
POLICY = dk.policies.SparseVLM(keep=SHARES, **RECYCLE)


class Slow:
    """A greedy answer for one unpadded sequence.

    Attributes:
        ratings: of the visual columns that could be chosen, by stage.
        kept: visual columns of each stage.
        merged: how many columns were averaged into others, by stage.
        logits: ``[steps, V]``.
    """

    @torch.no_grad()
    def __init__(self, model, fields, steps):
        self.model = copy.deepcopy(model).double()
        self.text = self.model.get_decoder()
        entered = []
        hook = self.text.register_forward_pre_hook(lambda _, args, kwargs: entered.append(kwargs["inputs_embeds"][0]), with_kwargs=True)
        double = {name: value.double() if value.is_floating_point() else value for name, value in fields.items()}
        self.model(**double, use_cache=False)
        hook.remove()
        ids = fields["input_ids"][0].tolist()
        self.visual = [c for c, token in enumerate(ids) if token == models.IMAGE_TOKEN]
        self.held = [([], [], []) for _ in self.text.layers]  # column, key, value of each row
        self.ratings, self.kept, self.merged, self.logits = [], [], [], []
        states = entered[0]
        raters = self._raters(states, len(ids))
        columns = list(range(len(ids)))
        for index in range(len(self.text.layers)):
            normed, weights, states = self._layer(index, columns, states)
            if index + 1 in STARTS and self.visual:
                columns, states = self._stage(STARTS.index(index + 1), columns, normed, weights, states, raters or [len(ids) - 1])
        self._answer(states[-1])
        for step in range(1, steps):
            states = self.text.get_input_embeddings()(self.logits[-1].argmax())[None]
            for index in range(len(self.text.layers)):
                _, _, states = self._layer(index, [len(ids) + step - 1], states)
            self._answer(states[-1])

    def _raters(self, states, length):
        if not self.visual:
            return []
        words = [c for c in range(self.visual[0], length) if c not in self.visual]
        relevance = (states[self.visual] @ states[words].T).softmax(-1).mean(0)
        return [word for word, value in zip(words, relevance, strict=True) if value > relevance.mean()]

    def _layer(self, index, columns, states):
        """Attention's input, its weights by (row, column of the key) meaned over heads, and the layer's output."""
        layer = self.text.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(states[None])
        shape = (1, len(columns), -1, attention.head_dim)
        query, key, value = (part(normed).view(shape).transpose(1, 2) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        cos, sin = self.text.rotary_emb(normed, torch.tensor([columns]))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        held = self.held[index]
        held[0].extend(columns)
        held[1].extend(key[0].unbind(1))
        held[2].extend(value[0].unbind(1))
        groups = query.shape[1] // key.shape[1]
        keys, values = (torch.stack(held[i], 1).repeat_interleave(groups, 0) for i in (1, 2))
        allowed = torch.tensor(held[0]) <= torch.tensor(columns)[:, None]
        scores = query[0] @ keys.mT * attention.scaling
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        mixed = (weights @ values).transpose(0, 1).reshape(len(columns), -1)
        states = states + attention.o_proj(mixed)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        return normed[0], weights.mean(0), states

    def _stage(self, stage, columns, normed, weights, states, raters):
        place = {column: row for row, column in enumerate(columns)}
        able = [column for column in self.visual if column in place]
        rating = {c: weights[[place[r] for r in raters], place[c]].mean().item() for c in able}
        count = math.floor(len(self.visual) * SHARES[stage] + 1e-6)
        kept, parts = recycle(rating, count, {c: normed[place[c]].tolist() for c in able}, RECYCLE["recycle"], RECYCLE["clusters"])
        stay = [c for c in columns if c not in self.visual or c in kept]
        new = []
        for column in stay:
            members = [place[c] for c, centre in parts.items() if centre == column] or [place[column]]
            new.append(states[members].mean(0))
        self.ratings.append(list(rating.values()))
        self.kept.append(kept)
        self.merged.append(sum(part != c for c, part in parts.items()))
        return stay, torch.stack(new)

    def _answer(self, state):
        last = self.model.lm_head(self.text.norm(state))
        last[[models.IMAGE_TOKEN, models.VIDEO_TOKEN]] = -math.inf
        self.logits.append(last)


def finite(output):
    got = logits(output)
    got[..., [models.IMAGE_TOKEN, models.VIDEO_TOKEN]] = 0
    return got


def raw(slow):
    want = torch.stack(slow.logits).float()
    want[..., [models.IMAGE_TOKEN, models.VIDEO_TOKEN]] = 0
    return want


# the first row begins with a picture and keeps fewer columns than the second: what fills it up must not count as its first token
FILLED = [["image", "image", "text 4"], ["text 20", "image", "text 9"]]


@pytest.mark.parametrize("rows", [ROWS, FILLED], ids=["ragged", "filled"])
@pytest.mark.parametrize("seed", range(3))
def test_recycling_is_that_of_a_slow_forward_pass(make_model, rows, seed):
    """One, two and no pictures; first-token logits and the tokens that follow."""
    model = make_model()
    fields = models.inputs(model, rows, seed=seed)
    with dk.patch(model, POLICY, retention="evict", record_importance=True) as handle:
        got = model.generate(**fields, **greedy(6))
        stats = handle.stats()
    merged = 0
    for row, items in enumerate(rows):
        slow = Slow(model, single(model, items, seed=seed), 6)
        assert got.sequences[row, -6:].tolist() == [step.argmax().item() for step in slow.logits]
        assert_close_logits(finite(got)[:, row], raw(slow))
        if slow.visual:
            assert stats.steps[0].kept_tokens[row] == [slow.visual.index(column) for column in slow.kept[0]]
            assert stats.steps[0].kept[row] == round((len(slow.kept[0]) + len(slow.kept[1]) + 2 * len(slow.kept[2])) / 4)
            assert stats.steps[0].importance[row] == pytest.approx(slow.ratings[0], abs=1e-5)
            assert min(slow.merged) > 0
        merged += sum(slow.merged)
    assert merged > 20


@pytest.mark.parametrize("chunk", [1, 7, 16, 63])
def test_chunks_change_nothing(make_model, chunk):
    model = make_model()
    fields = models.inputs(model, ROWS)
    if not PICTURES_FIRST:
        pytest.skip("this transformers gives no picture to a prompt in chunks")
    with dk.patch(model, POLICY, retention="evict"):
        want = model.generate(**fields, **greedy(6))
        got = model.generate(**fields, **greedy(6, prefill_chunk_size=chunk))
    assert_same(got, want)
    ranker = got.past_key_values.session.ranker
    assert not ranker.chunks and not ranker.embedded and ranker.column is None  # nothing of the prompt is held any longer


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": -1}], ids=["beams", "drafts"])
def test_recycling_in_other_modes(make_model, options):
    """Beams begin with the same logits; drafts change nothing."""
    model = make_model()
    fields = single(model, ["text 5", "image", "text 8"])
    fields["input_ids"][0, -6:] = torch.tensor([11, 12, 13, 11, 12, 13])
    with dk.patch(model, POLICY, retention="evict"):
        plain = model.generate(**fields, **greedy(8))
        got = model.generate(**fields, **greedy(8, **options))
        if "num_beams" not in options:
            assert_same(got, plain)
        assert_close_logits(logits(got)[0, :1], logits(plain)[0])


@pytest.mark.parametrize("chunk", [None, 9])
def test_second_picture_merges_only_its_own(make_model, chunk):
    """The first turn's tokens stay as they are where they are kept, and the second turn's budget counts both."""
    if chunk is not None and not PICTURES_FIRST:
        pytest.skip("this transformers gives no picture to a prompt in chunks")
    model = make_model()
    first, second = single(model, ["text 4", "image", "text 5"]), single(model, ["text 3", "image", "text 4"], seed=9)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    results = []
    for retries in (options, {}):
        with dk.patch(model, POLICY, retention="evict") as handle:
            got = model.generate(**first, **greedy(4))
            held = got.past_key_values
            ids = torch.cat([got.sequences, second["input_ids"]], 1)
            got = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=second["pixel_values"], **{cache_name(): held},
                **greedy(4, **retries),
            )  # fmt: skip
            assert [int(group.n_visual) for group in held.store.groups] == [50, 30, 20, 10]
            assert handle.stats().visual_tokens == [50]
        results.append(got)
    assert_same(*results)


@pytest.mark.parametrize("retention", ["recoverable", "evict"])
@pytest.mark.filterwarnings("ignore:policy 'sparsevlm' merges")
def test_a_row_without_a_new_picture_keeps_its_choice(make_model, retention):
    model = make_model()
    first = models.inputs(model, [["text 4", "image", "text 5"], ["text 3", "image", "text 2"]])
    second = models.inputs(model, [["text 32"], ["text 3", "image", "text 4"]], seed=9)
    with dk.patch(model, POLICY, retention=retention):
        got = model.generate(**first, **greedy(4))
        held = got.past_key_values
        before = [(group.alive if retention == "evict" else group.kept).clone() for group in held.store.groups[1:]]
        ids = torch.cat([got.sequences, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, 36, dtype=torch.long)], 1)
        model.generate(input_ids=ids, attention_mask=mask, pixel_values=second["pixel_values"], **{cache_name(): held}, **greedy(2))
        for group, was, share in zip(held.store.groups[1:], before, SHARES, strict=True):
            now = group.alive if retention == "evict" else group.kept
            width = was.shape[1]
            assert torch.equal(now[0, :width], was[0]) and not torch.equal(now[1, :width], was[1])
            count = group.n_visual if retention == "evict" else group.n_kept
            assert count.tolist() == [round(25 * share), round(50 * share)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("retention", ["recoverable", "evict"])
@pytest.mark.filterwarnings("ignore:policy 'sparsevlm' merges")
def test_other_types(dtype, retention):
    model = models.build("llava", dtype=dtype)
    with dk.patch(model, POLICY, retention=retention) as handle:
        got = model.generate(**models.inputs(model, ROWS), **greedy(3))
        assert handle.stats().steps[-1].kept == [9, 18, 0, 9]  # of 25, 50, 0 and 25: the mean over layers of .6, .4, .2 and .2
    assert torch.isfinite(got.logits[-1][:, : models.IMAGE_TOKEN]).all()


def test_mean_of_the_parts():
    hidden = torch.tensor([[[9.0], [1.0], [2.0], [6.0], [3.0], [8.0]]], dtype=torch.float16)
    token = torch.tensor([[-1, 0, 1, 2, 3, -1]])
    merge = torch.tensor([[1, 1, 1, -1, 7]])
    got = merge_columns(hidden, token, hidden[:, [0, 2, 4, 5]], token[:, [0, 2, 4, 5]], merge)
    assert got.dtype == torch.float16 and got[0, :, 0].tolist() == [9.0, 3.0, 3.0, 8.0]
    again = merge_columns(hidden, token, hidden[:, [3, 2]], torch.tensor([[-1, 1]]), torch.tensor([[-1, 1, -1, -1]]))
    assert again[0, :, 0].tolist() == [6.0, 2.0]  # nothing merged: the same bits


def test_recoverable_merges_nothing_and_says_so(make_model):
    model = make_model()
    fields = models.inputs(model, ROWS)
    results = []
    with pytest.warns(UserWarning, match=r"'sparsevlm' merges .*retention='evict', or set recycle=0"):
        handle = dk.patch(model, POLICY)
    for _ in range(2):
        with handle:
            results.append(model.generate(**fields, **greedy(4)))
        handle = dk.patch(model, dk.policies.SparseVLM(keep=SHARES, recycle=0))
    handle.unpatch()
    assert_same(*results)
