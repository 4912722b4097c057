"""Policies and reducers of one's own by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

import dyrate_kernels as dk
from dyrate_kernels.cli.main import main
from dyrate_kernels.policies.fixed import Fixed
from dyrate_kernels.vision.uniform import UniformTokens


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    for package in (dk.policies, dk.vision):
        monkeypatch.setattr(package._REGISTRY, "by_name", dict(package._REGISTRY.by_name))


@dataclass(frozen=True)
class Mine(Fixed):
    """One option more than ``fixed``."""

    weight: float = 0.5
    name: ClassVar[str] = "mine"


def test_a_registered_policy_has_a_name_everywhere(capsys):
    with pytest.raises(ValueError, match="policy must be one of"):
        dk.policies.get("mine")
    assert dk.policies.register(Mine) is Mine
    assert dk.policies.names()[-1] == "mine" and dk.policies.options("mine") == ["k", "rate", "weight"]
    assert dk.policies.parse("mine:rate=0.75:weight=0.25") == Mine(rate=0.75, weight=0.25)
    assert dk.policies.parse("recycle:policy=(mine:k=2)").policy == Mine(k=2)
    model, inputs = dk.demo_inputs()
    with dk.patch(model, policy="mine:rate=0.75") as handle:
        model.generate(**inputs, max_new_tokens=3)
        assert handle.stats().policy == "mine" and handle.stats().steps[1].kept == [36]
    assert main(["compare", "--image", "examples/shapes_1.png", "--policies", "mine:rate=0.75", "--max-new-tokens", "3"]) == 0
    assert "mine" in capsys.readouterr().out


def test_a_registered_reducer_has_a_name():
    @dk.vision.register
    @dataclass(frozen=True)
    class Other(UniformTokens):
        name: ClassVar[str] = "other"

    assert dk.vision.chain("other:keep=0.5+aim") == (Other(keep=0.5), dk.vision.get("aim"))


def test_the_newer_class_of_a_name_counts():
    newer = dataclass(frozen=True)(type("Newer", (Mine,), {"name": "mine"}))
    dk.policies.register(Mine)
    dk.policies.register(newer)
    assert type(dk.policies.get("mine")) is newer


class Plain(Fixed):
    name: ClassVar[str] = "plain"


@pytest.mark.parametrize(
    ("cls", "error", "message"),
    [
        (Mine(), TypeError, "below Policy.*not one made of it"),
        (int, TypeError, "below Policy"),
        (UniformTokens, TypeError, "below Policy"),
        (Plain, TypeError, "frozen dataclass"),
        (dataclass(frozen=True)(type("A", (Fixed,), {"name": "fastv"})), ValueError, "of the package, got 'fastv'"),
        (dataclass(frozen=True)(type("A", (Fixed,), {"name": "my-own"})), ValueError, "got 'my-own'"),
        (dataclass(frozen=True)(type("A", (Fixed,), {})), ValueError, "got None"),
    ],
)
def test_what_is_no_policy_is_refused(cls, error, message):
    before = dk.policies.names()
    with pytest.raises(error, match=message):
        dk.policies.register(cls)
    assert dk.policies.names() == before
