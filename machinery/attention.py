"""Attention by the fastest way there is on a device."""

from __future__ import annotations

import contextlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Most tokens at which plain products beat PyTorch's attention kernel on a CPU
SHORT = 256


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in two plain products: q (B, H, T, D) and k, v (B, K, T, D) give (B, H, T, D).

    Query heads that share keys stand below one another as rows, so that no key is copied. Compiled for a CPU, it
    takes three fifths of the kernel's time at T = 256 in bfloat16 (`python -m tools.bench.bench --parts attention`). It
    keeps (T, T) weights for backward. In bfloat16 scores and weights are rounded, which the kernel does not do.
    """
    B, H, T, D = q.shape
    K = k.size(1)
    later = q.new_full((T, T), -math.inf).triu(diagonal=1)
    scores = q.reshape(B * K, H // K * T, D) @ k.reshape(B * K, T, D).mT
    scores = scores.view(B, K, H // K, T, T) * D**-0.5 + later
    weights = scores.softmax(dim=-1).view(B * K, H // K * T, T)
    return (weights @ v.reshape(B * K, T, D)).view(B, H, T, D)


# In decoding and scoring lengths change from call to call, and cuDNN would make a plan for each
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WITHOUT_CUDNN, ANY = partial(sdpa_kernel, BACKENDS), contextlib.nullcontext


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """`scaled_dot_product_attention` by the fastest way on this device: q (B, H, T, D), k and v (B, K, S, D), where
    H / K query heads share each key/value head; returns (B, H, T, D).
    """
    if is_causal and torch.compiler.is_compiling() and q.device.type == "cpu" and q.size(2) <= SHORT:
        return short_attention(q, k, v)
    if mask is not None and mask.dim() == 3:
        mask = mask[None]  # (1, H, T, S): not all kernels take it without
    if k.size(1) < q.size(1) and not takes_groups(q, mask):  # a kernel that wants a copy for each query head
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # (B, H, S, D)
    kernels = WITHOUT_CUDNN if q.is_cuda and not (torch.is_grad_enabled() or torch.compiler.is_compiling()) else ANY
    with kernels():
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=k.size(1) < q.size(1))


def takes_groups(q: Tensor, mask: Tensor | None = None) -> bool:
    """Whether PyTorch's attention kernel for q (B, H, T, D) lets query heads share keys; others want a copy for each.

    FlashAttention does, in 16 bits and without a mask, from compute capability 8.0 up, and so does the kernel for CPUs.
    Where it is not to be had, asking for groups would fall back to products that keep (T, T) weights.
    """
    if q.device.type == "cuda":
        return mask is None and q.dtype != torch.float32 and _has_flash(q.device.index)
    return q.device.type == "cpu"


@torch.compiler.assume_constant_result
def _has_flash(index: int) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(index) >= (8, 0)


def kernel_name(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The kernel that PyTorch takes for causal attention on these: "FLASH_ATTENTION", "CUDNN_ATTENTION", …"""
    chosen = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=k.size(1) < q.size(1))
    return SDPBackend(chosen).name
