"""Disks that fill, and files that change under a run's feet."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from machinery.checkpoints import CheckpointError, checkpoint_folders, newest_checkpoint, read_state
from machinery.errors import DataError
from tools.common import lm, quietly
from tools.drills.common import Result, equal, start_training, tiny_config, weights


def full_disk(folder: Path, times: int) -> Result:
    """Train on a file system that fills: a small tmpfs where mounting is allowed, else a limit on file sizes."""
    steady = {"schedule": "constant", "warmup": 0.0}  # the rates of any budget
    straight = tiny_config(folder, run_name="straight", max_steps=60, **steady)
    quietly(lm.train, straight)
    survived, identical, mounted = 0, True, False
    for strike in range(times):
        disk = folder / f"disk{strike}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        config = replace(straight, runs_dir=str(disk), run_name="full", max_steps=40)
        try:
            process = start_training(config, preexec_fn=None if mounted else limit_file_size)
            while len(checkpoint_folders(disk / "full")) < 1 and process.poll() is None:
                time.sleep(0.01)
            if mounted:  # fill it up
                with contextlib.suppress(OSError):
                    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 10_000))
                    while True:
                        with (disk / "ballast").open("ab") as file:
                            file.write(bytes(1024))
            ended = process.wait(timeout=120)
            safe = newest_checkpoint(disk / "full") is not None
            if mounted:
                (disk / "ballast").unlink()
            quietly(lm.train, replace(config, max_steps=60))
            identical = identical and equal(weights(straight), weights(config))
            survived += ended == 0 and safe
        finally:
            if mounted:
                subprocess.run(["umount", disk], check=True)
    note = "a tmpfs of 6 MB, filled while training" if mounted else "a limit on file sizes"
    return Result("full disk", times, survived, identical=identical, note=note)


def limit_file_size() -> None:
    """In a child process: no file may grow beyond 20 kB; writing more fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip, cut, extend, blank or repeat bytes at random."""
    at = chance.randrange(len(content))
    length = chance.choice([1, 1, 7, 512, len(content)])
    kind = chance.choice(["flip", "cut", "extend", "blank", "repeat"])
    changed = {
        "flip": content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :],
        "cut": content[:at],
        "extend": content + chance.randbytes(length),
        "blank": content[:at] + bytes(len(content[at : at + length])) + content[at + length :],
        "repeat": content[:at] + content[max(0, at - length) : at] + content[at:],
    }[kind]
    return changed if changed != content else content + b"x"


def corrupt_checkpoints(folder: Path, times: int) -> Result:
    """Damage a random file of the newest checkpoint, or remove it: it must be recognised and the one before used.

    One time in ten the one before is damaged as well. Then that has to be said.
    """
    chance = random.Random(0)
    config = tiny_config(folder, run_name="corrupt", max_steps=20, keep_checkpoints=2)
    quietly(lm.train, config)
    run = Path(config.runs_dir) / "corrupt"
    older, newest = checkpoint_folders(run)
    survived, state = 0, read_state(newest)
    for _ in range(times):
        damaged = [newest, older] if chance.random() < 0.1 else [newest]
        files = [chance.choice(sorted(folder.iterdir())) for folder in damaged]
        contents = {path: path.read_bytes() for path in files}
        for path, content in contents.items():
            path.write_bytes(damage(content, chance)) if chance.random() < 0.95 else path.unlink()
        try:
            found = quietly(newest_checkpoint, run)
            survived += found == older or read_state(found) == state  # more blank space in JSON is no damage
        except CheckpointError:
            survived += older in damaged
        for path, content in contents.items():
            path.write_bytes(content)
    sound = quietly(newest_checkpoint, run) == newest
    return Result("corrupted checkpoint", times, survived if sound else 0, note="named, and the one before used")


def corrupt_shards(folder: Path, times: int) -> Result:
    """Damage a shard: no token of it may be used."""
    chance = random.Random(0)
    config = tiny_config(folder)
    data = quietly(lm.prepare_data, config)
    path = data.folder / "train_000000.bin"
    content, survived = path.read_bytes(), 0
    for _ in range(times):
        path.write_bytes(damage(content, chance))
        try:
            data.windows("train", config.block_size, 0).read(0, 1)
        except DataError:
            survived += 1
    path.write_bytes(content)
    data.windows("train", config.block_size, 0).read(0, 1)
    return Result("corrupted shard", times, survived, note="refused before a token was used")
