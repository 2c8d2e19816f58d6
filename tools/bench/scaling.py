"""Cost against size: time per token of a gradient while one dimension grows, beside the FLOP formula."""

from __future__ import annotations

from model_utils import flops_per_token
from tools.bench.common import pair_for, take_turns
from tools.common import lm

BASE = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_kv_head": 2, "n_ffn": 704, "block_size": 256, "vocab_size": 8192}
GRID = {
    "depth (n_layer)": [{"n_layer": n} for n in (2, 4, 8, 16)],
    "width (n_embd)": [{"n_embd": 64 * n, "n_head": n, "n_kv_head": n // 2, "n_ffn": 176 * n} for n in (2, 4, 8, 16)],
    "context (block_size)": [{"block_size": n} for n in (128, 256, 512, 1024, 2048)],
    "vocabulary (vocab_size)": [{"vocab_size": n} for n in (2048, 8192, 32768, 131072)],
}
TOLERANCE = 1.25  # what is no matrix product (norms, softmax, the clock's noise) is not in the formula


def make_gradient(config, machine):
    """The configured model, and a function that computes its gradient on `batch_tokens` tokens."""
    model = lm.build_model(config).to(machine.device)
    pair = pair_for(config, config.batch_tokens // config.block_size, machine.device)

    def compute() -> None:
        with machine.autocast():
            loss = model(*pair)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return model, compute


def measure_scaling(machine, grid=GRID, batch_tokens: int = 2048, rounds: int = 5) -> list[dict]:
    """A row per point: seconds and FLOPs per token, and both over those of the smallest point of the same axis.

    Not compiled: sixteen compilations would take longer than all the rest.
    """
    rows = []
    for axis, points in grid.items():
        name = axis[axis.index("(") + 1 : -1]
        configs = [
            lm.Config.from_preset("day", **BASE | point, batch_tokens=batch_tokens, micro_batch=1, qk_norm=False)
            for point in points
        ]
        built = [make_gradient(config, machine) for config in configs]
        seconds = take_turns({i: compute for i, (_, compute) in enumerate(built)}, machine, rounds)
        flops = [flops_per_token(model, config) for (model, _), config in zip(built, configs)]
        for i, config in enumerate(configs):
            growth, formula = seconds[i] / seconds[0], flops[i] / flops[0]
            rows.append({
                "axis": axis, "size": getattr(config, name), "µs per token": seconds[i] / batch_tokens * 1e6,
                "MFLOPs per token": flops[i] / 1e6, "time grows": growth, "formula grows": formula,
                "ratio": growth / formula,
            })  # fmt: skip
    return rows


def grows_faster(rows: list[dict]) -> list[dict]:
    """The points whose time grew by more than their formula."""
    return [row for row in rows if row["ratio"] > TOLERANCE]
