"""Rate predictors: the closed form against buckets computed by hand, the trained one through save, load, checks and
damaged files.
"""

from __future__ import annotations

import contextlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from dyrate_kernels import DyRatePredictor, ops, policies, predictor
from dyrate_kernels.policies.base import ModelShape, View
from dyrate_kernels.predictor import CONFIG_FILE, WEIGHTS_FILE, ClosedForm, named_rates

SHAPE = ModelShape(6, 8, 8, 16, 128, 256, 100)
HALF_OPEN = (0.0, 0.2, 0.4, 0.6, 0.8)


def trained(rates=HALF_OPEN, seed=0, k=3, shape=SHAPE) -> DyRatePredictor:
    made = DyRatePredictor.for_model(shape, rates, k)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator))
        made.bias.copy_(torch.randn(made.bias.shape, generator=generator))
    return made


def mass_of(visual: list[float], heads: int = 8) -> torch.Tensor:
    """``[B, heads, 4]`` whose head mean of visual mass is ``visual`` while heads differ."""
    spread = torch.linspace(-0.5, 0.5, heads)[None] * 0.1
    image = torch.tensor(visual)[:, None] + spread * torch.tensor(visual)[:, None]
    rest = (1 - image) / 3
    return torch.stack([rest, image, rest, rest], -1)


def view_of(visual: list[float], step: int, state: dict, tokens: int = 100) -> View:
    batch = len(visual)
    return View(
        torch.full((batch,), step),
        mass_of(visual),
        torch.rand(batch, tokens),
        torch.full((batch,), tokens, dtype=torch.int32),
        None,
        state,
    )


# ---- closed form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_closed_form_is_the_bucket_of_the_mass(count):
    policy = policies.DyRate(num_rates=count).bind(SHAPE)
    rates = named_rates("half_open", count)
    thresholds = [(2 * (count - 1 - j) + 0.5) / count for j in range(count - 1)]  # descending, times the first mass
    draw = random.Random(count)
    for _ in range(200):
        first, now = draw.uniform(0.01, 0.9), draw.uniform(0.0, 0.9)
        if any(abs(now - t * first) < 1e-5 for t in thresholds):
            continue
        state = policy.start(torch.tensor([100], dtype=torch.int32))
        policy.decide(view_of([first], 0, state))
        rate = policy.decide(view_of([now], 1, state)).rate.item()
        assert rate == rates[sum(now < t * first for t in thresholds)]


def test_closed_form_takes_the_middle_rate_first_and_prunes_more_as_mass_falls():
    policy = policies.DyRate().bind(SHAPE)
    state = policy.start(torch.tensor([100, 100], dtype=torch.int32))
    assert policy.decide(view_of([0.5, 0.02], 0, state)).rate.tolist() == [0.4, 0.4]
    chosen = []
    for step, factor in enumerate((1.7, 1.3, 1.0, 0.7, 0.1), 1):
        decision = policy.decide(view_of([0.5 * factor, 0.02 * factor], step, state))
        chosen.append(decision.rate.tolist())
        assert decision.count.tolist() == [round(100 * (1 - rate)) for rate in chosen[-1]]
    assert chosen == [[rate, rate] for rate in HALF_OPEN]
    assert policy.predictor_name == "closed-form"


def test_closed_form_without_visual_mass_keeps_the_first_rate():
    policy = policies.DyRate().bind(SHAPE)
    state = policy.start(torch.tensor([100, 100], dtype=torch.int32))
    policy.decide(view_of([0.0, 0.3], 0, state))
    assert policy.decide(view_of([0.0, float("nan")], 1, state)).rate.tolist() == [0.0, 0.0]


def test_only_step_0_sets_the_first_mass():
    policy = policies.DyRate().bind(SHAPE)
    state = policy.start(torch.tensor([100, 100], dtype=torch.int32))
    policy.decide(view_of([0.4, 0.2], 0, state))
    before = state["first_mass"].clone()
    assert before.tolist() == pytest.approx([0.4, 0.2])
    policy.decide(view_of([0.1, 0.9], 1, state))
    assert torch.equal(state["first_mass"], before)
    mixed = view_of([0.3, 0.3], 0, state)
    mixed.step = torch.tensor([0, 4])
    policy.decide(mixed)
    assert state["first_mass"].tolist() == pytest.approx([0.3, 0.2])


def test_what_the_fused_step_gets_is_what_decide_uses():
    for source in (None, trained()):
        policy = policies.DyRate(predictor=source).bind(SHAPE)
        state = policy.start(torch.tensor([100] * 3, dtype=torch.int32))
        policy.decide(view_of([0.5, 0.1, 0.3], 0, state))
        weight, bias, rates = policy.predictor_tensors(state)
        assert (weight.shape, bias.shape, rates.shape) == ((5, 32), (3, 5), (5,))
        assert (weight.dtype, bias.dtype, rates.dtype) == (torch.float32, torch.float32, torch.float64)
        assert weight.is_contiguous() and not weight.requires_grad and not bias.requires_grad
        assert bias.stride(0) == (5 if source is None else 0)
        later = view_of([0.22, 0.15, 0.5], 1, state)  # no closer than 4 % to a threshold
        logits = later.mass.flatten(1).double() @ weight.double().t() + bias
        assert policy.decide(later).rate.tolist() == rates[logits.argmax(1)].tolist()
        assert ops.predict_rate(later.mass, weight, bias, rates)[0].tolist() == policy.decide(later).rate.tolist()


def test_closed_form_tensors():
    form = ClosedForm(2, [0.0, 0.5, 1.0])
    visual = torch.zeros(3, 2, 4)
    visual[:, :, 1] = torch.tensor([2.0, 1.0, 0.0])[:, None] / 2
    assert torch.equal(form.weight, visual.flatten(1))
    assert form.bias.tolist() == pytest.approx([0.0, 4.5 / 3, 4.5 / 3 + 2.5 / 3])


# ---- options -------------------------------------------------------------------------------------------------------


def test_rate_sets():
    assert policies.DyRate().rate_values == pytest.approx((0, 0.2, 0.4, 0.6, 0.8))
    assert policies.DyRate(rates="closed").rate_values == (0, 0.25, 0.5, 0.75, 1)
    assert policies.DyRate(rates="closed", num_rates=1).rate_values == (0,)
    assert policies.DyRate(rates="half_open", num_rates=2).rate_values == (0, 0.5)
    assert policies.DyRate(rates=[0.1, 0.7]).rate_values == (0.1, 0.7)
    assert policies.DyRate(rates=torch.tensor([0.25, 0.5])).rate_values == (0.25, 0.5)
    assert policies.DyRate(rates=[0.5, 0.75]).bind(SHAPE).kept_bound(100) == 50
    assert not policies.DyRate(rates=[0.0]).drops


def test_options_are_checked():
    for rates in ("open", [], [0.5, 0.2], [0.5, 0.5], [0.1, 1.2], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="rates must"):
            policies.DyRate(rates=rates)
    for rates in (5, None, [None], ["a"], [True]):
        with pytest.raises(TypeError, match="rates must"):
            policies.DyRate(rates=rates)
    with pytest.raises(ValueError, match="num_rates must be at least 1"):
        policies.DyRate(num_rates=0)
    with pytest.raises(TypeError, match="num_rates must be an integer"):
        policies.DyRate(num_rates=2.5)
    with pytest.raises(TypeError, match="predictor must be a DyRatePredictor, a folder, a hub id or None, got int"):
        policies.DyRate(predictor=3)


def test_unbound_use_says_so():
    with pytest.raises(RuntimeError, match="must be bound to a model first"):
        policies.DyRate().start(torch.ones(1, dtype=torch.int32))


# ---- the trained predictor -----------------------------------------------------------------------------------------


def test_forward_is_a_linear_layer():
    made = trained()
    mass = mass_of([0.2, 0.5, 0.7])
    expected = torch.stack([sum(w * x for w, x in zip(row, mass.flatten(1).t(), strict=True)) for row in made.weight]).t() + made.bias
    assert torch.allclose(made(mass), expected, atol=1e-5)
    assert set(dict(made.named_parameters())) == {"weight", "bias"}
    made(mass).sum().backward()
    assert made.weight.grad is not None and made.bias.grad is not None


def test_save_and_load(tmp_path):
    made = trained(rates=(0.8, 0.1, 0.5), k=2)
    made.notes = {"steps": 7, "data": "shapes"}
    made.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])
    for source in (tmp_path / "a" / "b", str(tmp_path / "a" / "b")):
        loaded = DyRatePredictor.from_pretrained(source)
        assert torch.equal(loaded.weight, made.weight) and torch.equal(loaded.bias, made.bias)
        assert (loaded.rates, loaded.k, loaded.num_heads, loaded.model, loaded.notes) == (
            made.rates,
            2,
            8,
            made.model,
            made.notes,
        )
        assert loaded.source == str(source) and str(source) in repr(loaded)
    mass = mass_of([0.2, 0.5, 0.7])
    assert torch.equal(loaded(mass), made(mass))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CONFIG_FILE).read_bytes() == (tmp_path / "a" / "b" / CONFIG_FILE).read_bytes()


def test_half_precision_is_saved_as_float32(tmp_path):
    made = trained().half()
    made.save_pretrained(tmp_path)
    assert torch.equal(DyRatePredictor.from_pretrained(tmp_path).weight, made.weight.float())


def test_bind_loads_by_path_and_uses_its_rates(tmp_path):
    made = trained(rates=(0.9, 0.3))
    made.save_pretrained(tmp_path)
    policy = policies.DyRate(predictor=str(tmp_path)).bind(SHAPE)
    assert policy.rate_values == (0.9, 0.3) and policy.predictor_name == str(tmp_path)
    assert policy.kept_bound(10) == 7
    state = policy.start(torch.tensor([100] * 40, dtype=torch.int32))
    view = view_of([i / 40 for i in range(40)], 0, state)
    expected = [made.rates[i] for i in made(view.mass).argmax(1).tolist()]
    assert policy.decide(view).rate.tolist() == expected
    assert policies.DyRate(predictor=made).bind(SHAPE).predictor_name == "in memory"


def test_a_new_generation_sees_changed_weights_at_the_same_address():
    made = trained()
    policy = policies.DyRate(predictor=made).bind(SHAPE)
    count = torch.tensor([100], dtype=torch.int32)
    before = policy.predictor_tensors(policy.start(count))[0]
    address = before.data_ptr()
    with torch.no_grad():
        made.weight.mul_(-1)
    after = policy.predictor_tensors(policy.start(count))[0]
    assert after.data_ptr() == address and torch.equal(after, made.weight)


def test_a_predictor_for_another_model_is_refused():
    made = trained()
    other = {
        "expects mass of 8 heads .*the model has 16": SHAPE.replace(num_heads=16),
        "trained for a model with hidden_size 128, this model has 64": SHAPE.replace(hidden_size=64),
        "trained for a model with num_layers 6, this model has 8": SHAPE.replace(num_layers=8),
        "trained for a model with model_type 'llama', this model has 'qwen2'": SHAPE.replace(model_type="qwen2"),
    }
    for message, shape in other.items():
        with pytest.raises(ValueError, match=message):
            policies.DyRate(predictor=made).bind(shape)
    with pytest.raises(ValueError, match=r"trained for k=3 \(it reads layer 2\), got k=2; pass k=3"):
        policies.DyRate(predictor=made, k=2).bind(SHAPE)
    with pytest.raises(ValueError, match="rates must be those of the predictor"):
        policies.DyRate(predictor=made, rates="closed").bind(SHAPE)
    with pytest.raises(ValueError, match="rates must be those of the predictor"):
        policies.DyRate(predictor=made, rates=[0.1, 0.2]).bind(SHAPE)
    policies.DyRate(predictor=made, rates=list(HALF_OPEN)).bind(SHAPE)
    anonymous = DyRatePredictor(8, HALF_OPEN)  # no fingerprint: only the shape counts
    policies.DyRate(predictor=anonymous).bind(SHAPE.replace(hidden_size=64))


def test_weights_that_became_nan_are_refused(tmp_path):
    made = trained()
    with torch.no_grad():
        made.weight[1, 3] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite, got 1 NaN"):
        policies.DyRate(predictor=made).bind(SHAPE)
    with pytest.raises(ValueError, match="weight must be finite"):
        made.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- damaged and missing files -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    trained().save_pretrained(tmp_path)
    return tmp_path


def tensors(**changes):
    return {"weight": torch.zeros(5, 32), "bias": torch.zeros(5)} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensors(weight=torch.zeros(5, 64)), r"weight must be \[5, 32\] .*got \[5, 64\]"),
        (tensors(bias=torch.zeros(4)), r"bias must be \[5\] .*got \[4\]"),
        (
            tensors(extra=torch.zeros(1)),
            r"must hold the tensors \['bias', 'weight'\], got \['bias', 'extra', 'weight'\]",
        ),
        ({"weight": torch.zeros(5, 32)}, r"got \['weight'\]"),
        (
            {"linear.weight": torch.zeros(5, 32), "linear.bias": torch.zeros(5)},
            r"got \['linear.bias', 'linear.weight'\]",
        ),
        (tensors(weight=torch.zeros(5, 32, dtype=torch.int32)), r"weight must be a floating point tensor .*got I32"),
        (tensors(bias=torch.zeros(5, dtype=torch.float8_e4m3fn)), r"bias must be a floating point tensor .*got F8_E4M3"),
        (tensors(weight=torch.full((5, 32), float("inf"))), "weight must be finite, got 160"),
        (tensors(bias=torch.tensor([0, 0, float("nan"), 0, 0])), "bias must be finite, got 1"),
    ],
)
def test_wrong_tensors(folder, content, message):
    save_file(content, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        DyRatePredictor.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not safetensors at all", b"\x80\x04\x95pickle" * 100])
def test_unreadable_weights(folder, content):
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        DyRatePredictor.from_pretrained(folder)


def test_truncated_weights(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        DyRatePredictor.from_pretrained(folder)


def without(key):
    return lambda config: config.pop(key)


def having(**values):
    return lambda config: config.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("format"), "must be a JSON object with format"),
        (having(format="other"), "must be a JSON object with format"),
        (having(version=2), "version must be 1, got 2"),
        (without("rates"), "must have the key 'rates'"),
        (without("num_heads"), "must have the key 'num_heads'"),
        (without("k"), "must have the key 'k'"),
        (having(rates=[0.1, 1.5, 0, 0, 0]), r"rates must be in \[0, 1\]"),
        (having(rates=[0.1, float("nan"), 0, 0, 0]), r"rates must be in \[0, 1\]"),
        (having(rates=["a"]), "rates must be numbers"),
        (having(rates=[]), "rates must hold at least one"),
        (having(rates=0.5), "rates must be a list"),
        (having(rates=[0.1, 0.2]), r"weight must be \[2, 32\]"),
        (having(num_heads=0), "num_heads must be a positive integer"),
        (having(num_heads="8"), "num_heads must be a positive integer"),
        (having(num_heads=4), r"weight must be \[5, 16\] .*got \[5, 32\]"),
        (having(k=-1), "k must be a positive integer"),
        (having(model=[1]), "model must be an object"),
        (having(model={"vocab_size": 3}), r"model must hold only .*got also \['vocab_size'\]"),
        (having(notes="x"), "notes must be an object"),
        (having(num_heads=10**15), rf"{WEIGHTS_FILE}: weight must be \[5, {4 * 10**15}\] .*says {CONFIG_FILE}.*got \[5, 32\]"),
        (having(num_heads=-(10**15)), f"{CONFIG_FILE}: num_heads must be a positive integer"),
        (having(text_size=10**15), r"must hold the tensors \['bias', 'hidden_weight', 'weight'\]"),
        (having(text_size=-5), f"{CONFIG_FILE}: text_size must be an integer of at least 0, got -5"),
        (having(text_size=1.5), "text_size must be an integer of at least 0, got 1.5"),
        (having(num_heads=1e15), "num_heads must be a positive integer"),
        (having(rates=[10**400]), r"rates must be in \[0, 1\]"),
        (having(spread=float("nan")), "spread must be a number in"),
    ],
)
def test_wrong_config(folder, change, message):
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        DyRatePredictor.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe\x00"])
def test_unreadable_config(folder, content):
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as JSON|must be a JSON object"):
        DyRatePredictor.from_pretrained(folder)


def test_nothing_is_allocated_from_a_files_numbers_before_its_tensors_are_looked_at(folder, monkeypatch):
    config = json.loads((folder / CONFIG_FILE).read_text()) | {"num_heads": 10**6}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    monkeypatch.setattr(torch, "zeros", lambda *size, **_: pytest.fail(f"allocated {size}"))
    with pytest.raises(ValueError, match="weight must be"):
        DyRatePredictor.from_pretrained(folder)


def test_a_kill_while_saving_leaves_the_old_predictor_the_new_one_or_none(folder, monkeypatch):
    other = trained(seed=3)
    for calls in range(3):
        done = []

        def replace(source, target, real=os.replace, calls=calls, done=done):
            if len(done) == calls:
                raise KeyboardInterrupt
            done.append(real(source, target))

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(os, "replace", replace)
            other.save_pretrained(folder)
        if calls < 2:
            with pytest.raises(FileNotFoundError, match=f"has no {CONFIG_FILE}"):
                DyRatePredictor.from_pretrained(folder)
    assert torch.equal(DyRatePredictor.from_pretrained(folder).weight, other.weight)


def test_missing_files(folder, tmp_path_factory):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS_FILE}"):
        DyRatePredictor.from_pretrained(folder)
    for missing in (str(folder / "nothing" / "here"), "./nothing", folder / "nothing"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            DyRatePredictor.from_pretrained(missing)
    (folder / "other.json").write_text("{}")
    with pytest.raises(NotADirectoryError, match="got the file"):
        DyRatePredictor.from_pretrained(folder / "other.json")


def test_the_config_file_stands_for_its_folder(folder):
    named, whole = (DyRatePredictor.from_pretrained(source) for source in (folder / CONFIG_FILE, folder))
    assert torch.equal(named.weight, whole.weight) and (named.k, named.rates, named.spread) == (whole.k, whole.rates, whole.spread)


def test_hub(folder, monkeypatch, tmp_path_factory):
    """The download itself is huggingface_hub's; ours is what is asked for and what is said when it fails."""
    import huggingface_hub

    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return str(folder / name)

    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = DyRatePredictor.from_pretrained("someone/predictor", revision="v1")
    assert asked == [("someone/predictor", name, {"revision": "v1"}) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    assert loaded.source == "someone/predictor"

    def fail(repo, name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match="predictor 'someone/predictor' is no folder here.*no network$"):
        DyRatePredictor.from_pretrained("someone/predictor")


def test_hub_really_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("someone/predictor", "a bad id?"):
        with pytest.raises(OSError, match="is no folder here, and .* could not be had from the hub"):
            DyRatePredictor.from_pretrained(name, cache_dir=tmp_path)


def test_constructor_is_checked():
    for heads in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="num_heads must be a positive integer"):
            DyRatePredictor(heads, HALF_OPEN)
    with pytest.raises(ValueError, match="k must be a positive integer"):
        DyRatePredictor(8, HALF_OPEN, k=0)
    with pytest.raises(ValueError, match="rates must"):
        DyRatePredictor(8, [2.0])
    assert predictor.DyRatePredictor is DyRatePredictor


def test_spread_is_saved_and_used_by_default(tmp_path):
    made = DyRatePredictor.for_model(SHAPE, (0.0, 0.5), k=2, spread=0.25)
    made.save_pretrained(tmp_path)
    assert policies.DyRate(predictor=str(tmp_path)).bind(SHAPE).k == 2
    assert DyRatePredictor.from_pretrained(tmp_path).spread == 0.25
    assert policies.DyRate(k=2, predictor=str(tmp_path)).bind(SHAPE).spread == 0.25
    asked = policies.DyRate(k=2, predictor=str(tmp_path), spread=0.0).bind(SHAPE)
    state = asked.start(torch.tensor([4], dtype=torch.int32))
    assert asked.spread == 0.0 and asked.predictor_tensors(state) is not None  # the fused step ranks by importance
    assert policies.DyRate(k=2).bind(SHAPE).spread == 0.0
    for wrong in (-0.1, 1.1, True, "0.5"):
        with pytest.raises((TypeError, ValueError), match="spread"):
            policies.DyRate(spread=wrong)
        with pytest.raises(ValueError, match="spread"):
            DyRatePredictor(2, (0.0,), spread=wrong)


def test_text_aware(tmp_path):
    made = DyRatePredictor.for_model(SHAPE, (0.0, 0.5, 0.9), k=2, text=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    made.save_pretrained(tmp_path)
    loaded = DyRatePredictor.from_pretrained(tmp_path)
    mass, hidden = torch.rand(6, SHAPE.num_heads, 4), torch.randn(6, SHAPE.hidden_size)
    want = mass.flatten(1).double() @ made.weight.double().T + made.bias.double() + hidden.double() @ made.hidden_weight.double().T
    torch.testing.assert_close(loaded(mass, hidden).double(), want, rtol=1e-5, atol=1e-4)
    policy = policies.DyRate(predictor=loaded).bind(SHAPE)
    assert policy.reads_hidden and not policies.DyRate().bind(SHAPE).reads_hidden
    weight, bias, _ = policy.predictor_tensors(policy.start(torch.full((6,), 9, dtype=torch.int32)), hidden)
    torch.testing.assert_close(mass.flatten(1) @ weight.T + bias, want.float(), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="hidden"):
        loaded(mass)
    with pytest.raises(RuntimeError, match="hidden state"):
        policy.predictor_tensors(policy.start(torch.ones(6, dtype=torch.int32)))
    with pytest.raises(ValueError, match="hidden state of"):
        DyRatePredictor(SHAPE.num_heads, (0.0,), text_size=SHAPE.hidden_size + 1).check(SHAPE, 3)


@pytest.mark.parametrize("text", [False, True])
def test_shifted_prunes_more_or_less(text):
    made = DyRatePredictor.for_model(SHAPE, (0.0, 0.5, 0.9), text=text)
    mass, hidden = torch.rand(50, SHAPE.num_heads, 4), torch.randn(50, SHAPE.hidden_size)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        rates = torch.tensor(made.rates)
        mean = [rates[made.shifted(amount)(mass, hidden).argmax(1)].mean().item() for amount in (-1e3, -3.0, 0.0, 3.0, 1e3)]
        assert mean == sorted(mean) and mean[0] == 0.0 and mean[-1] == pytest.approx(0.9) and len(set(mean)) > 3
        assert made.shifted(0.0)(mass, hidden).equal(made(mass, hidden))
    with pytest.raises(ValueError, match="finite"):
        made.shifted(float("nan"))
