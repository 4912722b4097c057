"""Options of the vLLM plug-in, without vLLM: what is read, and each refusal by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dyrate_kernels import DyRatePredictor, policies
from dyrate_kernels.engines.vllm import options, versions
from dyrate_kernels.engines.vllm.options import Facts, Options
from dyrate_kernels.policies.base import ModelShape

SUPPORTED = [
    policies.DyRate(k=2, rates="closed"),
    policies.DyRate(k=2, spread=0.5),
    policies.FastV(k=2, rate=0.75),
    policies.Fixed(k=1, rate=0.25),
    policies.Random(k=2, seed=7),
    policies.Uniform(k=2, rate=0.5),
    policies.VTW(k=4),
    policies.Depth(k=3, prune=0.25),
    policies.Schedule(k=2, kept=[[1, 6]]),
    policies.Threshold(k=2, share=0.7),
    policies.ST3(k=2, stages=2),
    policies.DyCoke(k=2, similarity=0.8),
    policies.PyramidDrop(k=2, keep=0.25),
    policies.LayerWise(k=2, groups=3),
]
LLAVA = Facts(("LlavaForConditionalGeneration",))
ROWS, LOGITS = "its ranking reads the prompt's rows", "it reads the model's logits"


def asked(policy: policies.Policy) -> dict:
    """Every option of a policy as one would write it in JSON."""
    values = {name: getattr(policy, name) for name in policies.options(policy.name)}
    return {"policy": policy.name, **{name: value for name, value in values.items() if value is not None}}


# ---- what is read ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", SUPPORTED, ids=lambda policy: policy.name)
def test_supported_policies_are_read_with_their_options(policy):
    assert options.read(asked(policy)) == Options(policy)


def test_every_policy_is_supported_or_refused_below():
    assert {policy.name for policy in SUPPORTED} | {"none", "sparsevlm", "aim", "recycle", "klguard"} == {*policies.names()}


@pytest.mark.parametrize("given", ["fastv:k=2:rate=0.75", {"policy": "fastv:k=2:rate=0.75"}, {"policy": "fastv:k=2", "rate": 0.75}])
def test_a_policy_in_text(given):
    assert options.read(given) == Options(policies.FastV(k=2, rate=0.75))


@pytest.mark.parametrize("given", [{"k": 4}, {"k": 4, "retention": "recoverable"}])
def test_the_policy_is_dyrate_unless_said(given):
    assert options.read(given) == Options(policies.DyRate(k=4))


@pytest.mark.parametrize("given", [None, {}, "none", {"policy": "none"}, {"policy": "fixed", "rate": 0}, "pyramiddrop:keep=1.0"])
def test_nothing_is_asked_for(given):
    assert options.read(given) is None


def test_eviction_by_blocks_is_of_vtw_alone():
    assert options.read({"policy": "vtw", "k": 2, "retention": "evict"}) == Options(policies.VTW(k=2), evict=True)
    with pytest.raises(ValueError, match="retention must be 'recoverable' inside of vLLM .*, got 'evict' for 'fastv'; use retention="):
        options.read({"policy": "fastv", "retention": "evict"})


def test_what_is_given_is_not_changed():
    given = {"policy": "vtw", "retention": "evict", "k": 2}
    options.read(given)
    assert given == {"policy": "vtw", "retention": "evict", "k": 2}


# ---- what is refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"policy": "fastv", "ranking": "mean"}, ROWS + " ('mean')"),
        ({"policy": "aim"}, ROWS + " ('pagerank')"),
        ({"policy": "sparsevlm"}, ROWS + " ('raters')"),
        ({"policy": "klguard"}, LOGITS),
        ({"policy": "recycle"}, LOGITS),
        ("recycle:policy=(fastv:k=2)", LOGITS),
    ],
)
def test_policies_are_refused_by_name(given, why):
    with pytest.raises(ValueError) as caught:
        options.read(given)
    message, name = str(caught.value), given.partition(":")[0] if isinstance(given, str) else given["policy"]
    assert message.startswith(f"policy {name!r} cannot run inside of vLLM: {why}") and message.endswith("or patch() and generate()")
    named = re.search(r"use one of (.*), or patch", message)
    assert named is not None and named[1].split(", ") == [name for name in policies.names() if name in {each.name for each in SUPPORTED}]


def test_a_predictor_may_read_mass_alone(tmp_path):
    shape = ModelShape(6, 4, 2, 8, 32, 64, 100)
    for text, why in ((False, None), (True, "its predictor reads hidden states.* use one that reads mass alone.*'closed-form'")):
        folder = tmp_path / str(text)
        DyRatePredictor.for_model(shape, (0.0, 0.5), k=2, text=text).save_pretrained(folder)
        asked_for = options.read({"policy": "dyrate", "predictor": str(folder)})
        assert asked_for is not None
        found = options.why_refused(asked_for.policy.bind(shape))
        assert found is None if why is None else re.fullmatch(why, found)


def test_policies_that_merge_are_refused():
    class Merges(policies.Fixed):
        merges = True

    assert options.why_refused(Merges(k=2)) == "it merges tokens, and cache blocks are never changed"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, r'additional_config\["dyrate"\] must be an object like .*, got 3'),
        (True, TypeError, "must be an object like .*, got True"),
        (["dyrate"], TypeError, r"must be an object like .*, got \['dyrate'\]"),
        ({"policy": 3}, TypeError, "policy must be a name or a policy in text, got 3"),
        ({"policy": None}, TypeError, "policy must be a name or a policy in text, got None"),
        ({"policy": "fast"}, ValueError, "policy must be one of none, dyrate, .*, got 'fast'"),
        ({"policy": ""}, ValueError, "policy must be one of none, .*, got ''"),
        ({"policy": "fastv", "share": 0.5}, TypeError, "share"),
        ({"policy": "fastv", "rate": 2}, ValueError, r"rate must be in \[0, 1\]"),
        ({"policy": "fastv", "k": "2"}, TypeError, "k must be an integer .*, got '2'"),
        ({"policy": "fastv:k", "rate": 0.5}, ValueError, "policy options are NAME=VALUE, got 'k'"),
        ({"policy": "fastv", "retention": "keep"}, ValueError, "retention must be .*, got 'keep'"),
        ({"policy": "fastv", "retention": None}, ValueError, "retention must be one of .*; got None"),
        ({"policy": "none", "retention": "keep"}, ValueError, "retention must be .*, got 'keep'"),
        ({"policy": "fastv", "retention": "pool"}, ValueError, "retention must be 'recoverable' inside of vLLM .*got 'pool' for 'fastv'"),
        ({"policy": "vtw", "retention": "pool=0.5"}, ValueError, "retention must be 'recoverable' inside of vLLM .*got 'pool' for 'vtw'"),
    ],
)
def test_what_cannot_be_read(given, error, message):
    with pytest.raises(error, match=message):
        options.read(given)


@pytest.mark.parametrize("architecture", options.ARCHITECTURES)
def test_models_that_it_knows(architecture):
    options.check(Options(policies.Fixed(k=2)), Facts((architecture,)))
    options.check(Options(policies.Fixed(k=2)), Facts(("Other", architecture)))


@pytest.mark.parametrize(
    ("policy", "facts", "message"),
    [
        ("fixed", {"architectures": ("OtherForCausalLM",)}, "model: expected one of Llava.* for policy 'fixed', got OtherForCausalLM"),
        ("fixed", {"architectures": ()}, "model: expected one of .*, got ; leave dyrate out"),
        ("fixed", {"pipeline": 2}, "pipeline_parallel_size must be 1 with dyrate, got 2: .*; use tensor_parallel_size"),
        ("fixed", {"context": 4}, "decode and prefill context parallel sizes must be 1 with dyrate, got 4; use tensor_parallel_size"),
        ("fixed", {"connector": True}, "kv_transfer_config must be None with dyrate"),
        ("fixed", {"split": True}, "enable_dbo must be False with dyrate"),
        ("fixed", {"cache_dtype": "fp8"}, "kv_cache_dtype must be 'auto' with dyrate, got 'fp8'"),
        ("fixed", {"speculation": "eagle3"}, "method must be one of ngram, ngram_gpu, suffix with dyrate, got 'eagle3'"),
        ("dycoke", {"speculation": "ngram"}, "speculative_config must be None with policy 'dycoke'"),
        ("vtw", {"speculation": "ngram"}, "speculative_config must be None with retention 'evict'; use retention 'recoverable'"),
    ],
)
def test_engines_that_cannot(policy, facts, message):
    wanted = Options(policies.get(policy), evict=policy == "vtw")
    options.check(wanted, LLAVA)
    with pytest.raises(ValueError, match=message):
        options.check(wanted, Facts(**{"architectures": LLAVA.architectures, **facts}))


@pytest.mark.parametrize("facts", [{"speculation": method} for method in options.SPECULATION] + [{"cache_dtype": "bfloat16"}])
def test_engines_that_can(facts):
    options.check(Options(policies.VTW()), Facts(LLAVA.architectures, **facts))


# ---- versions -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc2.dev3+g0123abc.cpu", "0.33.0", "0.33"])
def test_versions_that_it_was_written_for(version):
    versions.check(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.3.2", "1.0.0", "0.320.0", "dev", ""])
def test_other_versions_are_refused(version):
    got = f"got {re.escape(version)}; pip install 'vllm>=0.32,<0.34'"
    with pytest.raises(ImportError, match=f"vllm: expected a version from 0.32 to 0.33, .*{got}"):
        versions.check(version)


def test_the_range_is_that_of_the_extra():
    assert versions.OLDEST == (0, 32) and versions.NEWEST == (0, 33)
    assert '\nvllm = ["vllm>=0.32,<0.34"]\n' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_answers_enter_the_prefix_cache_where_that_is_asked_for():
    assert not options.read({"policy": "fixed"}).cache_answers
    assert options.read({"policy": "fixed", "cache_answers": True}).cache_answers
    with pytest.raises(TypeError, match="cache_answers must be true or false, got 'yes'"):
        options.read({"policy": "fixed", "cache_answers": "yes"})
