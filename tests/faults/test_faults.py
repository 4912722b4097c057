"""Every planted fault still has its text in the sources. Whether tests see the faults: ``python -m tests.faults``."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults import fault as faults


@pytest.mark.parametrize("name", faults.NAMES)
def test_every_fault_can_be_planted(name: str) -> None:
    planted = faults.load(name).faults
    assert len(planted) >= 20
    for fault in planted:
        changed = fault.applied((faults.ROOT / fault.file).read_text())
        assert fault.old not in changed or fault.old in fault.new, str(fault)
        if fault.file.endswith(".py"):
            compile(changed, fault.file, "exec")
    assert not [fault for fault, count in Counter(planted).items() if count > 1]


def test_a_fault_whose_text_is_gone_is_an_error() -> None:
    for old in ("no such text", "the"):
        with pytest.raises(ValueError, match="expected this text once"):
            faults.Fault("a.py", old, "").applied("the first and the second")
