"""More than one process: what `torchrun` starts, joined into one run by PyTorch's own DDP or FSDP2.

Every process executes the same program on its own share of each batch. Process 0 speaks and writes; what all of them
decide together (a stop, the clock) is reduced over all. Launching, rendezvous and restarts are torchrun's.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from machinery.errors import UserError, first_line, plain_errors


def join(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes) of this process among those that torchrun started; (0, 1) without torchrun.

    All but process 0 are silent from here on; errors show from all.
    """
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():  # once in the life of a process: the addresses of a group are not exchanged again
        plain_errors()  # torch's own way to print errors, from here on, puts the rank before each line of this one
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    return dist.get_rank(), dist.get_world_size()


def reduce(values: tuple[float, ...], operation: dist.ReduceOp) -> list[float]:
    """Each value reduced over all processes, in float64, on the CPU: no GPU is waited for."""
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers, operation)
    return numbers.tolist()


def gather_objects(value: object) -> list:
    """The value of each process, in the order of their ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def lost_process(error: BaseException | None) -> UserError | None:
    """What to say of an error that comes of another process being gone; None for any other error."""
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "Socket", "NCCL", "Timed out")
    if not (isinstance(error, RuntimeError) and dist.is_initialized()):
        return None
    if not (isinstance(error, dist.DistError) or any(word in str(error) for word in words)):
        return None
    return UserError(
        f"process {dist.get_rank()} of {dist.get_world_size()}: another process of this run is gone; start the same"
        f" command again, it goes on from the last checkpoint ({first_line(error)})"
    )


def parallelize(model: nn.Module, device: torch.device, dtype: torch.dtype, processes: int, parallel: str) -> nn.Module:
    """What to call in place of `model` so that all processes train it together.

    "ddp" keeps a copy in each process and averages gradients (Li et al. 2020, arXiv 2006.15704); "fsdp" keeps a
    share of every matrix in each and gathers a block's when it is needed (Zhao et al. 2023, arXiv 2304.11277):
    then `model` itself is changed, and an optimizer has to be built after.
    """
    if processes == 1:
        return model.to(device)
    if parallel == "ddp":
        model.to(device)
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
            return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    if dtype == torch.float16:
        raise UserError("parallel is 'fsdp' but this device computes in float16; use parallel='ddp' or dtype='float32'")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # half a second, for these alone

    mesh, policy = init_device_mesh(device.type, (processes,)), MixedPrecisionPolicy()
    if dtype == torch.bfloat16:  # half the bytes on the wire; gradients are added in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy).to(device)


def gather(value, keep: bool = True, whole: bool = True):
    """A copy of a tensor on the CPU, with all its parts where it is sharded and wanted `whole`; others as they are.

    Takes dicts and lists of them too. Every process has to call it, also one that will not `keep` what is gathered.
    """
    if isinstance(value, Tensor):
        value = value.full_tensor() if whole and hasattr(value, "full_tensor") else value
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) if keep else None
    if isinstance(value, dict):
        return {key: gather(part, keep, whole) for key, part in value.items()}
    return [gather(part, keep, whole) for part in value] if isinstance(value, list) else value


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of `tensor`, where `like` is sharded; else `tensor` itself."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
