"""Processes that are killed, interrupted or told to end, at random moments."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from machinery.checkpoints import newest_checkpoint, read_state
from machinery.notebook import defining_cells
from machinery.run_folder import run_state
from tools.common import ROOT, lm, quietly
from tools.drills.common import (
    Result,
    equal,
    last_step,
    make_texts,
    start_training,
    tiny_config,
    wait_for_step,
    weights,
)


def kill_training(folder: Path, times: int) -> Result:
    """SIGKILL a training process at random moments, every third time while it writes a checkpoint."""
    chance = random.Random(0)
    straight = tiny_config(folder, run_name="straight", max_steps=60 * times)
    killed = replace(straight, run_name="killed")
    quietly(lm.train, straight)
    run, survived, lost, inside = Path(killed.runs_dir) / "killed", 0, 0, 0
    for strike in range(times):
        process = start_training(killed)
        wait_for_step(run, process)
        if strike % 3 == 0:  # a folder that ends in .part is a checkpoint being written
            while process.poll() is None and not list((run / "checkpoints").glob(".*.part")):
                pass
            inside += 1
        else:
            time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.wait()
        reached, checkpoint = last_step(run), quietly(newest_checkpoint, run)
        kept = read_state(checkpoint)["step"] if checkpoint else 0
        lost = max(lost, reached - kept)
        survived += reached - kept <= 2 * killed.checkpoint_every  # since the one before the one that was being written
    quietly(lm.train, killed)
    note = f"{inside} of them while a checkpoint was written"
    return Result("SIGKILL while training", times, survived, lost, equal(weights(straight), weights(killed)), note)


PREPARE = """
import json, sys
import data_utils
from machinery.notebook import load_definitions
data_utils.SHARD_TOKENS = 100_000
data_utils.prepare_data(load_definitions().Config.from_dict(json.loads(sys.argv[1])))
"""


def kill_tokenization(folder: Path, times: int) -> Result:
    """SIGKILL a tokenization at random moments after its first shard."""
    chance = random.Random(0)
    source = make_texts(folder / "many", files=60 + 36 * times, lines=2500)
    values = {"source": source, "tokenizer": "bpe", "vocab_size": 300, "max_steps": 10**9}
    configs = [tiny_config(folder, **values, data_dir=str(folder / name)) for name in ("one", "many times")]
    commands = [[sys.executable, "-c", PREPARE, json.dumps(config.to_dict())] for config in configs]
    quiet = {"stdout": subprocess.DEVNULL, "cwd": ROOT}
    subprocess.run(commands[0], **quiet, check=True)
    struck = 0
    for _ in range(times):
        process = subprocess.Popen(commands[1], **quiet)
        before = len(list((folder / "many times").glob("*/train_*.bin")))
        while len(list((folder / "many times").glob("*/train_*.bin"))) <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        struck += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(commands[1], **quiet, check=True)
    files = [{p.name: p.read_bytes() for p in (folder / name).glob("*/*.bin")} for name in ("one", "many times")]
    same, note = files[0] == files[1], f"{len(files[0])} shards"
    return Result("SIGKILL while tokenizing", struck, struck, identical=same, note=note)


def interrupt_kernel(folder: Path, times: int) -> Result:
    """Interrupt a real Jupyter kernel, as the stop button does, at random moments of the training cell."""
    from jupyter_client.manager import start_new_kernel

    chance = random.Random(0)
    straight = tiny_config(folder, run_name="straight", max_steps=150 * times)
    config = replace(straight, run_name="interrupted")
    quietly(lm.train, straight)
    manager, client = start_new_kernel(cwd=str(ROOT))
    try:

        def execute(code: str) -> dict:
            return client.execute_interactive(code, output_hook=lambda message: None, timeout=600)["content"]

        for _, source in defining_cells():
            execute(source)
        execute(f"torch.set_num_threads({torch.get_num_threads()})")
        execute(f"config = Config.from_dict({config.to_dict()!r})")
        run, survived, lost = Path(config.runs_dir) / "interrupted", 0, 0
        for _ in range(times):

            def strike():
                wait_for_step(run)
                time.sleep(chance.uniform(0, 0.4))
                manager.interrupt_kernel()

            thread = threading.Thread(target=strike)
            thread.start()
            reply = execute("summary = train(config)")
            thread.join()
            status = json.loads((run / "summary.json").read_text())["status"]
            kept = read_state(newest_checkpoint(run))["step"]
            lost = max(lost, last_step(run) - kept)
            survived += reply["status"] == "ok" and status == "interrupted"
        execute("summary = train(config)")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return Result("interrupt of a Jupyter kernel", times, survived, lost, equal(weights(straight), weights(config)))


def terminate(folder: Path, times: int) -> Result:
    """SIGTERM, as a shutdown or a scheduler sends it."""
    chance = random.Random(0)
    straight = tiny_config(folder, run_name="straight", max_steps=80 * times)
    config = replace(straight, run_name="terminated")
    quietly(lm.train, straight)
    run, survived, lost = Path(config.runs_dir) / "terminated", 0, 0
    for _ in range(times):
        process = start_training(config)
        wait_for_step(run, process)
        time.sleep(chance.uniform(0, 0.3))
        process.terminate()
        ended = process.wait(timeout=60)
        lost = max(lost, last_step(run) - read_state(newest_checkpoint(run))["step"])
        survived += ended == 0 and run_state(run)["status"] in ("interrupted", "finished")
    quietly(lm.train, config)
    return Result("SIGTERM", times, survived, lost, equal(weights(straight), weights(config)))
