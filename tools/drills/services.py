"""Services that misbehave: a hub, and W&B."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet

from machinery.run_folder import run_state
from tools.common import ROOT
from tools.drills.common import Result, last_step, start_training, tiny_config
from tools.drills.hub_server import Hub


def bad_network(folder: Path, times: int) -> Result:
    """Stream from a local hub that refuses, stalls or drops one request in three."""
    documents = [f"Document {i}\n" * 20 for i in range(300)]
    served = folder / "served"
    served.mkdir(parents=True)
    for part in range(3):
        table = pyarrow.table({"text": documents[part * 100 : part * 100 + 100]})
        pyarrow.parquet.write_table(table, served / f"train-{part:05d}.parquet", row_group_size=10)
    program = (
        "import json; from machinery.sources import iter_documents\n"
        "print(json.dumps(list(iter_documents('owner/name'))))"
    )
    survived, faults = 0, 0
    for strike in range(times):
        kind = ("refuse", "stall", "drop")[strike % 3]
        struck = []

        def fault(path, count, kind=kind, struck=struck):
            if path.endswith(".parquet") and count == 2:
                struck.append(path)
                return kind

        with Hub(served, fault) as hub:
            env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / f"hf{strike}"), "HF_HUB_OFFLINE": "0"}
            env["HF_HUB_DOWNLOAD_TIMEOUT"] = "2"
            result = subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
            )
        faults += len(struck)
        survived += len(struck) * (result.returncode == 0 and json.loads(result.stdout.splitlines()[-1]) == documents)
    return Result("network: refused, stalled, dropped", faults, survived, note="every document arrived once")


def bad_wandb(folder: Path, times: int) -> Result:
    """Real W&B whose service process is killed at the start, in the middle or at the end of a run."""
    survived = 0
    for strike in range(times):
        config = tiny_config(folder, run_name=f"wandb{strike}", max_steps=300, wandb="offline", eval_every=10**6)
        process = start_training(config)
        run, moment = Path(config.runs_dir) / config.run_name, (0, 150, 290)[strike % 3]
        struck = False
        while process.poll() is None and not struck:
            if (run / "wandb_id").exists() and last_step(run) >= moment:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for service in psutil.Process(process.pid).children(recursive=True):
                        service.kill()
                        struck = True
            time.sleep(0.002)
        try:
            ended = process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            process.kill()
            ended = -1
        survived += ended == 0 and run_state(run)["status"] == "finished"
    return Result("W&B killed at start, middle, end", times, survived, note="the run finished, files complete")
