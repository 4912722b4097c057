"""Counts of ``stats()`` against other counts: torch's, the parameters, the columns that the mask oracle keeps, a sequence alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import dyrate_kernels as dk
from tests import models
from tests.checks import METHODS, RETENTIONS, ROWS, greedy, patched, policy, rows_for, single
from tests.oracle import Oracle, Rule

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
EVERY = [*models.VARIANTS, *models.MORE_VARIANTS]
EVERY_FAMILY = pytest.mark.parametrize(("family", "text"), EVERY, ids=["-".join(v) for v in EVERY])
WINDOWED = [("llava", "mistral"), ("mistral3", "mistral"), ("gemma3", "own"), ("llava", "qwen2")]
NEW = 6
LONG_ROW = ["text 20", "image", "text 3", "image", "text 3", "image", "text 9"]


def alternating(family: str, text: str) -> dict:
    """Windows of some layers alone, for a family whose config can name them."""
    if (family, text) != ("llava", "qwen2"):
        return {}
    return {
        "sliding_window": 17,
        "use_sliding_window": True,
        "layer_types": [f"{kind}_attention" for kind in ("full", "sliding") * 2] + ["full_attention"],
    }


def model_for(make_model, method: str):
    """One with windows, unless the method's predictor was made for another."""
    return make_model("llava", "llama" if METHODS[method].weight is not None else "mistral")


def windows_of(model) -> list[int | None]:
    """As the cache of the unpatched model has them."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config.get_text_config()).layers]


def weights_of(model) -> int:
    """Bytes of the text model's and the head's parameters, the embedding once where the head is tied to it."""
    held = {parameter.data_ptr(): parameter for module in (model.get_decoder(), model.lm_head) for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in held.values())


# ---- weights ------------------------------------------------------------------------------------------------------------------------


def bytes_of_weights(model, fields, steps: int = 2) -> float:
    """Returns what stats() says a decode step reads of them: all that it reads, without the rows of keys and values."""
    with dk.patch(model, "none") as handle:
        model.generate(**fields, max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False)
        stats = handle.stats()
    row = 2 * models.KV_HEADS * models.HEAD_DIM * model.get_decoder().layers[0].self_attn.v_proj.weight.element_size() * models.LAYERS
    length = int(fields["attention_mask"].sum())
    return (stats.bytes_read_unpruned - row * sum(length + step for step in range(1, steps + 1))) / steps


@pytest.mark.parametrize("tied", [False, True])
def test_weights_have_the_dtype_that_the_model_was_moved_to(tied):
    model = models.build("llava", "qwen3", tie_word_embeddings=tied)
    model.config.tie_word_embeddings = tied
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fields = models.inputs(model.to(dtype), ROWS[:1])
        assert bytes_of_weights(model, fields) == weights_of(model)


def test_a_patched_model_that_is_moved_counts_what_it_is_now():
    model = models.build("llava", "qwen3")
    fields = models.inputs(model, ROWS[:1])
    with dk.patch(model, "none") as handle:
        model.generate(**fields, **greedy(3))
        whole = handle.stats()
        model.to(torch.bfloat16)
        model.generate(**models.inputs(model, ROWS[:1]), **greedy(3))
        assert 2 * handle.stats().bytes_read == whole.bytes_read
        assert handle.shape.dtype == torch.bfloat16 and dk.flops.weight_bytes(handle.shape) == weights_of(model)


def test_weights_of_several_dtypes_count_each_in_its_own():
    model = models.build("llava", "qwen3", dtype=torch.bfloat16)
    for module in model.get_decoder().modules():
        if "RMSNorm" in type(module).__name__:
            module.to(torch.float32)
    model.lm_head.weight.data = model.lm_head.weight.data.float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    for layer in model.get_decoder().layers:  # what leaves a norm in float32 goes on in the layer's own dtype
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp):
            part.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    kinds = {parameter.dtype for parameter in model.get_decoder().parameters()}
    assert kinds == {torch.bfloat16, torch.float32}
    with dk.patch(model, "none") as handle:
        assert dk.flops.weight_bytes(handle.shape) == weights_of(model)


def test_adapters_count_where_they_are_read():
    peft = pytest.importorskip("peft")
    model = models.build("llava", "qwen3")
    fields = models.inputs(model, ROWS[:1])
    plain = bytes_of_weights(model, fields)
    lora = peft.LoraConfig(r=4, target_modules=r".*language_model.*[qv]_proj", init_lora_weights=False)
    wrapper = peft.get_peft_model(model, lora, "first")
    wrapper.add_adapter("second", lora)
    wrapper.set_adapter("second")
    width, (out_q, out_v) = models.HIDDEN, (models.HEADS * models.HEAD_DIM, models.KV_HEADS * models.HEAD_DIM)
    adapter = 4 * models.LAYERS * 4 * ((width + out_q) + (width + out_v))  # rank 4, float32
    assert bytes_of_weights(model, fields) == plain + adapter  # the first one lies beside it
    with wrapper.disable_adapter():
        assert bytes_of_weights(model, fields) == plain
    wrapper.merge_adapter()
    assert bytes_of_weights(model, fields) == plain
    wrapper.unmerge_adapter()
    assert bytes_of_weights(model, fields) == plain + adapter


def test_a_trained_copy_of_the_head_counts_in_its_place():
    peft = pytest.importorskip("peft")
    model = models.build("llava", "qwen3")
    fields = models.inputs(model, ROWS[:1])
    plain = bytes_of_weights(model, fields)
    inner = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj", modules_to_save=["lm_head"])
    ).base_model.model
    assert bytes_of_weights(inner, fields) == plain + 4 * models.LAYERS * 4 * (models.HIDDEN + models.HEADS * models.HEAD_DIM)


# ---- FLOPs against torch's counter --------------------------------------------------------------------------------------------------


def torch_counts(model, **options) -> float:
    """FLOPs of the text model and its head in ``generate`` of the unpatched model; those of rotations, which some versions of transformers
    make by a matrix product, left out.
    """
    total = 0
    with torch.no_grad():
        with FlopCounterMode(model, display=False, depth=9) as counter:
            model.generate(**options)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    names = {module: name for name, module in model.named_modules()}
    for module, sign in ((model.get_decoder(), 1), (model.lm_head, 1), (getattr(model.get_decoder(), "rotary_emb", None), -1)):
        if module is not None:
            total += sign * counts.get(f"{type(model).__name__}.{names[module]}", 0)
    return total


@EVERY_FAMILY
def test_unpruned_flops_are_those_that_torch_counts(family, text):
    """In a batch with padding: those of each sequence alone. Several pictures, prompts that see ahead, and windows among them."""
    model = models.build(family, text, **alternating(family, text))
    model.set_attn_implementation("eager")
    rows = [LONG_ROW, ["text 2", "image", "text 5"], *rows_for(family)[2:4]]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    alone = [torch_counts(model, **single(model, row), **options) for row in rows]
    with dk.patch(model, "none") as handle:
        model.generate(**models.inputs(model, rows), **options)
        stats = handle.stats()
        assert [handle.stats(b).flops_unpruned for b in range(len(rows))] == alone
    assert stats.flops_unpruned == stats.flops == stats.flops_unreduced == sum(alone)


@pytest.mark.parametrize(("family", "text"), WINDOWED)
def test_unpruned_flops_of_a_later_turn_are_those_that_torch_counts(family, text):
    model = models.build(family, text, **alternating(family, text))
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first, more = single(model, LONG_ROW), torch.arange(5, 12)[None]

    def both_turns(count):
        output = model.generate(**first, **options)
        fields = {name: value for name, value in first.items() if name in ("token_type_ids",)}
        ids = torch.cat([output.sequences, more], 1)
        if fields:
            fields["token_type_ids"] = torch.nn.functional.pad(fields["token_type_ids"], (0, ids.shape[1] - first["input_ids"].shape[1]))
        fields |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": output.past_key_values}
        return count(**fields, **options)

    want = both_turns(lambda **fields: torch_counts(model, **fields))
    with dk.patch(model, "none") as handle:
        both_turns(model.generate)
        stats = handle.stats()
    assert stats.flops_unpruned == stats.flops == want


# ---- a sequence of a batch ----------------------------------------------------------------------------------------------------------


def assert_same_stats(got: dk.Stats, want: dk.Stats) -> None:
    """Every field; numbers that were summed in another order within rounding."""
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if field.name == "steps":
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                assert (x.step, x.kept, x.kept_tokens) == (y.step, y.kept, y.kept_tokens)
                assert x.rate == pytest.approx(y.rate, abs=1e-12) and torch.allclose(torch.tensor(x.mass), torch.tensor(y.mass), atol=1e-5)
                assert (x.importance is None) == (y.importance is None)
                if x.importance is not None:
                    assert torch.allclose(torch.tensor(x.importance), torch.tensor(y.importance), atol=1e-4)
        else:
            assert a == (pytest.approx(b, rel=1e-12) if isinstance(b, float) else b), field.name


def check_each_alone(model, rows, retention, lengths=(1, 3, NEW), **options) -> None:
    with dk.patch(model, retention=retention, record_importance=True, **options) as handle:
        whole = model.generate(**models.inputs(model, rows), **greedy(NEW)).sequences[:, -NEW:]
        found = {(place, length): handle.stats(place, length) for place in range(len(rows)) for length in lengths}
        for (place, length), got in found.items():
            alone = model.generate(**single(model, rows[place]), **greedy(length)).sequences[0, -length:]
            assert alone.tolist() == whole[place, :length].tolist()
            assert_same_stats(got, handle.stats())


@RETENTION
@pytest.mark.parametrize("method", METHODS)
def test_stats_of_a_sequence_are_those_of_it_alone(make_model, method, retention):
    check_each_alone(model_for(make_model, method), ROWS[:3], retention, policy=policy(METHODS[method]))


@RETENTION
@EVERY_FAMILY
def test_stats_of_a_sequence_of_each_family(family, text, retention):
    model = models.build(family, text, **alternating(family, text))
    for chosen in (dk.policies.Fixed(k=2, rate=0.6), dk.policies.get("dyrate", k=3)):
        check_each_alone(model, rows_for(family)[:3], retention, (2, NEW), policy=chosen)


@pytest.mark.parametrize("name", ["recycle", "klguard"])
def test_stats_of_a_sequence_of_policies_that_wrap_others(make_model, name):
    check_each_alone(make_model("llava", "mistral"), ROWS[:3], "recoverable", policy=dk.policies.get(name, policy="fixed", k=2))


@RETENTION
@pytest.mark.parametrize("vision", ["uniform:keep=0.5", "prumerge", "tome+aim"])
def test_stats_of_a_sequence_behind_reducers(make_model, vision, retention):
    check_each_alone(make_model("llava", "mistral"), ROWS[:3], retention, policy=dk.policies.Fixed(k=2, rate=0.6), vision=vision)


@RETENTION
@pytest.mark.parametrize("method", ["fixed", "dyrate", "fastv"])
def test_stats_of_a_sequence_in_the_second_turn_of_a_chat(make_model, method, retention):
    model = make_model("llava", "mistral")

    def chat(rows):
        fields, options = models.inputs(model, rows), {"do_sample": False, "return_dict_in_generate": True}
        first = model.generate(**fields, **options, max_new_tokens=4)
        ids = torch.cat([first.sequences, torch.arange(5, 12)[None].expand(len(rows), -1)], 1)
        mask = torch.nn.functional.pad(fields["attention_mask"], (0, 11), value=1)
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **options, max_new_tokens=5)

    with patched(model, METHODS[method], retention) as handle:
        chat(ROWS[:2])
        found = [handle.stats(0, 3), handle.stats(1)]
        for got, row, length in zip(found, ROWS, (3, None), strict=False):
            chat([row])
            assert_same_stats(got, handle.stats(0, length))


@pytest.mark.parametrize("method", ["fixed", "dyrate", "depth", "layerwise"])
def test_stats_of_drafted_steps_know_windows(make_model, method):
    model = make_model("llava", "mistral")
    fields, options = single(model, ROWS[0]), {"max_new_tokens": 8, "do_sample": False}
    with patched(model, METHODS[method]) as handle:
        model.generate(**fields, **options)
        plain = handle.stats()
        model.generate(**fields, **options, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
        drafted = handle.stats()
    assert drafted.bytes_read == plain.bytes_read < plain.bytes_read_unpruned
    assert drafted.flops == pytest.approx(plain.flops, rel=1e-12)


# ---- against the columns that the oracle keeps -----------------------------------------------------------------------------------------


def counted(model, fields, oracle: Oracle, retention: str) -> dict[str, float]:
    """The costs of a generation by loops over its sequences, steps and layers, from which columns each layer may read."""
    text = model.config.get_text_config()
    windows, layers = windows_of(model), model.get_decoder().layers
    linear = [sum(2 * m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear)) for layer in layers]
    head, pairs = 2 * model.lm_head.weight.numel(), 4 * models.HEADS * models.HEAD_DIM
    d, m = text.hidden_size, text.intermediate_size
    row_bytes = 2 * models.KV_HEADS * models.HEAD_DIM * layers[0].self_attn.v_proj.weight.element_size()
    prompt, batch = fields["input_ids"].shape[1], len(fields["input_ids"])
    total = dict.fromkeys(("flops", "flops_unpruned", "bytes_read", "bytes_read_unpruned", "kv_bytes_live"), 0.0)
    total["bytes_read"] = total["bytes_read_unpruned"] = (NEW - 1) * weights_of(model)
    paper, exact, kept_share, layer_share = [], [], [], []

    def whole(n: int, part: int, gate: float) -> float:
        return (4 * n * d * d + 2 * n * n * d + 2 * n * d * m) if not gate else linear[part] * n + pairs * n * n

    for b in range(batch):
        real = [c for c in range(prompt) if fields["attention_mask"][b, c]]
        visual = [c for c in real if int(fields["input_ids"][b, c]) in oracle.visual_ids]
        for step in range(NEW):
            newest = prompt + step - 1
            ratio, exact_ratio, shares = [], [], []
            for index in range(len(layers)):
                trace = oracle.trace[b][step].kept if visual else {}
                everything = real + list(range(prompt, newest + 1))
                chosen = set(trace.get(index, visual)) if index >= oracle.k else set(visual)
                read = [c for c in everything if c not in visual or c in chosen]
                for gate, into in ((False, ratio), (True, exact_ratio)):
                    into.append(whole(len(read), index, gate) / whole(len(everything), index, gate))
                if step == 0 and retention == "recoverable":
                    chosen, ran = set(visual), everything
                    if visual:  # the record tells that a prompt read all
                        ratio[-1] = exact_ratio[-1] = 1.0
                else:
                    ran = read
                shares.append(len(chosen) / len(visual) if visual else 1.0)
                if step == 0:
                    rows = len(ran) + (prompt - 1 not in ran)  # the last column gives the next token, also where it is dropped
                    total["flops"] += rows * (linear[index] + pairs * len(ran))
                    total["flops_unpruned"] += len(everything) * linear[index] + pairs * len(everything) ** 2
                    continue
                inside = [c for c in everything if windows[index] is None or c > newest - windows[index]]
                seen = [c for c in inside if c in read]
                for name, rows in (("", seen), ("_unpruned", inside)):
                    total[f"flops{name}"] += linear[index] + pairs * len(rows)
                    total[f"bytes_read{name}"] += row_bytes * len(rows)
                if step == NEW - 1:
                    total["kv_bytes_live"] += row_bytes * len(ran if retention == "evict" else everything)
            total["flops"] += head
            total["flops_unpruned"] += head
            paper.append(sum(ratio) / len(layers))
            exact.append(sum(exact_ratio) / len(layers))
            if visual:
                kept_share.append(sum(shares[oracle.k :]) / len(shares[oracle.k :]))
                layer_share.append(sum(shares) / len(shares))
    means = {"paper_cost": paper, "exact_cost": exact, "kept_mean": kept_share or [1.0], "visual_share": layer_share or [1.0]}
    return total | {name: sum(values) / len(values) for name, values in means.items()}


def check_against_oracle(model, fields, rule: Rule, retention: str) -> None:
    oracle = Oracle(model, rule, retention)
    want = oracle.generate(**fields, **greedy(NEW)).sequences
    with patched(model, rule, retention) as handle:
        assert torch.equal(model.generate(**fields, **greedy(NEW)).sequences, want)
        stats = handle.stats()
    for name, value in counted(model, fields, oracle, retention).items():
        assert getattr(stats, name) == pytest.approx(value, rel=1e-12), name


@RETENTION
@pytest.mark.parametrize("method", METHODS)
def test_costs_of_each_method_by_the_columns_that_it_keeps(make_model, method, retention):
    model = model_for(make_model, method)
    check_against_oracle(model, models.inputs(model, ROWS), METHODS[method], retention)


@pytest.mark.parametrize("seed", range(12))
def test_costs_of_random_configurations_by_the_columns_that_they_keep(seed):
    draw = random.Random(seed)
    family, text = draw.choice(EVERY)
    options = alternating(family, text)
    if text in ("mistral", "own") and family in ("llava", "mistral3", "gemma3"):
        options["sliding_window"] = draw.randint(3, 40)
    model = models.build(family, text, seed=seed, **options)
    items = ["image", "text 1", "text 4", "text 17"]
    # generate() without a cache, as the oracle runs it, takes what follows a picture of Gemma 3 for more of that picture
    ends = ["text 3"] if family == "gemma3" else ["text 3", "image"]
    rows = [[*draw.choices(items, k=draw.randint(0, 5)), draw.choice(ends)] for _ in range(draw.randint(1, 4))]
    least = 2 if family == "qwen3_vl" else 1  # its first layers add visual features
    rule = METHODS[
        draw.choice([name for name, rule in METHODS.items() if rule.weight is None and rule.first_layer(models.LAYERS) >= least])
    ]
    check_against_oracle(model, models.inputs(model, rows, seed=seed), rule, draw.choice(RETENTIONS))
