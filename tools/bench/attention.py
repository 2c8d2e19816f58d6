"""Attention, forward and backward, compiled: PyTorch's kernel against `short_attention`, which is two plain products.

The lengths at which the products win are what `machinery.attention.SHORT` stands for.
"""

from __future__ import annotations

import itertools

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

    rows = []
    for dtype, T in itertools.product(dict.fromkeys((torch.float32, machine.dtype)), (64, 128, 256, 512)):
        heads = [torch.randn(1024 // T, H, T, 64, dtype=dtype, requires_grad=True) for H in (6, 2, 2)]
        calls = {name: torch.compile(f, dynamic=False) for name, f in (("k", kernel), ("p", short_attention))}
        calls = {name: lambda f=f, heads=heads: gradient(f, heads) for name, f in calls.items()}
        seconds = take_turns(calls, machine, rounds=10)
        kernel_ms, products_ms = seconds["k"] * 1e3, seconds["p"] * 1e3
        ratio = kernel_ms / products_ms
        row = {"precision": str(dtype)[6:], "tokens": T, "kernel (ms)": kernel_ms, "products (ms)": products_ms}
        rows.append(row | {"products are faster by": ratio})
    return rows
