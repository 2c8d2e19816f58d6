"""Attention, forward and backward, compiled: PyTorch's kernel against `short_attention`, which is two plain products.

The lengths at which the products win are what `machinery.attention.SHORT` stands for.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F

from model_utils import short_attention
from tools.bench.common import take_turns


def compare_attention(machine) -> list[dict]:
    """A row per precision and length: milliseconds of a gradient of 1,024 tokens, 6 query, 2 key/value heads of 64."""

    def gradient(attention, heads) -> None:
        attention(*heads).sum().backward()

    def kernel(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    functions, rows = {"kernel (ms)": kernel, "products (ms)": short_attention}, []
    for dtype, T in itertools.product(dict.fromkeys((torch.float32, machine.dtype)), (64, 128, 256, 512)):
        heads = [torch.randn(1024 // T, H, T, 64, dtype=dtype, requires_grad=True) for H in (6, 2, 2)]
        calls = {name: partial(gradient, torch.compile(f, dynamic=False), heads) for name, f in functions.items()}
        row = {name: 1e3 * seconds for name, seconds in take_turns(calls, machine, rounds=10).items()}
        ratio = row["kernel (ms)"] / row["products (ms)"]
        rows.append({"precision": str(dtype)[6:], "tokens": T, **row, "products are faster by": ratio})
    return rows
