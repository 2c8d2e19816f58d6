"""What one block of `day` reads and writes beside its matrix products and attention, counted without a GPU.

    python -m tools.bench.traffic                 the block, and edits of it: results/traffic.md

PyTorch's compiler plans the kernels of a stack of blocks for a CUDA card that is not there, forward and backward.
Nothing is compiled or computed: each planned kernel tells the sizes of the buffers that it reads and writes. It takes
minutes, on any machine, and asks parts of PyTorch that may change from one release to the next.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, scheduler
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from tools.common import RESULTS, lm, table

RESULT = RESULTS / "traffic.md"
DEVICE = torch.device("cuda:0")
MICRO_BATCH = 64  # sequences, what `day` takes on a card of 80 GB; with fewer, casts of weights weigh more


class Card(device_interface.CudaInterface):
    """What the compiler asks of a card: an RTX 4090's answers."""

    @staticmethod
    def get_device_properties(device=None) -> SimpleNamespace:
        return SimpleNamespace(
            name="NVIDIA GeForce RTX 4090", major=8, minor=9, multi_processor_count=128, warp_size=32,
            max_threads_per_multi_processor=1536, max_threads_per_block=1024, regs_per_multiprocessor=65536,
        )  # fmt: skip

    get_compute_capability = staticmethod(lambda device=None: 89)
    is_bf16_supported = staticmethod(lambda *_, **__: True)
    current_device = staticmethod(lambda: 0)

    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda device=None: Card.get_device_properties())
        current_device = staticmethod(lambda: 0)


# --------------------------------------------------------------------------------------------------- edits


class AfterTranspose(lm.GroupedQueryAttention):
    """Norm and rotation of queries and keys on (B, H, T, D), where attention wants them."""

    def forward(self, x: Tensor, position, *_) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.D).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (turn(norm(z), position.cos[:T], position.sin[:T]) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).reshape(B, T, self.H * self.D))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `RotaryPosition.rotate` does, for angles that fit x as they are."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class TurnedByHalves(lm.RotaryPosition):
    """The rotation of each half written by itself."""

    def rotate(self, x: Tensor, start: int) -> Tensor:
        half = x.size(-1) // 2
        cos, sin = (angle[start : start + x.size(1), None, :half] for angle in (self.cos, self.sin))
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class OneProduct(lm.GroupedQueryAttention):
    """Queries, keys and values from one product; the weights are put together as they are cast."""

    def forward(self, x: Tensor, position, *_) -> Tensor:
        B, T, _ = x.shape
        weight = torch.cat([p.weight for p in (self.q_proj, self.k_proj, self.v_proj)])
        q, k, v = F.linear(x, weight).view(B, T, -1, self.D).split((self.H, self.K, self.K), dim=2)
        q, k = position.rotate(self.q_norm(q), 0), position.rotate(self.k_norm(k), 0)
        y = self.attend(*(z.transpose(1, 2) for z in (q, k, v)))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class OneProductFFN(lm.GatedFFN):
    """Gate and up from one product."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Wide(lm.RMSNorm):
    """The gain multiplied in float32, before the result is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


SIBLINGS = {
    "ATTENTIONS": {"after": AfterTranspose, "one": OneProduct}, "POSITIONS": {"halves": TurnedByHalves},
    "FFNS": {"one": OneProductFFN}, "NORMS": {"wide": Wide},
}  # fmt: skip
NARROW = {"stream": torch.bfloat16}
NOW = "stream in bfloat16"
EDITS = {  # overrides of `day`; "stream", the type of the residual stream; "weights", of the matrices; compiler options
    NOW: NARROW,
    "stream in bfloat16, norm and rotation after the transpose": NARROW | {"attention": "after"},
    "stream in float32": {},
    "stream in float32, norm and rotation after the transpose": {"attention": "after"},
    "stream in bfloat16, rotation by halves": NARROW | {"position": "halves"},
    "stream in bfloat16, norms multiply by their gain in float32": NARROW | {"norm": "wide"},
    "stream in bfloat16, no QK-norm": NARROW | {"qk_norm": False},
    "stream in bfloat16, one product for q, k, v": NARROW | {"attention": "one"},
    "stream in bfloat16, one product for gate and up": NARROW | {"ffn": "one"},
    "stream in bfloat16, matrices in bfloat16": NARROW | {"weights": torch.bfloat16},
    "stream in bfloat16, loop_ordering_after_fusion off": NARROW | {"options": {"loop_ordering_after_fusion": False}},
    "stream in bfloat16, aggressive_fusion": NARROW | {"options": {"aggressive_fusion": True}},
}
COLUMNS = {
    "block": "", "forward": ".1f", "backward": ".1f", "both": ".1f", "kernels": "d", "against the first": "+.0%",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ counting


class Stack(nn.Module):
    """Blocks alone: x (B, T, C) in, x out."""

    def __init__(self, config) -> None:
        super().__init__()
        self.position = lm.POSITIONS[config.position](config)
        self.blocks = nn.ModuleList(lm.Block(config, layer) for layer in range(config.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.position)
        return x


class Planned(BaseException):
    """All kernels are planned, and none needs to be made."""


def planned_kernels(model: nn.Module, x: Tensor, options: dict) -> list[tuple[bool, int]]:
    """Whether it is of backward, and the bytes that it reads and writes, of each kernel that the compiler would make
    for `model` on `x`. Matrix products and attention are kernels of libraries and not among them.
    """
    found = []

    def note(graph: GraphLowering) -> None:
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if not isinstance(node, scheduler.ExternKernelSchedulerNode | scheduler.NopKernelSchedulerNode):
                found.append((graph.is_backward, node.get_read_write_buffers_sizes()))
        raise Planned

    def plan(graph_module, inputs, **keywords) -> Callable:
        mode = detect_fake_mode(inputs) or torch._guards.TracingContext.get().fake_mode

        def moved(value):
            """A tensor without memory, as it would be on the card."""
            if not isinstance(value, Tensor):
                return value
            empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return FakeTensor(mode, empty, DEVICE)

        for node in graph_module.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | {"device": DEVICE}
            if "val" in node.meta:
                node.meta["val"] = tree_map(moved, node.meta["val"])
        with (
            patch.dict(device_interface.device_interfaces, {"cuda": Card}),
            patch.object(scheduler, "has_triton", lambda: True),
            patch.object(GraphLowering, "compile_to_module", note),
            inductor_config.patch(force_disable_caches=True, **options),
        ):
            try:
                compile_fx.compile_fx_inner(graph_module, [moved(value) for value in inputs], **keywords)
            except Planned:
                return stop

    def stop(*_):
        raise Planned

    torch.compiler.reset()
    fused = {"fused_attention": flash_attention}
    with (
        patch.dict(lm.MultiHeadAttention.attend.__globals__, fused),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        try:
            torch.compile(model, dynamic=False, backend=partial(compile_fx.compile_fx, inner_compile=plan))(x)
        except Planned:
            return found


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask=None, is_causal: bool = True) -> Tensor:
    """The operation that `fused_attention` comes to on a GPU: of the machine's own there would be another one."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def count(stream=torch.float32, weights=torch.float32, options=None, **overrides) -> dict[str, float]:
    """KiB per token and kernels of one block of `day`, forward and backward: what two blocks have more than one."""
    kernels = {}
    for n_layer in (1, 2):
        config = lm.Config.from_preset("day", n_layer=n_layer, device="cpu", **overrides)
        model = Stack(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.to(weights)
        x = torch.empty(MICRO_BATCH, config.block_size, config.n_embd, dtype=stream, requires_grad=True)
        kernels[n_layer] = planned_kernels(model, x, options or {})
    row = {}
    for name, backward in (("forward", False), ("backward", True)):
        one, two = ([size for later, size in kernels[n] if later == backward] for n in (1, 2))
        tokens = MICRO_BATCH * config.block_size
        row |= {name: (sum(two) - sum(one)) / tokens / 1024, f"{name} kernels": len(two) - len(one)}
    return row | {"both": row["forward"] + row["backward"], "kernels": row["forward kernels"] + row["backward kernels"]}


def write_traffic(rows: list[dict]) -> None:
    """results/traffic.md"""
    found = {row["block"]: row["both"] for row in rows}
    rows = [row | {"against the first": row["both"] / found[NOW] - 1} for row in rows]
    casts = found["stream in bfloat16"] - found["stream in bfloat16, matrices in bfloat16"]
    version = torch.__version__.split("+")[0]
    RESULT.write_text(f"""# What a block reads and writes

`make traffic`, {datetime.date.today()}: KiB per token and layer that the compiler's own kernels of one block of `day`
read and write, beside matrix products and attention, in bfloat16, {MICRO_BATCH} sequences at a time. Planned by PyTorch
{version} for a CUDA card; none was there, and nothing was computed ([how](../tools/bench/traffic.py)). The time of such
kernels on a GPU is about these bytes over the bandwidth of its memory. An edit that saves 10% is worth a line of code,
one that saves 2% is not.

{table(rows, COLUMNS)}

Casts of the block's matrices to bfloat16, and of their gradients back, are {casts:.1f} KiB of every row but that of
*matrices in bfloat16*. They are made once a micro-batch: with 16 sequences they weigh four times as much per token.
""")


def main() -> None:
    for name, siblings in SIBLINGS.items():
        getattr(lm, name).update(siblings)
    rows = []
    for name, edit in EDITS.items():
        rows.append({"block": name, **count(**edit)})
        print(rows[-1], flush=True)
    write_traffic(rows)
    print(RESULT)


if __name__ == "__main__":
    main()
