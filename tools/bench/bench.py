"""How fast, against what users would pick instead, on the machine this runs on: `make bench`.

    python -m tools.bench.bench                        everything: results/bench-<machine>.md and .json
    python -m tools.bench.bench --parts generation     some of it; the rest is taken from the .json that is there

Parts: steps, attention, data, tokenization, generation, scaling. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from machinery.files import read_json, write_atomic, write_json
from machinery.machine import Machine
from tools.bench.attention import compare_attention
from tools.bench.common import benchmark_environment, slug
from tools.bench.generation import compare_generation
from tools.bench.scaling import TOLERANCE, grows_faster, measure_scaling
from tools.bench.steps import compare_steps, waiting_for_data
from tools.bench.tokenization import compare_tokenization, package_source
from tools.common import RESULTS, table


def step_models(machine) -> list[str]:
    return ["demo", "22M", "day"] if machine.device.type == "cuda" else ["demo", "22M"]


PARTS = {
    "steps": lambda machine: [row for name in step_models(machine) for row in compare_steps(name, machine)],
    "attention": lambda machine: compare_attention(machine) if machine.device.type == "cpu" else [],
    "data": lambda machine: [waiting_for_data(machine)],
    "tokenization": lambda machine: [
        *compare_tokenization(machine),
        *compare_tokenization(machine, package_source("torch"), slow_ones=False),
    ],
    "generation": lambda machine: [
        row
        for name in ("demo", "22M", "100M")
        for dtype in dict.fromkeys((machine.dtype, torch.float32))
        for row in compare_generation(replace(machine, dtype=dtype), name)
    ],
    "scaling": measure_scaling,
}

STEPS = {
    "model": "", "library": "", "parameters": ",d", "tokens/s": ",.0f", "ours is faster by": ".2f",
    "of the matrix rate": ".0%", "of the datasheet": ".0%", "peak memory (GB)": ".2f", "ours takes": ".2f",
}  # fmt: skip
COLUMNS = {
    "steps": STEPS,
    "attention": {
        "precision": "", "tokens": "d", "kernel (ms)": ".1f", "products (ms)": ".1f", "products are faster by": ".2f",
    },
    "data": {"model": "", "steps": "d", "waiting": ".2%"},
    "tokenization": {"text (MB)": ".0f", "library": "", "MB/s": ".1f", "of raw tiktoken": ".0%"},
    "generation": {
        "model": "", "precision": "", "batch": "d", "LMHarness tokens/s": ",.0f", "transformers tokens/s": ",.0f",
        "ours is faster by": ".2f",
    },
    "scaling": {
        "axis": "", "size": ",d", "µs per token": ".1f", "time grows": ".2f", "formula grows": ".2f", "ratio": ".2f",
    },
}  # fmt: skip
TEXTS = {
    "steps": """## Training steps

Forward, loss, backward, gradient clipping, AdamW: the same batch, threads, precision and allocator settings, in turns;
medians of 10. All libraries are set to one architecture (grouped queries, RoPE, SwiGLU, RMSNorm, tied embeddings, no
biases) and have the same number of parameters. Of x-transformers, the bias of the gated feed-forward is taken out,
which no option does. One whose step raises an error on this machine has no row. *The matrix rate* is that of a large
matrix product in the same precision, measured before.
Memory is the most that a process of its own held over three steps, less what it held after one step of a tiny model,
so that neither libraries nor the compiler's own modules count; the median of three processes.""",
    "attention": """## Attention on a CPU

Forward and backward, compiled, of 1,024 tokens in sequences of so many, 6 query and 2 key/value heads of 64 channels:
PyTorch's kernel, and `short_attention`, two plain products, which a compiled model takes up to 256 tokens.""",
    "data": """## Waiting for data

The share of training steps spent in `Batches.next`, on the shards of `demo`.""",
    "tokenization": """## Tokenization

The standard library of Python, and the larger source of PyTorch; 32,768 tokens, all cores; the same vocabulary and
the same tokens for all. Ours finds and reads files, loads its tokenizer and writes shards with checksums, the others go
from memory to memory.""",
    "generation": """## Generation

Greedy, with the cache, 128 new tokens after a prompt of 32, in turns; not compiled; medians of 5. On a CPU the notebook
decodes in float32, on a GPU in 16 bits.""",
    "scaling": f"""## Cost against size

Time per token of a gradient, not compiled, while one dimension grows, over that of the smallest; beside it the formula,
6·N + 12·n_layer·n_embd·block_size. *Ratio* is time over formula: above {TOLERANCE}, cost would grow faster than it
should.""",
}


def write_report(path: Path, results: dict) -> None:
    """`path`.md from what `path`.json holds."""
    e = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    memory = e["device_memory_bytes"] / 1e9
    parts = [part for part in PARTS if results.get(part)]
    dates = Counter(results["dates"][part] for part in parts).most_common()
    other = "".join(f", {part} {day}" for part, day in results["dates"].items() if part in parts and day != dates[0][0])
    blocks = [f"{TEXTS[part]}\n\n{table(results[part], COLUMNS[part])}" for part in parts]
    if "scaling" in parts:
        worst = max(results["scaling"], key=lambda row: row["ratio"])
        faster = ", ".join(f"{row['axis']} {row['size']:,}" for row in grows_faster(results["scaling"])) or "nothing"
        blocks.append(
            f"Largest ratio: {worst['ratio']:.2f}, at {worst['axis']} {worst['size']:,}. Faster than its formula grows:"
            f" {faster}."
        )
    text = f"""# Speed on {e["device"]}

`make bench`, {dates[0][0]}{other}: {e["device"]}, {e["threads"]} threads, {memory:.0f} GB, {e["dtype"]}.
Python {e["python"]}, {versions}.

"""
    write_atomic(path.with_suffix(".md"), text + "\n\n".join(blocks) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    machine = Machine.find()
    path = RESULTS / f"bench-{slug(machine)}"
    saved = path.with_suffix(".json")
    results = read_json(saved, missing={})
    for part in options.parts:
        results |= {"environment": benchmark_environment(machine), part: PARTS[part](machine)}
        results.setdefault("dates", {})[part] = results["environment"]["started"][:10]
        print(table(results[part], COLUMNS[part]), flush=True)
        write_json(saved, results)
    write_report(path, results)
    print(f"{path}.md")


if __name__ == "__main__":
    main()
