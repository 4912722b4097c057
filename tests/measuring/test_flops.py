"""FLOPs and bytes against published tables, against torch's own counters on real models, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from dyrate_kernels import flops
from dyrate_kernels.patching.lookup import cache_name
from dyrate_kernels.policies.base import ModelShape

SEVEN = flops.named_model("llava-1.5-7b").shape
THIRTEEN = flops.named_model("llava-1.5-13b").shape

# FastV (arXiv 2403.06764v1), Table 1: (K, R) -> Flops(B), Flops Ratio in %.
# The paper does not state n; 611 = 576 + 35 text tokens.
TABLE_7B = {
    (2, 0.90): (19.9, 20), (2, 0.75): (32.8, 33), (2, 0.50): (54.6, 55),
    (3, 0.90): (22.8, 23), (3, 0.75): (34.8, 35), (3, 0.50): (56.6, 57),
    (5, 0.90): (27.8, 28), (5, 0.75): (39.7, 40), (5, 0.50): (59.6, 60),
    (0, 0.75): (28.8, 29), (0, 0.50): (51.6, 52),
}  # fmt: skip
TABLE_13B = {
    (2, 0.90): (29.7, 19), (2, 0.75): (50.2, 32), (2, 0.50): (84.6, 55),
    (3, 0.90): (33.0, 21), (3, 0.75): (52.9, 34), (3, 0.50): (86.4, 56),
    (5, 0.90): (39.6, 26), (5, 0.75): (58.4, 38), (5, 0.50): (90.1, 58),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "full", "table"), [(SEVEN, 99.3, TABLE_7B), (THIRTEEN, 154.6, TABLE_13B)], ids=["7B", "13B"])
def test_fastv_table_1(shape, full, table):
    for (k, rate), (billions, percent) in table.items():
        cost = flops.fastv_cost(shape, n=611, visual=576, k=k, rate=rate)
        assert cost.n == 611
        assert cost.full / 1e9 == pytest.approx(full, rel=0.002)
        # the table's own figures lie around the formula: K=2 fits n = 611 to .04 G, K=5/R=50 % needs n = 614
        assert cost.pruned / 1e9 == pytest.approx(billions, rel=0.015)
        assert abs(100 * cost.ratio - percent) < 1


def test_fastv_table_1_to_the_digit_at_k_2():
    for rate, billions in ((0.9, 19.9), (0.75, 32.8), (0.5, 54.6)):
        assert round(flops.fastv_cost(SEVEN, n=611, visual=576, k=2, rate=rate).pruned / 1e9, 1) == billions


def test_the_published_dyrate_baseline():
    """57.90 % is FastV's formula at K=3, R=.5, n = 576 + 55 (docs/costs.md); a constant K=2, R=.75 costs 33
    % too.
    """
    assert 100 * flops.fastv_cost(SEVEN, n=631, visual=576, k=3, rate=0.5).ratio == pytest.approx(57.90, abs=0.6)
    assert 100 * flops.fastv_cost(SEVEN, n=611, visual=576, k=2, rate=0.75).ratio == pytest.approx(33, abs=0.2)


def test_the_published_video_llava_ratios():
    """FastV, Table 6: 52.3 % and 57.1 % for K = 2 and 5 at R = 50 % of 2048 tokens; 68 text tokens give both."""
    for k, percent in ((2, 52.3), (5, 57.1)):
        assert 100 * flops.fastv_cost(SEVEN, n=2116, visual=2048, k=k, rate=0.5).ratio == pytest.approx(percent, abs=0.1)


def test_fastv_formula_by_hand():
    assert flops.fastv_layer(3, 2, 5) == 4 * 3 * 4 + 2 * 9 * 2 + 2 * 3 * 2 * 5
    shape = ModelShape(4, 1, 1, 2, 2, 5, 7)
    cost = flops.fastv_cost(shape, n=10, visual=8, k=1, rate=0.5)
    full, after = flops.fastv_layer(10, 2, 5), flops.fastv_layer(6, 2, 5)
    assert cost.pruned == pytest.approx((full + 3 * after) / 4) and cost.ratio == pytest.approx((full + 3 * after) / (4 * full))
    assert flops.fastv_cost(shape, n=10, visual=8, k=4, rate=0.5).ratio == 1
    assert flops.fastv_cost(shape, n=10, visual=8, k=1, rate=0).ratio == 1


def test_fastv_arguments_are_checked():
    good = {"n": 611, "visual": 576, "k": 2, "rate": 0.5}
    for bad in (
        {"rate": 1.1},
        {"rate": float("nan")},
        {"k": 33},
        {"k": -1},
        {"visual": 612},
        {"visual": -1},
        {"n": 0, "visual": 0},
    ):
        with pytest.raises(ValueError, match="must be in"):
            flops.fastv_cost(SEVEN, **(good | bad))


# ---- executed FLOPs ------------------------------------------------------------------------------------------------


def tiny_config(kind: str, **more):
    common = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80,
        "vocab_size": 101,
        "attn_implementation": "eager", "tie_word_embeddings": False,
    }  # fmt: skip
    if kind.startswith("qwen3"):
        common["head_dim"] = 16  # not hidden_size / heads
    return transformers.AutoConfig.for_model(kind, **(common | more))


FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def counted(call):
    """Returns what ``call`` returns, and torch's count of its operations."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("kind", FAMILIES)
def test_exact_count_is_what_torch_counts(kind):
    config = tiny_config(kind)
    shape = ModelShape.from_config(config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(0, 101, (1, 13))
    # some versions of transformers (5.6) make the angles of the rotary embedding by a matrix product, which torch counts and we do not
    rotary = [counted(lambda n=n: model.model.rotary_emb(torch.zeros(1, n, 48), torch.arange(n)[None]))[1] for n in (13, 1)]
    output, count = counted(lambda: model(ids, use_cache=True, logits_to_keep=1))
    assert count - rotary[0] == flops.prefill_flops(shape, 13)
    _, count = counted(lambda: model(ids[:, :1], **{cache_name(): output.past_key_values}, use_cache=True))
    assert count - rotary[1] == flops.decode_flops(shape, 14)


def test_prefill_and_decode_by_layer():
    shape = ModelShape.from_config(tiny_config("qwen3"))
    rows = [20, 8, 8]
    by_hand = 0
    for n in rows:
        by_hand += n * 48 * (6 * 16) * 2 + n * 48 * (2 * 16) * 2  # q and o, k and v
        by_hand += 3 * n * 48 * 80  # gate, up, down
        by_hand += 2 * n * n * 6 * 16  # q k^T and p v
    assert flops.prefill_flops(shape, rows, head=False) == 2 * by_hand
    assert flops.prefill_flops(shape, rows) == 2 * (by_hand + 48 * 101)
    assert flops.decode_flops(shape, [9, 5, 5], head=False) == sum(flops.layer_flops(shape, 1, c) for c in (9, 5, 5))
    assert flops.prefill_flops(shape, 20) > flops.prefill_flops(shape, rows)


def test_exact_and_fastv_counts_differ_by_the_gate_only():
    """On a model without grouped heads the exact count is twice (multiply and add) FastV's with 3 ndm for 2 ndm."""
    n, d, m = 611, SEVEN.hidden_size, SEVEN.intermediate_size
    assert flops.layer_flops(SEVEN, n, n) == 2 * (flops.fastv_layer(n, d, m) + n * d * m)


# ---- parameters and bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_what_the_model_has(kind, tied, bias):
    more = {"tie_word_embeddings": tied}
    if bias and kind in ("llama", "qwen3"):
        more["attention_bias"] = True
        if kind == "llama":
            more["mlp_bias"] = True
    config = tiny_config(kind, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert flops.parameters(ModelShape.from_config(config)) == sum(p.numel() for p in model.parameters())
    half = ModelShape.from_config(config, dtype=torch.float16)
    assert flops.weight_bytes(half) == sum(p.nbytes for p in model.half().parameters())


def qwen25_vl(**more):
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=text | more, tie_word_embeddings=False)


# docs/costs.md: fp16, 128 text tokens, all visual KV gone
BOUNDS = [
    (transformers.LlavaConfig, 576, 512, (1.02, 1.17, 1.62)),
    (transformers.LlavaNextConfig, 2880, 512, (1.11, 1.86, 4.1)),
    (qwen25_vl, 1280, 56, (1.00, 1.04, 1.15)),
    (qwen25_vl, 16384, 56, (1.06, 1.49, 2.95)),
]


@pytest.mark.parametrize(("config", "visual", "kib", "bounds"), BOUNDS)
def test_bounds_of_the_byte_model(config, visual, kib, bounds):
    shape = ModelShape.from_config(config(), dtype=torch.float16)
    assert flops.kv_bytes_per_token(shape) == kib * 1024
    for batch, bound in zip((1, 8, 32), bounds, strict=True):
        result = flops.decode_bytes(shape, batch=batch, visual=visual, text=128)
        assert result.bound == pytest.approx(bound, abs=0.0101)
        weights, token = flops.parameters(shape) * 2, kib * 1024
        assert result.total == weights + batch * token * (visual + 128)
        assert result.total_pruned == weights + batch * token * 128


def test_byte_model_with_some_kept():
    shape = SEVEN
    result = flops.decode_bytes(shape, batch=4, visual=2880, text=100, kept=360, k=3)
    token = 2 * 32 * 128 * 2
    assert result.total_pruned == flops.weight_bytes(shape) + 4 * token * (32 * 100 + 3 * 2880 + 29 * 360)
    assert 1 < result.bound < flops.decode_bytes(shape, batch=4, visual=2880, text=100).bound
    assert flops.decode_bytes(shape, batch=4, visual=2880, kept=2880).bound == 1
    wide = flops.decode_bytes(shape.replace(dtype=torch.float32), batch=4, visual=2880, text=100, kept=360, k=3)
    assert wide.total == 2 * result.total and wide.bound == result.bound
    for bad in ({"batch": 0}, {"visual": -1}, {"text": -1}, {"kept": 2881}, {"kept": -1}, {"k": 33}):
        with pytest.raises(ValueError, match="must be"):
            flops.decode_bytes(shape, **({"batch": 1, "visual": 2880} | bad))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llava-1.5-7b", lambda: transformers.LlavaConfig(text_config={"model_type": "llama", "vocab_size": 32064})),
        (
            "llava-next-7b",
            lambda: transformers.LlavaNextConfig(text_config={"model_type": "llama", "vocab_size": 32064}),
        ),
        ("qwen2.5-vl-7b", qwen25_vl),
    ],
)
def test_named_models_are_the_configs(name, config):
    named = flops.named_model(name).shape
    found = ModelShape.from_config(config(), dtype=torch.float16)
    assert found.replace(model_type=named.model_type) == named


def test_named_models():
    billions = {name: flops.parameters(model.shape) / 1e9 for name, model in flops.MODELS.items()}
    assert billions["llava-1.5-7b"] == pytest.approx(6.74, abs=0.01)
    assert billions["llava-1.5-13b"] == pytest.approx(13.02, abs=0.01)
    assert billions["llava-next-mistral-7b"] == pytest.approx(7.24, abs=0.01)
    assert billions["qwen2.5-vl-7b"] == pytest.approx(7.62, abs=0.01)
    assert all(model.visual_tokens > 0 and model.note for model in flops.MODELS.values())
    with pytest.raises(ValueError, match="model must be one of llava-1.5-7b, .*got 'gpt'"):
        flops.named_model("gpt")


# ---- a generation --------------------------------------------------------------------------------------------------


def loop_cost(shape, text, visual, layers, kept, shrunk, row_bytes):
    """The same by plain loops: pruned and unpruned FLOPs and bytes, and the paper cost."""
    totals = {"flops": 0.0, "flops_unpruned": 0.0, "bytes": 0.0, "bytes_unpruned": 0.0}
    ratios = []
    d, m = shape.hidden_size, shape.intermediate_size
    for b in range(len(text)):
        for step in range(len(kept)):
            paper = []
            for g, count in enumerate(layers):
                for _ in range(count):
                    have, everything = kept[step][g][b], visual[b]
                    paper.append(flops.fastv_layer(have + text[b] + step, d, m))
                    if step == 0:
                        rows = (have if shrunk else everything) + text[b]
                        totals["flops"] += flops.layer_flops(shape, rows, rows)
                        totals["flops_unpruned"] += flops.layer_flops(shape, everything + text[b], everything + text[b])
                    else:
                        totals["flops"] += flops.layer_flops(shape, 1, have + text[b] + step)
                        totals["flops_unpruned"] += flops.layer_flops(shape, 1, everything + text[b] + step)
                        totals["bytes"] += row_bytes * (have + text[b] + step)
                        totals["bytes_unpruned"] += row_bytes * (everything + text[b] + step)
            totals["flops"] += flops.head_flops(shape)
            totals["flops_unpruned"] += flops.head_flops(shape)
            ratios.append(sum(paper) / (shape.num_layers * flops.fastv_layer(visual[b] + text[b] + step, d, m)))
    steps = len(kept) - 1
    totals["bytes"] += steps * flops.weight_bytes(shape)
    totals["bytes_unpruned"] += steps * flops.weight_bytes(shape)
    return totals, sum(ratios) / len(ratios)


@pytest.mark.parametrize("shrunk", [False, True])
def test_generation_cost_against_loops(shrunk):
    shape = ModelShape.from_config(tiny_config("qwen3"))
    text, visual, layers = [7, 12], [40, 0], [1, 1, 1]
    kept = [
        [[40, 0], [20, 0], [10, 0]],
        [[40, 0], [18, 0], [9, 0]],
        [[40, 0], [4, 0], [0, 0]],
        [[40, 0], [30, 0], [10, 0]],
    ]
    result = flops.generation_cost(
        shape, text_rows=text, visual_tokens=visual, group_layers=layers, kept=np.array(kept), prefill_shrunk=shrunk
    )
    expected, paper = loop_cost(shape, text, visual, layers, kept, shrunk, flops.kv_bytes_per_token(shape) / 3)
    assert result.n == (47, 12)
    assert result.flops == pytest.approx(expected["flops"]) and result.flops_unpruned == pytest.approx(expected["flops_unpruned"])
    assert result.bytes_read == pytest.approx(expected["bytes"]) and result.bytes_read_unpruned == pytest.approx(expected["bytes_unpruned"])
    assert result.paper_cost == pytest.approx(paper)
    assert result.flops < result.flops_unpruned and (result.prefill_flops < result.prefill_flops_unpruned) == shrunk


def test_generation_cost_is_the_sum_of_its_passes():
    shape = SEVEN
    kept = np.array([[[576], [288]], [[576], [144]]])
    result = flops.generation_cost(
        shape,
        text_rows=[35],
        visual_tokens=[576],
        group_layers=[2, 30],
        kept=kept,
        prefill_shrunk=True,
        bytes_per_row=[10, 20],
        weights=1000,
    )
    rows = [611] * 2 + [323] * 30
    assert result.prefill_flops == pytest.approx(flops.prefill_flops(shape, rows))
    assert result.flops == pytest.approx(flops.prefill_flops(shape, rows) + flops.decode_flops(shape, [612] * 2 + [180] * 30))
    assert result.flops_unpruned == pytest.approx(flops.prefill_flops(shape, 611) + flops.decode_flops(shape, 612))
    assert result.bytes_read == 1000 + 2 * 10 * 612 + 30 * 20 * 180
    assert result.bytes_read_unpruned == 1000 + 2 * 10 * 612 + 30 * 20 * 612
    first = flops.fastv_cost(shape, n=611, visual=576, k=2, rate=0.5).ratio
    second = flops.fastv_cost(shape, n=612, visual=576, k=2, rate=0.75).ratio
    assert result.paper_cost == pytest.approx((first + second) / 2)


def test_generation_cost_when_nothing_is_dropped():
    kept = np.full((4, 1, 2), 30)
    result = flops.generation_cost(SEVEN, text_rows=[5, 9], visual_tokens=[30, 30], group_layers=[32], kept=kept, prefill_shrunk=True)
    assert result.paper_cost == 1
    assert result.flops == result.flops_unpruned and result.bytes_read == result.bytes_read_unpruned
    prompt_only = flops.generation_cost(
        SEVEN, text_rows=[5, 9], visual_tokens=[30, 30], group_layers=[32], kept=kept[:1], prefill_shrunk=True
    )
    assert prompt_only.bytes_read == 0 and prompt_only.flops == prompt_only.prefill_flops == result.prefill_flops


def test_generation_cost_of_a_later_turn():
    """Text that was in the cache already is attended to, not computed again."""
    kept = np.array([[[30], [10]]])
    both = {"visual_tokens": [30], "group_layers": [3, 29], "kept": kept, "prefill_shrunk": True}
    turn = flops.generation_cost(SEVEN, text_rows=[50], cached_text=[40], cached_visual=[30], **both)
    expected = sum(count * flops.layer_flops(SEVEN, 10, context) for count, context in ((3, 80), (29, 60)))
    assert turn.prefill_flops == pytest.approx(expected + flops.head_flops(SEVEN))
    assert turn.prefill_flops < flops.generation_cost(SEVEN, text_rows=[50], **both).prefill_flops


def test_generation_cost_arguments_are_checked():
    good = {
        "text_rows": [5],
        "visual_tokens": [30],
        "group_layers": [32],
        "kept": np.full((1, 1, 1), 30),
        "prefill_shrunk": False,
    }
    flops.generation_cost(SEVEN, **good)
    with pytest.raises(ValueError, match="group_layers must sum to 32"):
        flops.generation_cost(SEVEN, **(good | {"group_layers": [31]}))
    for kept in (np.full((1, 2, 1), 30), np.full((1, 1, 2), 30), np.full((1, 1), 30), np.zeros((0, 1, 1))):
        with pytest.raises(ValueError, match="kept must be"):
            flops.generation_cost(SEVEN, **(good | {"kept": kept}))
    with pytest.raises(ValueError, match="visual_tokens"):
        flops.generation_cost(SEVEN, **(good | {"visual_tokens": [30, 30]}))
