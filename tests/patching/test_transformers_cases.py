"""Cases that transformers' own tests brought up (tests/upstream), small enough to run everywhere."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import models
from tests.checks import METHODS, RETENTIONS, assert_same, greedy, patched, single

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
ROW = ["text 5", "image", "text 8"]


def _drafter(model):
    drafter = copy.deepcopy(model)
    drafter.generation_config.num_assistant_tokens = 2
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    drafter.generation_config.assistant_confidence_threshold = 0.0
    return drafter


@RETENTION
def test_drafter_whose_first_drafts_are_all_wrong(make_model, retention):
    """Its cache is then rolled back to before the last prompt token, in a prompt whose pictures were already evicted."""
    model = make_model()
    wrong = _drafter(models.build("llava", "llama", seed=5))
    fields = single(model, ROW)
    want = model.generate(**fields, **greedy(8))
    with patched(wrong, METHODS["dyrate"], retention):
        assert_same(model.generate(**fields, **greedy(8, assistant_model=wrong)), want)


def test_crop_that_removes_evicted_pictures_is_refused(make_model):
    model = make_model()
    fields = single(model, ROW)
    with patched(model, METHODS["fixed"], "evict"):
        cache = model.generate(**fields, **greedy(1)).past_key_values
        cache.crop(-3)  # text only
        with pytest.raises(RuntimeError, match="reaches into a prompt"):
            cache.crop(-8)


@RETENTION
def test_stats_of_a_model_that_drafts_for_itself(make_model, retention):
    model = _drafter(make_model())
    fields = single(model, ROW)
    with patched(model, METHODS["fixed"], retention) as handle:
        model.generate(**fields, **greedy(9, assistant_model=model))
        assert [step.step for step in handle.stats().steps] == list(range(len(handle.stats().steps)))
        assert len(handle.stats().steps) >= 9


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_forward_compiles_without_graph_break(make_model, family):
    """LLaVA-NeXT gives input_ids by position, so the hooks have to find names for them."""
    model = copy.deepcopy(make_model(family, "llama"))
    fields = single(model, ROW)
    embeds = model.get_input_embeddings()(fields["input_ids"]) if family == "llava_next" else None
    fields = {"inputs_embeds": embeds} if embeds is not None else {"input_ids": fields["input_ids"].clamp(max=models.IMAGE_TOKEN - 1)}
    want = model(**fields, use_cache=False).logits
    with patched(model, METHODS["fixed"], "evict"):
        torch.compiler.reset()
        got = torch.compile(model, backend="eager", fullgraph=True)(**fields, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5)
