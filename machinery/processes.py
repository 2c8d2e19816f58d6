"""More than one process: what `torchrun` starts, joined into one run by PyTorch's own DDP or FSDP2.

Every process executes the same program on its own share of each batch. Process 0 speaks and writes; what
all of them decide together (a stop, the clock) goes through `Group`, whose methods do nothing when a run is
alone. Launching, rendezvous and restarts are torchrun's.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from machinery.errors import UserError
from machinery.machine import Machine

if dist.is_torchelastic_launched() and os.environ["RANK"] != "0":
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - one process speaks; errors show from all


@dataclass(frozen=True)
class Group:
    """The processes of a run: this is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def maximum(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.total(0)

    def _reduce(self, values: tuple[float, ...], operation: dist.ReduceOp) -> list[float]:
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)  # on the CPU, so that no GPU is waited for
        dist.all_reduce(numbers, operation)
        return numbers.tolist()


ALONE = Group()


@contextlib.contextmanager
def join_group(machine: Machine) -> Iterator[Group]:
    """The processes that torchrun started, or `ALONE`; left together at the end.

    Raises `UserError` when one of them is lost: torchrun then ends the others, and the checkpoints stay.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    if not dist.is_initialized():  # once in the life of a process: the addresses of a group are not exchanged again
        if machine.device.type == "cuda":
            torch.cuda.set_device(machine.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    group = Group(dist.get_rank(), dist.get_world_size())
    try:
        yield group
        group.barrier()  # process 0 has written everything
    except RuntimeError as error:
        if not _is_lost_process(error):
            raise
        raise UserError(
            f"process {group.rank} of {group.size}: another process of this run is gone; start the same command again,"
            f" it goes on from the last checkpoint ({str(error).strip().splitlines()[0][:160]})"
        ) from None


def _is_lost_process(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "Socket", "NCCL", "Timed out")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def spread(model: nn.Module, machine: Machine, group: Group, parallel: str) -> nn.Module:
    """What to call in place of `model` so that all processes train it together.

    "ddp" keeps a copy in each process and averages gradients (Li et al. 2020, arXiv 2006.15704); "fsdp" keeps a
    share of every matrix in each and gathers a block's when it is needed (Zhao et al. 2023, arXiv 2304.11277):
    then `model` itself is changed, and an optimizer has to be built after.
    """
    if group.size == 1:
        return model.to(machine.device)
    if parallel == "ddp":
        model.to(machine.device)
        devices = [machine.device] if machine.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
            return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    if machine.dtype == torch.float16:
        raise UserError("parallel is 'fsdp' but this device computes in float16; use parallel='ddp' or dtype='float32'")
    mesh = init_device_mesh(machine.device.type, (group.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh).to(machine.device)


def exchange_gradients(runner: nn.Module, on: bool) -> None:
    """Whether the next backward pass of DDP exchanges gradients; only the last of an accumulation needs to.

    FSDP always does: until it has, each process would hold the gradients of all, and the memory is what it is for.
    """
    runner = getattr(runner, "_orig_mod", runner)  # of a compiled one
    if isinstance(runner, DistributedDataParallel):
        runner.require_backward_grad_sync = on


def micro_batch_of(group: Group, micro_batch: int, sequences: int) -> int:
    """The micro-batch that all processes use: the smallest any chose, cut to share `sequences` evenly.

    Raises `UserError` when there are more processes than sequences, or they cannot share them.
    """
    share, left = divmod(sequences, group.size)
    if left or not share:
        raise UserError(
            f"a batch of {sequences} sequences cannot be shared by {group.size} processes; set batch_tokens to a"
            f" multiple of {group.size} × block_size"
        )
    return math.gcd(share, round(-group.maximum(-micro_batch)[0]))


def whole(value, keep: bool = True):
    """A tensor with all its parts gathered, on the CPU where it was shared out; other values as they are.

    Takes dicts and lists of them too. Every process has to call it, also one that will not `keep` what is gathered.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(part, keep) for key, part in value.items()}
    return [whole(part, keep) for part in value] if isinstance(value, list) else value


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of `tensor`, where `like` is shared out; else `tensor` itself."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
