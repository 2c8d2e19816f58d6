"""How long a checkpoint holds up training: the copy, and how long its writer keeps the interpreter at a time.

python -m tools.bench.checkpoint                  of `day`, three times
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machinery.checkpoints import take_checkpoint
from machinery.machine import Machine
from tools.common import lm


def fill_states(optimizers: list) -> None:
    """Give the optimizers states of the right size, without the products of a step of Muon."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for name in ("exp_avg", "exp_avg_sq") if "betas" in group else ("average",):
                    optimizer.state[p][name] = p.detach().clone()


def time_checkpoint(run: Path, model, optimizers: list, step: int) -> dict[str, float]:
    """Seconds of copying and of writing, and the longest time for which the writer kept this thread from running."""
    begun = time.perf_counter()
    write = take_checkpoint(run, model, optimizers, {"step": step}, 2, True, None)
    copied = last = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing, held = pool.submit(write), 0.0
        while not writing.done():
            time.sleep(0)  # as a training thread does, in the products of PyTorch
            held, last = max(held, time.perf_counter() - last), time.perf_counter()
    size = sum(file.stat().st_size for file in writing.result().iterdir())
    return {"GB": size / 1e9, "copied in": copied - begun, "written in": last - copied, "held for": held}


def main() -> None:
    config = lm.Config.from_preset("day")
    model = lm.build_model(config)
    optimizers = lm.build_optimizers(model, config, Machine.find("cpu", "float32"))
    fill_states(optimizers)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for step in range(3):
            values = time_checkpoint(Path(folder), model, optimizers, step)
            print(", ".join(f"{name} {value:.2f}" for name, value in values.items()), "s")


if __name__ == "__main__":
    main()
