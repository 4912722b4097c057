"""``bench.tune --toy``: from the command line to settings that the launcher takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from bench import operators, tune
from dyrate_kernels import devices
from dyrate_kernels.triton_kernels import plan

ROOT = Path(__file__).parents[2]


def test_every_kind_of_problem_gets_settings_that_the_launcher_takes(tmp_path, monkeypatch):
    """The command as it stands: it goes to the interpreter by itself."""
    path = tmp_path / devices.file_name(plan.INTERPRETED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.tune", "--toy", "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert said.splitlines()[-1] == f"written: {path}"
    assert "Error" not in said and "wrong result" not in said and "does not run" not in said
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    for cached in (devices.measured, plan.settings):
        cached.cache_clear()
    try:
        written = devices.measured(plan.INTERPRETED)
        kinds = {plan.problem(group, 16, 4, kind) for group in (1, 2) for kind in plan.KINDS}
        assert set(written["settings"]) == set(written["times"]) == kinds
        for group in (1, 2):
            for kind in plan.KINDS:
                key = plan.problem(group, 16, 4, kind)
                assert plan.settings(plan.INTERPRETED, group, 16, 4, kind) == plan.Settings(**written["settings"][key])
                assert all(time > 0 for time in written["times"][key].values())
    finally:
        for cached in (devices.measured, plan.settings):
            cached.cache_clear()


def test_a_setting_with_a_wrong_result_is_not_chosen(capsys):
    """And neither is one whose kernel does not store the new row."""
    (shapes, kind), *_ = tune.kinds(toy=True)
    problem = tune.Problem(shapes, kind, torch.device("cpu"))
    shape, calls, holds = problem.cases[0]
    step = calls[0]()
    assert holds(step)
    assert not holds(step._replace(n_kept=step.n_kept - 1))
    assert not holds(step._replace(rate=step.rate / 2))
    assert not holds(step._replace(output=step.output * 1.1))
    data = operators.Data(shape, "triton", torch.device("cpu"))
    data.forget_last_rows()
    plain = data.ours(operators.ops.decode_step, text_type=data.text_type, **data.linear)[0]()
    problem.cases = [(shape, [lambda: plain], holds)]
    assert problem.seconds(plan.heuristic(1, 16, 4), 0.1) is None
    assert "wrong result" in capsys.readouterr().out
