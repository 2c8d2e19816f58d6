"""Training in a process of its own, to its end."""

from __future__ import annotations

import subprocess

from machinery.notebook import train_elsewhere


def train_apart(config, threads: int) -> str:
    """Train `config` in a process with so many threads; returns the last line of its error, or nothing."""
    env = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), str(threads))
    process = train_elsewhere(config, env=env, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return f"{lines[-1][:300]} (exit status {process.returncode})" if process.returncode else ""
