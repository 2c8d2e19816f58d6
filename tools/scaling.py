"""The table of docs/scaling.md, from the notebook's own accounting: python docs/scaling.py"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from machinery.notebook import load_definitions
from model_utils import (
    choose_micro_batch,
    compute_optimal,
    count_parameters,
    expected_loss,
    flops_per_token,
    training_memory,
)

SIZES = {
    "1B": {"n_layer": 20, "n_embd": 2048, "n_head": 16, "n_kv_head": 8, "n_ffn": 5632, "vocab_size": 65536},
    "8B": {
        "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "n_ffn": 14336, "vocab_size": 131072,
        "tie_embeddings": False,
    },
}  # fmt: skip
PEAK, USED = 989e12, 0.40  # FLOP/s of an H100 or H200 on its datasheet, dense bfloat16; assumed share of it
NVLINK, NETWORK = 450e9, 50e9  # bytes/s a GPU sends: NVLink 4 within a machine, 400 Gb/s between machines
BATCH = 2**21  # tokens per optimizer step
BLOCK, MEMORY = 4096, 80e9  # tokens of context; bytes of a GPU


def row(lm, name: str, gpus: int, parallel: str) -> str:
    """One line of the table."""
    config = lm.Config.from_preset("day", block_size=BLOCK, batch_tokens=BATCH, optimizer="adamw", **SIZES[name])
    with torch.device("meta"):
        model = lm.build_model(config)
        optimizers = lm.build_optimizers(model, config)
    parameters, flops = count_parameters(model)["total"], flops_per_token(model, config)
    shares = gpus if parallel == "fsdp" else 1
    own = replace(config, batch_tokens=BATCH // gpus)
    micro_batch = choose_micro_batch(model, optimizers, own, 2, MEMORY, shares)
    memory = sum(training_memory(model, optimizers, config, micro_batch, 2, shares).values())
    if memory > MEMORY:
        return (
            f"| {name} | {gpus} | {parallel} | {parameters / 1e9:.2f}B | {memory / 1e9:.0f} GB: does not fit" + " |" * 8
        )
    micro_steps = own.batch_tokens // BLOCK // micro_batch
    once = 4 * parameters * (gpus - 1) / gpus  # bytes of float32 that a rank sends to gather or reduce all weights
    sent = 2 * once if parallel == "ddp" else 3 * micro_steps * once
    compute = BATCH * flops / (gpus * PEAK * USED)
    wire = sent / (NVLINK if gpus <= 8 else NETWORK)
    tokens = 86400 / max(compute, wire) * BATCH  # communication overlaps with computation at best
    shards = tokens * (2 if config.vocab_size <= 2**16 else 4)
    return (
        f"| {name} | {gpus} | {parallel} | {parameters / 1e9:.2f}B | {memory / 1e9:.0f} GB | {micro_batch}"
        f" | {sent / 1e9:,.0f} GB | {wire:.2f} s | {compute:.2f} s | {tokens / 1e9:,.0f}B | {shards / 1e9:,.0f} GB"
        f" | {expected_loss(parameters, tokens):.2f} | {compute_optimal(flops * tokens)[0] / 1e9:.1f}B |"
    )


if __name__ == "__main__":
    lm = load_definitions()
    head = "model, GPUs, `parallel`, parameters, memory per GPU, micro-batch, sent per step, on the wire, computing"
    names = (head + ", tokens per day, shards per day, expected loss, best size").split(", ")
    print(f"| {' | '.join(names)} |\n| {' | '.join(['---'] * len(names))} |")
    for name in SIZES:
        for gpus in (8, 64):
            for parallel in ("ddp", "fsdp"):
                print(row(lm, name, gpus, parallel))
