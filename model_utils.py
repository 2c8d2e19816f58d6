"""Around the model: counting, memory, what a run will take, the fused loss, and looking inside.

`config` is the notebook's Config, or any object with the same fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from machinery.attention import SHORT, fused_attention, short_attention
from machinery.budget import budget_left, multiplying_and_flops, tokens_within, training_flops
from machinery.errors import UserError
from machinery.forecast import compute_optimal, expected_loss, forecast, laws
from machinery.machine import Machine, evaluation_mode
from machinery.settings import kv_heads
from machinery.sources import source_kind

__all__ = [
    "attention_maps", "best_shape", "choose_micro_batch", "compute_optimal", "count_parameters", "cross_entropy",
    "evaluation_mode", "expected_loss", "flops_per_token", "fused_attention", "loss_rows", "multiplying_parameters",
    "predict", "shape_of", "short_attention", "training_memory",
]  # fmt: skip


# -------------------------------------------------------------------------------------------- counting


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by group, each counted once; "total" is their sum.

    A table that the head shares counts as "embedding". The groups follow the names of the modules.
    """
    groups = dict.fromkeys(("embedding", "position", "attention", "ffn", "norms", "head"), 0)
    for name, parameter in model.named_parameters():  # a shared tensor appears once, under its first name
        parts = name.split(".")
        group = "norms" if "norm" in name else next((group for group in groups if group in parts), "other")
        groups[group] = groups.get(group, 0) + parameter.numel()
    return groups | {"total": sum(groups.values())}


def multiplying_parameters(model: nn.Module) -> int:
    """N of the FLOP count: weights of matrix products. The head counts once, tied or not; a lookup never does."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def flops_per_token(model: nn.Module, config) -> float:
    """Training FLOPs per token, forward and backward, of a model (`training_flops`)."""
    return training_flops(multiplying_parameters(model), config)


def shape_of(config, n_layer: int) -> dict[str, int]:
    """Overrides of `config` for so many blocks, at about 64 channels per block, with its heads' size and sharing."""
    heads = max(1, round(n_layer * 64 / config.head_size))
    size = {"n_layer": n_layer, "n_embd": heads * config.head_size, "n_head": heads}
    size["n_kv_head"] = math.gcd(heads, max(1, heads * config.n_kv_head // config.n_head))
    return size | {"n_ffn": 128 * math.ceil(size["n_embd"] / 48)}


def best_shape(config, machine: Machine | str, hours: float) -> dict[str, float]:
    """Overrides of `config` for the depth (`shape_of`) that should be best after `hours` on a machine or a named card.

    Speed is taken to be half the rate of a large matrix product, or 40% of the card's datasheet; loss is that of the
    law fitted to the source, or for text from the hub, `expected_loss`. Prints the candidates near the best, and where
    sizes that the law does not cover may be better. Raises `UserError` where no law covers any.
    """
    sized, rows = replace(config, max_hours=hours, max_steps=0, max_tokens=0), []
    for depth in range(1, 65):
        shape = shape_of(config, depth)
        one = replace(sized, **shape)
        parameters, flops = multiplying_and_flops(one)
        tokens = tokens_within(one, machine)
        known = forecast(one, parameters, flops, tokens)
        if known and known.law:
            rows.append((known.middle, "bits per byte", shape, parameters, tokens))
        elif parameters > 2e7 and source_kind(config.source) == "hub":  # the published law begins at 5e7
            unit = "nats per token" + (f", {known.low:.2f} to {known.high:.2f} bits per byte" if known else "")
            rows.append((expected_loss(parameters, tokens), unit, shape, parameters, tokens))
    best = min(rows, key=lambda row: row[0], default=None)
    if not rows:
        why = "laws are for 'demo' on 'python' or 'english', for some minutes, and for the hub"
        raise UserError(f"the best size for {sized.max_hours:g} hours of {config.source!r} is not known: {why}")
    if best in (rows[0], rows[-1]):
        end, change = ("smallest", "more") if best == rows[0] else ("largest", "fewer")
        if best[3] > laws().get(config.source, {"parameters": [math.inf]})["parameters"][0]:
            change = "fewer"  # smaller ones would read the text too often
        print(f"the best is the {end} that the law covers, so one beyond may be better; or try {change} hours")
    for loss, unit, shape, parameters, tokens in rows[max(0, rows.index(best) - 2) : rows.index(best) + 3]:
        sizes = f"{shape['n_layer']:3d} × {shape['n_embd']:<5d}{parameters:14,.0f} weights {tokens:16,.0f} tokens"
        print(f"{sizes}  {loss:.3f} {unit}{'   <- best' if shape is best[2] else ''}")
    return best[2] | {"max_hours": sized.max_hours}


def training_memory(
    model: nn.Module, optimizers: list, config, micro_batch: int, dtype: torch.dtype, processes: int = 1
) -> dict[str, float]:
    """Predicted bytes of a training step on `micro_batch` sequences at a time, by what holds them.

    `dtype` is that of matrix products, and of the residual stream unless it is float16. With FSDP,
    `processes` share weights, gradients and optimizer state. These are exact. Activations count what backward needs per
    token and block: the inputs of norms and matrix products, queries, keys, values, the attention output, the weights
    of `short_attention`, and the feed-forward's hidden values. That is what a compiled model keeps; an eager one keeps
    1.2 to 1.5 times as much in float32 and 1.5 to 1.9 times in 16 bits. Logits count values, logarithms and gradients
    of the rows that exist at a time, and the gradient of the head, made in parts.
    """
    parameters, state = count_parameters(model)["total"], 0
    shares = processes if config.parallel == "fsdp" else 1
    for optimizer in optimizers:  # AdamW keeps two float32 averages per weight, Muon one
        per_weight = 8 if isinstance(optimizer, torch.optim.AdamW) else 4
        state += per_weight * sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    matmul_bytes, stream_bytes = dtype.itemsize, 2 if dtype == torch.bfloat16 else 4
    tokens = micro_batch * config.block_size
    rows = min(tokens, loss_rows(tokens))
    kv_width = 2 * kv_heads(config) * config.head_size  # keys and values, per block
    hidden = (3 if config.ffn == "gated" else 2) * config.n_ffn
    tables = sum(buffer.nbytes for buffer in model.buffers())  # such as rotary angles
    weights = config.n_head * config.block_size if config.compile and config.block_size <= SHORT else 0
    kept = 1.0 if config.compile else 1.7 if matmul_bytes < 4 else 1.4
    per_block = 2 * stream_bytes * config.n_embd + matmul_bytes * (5 * config.n_embd + kv_width + weights + hidden)
    return {
        "weights": 4.0 * parameters / shares + (matmul_bytes * parameters if matmul_bytes < 4 else 0) + tables,
        "gradients": 4.0 * parameters / shares,
        "optimizer": state / shares,
        "activations": tokens * config.n_layer * per_block * kept,
        "logits": config.vocab_size * (rows * (4.0 + 2 * matmul_bytes) + config.n_embd * (4 + matmul_bytes)),
    }


def choose_micro_batch(
    model: nn.Module, optimizers: list, config, dtype: torch.dtype, free_memory: float, processes: int = 1
) -> int:
    """`config.micro_batch`; for "auto" the largest divisor of a process's sequences in a step that is predicted to fit
    80% of the free bytes, up to 65,536 tokens, which fill any device.
    """
    if config.micro_batch != "auto":
        return config.micro_batch
    sequences = config.batch_tokens // config.block_size // processes
    most = min(sequences, max(1, 65536 // config.block_size))
    sizes = (size for size in range(most, 1, -1) if sequences % size == 0)
    needed = ((size, training_memory(model, optimizers, config, size, dtype, processes)) for size in sizes)
    return next((size for size, memory in needed if sum(memory.values()) < 0.8 * free_memory), 1)


def predict(
    model: nn.Module,
    optimizers: list,
    config,
    machine: Machine,
    tokens_per_second: float,
    in_use: int = 0,
    used: tuple[int, int, float] = (0, 0, 0.0),
) -> dict[str, float]:
    """What a run takes that trains at this rate, with `in_use` bytes of memory taken before it.

    `model` and `optimizers` may be without memory ("meta"). `used` is what the run has spent: steps, tokens, seconds.
    """
    if config.batch_tokens == "auto":
        raise UserError("batch_tokens is 'auto': machinery.budget.settle_batch(config, machine) makes it a number")
    parameters, flops = count_parameters(model)["total"], flops_per_token(model, config)
    left, trained = min(budget_left(config, tokens_per_second, used).values()), used[1]
    tokens = math.ceil(left / config.batch_tokens) * config.batch_tokens  # a run takes whole steps
    is_known = not config.init_from  # the law is of models that begin with random weights
    loss = expected_loss(parameters, trained + tokens)  # above ln V, of all tokens alike, there are too few
    best = compute_optimal(flops * (trained + tokens))[0]  # parameters, by a law that knows nothing of small models
    dtype, processes = machine.dtype, machine.processes
    micro_batch = choose_micro_batch(model, optimizers, config, dtype, machine.free_memory(), processes)
    memory = training_memory(model, optimizers, config, micro_batch, dtype, processes)
    checkpoint = 4 * parameters + training_memory(model, optimizers, config, micro_batch, dtype)["optimizer"]
    copied = checkpoint if machine.device.type == "cpu" else 0  # in the same memory while it is being written
    return {
        "parameters": parameters,
        "FLOPs per token": flops,
        "tokens per second": tokens_per_second,
        "tokens": tokens,
        "seconds": tokens / tokens_per_second,
        "micro-batch": micro_batch,
        "peak memory (GB)": (in_use + sum(memory.values()) + copied) / 1e9,
        "checkpoint (GB)": checkpoint / 1e9,
        "tokens per parameter": (trained + tokens) / parameters,  # about 20 is compute-optimal
        "expected loss": loss if is_known and parameters > 5e7 and loss < math.log(config.vocab_size) else math.nan,
        "compute-optimal parameters": best if is_known and best > 5e7 else math.nan,
    }


def check_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Tell which parameters none of these moves. Raises `UserError` where a group has no peak rate for the schedule."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not all("peak_lr" in group for group in groups):
        raise UserError(
            "build_optimizers: a group lacks its peak_lr; the schedule sets lr to a share of it at each step"
        )
    moved = {id(parameter) for group in groups for parameter in group["params"]}
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in moved]:
        print(f"build_optimizers: no optimizer has {', '.join(left[:3])}{' and others' * (len(left) > 3)}: not trained")


# ------------------------------------------------------------------------------------------------ loss


def loss_rows(rows: int) -> int:
    """How many of so many rows of logits the loss makes at a time: a quarter, but no fewer than 512.

    Fewer would take less memory, and the gradient of the head would be added up more often.
    """
    return max(512, math.ceil(rows / 4))


class LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy`, `rows` of the logits at a time. The gradient of a logit is p, less 1 for the target's, so it is
    made with the loss. In bfloat16 p above 0.998 is rounded to 1, and p - 1 to nothing; expm1(ln p) in float32 is not.
    """

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, targets: Tensor, rows: int, training: bool) -> Tensor:
        scored = targets != -100
        total, x_grads, table_grad = 0.0, [], 0.0
        for part, kept, target in zip(x.split(rows), scored.split(rows), targets.where(scored, 0).split(rows)):
            logits = F.linear(part, table)  # (rows, V), in 16 bits where products are
            log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)  # (rows, V)
            at_target = torch.arange(len(part), device=x.device), target
            log_p_target = log_p[at_target]  # (rows,)
            total = total - (log_p_target * kept).sum()
            if training:
                logits_grad = log_p.exp_().to(logits.dtype)  # (rows, V): p
                logits_grad[at_target] = log_p_target.expm1().to(logits.dtype)  # p - 1
                part, kept = part.to(logits_grad.dtype), kept[:, None]
                x_grads.append((logits_grad @ table.to(logits_grad.dtype)).type_as(x) * kept)  # (rows, C)
                table_grad = table_grad + (logits_grad.mT @ (part * kept)).float()  # (V, C)
        count = scored.sum().clamp(min=1)
        if x_grads:
            ctx.save_for_backward(torch.cat(x_grads), table_grad, count)
        return total / count

    @staticmethod
    def backward(ctx, loss_grad: Tensor) -> tuple:
        x_grad, table_grad, count = ctx.saved_tensors
        return loss_grad / count * x_grad, loss_grad / count * table_grad, None, None, None


def cross_entropy(x: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats of the logits x @ table.T for targets (B·T,), of which -100 are left out: x (B·T, C), table
    (V, C). What `F.cross_entropy(x @ table.T, targets)` is, with a part of the logits at a time.
    """
    return LinearCrossEntropy.apply(x, table, targets, loss_rows(len(x)), torch.is_grad_enabled())


# ----------------------------------------------------------------------------------------- looking in


def check_tokens(model: nn.Module, tokens: Tensor, *dimensions: str) -> None:
    """Raise `UserError` unless tokens are ids that the model has, in so many dimensions, T no more than it takes."""
    whole = isinstance(tokens, Tensor) and tokens.dtype in (torch.int32, torch.int64) and not tokens.is_meta
    if not (whole and tokens.dim() == len(dimensions) and tokens.numel() and tokens.size(-1) <= model.max_length):
        given = type(tokens).__name__
        if isinstance(tokens, Tensor):
            given = f"{tuple(tokens.shape)} of {tokens.dtype} on {tokens.device}"
        shape = str(dimensions).replace("'", "")
        raise UserError(f"tokens are {given}; give a tensor {shape} of whole numbers, T at most {model.max_length}")
    least, most, rows = int(tokens.min()), int(tokens.max()), model.embedding.num_embeddings
    if least < 0 or most >= rows:
        raise UserError(f"tokens are numbers from {least} to {most} and the model has rows for 0 to {rows - 1}")


def check_generation(
    model: nn.Module,
    tokens: Tensor,
    n_new: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    n_vocab: int | None,
) -> None:
    """Raise `UserError` for arguments of the notebook's `generate` that cannot work."""
    check_tokens(model, tokens, "B", "T")
    kept = 1 if n_vocab is None else n_vocab
    whole = all(type(value) is int for value in (n_new, top_k, seed, kept))
    numbers = whole and all(isinstance(value, int | float) for value in (temperature, top_p))
    fits = numbers and 0 <= temperature <= 1e18 and min(n_new, top_k, kept - 1) >= 0 and 1e-9 <= top_p <= 1
    if not (fits and abs(seed) < 1 << 63):
        raise UserError(
            f"temperature {temperature!r}, top_p {top_p!r}, top_k {top_k!r}, n_new {n_new!r}, seed {seed!r}, n_vocab"
            f" {n_vocab!r}: use 0 to 1e18, 1e-9 to 1, and whole numbers"
        )


@torch.no_grad()
def attention_maps(model: nn.Module, tokens: Tensor) -> Tensor:
    """(n_layer, H, T, T): where every head of every layer looks, for one sequence of tokens (T,); rows are queries.

    `attend` takes means of values: of a unit matrix, as many columns at a time as values have, it gives the weights.
    """
    check_tokens(model, tokens, "T")
    maps, layers = [], [block.attention for block in model.blocks if hasattr(block.attention, "attend")]

    def look(attend: Callable, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        S, D = k.size(2), v.size(3)
        unit = torch.eye(S, -(-S // D) * D, dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        maps.append(torch.cat([attend(q, k, part, *bias) for part in unit.split(D, dim=3)], dim=3)[..., :S])
        return attend(q, k, v, *bias)

    for layer in layers:
        layer.attend = partial(look, layer.attend)
    try:
        with evaluation_mode(model):
            model(tokens[None])
    finally:
        for layer in layers:
            del layer.attend
    if len(maps) != len(model.blocks):
        raise UserError(f"{len(maps)} attention maps for {len(model.blocks)} layers: each is to call its `attend` once")
    if ((found := torch.cat(maps)).sum(dim=-1) - 1).abs().max() > 0.1:  # of a gate or a norm in it
        print("rows of these attention maps do not sum to 1: `attend` does more than take means of values")
    return found
