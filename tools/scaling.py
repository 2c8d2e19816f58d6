"""The table of docs/scaling.md, from the notebook's own accounting: python -m tools.scaling"""

from __future__ import annotations

import torch

from machinery.machine import DATASHEET_TFLOPS, Machine
from model_utils import (
    choose_micro_batch,
    compute_optimal,
    count_parameters,
    expected_loss,
    flops_per_token,
    training_memory,
)
from tools.common import lm, table

SIZES = {
    "1B": {"n_layer": 20, "n_embd": 2048, "n_head": 16, "n_kv_head": 8, "n_ffn": 5632, "vocab_size": 65536},
    "8B": {
        "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "n_ffn": 14336, "vocab_size": 131072,
        "tie_embeddings": False,
    },
}  # fmt: skip
PEAK, USED = DATASHEET_TFLOPS["H100"] * 1e12, 0.40  # FLOP/s by the data sheet, and the share of it that is assumed
NVLINK, NETWORK = 450e9, 50e9  # bytes/s a GPU sends: NVLink 4 within a machine, 400 Gb/s between machines
BATCH = 2**21  # tokens per optimizer step
BLOCK, MEMORY = 4096, 80e9  # tokens of context; bytes of a GPU


COLUMNS = {
    "model": "", "GPUs": "d", "`parallel`": "", "parameters": "", "memory per GPU": "", "micro-batch": "d",
    "sent per step": "", "on the wire": "", "computing": "", "tokens per day": "", "shards per day": "",
    "expected loss": ".2f", "best size": "",
}  # fmt: skip


def row(name: str, gpus: int, parallel: str) -> dict:
    """One line of the table; without the cells after the memory where that is more than a GPU has."""
    values = {"block_size": BLOCK, "batch_tokens": BATCH, "optimizer": "adamw", "parallel": parallel}
    config = lm.Config.from_preset("day", **values, **SIZES[name])
    model, optimizers = lm.outline(config, Machine.find("cpu"))
    parameters, flops = count_parameters(model)["total"], flops_per_token(model, config)
    micro_batch = choose_micro_batch(model, optimizers, config, torch.bfloat16, MEMORY, gpus)
    memory = sum(training_memory(model, optimizers, config, micro_batch, torch.bfloat16, gpus).values())
    cells = {"model": name, "GPUs": gpus, "`parallel`": parallel, "parameters": f"{parameters / 1e9:.2f}B"}
    if memory > MEMORY:
        return cells | {"memory per GPU": f"{memory / 1e9:.0f} GB: does not fit"}
    micro_steps = BATCH // gpus // BLOCK // micro_batch
    once = 4 * parameters * (gpus - 1) / gpus  # bytes of float32 that a rank sends to gather or reduce all weights
    # ddp reduces gradients once; fsdp gathers weights in 16 bits twice a micro-batch, and scatters gradients in 32
    sent = 2 * once if parallel == "ddp" else (0.5 + 0.5 + 1) * micro_steps * once
    compute = BATCH * flops / (gpus * PEAK * USED)
    wire = sent / (NVLINK if gpus <= 8 else NETWORK)
    tokens = 86400 / max(compute, wire) * BATCH  # communication overlaps with computation at best
    shards = tokens * (2 if config.vocab_size <= 2**16 else 4)
    return cells | {
        "memory per GPU": f"{memory / 1e9:.0f} GB", "micro-batch": micro_batch,
        "sent per step": f"{sent / 1e9:,.0f} GB", "on the wire": f"{wire:.2f} s", "computing": f"{compute:.2f} s",
        "tokens per day": f"{tokens / 1e9:,.0f}B", "shards per day": f"{shards / 1e9:,.0f} GB",
        "expected loss": expected_loss(parameters, tokens),
        "best size": f"{compute_optimal(flops * tokens)[0] / 1e9:.1f}B",
    }  # fmt: skip


def main() -> None:
    cases = [(name, gpus, parallel) for name in SIZES for gpus in (8, 64) for parallel in ("ddp", "fsdp")]
    print(table([row(*case) for case in cases], COLUMNS))


if __name__ == "__main__":
    main()
