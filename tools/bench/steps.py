"""Training steps: tokens per second against other libraries, peak memory, and the time spent waiting for data.

All contenders get the same batch, threads, precision, allocator settings, gradient clipping and optimizer (AdamW).
They take turns in one process for the time, and have a process of their own for the memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from data_utils import Batches, prepare_data
from machinery.machine import Machine, compile_or_eager, measure_matmul_flops
from model_utils import flops_per_token
from tools.bench.common import in_own_process, pair_for, take_turns
from tools.bench.peers import Transformers, XTransformers, make_config
from tools.common import lm, quietly

OURS = "LMHarness"
CONTENDERS = {  # the model, and whether it is compiled and AdamW fused
    OURS: (lm.build_model, True),
    "transformers, as shipped": (Transformers, False),
    "transformers, compiled, fused AdamW": (Transformers, True),
    "x-transformers, compiled, fused AdamW": (XTransformers, True),
}


def build(name: str, config, machine) -> tuple[nn.Module, Callable]:
    """The contender's model, and a function that makes one optimizer step on a batch that stays the same."""
    make_model, tuned = CONTENDERS[name]
    torch.manual_seed(config.seed)
    model = make_model(config).to(machine.device)
    if name == OURS:
        optimizers = lm.build_optimizers(model, config, machine)
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=tuned or None)]
    runner = torch.compile(model, dynamic=False) if tuned else model
    tokens, targets = pair_for(config, config.micro_batch, machine.device)

    def step() -> None:
        with machine.autocast():
            loss = runner(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return model, step


def config_on(machine, model_name: str):
    """Small micro-batches on a GPU of a desktop, since all contenders are in its memory at once."""
    small = machine.device.type == "cuda" and machine.memory < 60e9
    return make_config(model_name, **({"micro_batch": 4} if small else {}))


def measure_memory(model_name: str, machine, contenders: tuple[str, ...]) -> dict[str, float]:
    """Bytes of each contender, the median of three processes; those that raise an error here are named and left out."""
    memory = {}
    for name in contenders:
        try:  # where blocks land in the heap is up to chance
            asked = "tools.bench.steps", name, model_name, machine.device.type
            memory[name] = median(in_own_process(*asked)["bytes"] for _ in range(3))
        except RuntimeError as error:  # of PyTorch's compiler, on some devices
            if name == OURS:
                raise
            print(f"{name} does not run here: {error}", flush=True)
    return memory


def compare_steps(model_name: str, machine) -> list[dict]:
    """A row per contender: tokens per second, and how ours compares; peak memory; share of the matrix rate."""
    config = config_on(machine, model_name)
    matmul_flops = measure_matmul_flops(machine)
    memory = measure_memory(model_name, machine, tuple(CONTENDERS))
    built = {name: build(name, config, machine) for name in memory}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in built.items()}
    assert len(set(parameters.values())) == 1, f"not the same architecture: {parameters}"
    flops = flops_per_token(built[OURS][0], config)
    seconds = take_turns({name: step for name, (_, step) in built.items()}, machine, rounds=10)
    rows = []
    for name in built:
        rate = config.micro_batch * config.block_size / seconds[name]
        rows.append({
            "model": model_name, "library": name, "parameters": parameters[name], "tokens/s": rate,
            "ours is faster by": seconds[name] / seconds[OURS], "of the matrix rate": flops * rate / matmul_flops,
            "of the datasheet": flops * rate / machine.peak_flops if machine.peak_flops else None,
            "peak memory (GB)": memory[name] / 1e9,
            "ours takes": memory[OURS] / memory[name],
        })  # fmt: skip
    return rows


def peak_memory(name: str, model_name: str, device: str) -> dict:
    """Most bytes that a contender takes over three steps: of tensors on a GPU.

    On a CPU it is the whole process, above what it held after a step of a tiny model: neither the libraries nor
    the compiler count.
    """
    machine = Machine.find(device)
    if machine.device.type == "cpu":
        build(name, make_config("tiny"), machine)[1]()
    before = machine.used_memory()
    _, step = build(name, config_on(machine, model_name), machine)
    for _ in range(3):
        step()
    return {"bytes": machine.peak_memory() - before}


def waiting_for_data(machine) -> dict:
    """Share of the steps of `demo` that is spent in `Batches.next`: the rest computes."""
    config, steps = make_config("demo", optimizer="muon"), 50
    data = quietly(prepare_data, config)
    batches = Batches(data, config, machine, lm.Progress(micro_batch=config.micro_batch))
    model = lm.build_model(config).to(machine.device)
    optimizers, scaler = lm.build_optimizers(model, config, machine), machine.scaler()
    waited, read = [], batches.next

    def timed_read():
        start = time.perf_counter()
        rows = read()
        waited.append(time.perf_counter() - start)
        return rows

    batches.next = timed_read
    runner, _ = compile_or_eager(model, *read(), machine)
    start = time.perf_counter()
    for _ in range(steps):
        lm.gradient(runner, batches, batches.micro_steps, machine, scaler)
        lm.step_weights(model, optimizers, scaler, 1.0, config.grad_clip)
    machine.synchronize()
    seconds = time.perf_counter() - start
    return {"model": "demo", "steps": steps, "waiting": sum(waited) / seconds}


if __name__ == "__main__":
    print(json.dumps(peak_memory(*json.loads(sys.argv[1]))))
