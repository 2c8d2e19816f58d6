"""Training in a process of its own: python -m tools.training '<the config as JSON>'."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from machinery.errors import plain_errors
from machinery.notebook import NOTEBOOK, load_definitions


def start_training(config, threads: int = 1, **options) -> subprocess.Popen:
    """Begin to train `config` in another process with `threads` threads; relative folders stay those of this process.

    `options` are those of `subprocess.Popen`. A `UserError` there is one line of its standard error.
    """
    path = os.pathsep.join([str(NOTEBOOK.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), str(threads))
    command = [sys.executable, "-P", "-m", "tools.training", json.dumps(config.to_dict())]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, text=True, **options)


def main() -> None:
    """Train what the first argument says."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    plain_errors()
    lm = load_definitions()
    lm.train(lm.Config.from_dict(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
