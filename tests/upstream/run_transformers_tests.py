"""Runs transformers' own generation tests for the supported model families on patched models, and compares with unpatched ones.

    python tests/upstream/run_transformers_tests.py --transformers-repo PATH

``PATH`` is a checkout of transformers of the installed version (the wheel holds no tests). See README.md beside this file.

How it works: one process a variant runs pytest on the checkout's ``tests/models/<family>/test_modeling_<family>.py``. In that process every
``...ForConditionalGeneration`` of a supported family is patched as soon as it is built or loaded, so the tests themselves are unchanged.
A test that passes unpatched must pass patched, and every ``generate`` in it must return the same tokens and the same scores; the exit
status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = "DYRATE_TRANSFORMERS_TESTS"

FAMILIES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
}


@dataclass(frozen=True)
class Variant:
    """One way to patch: policy, its options, retention. ``policy`` None: not at all."""

    name: str
    policy: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    retention: str = "recoverable"


# The tests' models have two layers, so k is 1. Rate 0 decides, sorts and compacts at every step, and drops nothing.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("unpatched"),
        Variant("none-recoverable", "none", (("k", 1),)),
        Variant("none-evict", "none", (("k", 1),), "evict"),
        Variant("fixed0-recoverable", "fixed", (("k", 1), ("rate", 0.0))),
        Variant("fixed0-evict", "fixed", (("k", 1), ("rate", 0.0)), "evict"),
        Variant("fixed0-pool", "fixed", (("k", 1), ("rate", 0.0)), "pool=1"),  # a pool of everything
    )
}
BASELINE = "unpatched"

# Tests that a patched model does not pass by design: name of the test -> (text that its failure must contain, reason).
REFUSED = {
    "test_attn_implementation_composite_models": (
        "config._attn_implementation=dyrate",
        "asserts that every attention module's config names 'eager'; a patched module's names our attention function",
    ),
    "test_generate_compilation_all_outputs": (
        "False is not true",
        "asserts that the static cache which the model's generation config names is compiled; a patched model takes that for what it "
        "was saved with and uses its own cache, unless the call asks for another",
    ),
    "test_torch_export_generate_static": ("on this cache did not finish", "torch.export cannot take a cache that is a Python object"),
    "test_torch_export_generate_dynamic": ("on this cache did not finish", "torch.export cannot take a cache that is a Python object"),
}


# ---- in the process of one variant ------------------------------------------------------------------------------------------------


class Plugin:
    """The pytest plugin that chooses the tests, patches the models and writes down the outcomes.

    Args:
        variant: how to patch.
        out: file that gets one JSON object a test.
    """

    def __init__(self, variant: Variant, out: Path) -> None:
        self.variant, self.out = variant, out
        self.counts: Counter[str] = Counter()
        self.generated: list[dict] = []  # of the test under way
        self.outputs: dict[tuple[str, str], list[dict]] = {}

    def pytest_configure(self, config: Any) -> None:
        config.addinivalue_line("markers", "generate: transformers' generation tests")
        import transformers

        _repair_tests()
        for name in FAMILIES.values():
            self._record(getattr(transformers, name))
        if self.variant.policy is not None:
            self._patch_classes()

    # ---- choice

    def pytest_collection_modifyitems(self, config: Any, items: list) -> None:
        from tests.generation.test_utils import GenerationTesterMixin

        def chosen(item: Any) -> bool:  # not the tests of processors, nor those that download checkpoints
            return item.cls is not None and issubclass(item.cls, GenerationTesterMixin)

        drop = [item for item in items if not chosen(item)]
        items[:] = [item for item in items if chosen(item)]
        config.hook.pytest_deselected(items=drop)

    # ---- outcomes

    def pytest_runtest_setup(self, item: Any) -> None:
        from transformers import set_seed

        from tests import test_modeling_common

        seed = zlib.crc32(item.name.encode())  # the same weights and inputs in every variant
        set_seed(seed)
        test_modeling_common.global_rng.seed(seed)
        self.counts.clear()
        self.generated.clear()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            detail = ""
            if report.outcome == "failed":
                crash = getattr(report.longrepr, "reprcrash", None)
                detail = f"{crash.message}\n{report.longreprtext}" if crash else report.longreprtext
            elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                detail = report.longrepr[2]
            family, _, name = report.nodeid.partition("/test_modeling_")[2].partition(".py::")
            name = name.rpartition("::")[2]
            self.outputs[family, name] = list(self.generated)
            with self.out.open("a") as file:
                entry = {"family": family, "test": name, "outcome": report.outcome, "detail": detail, "counts": dict(self.counts)}
                file.write(json.dumps({**entry, "seconds": round(report.duration, 2)}) + "\n")

    def pytest_sessionfinish(self) -> None:
        import torch

        torch.save(self.outputs, self.out.with_suffix(".pt"))

    def _record(self, model_class: Any) -> None:
        import torch

        generate = model_class.generate

        @functools.wraps(generate)
        def recorded(model: Any, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            if mask is not None and not mask[:, -1].all():
                # the tests of 5.6 mask ids at random, the last one too; a patched model refuses such a prompt (right padding)
                mask[:, -1] = 1  # in place, and in the unpatched run too: every later use of the mask in this test is the same
                self.counts["right padding"] += 1
            output = generate(model, *args, **kwargs)
            found = {"sequences": output if isinstance(output, torch.Tensor) else output.sequences}
            for name in ("scores", "logits", "hidden_states"):
                value = getattr(output, name, None)
                if value is not None:  # of every step; hidden states: what came out of the last layer for the last token
                    found[name] = [step[-1][:, -1] if isinstance(step, tuple) else step for step in value]
            self.generated.append(found)
            return output

        model_class.generate = recorded

    # ---- patching

    def _patch_classes(self) -> None:
        import transformers
        from tests.generation import test_utils

        from dyrate_kernels.patching import generate

        for name in FAMILIES.values():
            self._patch_class(getattr(transformers, name))
        GenerationTesterMixin = test_utils.GenerationTesterMixin
        counts, session = self.counts, generate.Session

        def counting_session(*args: Any, **kwargs: Any) -> Any:
            counts["caches"] += 1
            return session(*args, **kwargs)

        generate.Session = counting_session
        for name, check in (
            ("_check_past_key_values_for_generate", check_cache_shape),
            ("_check_caches_are_equal", check_caches_are_equal),
        ):
            setattr(GenerationTesterMixin, name, _for_visual_cache(check, getattr(GenerationTesterMixin, name)))
        GenerationTesterMixin._check_attentions_for_generate = lambda *args, **kwargs: None  # see `without_attentions`
        test_utils.DynamicCache = _accepting_visual_cache(test_utils.DynamicCache)  # "the default cache is a DynamicCache"

    def _patch_class(self, model_class: Any) -> None:
        make, load, generate = model_class.__init__, model_class.from_pretrained.__func__, model_class.generate

        @functools.wraps(make)
        def patched_make(model: Any, *args: Any, **kwargs: Any) -> None:
            make(model, *args, **kwargs)
            if type(model) is model_class and not any(p.is_meta for p in model.parameters()):
                self._patch(model)

        @functools.wraps(load)
        def patched_load(cls: Any, *args: Any, **kwargs: Any) -> Any:
            loaded = load(cls, *args, **kwargs)
            self._patch(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

        @functools.wraps(generate)
        def without_attentions(model: Any, *args: Any, **kwargs: Any) -> Any:
            # a patched model refuses output_attentions: it makes no attention matrix. Many tests ask for it along with other outputs
            if kwargs.get("output_attentions"):
                kwargs["output_attentions"] = False
                self.counts["attentions"] += 1
            return generate(model, *args, **kwargs)

        model_class.__init__ = patched_make
        model_class.from_pretrained = classmethod(patched_load)
        model_class.generate = without_attentions

    def _patch(self, model: Any) -> None:
        import dyrate_kernels

        if "_dyrate_handle" in vars(model):
            return
        policy = dyrate_kernels.policies.get(self.variant.policy, **dict(self.variant.options))
        dyrate_kernels.patch(model, policy=policy, retention=self.variant.retention)
        self.counts["patched"] += 1


def _repair_tests() -> None:
    """A test under a bare ``@is_flaky`` (no parentheses, as prompt lookup is in 5.17) is swallowed by the decorator and never runs."""
    from tests.generation.test_utils import GenerationTesterMixin

    for name, test in list(vars(GenerationTesterMixin).items()):
        if getattr(test, "__qualname__", "") == "is_flaky.<locals>.decorator":
            swallowed = inspect.getclosurevars(test).nonlocals["max_attempts"]
            if callable(swallowed):
                setattr(GenerationTesterMixin, name, swallowed)


def _for_visual_cache(check: Any, otherwise: Any) -> Any:
    """A check of the test class, replaced for our cache, which has no ``layers[i].keys`` to look at."""
    from dyrate_kernels import VisualCache

    @functools.wraps(otherwise)
    def checked(test: Any, *args: Any, **kwargs: Any) -> None:
        ours = any(isinstance(value, VisualCache) for value in (*args, *kwargs.values()))
        (check if ours else otherwise)(test, *args, **kwargs)

    return checked


def _accepting_visual_cache(original: type) -> type:
    """``DynamicCache`` for the tests' ``isinstance``: our cache stands in its place."""
    from dyrate_kernels import VisualCache

    class Kind(type(original)):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original | VisualCache)

    return Kind(original.__name__, (original,), {})


def dense_rows(cache: Any, layer: int) -> tuple[Any, Any, Any]:
    """A layer in the order of the prompt: keys and values ``[B, Hkv, columns, D]``, and which are stored, bool ``[B, columns]``."""
    import torch

    store = cache.store
    group = store.group_of[layer]
    column = store.columns(group, group.bound, store.text_bound).long()
    batch = column.shape[0]
    live = torch.cat(
        [
            torch.arange(group.bound, device=column.device) < group.n_visual[:, None],
            torch.arange(store.text_bound, device=column.device) < store.n_text[:, None],
        ],
        dim=1,
    )
    column = torch.where(live, column, store.length)
    stored = torch.zeros(batch, store.length + 1, dtype=torch.bool, device=column.device).scatter_(1, column, True)[:, :-1]
    dense = []
    for rows in store.live_slices(layer):
        out = rows.new_zeros(batch, rows.shape[1], store.length + 1, rows.shape[3])
        out.scatter_(2, column[:, None, :, None].expand_as(rows), rows)
        dense.append(out[:, :, :-1])
    return dense[0], dense[1], stored


def check_cache_shape(test: Any, batch_size: int, past_key_values: Any, seq_length: int, config: Any) -> None:
    """``GenerationTesterMixin._check_past_key_values_for_generate``: a row for each column, padding and dropped rows aside."""
    config = config.get_text_config(decoder=True)
    test.assertEqual(config.num_hidden_layers, len(past_key_values))
    test.assertEqual(past_key_values.get_seq_length(), seq_length)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(len(past_key_values)):
        keys, values, stored = dense_rows(past_key_values, layer)
        test.assertEqual(tuple(keys.shape), (batch_size, heads, seq_length, dim))
        test.assertEqual(tuple(values.shape), (batch_size, heads, seq_length, dim))
        test.assertTrue(bool(stored[:, -1].all()))


def check_caches_are_equal(test: Any, cache1: Any, cache2: Any) -> None:
    """``GenerationTesterMixin._check_caches_are_equal``: same rows at the same columns."""
    import torch

    test.assertEqual(type(cache1), type(cache2))
    test.assertEqual(len(cache1), len(cache2))
    for layer in range(len(cache1)):
        for one, other in zip(dense_rows(cache1, layer), dense_rows(cache2, layer), strict=True):
            torch.testing.assert_close(one, other)


def work(argv: list[str]) -> int:
    """Entry point of the process of one variant."""
    variant, out, *arguments = argv
    import pytest

    return pytest.main(arguments, plugins=[Plugin(VARIANTS[variant], Path(out))])


# ---- the comparison ---------------------------------------------------------------------------------------------------------------


def run_variant(repo: Path, variant: str, families: list[str], select: str = "") -> dict[tuple[str, str], dict]:
    """Runs the tests of ``families`` under one variant.

    Returns:
        (family, test) -> outcome, as written by :class:`Plugin`, and under ``"generated"`` what each ``generate`` of the test returned.
    """
    import torch

    files = [f"tests/models/{family}/test_modeling_{family}.py" for family in families]
    missing = [name for name in files if not (repo / name).is_file()]
    if missing:
        raise SystemExit(f"{repo} is not a checkout of transformers with its tests: {', '.join(missing)} not found")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "outcomes.jsonl")
        settings = Path(folder, "pytest.ini")
        settings.write_text("[pytest]\n")
        # nothing of the checkout's own pytest settings: they need plugins, and talk to the hub
        arguments = ["-c", str(settings), "--rootdir", str(repo), "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
        arguments += ["-k", select] if select else []
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONDONTWRITEBYTECODE": "1"}
        paths = [str(repo), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)  # the checkout's `tests` package comes before ours
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", variant, str(out)]
        done = subprocess.run([*command, *arguments, *files], cwd=repo, env=environment, capture_output=True, text=True)
        entries = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        generated = torch.load(out.with_suffix(".pt")) if out.with_suffix(".pt").exists() else {}
    if done.returncode not in (0, 1, 5):
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise SystemExit(f"variant {variant} did not finish (exit status {done.returncode}) after {len(entries)} tests:\n{tail}")
    keys = [(entry["family"], entry["test"]) for entry in entries]
    return {key: {**entry, "generated": generated.get(key, [])} for key, entry in zip(keys, entries, strict=True)}


def difference(one: list[dict], other: list[dict]) -> str:
    """How two runs of the same test generated differently; an empty string if they did not."""
    import torch

    if len(one) != len(other):
        return f"generate() was called {len(one)} times unpatched, {len(other)} times patched"
    for index, (want, got) in enumerate(zip(one, other, strict=True)):
        if not torch.equal(want["sequences"], got["sequences"]):
            return f"call {index} of generate() gives other tokens"
        for name in sorted((want.keys() & got.keys()) - {"sequences"}):
            for step, (left, right) in enumerate(zip(want[name], got[name], strict=True)):
                tolerance = 2e-5 if left.dtype in (torch.float32, torch.float64) else 2e-2
                if not torch.allclose(left, right, rtol=tolerance, atol=tolerance):
                    return f"call {index} of generate(), step {step}: {name} differ by {(left - right).abs().nan_to_num(0).max():.1e}"
    return ""


def judge(baseline: dict | None, entry: dict) -> tuple[str, str]:
    """``ok``, ``refused`` (fails by design), ``regression`` (passes unpatched, not patched) or ``both fail``; and why."""
    first = next(iter(entry["detail"].strip().splitlines()), "")
    if entry["outcome"] == "failed":
        message, reason = REFUSED.get(entry["test"], (None, ""))
        if message is not None and message in entry["detail"]:
            return "refused", reason
        return ("both fail" if baseline is not None and baseline["outcome"] == "failed" else "regression"), first
    if baseline is None or baseline["outcome"] != "passed":
        return "ok", ""
    if entry["outcome"] != "passed":
        return "regression", f"{entry['outcome']}: {first}"
    why = difference(baseline["generated"], entry["generated"])
    return ("regression" if why else "ok"), why


def compare(unpatched: dict, patched: dict) -> list[tuple[dict, str, str]]:
    """Every outcome of a variant with its judgement; tests that vanished count as regressions."""
    judged = [(entry, *judge(unpatched.get(key), entry)) for key, entry in patched.items()]
    return judged + [
        (entry, "regression", "did not run") for key, entry in unpatched.items() if key not in patched and entry["outcome"] == "passed"
    ]


def _row(name: str, family: str, outcomes: dict, judged: list[tuple[dict, str, str]]) -> str:
    mine = [entry for (owner, _), entry in outcomes.items() if owner == family]
    count = Counter(entry["outcome"] for entry in mine)
    verdict = Counter(verdict for entry, verdict, _ in judged if entry["family"] == family)
    on_cache = sum(entry["outcome"] == "passed" and entry["counts"].get("caches", 0) > 0 for entry in mine)
    cells = [name, family, count["passed"], count["failed"], count["skipped"], on_cache, verdict["refused"], verdict["regression"]]
    return "| " + " | ".join(map(str, cells)) + " |"


def _plain(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name != "generated"}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers-repo", default=os.environ.get(ENVIRONMENT), help=f"a checkout (default: ${ENVIRONMENT})")
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma separated (default: all)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma separated (default: all); the unpatched run is always made")
    parser.add_argument("-k", dest="select", default="", help="as pytest's -k (default: all tests of the models)")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of each regression")
    options = parser.parse_args(argv)
    if not options.transformers_repo:
        parser.error(f"give --transformers-repo PATH, or set {ENVIRONMENT}")
    repo = Path(options.transformers_repo).resolve()
    families, variants = options.families.split(","), options.variants.split(",")
    for given, known in ((families, FAMILIES), (variants, VARIANTS)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")

    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, tests of {repo}", flush=True)
    results: dict[str, dict] = {}
    judged: dict[str, list] = {}
    for name in [BASELINE, *(v for v in variants if v != BASELINE)]:
        start = time.time()
        results[name] = run_variant(repo, name, families, options.select)
        judged[name] = compare(results[BASELINE], results[name])
        print(f"{name}: {len(results[name])} tests, {time.time() - start:.0f} s", flush=True)
    print("\n| variant | family | passed | failed | skipped | passed on our cache | refused | regressions |")
    print("|---" * 8 + "|")
    for name in results:
        for family in families:
            print(_row(name, family, results[name], judged[name]))
    regressions = 0
    print()
    for name in results:
        for entry, verdict, why in judged[name]:
            if verdict == "ok" or (verdict == "both fail" and name != BASELINE):
                continue
            regressions += verdict == "regression"
            print(f"{'fails unpatched' if name == BASELINE else verdict}: {name} {entry['family']} {entry['test']}: {why}")
            if options.verbose and verdict == "regression":
                print(entry["detail"])
    if options.json:
        options.json.write_text(
            json.dumps({name: [_plain(entry) for entry in outcomes.values()] for name, outcomes in results.items()}, indent=1)
        )
    print(f"{regressions} tests pass unpatched and not patched, or generate something else")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
