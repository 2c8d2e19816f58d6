"""nanochat's own code on this project's text and batches: its model, optimizer and schedules, or its optimizer alone.

    NANOCHAT=../nanochat make recipe          after: git clone https://github.com/karpathy/nanochat ../nanochat

Nothing of nanochat is in this project; the clone is the user's. Both variants have the depth, width, heads, vocabulary
and context of the config. "whole" is its GPT. "llama" is the notebook's Transformer, untied, without learned gains, as
nanochat's optimizer groups, initialises and schedules it. Rates are nanochat's defaults times `scale`. On a CPU all of
it runs eagerly: Inductor of PyTorch 2.13 fails there on its optimizer.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from data_utils import prepare_data
from machinery.errors import UserError
from machinery.machine import Machine
from tools.common import lm

MATRIX, EMBEDDING, HEAD, SCALAR, DECAY = 0.02, 0.3, 0.008, 0.5, 0.28  # the defaults of its scripts/base_train.py
WARMUP_STEPS, WARMDOWN, FINAL = 40, 0.65, 0.05


def clone() -> Path | None:
    """The user's clone, named by NANOCHAT; None where it is not set. Raises UserError where it holds no nanochat."""
    path = os.environ.get("NANOCHAT")
    if not path:
        return None
    if not (Path(path) / "nanochat" / "gpt.py").is_file():
        raise UserError(f"NANOCHAT is {path!r}, which has no nanochat/gpt.py; name a clone of karpathy/nanochat")
    return Path(path).resolve()


@contextlib.contextmanager
def in_reach(machine: Machine) -> Iterator[None]:
    """Let the clone be imported. What it compiles at import stays eager on a CPU."""
    os.environ["NANOCHAT_DTYPE"] = str(machine.dtype)[6:]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "path", [str(clone()), *sys.path]))
        if machine.device.type == "cpu":
            stack.enter_context(patch.object(torch, "compile", lambda function=None, **_: function or (lambda f: f)))
        yield


class Scored(nn.Module):
    """nanochat's GPT called as the notebook's models are: targets of -100 are left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, targets.where(targets != -100, -1))


def build_whole(config, scale: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """nanochat's GPT of the config's size, with full attention in every layer, and its optimizer."""
    gpt = importlib.import_module("nanochat.gpt")
    heads = {"n_head": config.n_head, "n_kv_head": config.n_kv_head, "window_pattern": "L"}
    sizes = {"sequence_len": config.block_size, "vocab_size": config.vocab_size, "n_layer": config.n_layer}
    torch.manual_seed(config.seed)
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(n_embd=config.n_embd, **sizes, **heads))
    model.to_empty(device="cpu")
    model.init_weights()
    rates = {"unembedding_lr": HEAD, "embedding_lr": EMBEDDING, "matrix_lr": MATRIX, "scalar_lr": SCALAR}
    optimizer = model.setup_optimizer(weight_decay=DECAY, **{name: rate * scale for name, rate in rates.items()})
    return Scored(model), optimizer


def build_llama(config, scale: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The notebook's untied Transformer with nanochat's initial weights, groups and rates."""
    optim = importlib.import_module("nanochat.optim")
    model = lm.build_model(replace(config, tie_embeddings=False, embedding_norm=False))
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    with torch.no_grad():
        bound = (3 / config.n_embd) ** 0.5
        for name, p in model.blocks.named_parameters():
            if "norm" in name:
                p.requires_grad_(False)
            elif "o_proj" in name or "down_proj" in name:
                p.zero_()
            else:
                nn.init.uniform_(p, -bound, bound)
        model.norm.requires_grad_(False)
        nn.init.normal_(model.embedding.weight, std=0.8)
        nn.init.normal_(model.head.weight, std=0.001)
    width = (config.n_embd / 768) ** -0.5
    adamw = {"kind": "adamw", "eps": 1e-10, "weight_decay": 0.001}
    head = {"params": [model.head.weight], "lr": HEAD * scale * width, "betas": (0.8, 0.96), "weight_decay": 0.01}
    table = {"params": [model.embedding.weight], "lr": EMBEDDING * scale * width, "betas": (0.8, 0.995)}
    groups = [adamw | head, adamw | table]
    muon = {"kind": "muon", "lr": MATRIX * scale, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": DECAY}
    groups += [muon | {"params": [p for p in matrices if p.shape == s]} for s in sorted({p.shape for p in matrices})]
    optimizer = optim.MuonAdamW(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return model, optimizer


VARIANTS = {"whole": build_whole, "llama": build_llama}


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Learning rate, Muon's momentum and its weight decay at a step, by the schedules of its scripts/base_train.py."""
    down = round(WARMDOWN * steps)
    left = (steps - step) / down
    warm, momentum = min(1.0, (step + 1) / WARMUP_STEPS), 0.85 + 0.12 * min(1.0, step / 400)
    factor = warm if step < WARMUP_STEPS or left >= 1 else left + (1 - left) * FINAL
    momentum = 0.97 * left + 0.90 * (1 - left) if step >= 400 and left < 1 else momentum
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = momentum, DECAY * 0.5 * (1 + math.cos(math.pi * step / steps))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, machine: Machine) -> Callable[[torch.Tensor], None]:
    """A function that takes one step on rows (B, T + 1) of tokens."""

    def step(rows: torch.Tensor) -> None:
        with machine.autocast():
            model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train_nanochat(config, variant: str, scale: float) -> dict:
    """Train on the batches that the notebook would have read, and score all held-out text as it does."""
    machine, data = Machine.find(config.device, config.dtype), prepare_data(config)
    model, optimizer = VARIANTS[variant](config, scale)
    model = model.to(machine.device)
    windows, sequences = data.windows("train", config.block_size, config.seed), config.batch_tokens // config.block_size
    take_step, steps = step_of(model, optimizer, machine), config.max_tokens // config.batch_tokens
    started = time.perf_counter()
    for step in range(steps):
        set_rates(optimizer, step, steps)
        take_step(torch.from_numpy(windows.read(step * sequences, sequences)).to(machine.device))
    seconds = time.perf_counter() - started
    scores = lm.evaluate(model, data, machine, sequences, math.inf)
    parameters = sum(p.numel() for p in model.parameters())
    return {"status": "finished", "parameters": parameters, "train_seconds": seconds, **scores}


def main() -> None:
    """`python -m tools.bench.nanochat '[config, variant, scale]'` prints the result as JSON."""
    values, variant, scale = json.loads(sys.argv[1])
    config = lm.Config.from_dict(values)
    with in_reach(Machine.find(config.device, config.dtype)):
        print(json.dumps(train_nanochat(config, variant, scale)))


if __name__ == "__main__":
    main()
