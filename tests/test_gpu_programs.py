"""The programs for a real card (tools/gpu) run through in small on a CPU: nothing they call has moved."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("gpu_check", "gpu_speed")]


@pytest.mark.parametrize("name", [*LONG, "gpu_day"])
def test_every_part_runs_dry(name, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "gpu" / f"{name}.py"), "--dry"]
    env = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line or "SKIPPED" in line]
    assert not done.returncode and not failed, failed or done.stderr[-2000:]
    assert "0 failed" in done.stdout.splitlines()[-1]
