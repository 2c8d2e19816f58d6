"""Where a run computes: the device, its precision, its memory and its speed."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
from torch.distributed import ReduceOp

from machinery import processes
from machinery.errors import UserError, first_line

# Dense 16-bit matrix rate with 32-bit accumulation, in TFLOP/s, from the vendor's data sheets and white papers (without
# sparsity). For a GeForce it is tensor cores x boost clock x 128, for an RTX PRO twice that; a card may run above that
# clock. The first that fits the device's whole name counts.
DATASHEET_TFLOPS = {
    "B300": 2250, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 149.7, "A10": 125, "RTX A6000": 154.8,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8, "RTX 6000 Ada Generation": 364.2, "RTX 5090": 209.5,
    "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7, "RTX 5060 Ti": 47.4, "RTX 5060": 38.4, "RTX 4090": 165.2,
    "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 Ti SUPER": 88.2, "RTX 4070 Ti": 80.2, "RTX 4070 SUPER": 71,
    "RTX 4070": 58.3, "RTX 4060 Ti": 44.1, "RTX 4060": 30.2, "RTX 3090 Ti": 80.0, "RTX 3090": 71.2, "RTX 3080 Ti": 68.2,
    "RTX 3080": 59.5, "RTX 3070 Ti": 43.5, "RTX 3070": 40.6, "RTX 3060 Ti": 32.4, "RTX 3060": 25.5, "V100-SXM2": 125,
    "V100-PCIE": 112, "T4": 65,
}  # fmt: skip
# What else may stand in a name: memory and socket. Other words make it another chip (D, Ti, Laptop), or part of one
SAME_CHIP = r"(?:NVIDIA |Tesla )?(?:GeForce )?{}(?:[ -](?:\d+GB?|HBM\d\w?|SXM\d?|PCIe|PCIE|AC))*"


@dataclass(frozen=True)
class Machine:
    """Where a run computes and in which precision, and this process among those that train it together."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer state stay in float32
    name: str
    memory: int  # bytes
    peak_flops: float | None  # datasheet, dense, in this dtype; None where it is not known
    rank: int = 0  # of this process; process 0 speaks and writes
    processes: int = 1  # that train together; torchrun starts them, one for each GPU

    @classmethod
    def find(cls, device: str = "auto", dtype: str = "auto") -> Machine:
        """Choose by capability: CUDA before CPU; bfloat16 where the device multiplies it, float16 on older GPUs.

        GPUs multiply bfloat16 from compute capability 8.0, CPUs with the instructions AVX512-BF16; other
        CPUs get float32. A process that torchrun started takes the CUDA device of its own number and joins the others.
        Raises `UserError` for a device or precision that is not there.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if device == "cpu":
                _say_unused_gpu()
        kind = device.split(":")[0]
        counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
        named = re.fullmatch(r"\w+:(\d+)", device)
        count = counts.get(kind, 0) if named or ":" not in device else 0
        index = int(named[1]) if named else int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else 0
        if index >= count:
            there = ["cpu"] + ["mps"] * counts["mps"] + [f"cuda:{i}" for i in range(counts["cuda"])]
            if count and not named:
                raise UserError(
                    f"process {index} has no GPU to itself: there are {count}; use --nproc-per-node={count}"
                )
            raise UserError(f"device is {device!r} but this machine has {', '.join(there)}; use device='auto'")
        if kind == "cuda":
            place = torch.device(kind, index)
            torch.cuda.set_device(place)  # the choice of attention, for one, asks the current card
            properties, capability = torch.cuda.get_device_properties(place), torch.cuda.get_device_capability(place)
            name, memory = properties.name, properties.total_memory
            built = [int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
            if built and 10 * capability[0] + capability[1] < (least := min(built)):
                raise UserError(
                    f"{name} has compute capability {'.'.join(map(str, capability))}, and PyTorch {torch.__version__}"
                    f" is built for {least / 10} on; install one that is built for it, or set device='cpu'"
                )
            best = "bfloat16" if capability >= (8, 0) else "float16"
            if dtype == "bfloat16" and best != dtype:
                raise UserError(f"dtype is 'bfloat16' but {name} has none (capability under 8.0)")
            # TF32: 8 times the float32 rate, 10 bits of mantissa; of a GPU alone, where "high" also rounds a CPU's
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            place, name, memory = torch.device(kind), cpu_name(), _memory_of_cpu()[0]
            capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch do not tell
            best = "bfloat16" if kind == "cpu" and capabilities.get("avx512_bf16") else "float32"
            _keep_freed_memory()
        dtype = best if dtype == "auto" else dtype
        peak = datasheet_flops(name) if kind == "cuda" and dtype != "float32" else None
        return cls(place, getattr(torch, dtype), name, memory, peak, *processes.join(place))

    def autocast(self, decoding: bool = False) -> torch.autocast:
        """Matrix products in `dtype`, sums and norms in float32.

        Decoding on a CPU stays in float32: products with the small matrices of `demo` take longer in 16 bits there.
        """
        rounded = self.dtype != torch.float32 and not (decoding and self.device.type == "cpu")
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=rounded)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients from vanishing in float16; does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock read next is honest."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def used_memory(self) -> int:
        """Bytes held now: by tensors on a GPU, by the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def free_memory(self) -> int:
        """Bytes that could be taken now; of a GPU, also what PyTorch has set aside and no tensor holds."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + unused
        return min(self.memory, _memory_of_cpu()[1])

    def release_memory(self) -> None:
        """Give freed memory back to the device or the system, once a request has failed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)

    def forget_peak(self) -> None:
        """Have `peak_memory` begin anew, where the system lets it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM

    def peak_memory(self) -> int:
        """Bytes: the most held by tensors on a GPU, by the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "win32":
            return psutil.Process().memory_info().peak_wset
        status = Path("/proc/self/status")  # of Linux; ru_maxrss begins with what the process had that started this one
        if status.exists() and (found := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
            return int(found[1]) * 1024
        import resource  # only where there is Unix

        unit = 1 if sys.platform == "darwin" else 1024  # some sandboxes of Linux have no VmHWM
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # Over all processes of a run; where there is one, they give back what they are given.

    def parallelize(self, model: torch.nn.Module, parallel: str) -> torch.nn.Module:
        """The model on this device; with several processes, as DDP or FSDP2 has them train it ("ddp", "fsdp")."""
        return processes.parallelize(model, self.device, self.dtype, self.processes, parallel)

    def maximum(self, *values: float) -> list[float]:
        """The largest of each value."""
        return list(values) if self.processes == 1 else processes.reduce(values, ReduceOp.MAX)

    def total(self, *values: float) -> list[float]:
        """The sum of each value, in float64."""
        return list(values) if self.processes == 1 else processes.reduce(values, ReduceOp.SUM)

    def mean(self, value: float) -> float:
        """The mean of a value."""
        return self.total(value / self.processes)[0]

    def agree(self, values: dict[str, object]) -> None:
        """Raise the same `UserError` in all of them unless they have the same `values`."""
        first, *others = processes.gather_objects(values) if self.processes > 1 else [values]
        for rank, other in enumerate(others, 1):
            for what in first:
                if first[what] != other[what]:
                    found = f"process 0 has {first[what]!r}, process {rank} {other[what]!r}"
                    raise UserError(f"processes do not agree on {what}: {found}")

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.total(0)


def datasheet_flops(name: str) -> float | None:
    """Dense 16-bit FLOP/s of the GPU of this name by its data sheet; None where that is not known."""
    fits = (1e12 * tflops for part, tflops in DATASHEET_TFLOPS.items() if re.fullmatch(SAME_CHIP.format(part), name))
    return next(fits, None)


@cache
def _say_unused_gpu() -> None:
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        print(
            f"there is an NVIDIA driver, but PyTorch {torch.__version__} finds no GPU: the CPU is used; see"
            " https://pytorch.org/get-started for the build that fits the driver"
        )


def usable_cores() -> int:
    """How many cores this process may use: under a scheduler of jobs, or `taskset`, fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def _memory_of_cpu() -> tuple[int, int]:
    """Bytes of this computer, or of the container that this process runs in: in all, and what could be taken now."""
    memory, container = psutil.virtual_memory(), Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # there are no such files, or one says "max"
        limit, used = (int((container / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())["inactive_file"]
        return min(memory.total, limit), min(memory.available, max(0, limit - used + int(cached)))
    return memory.total, memory.available


def _keep_freed_memory() -> None:
    """Have glibc reuse large buffers between steps instead of returning them to the system, page by page."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no library of no name
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


@cache
def measure_matmul_flops(machine: Machine) -> float:
    """FLOP/s of a large square matrix product in the run's precision: the rate to hold a training step against.

    Larger and larger products, until one takes some time: a GPU's clocks have risen by then, and a processor
    without 16-bit products, which takes a second for a small one, is not kept waiting by a large one.
    """
    largest, enough = (8192, math.inf) if machine.device.type == "cuda" else (1024, 0.05)
    for size in (256, 512, 1024, 2048, 4096, 8192):
        a, b = torch.randn(2, size, size, device=machine.device, dtype=machine.dtype)
        seconds = time_per_call(lambda a=a, b=b: a @ b, machine, 1)
        if size == largest or seconds > enough:
            break
    return 2 * size**3 / time_per_call(lambda: a @ b, machine, 30 if largest == 8192 else 10)


def time_per_call(call: Callable, machine: Machine, calls: int = 5, least: float = 0.0) -> float:
    """Median seconds of a call, after one that is not timed; more calls where they are done before `least` seconds,
    so that what else the machine did for a moment does not count.
    """
    seconds, begun = [], time.perf_counter()
    while len(seconds) <= calls or least and machine.maximum(time.perf_counter() - begun)[0] < least:  # all agree
        machine.synchronize()
        start = time.perf_counter()
        call()
        machine.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def time_between(call: Callable, others: Iterable[Callable], machine: Machine, least: float) -> list[float]:
    """Seconds of a call, the median of spells before, between and after the others, and of each of these. A spell is of
    `least` seconds; a slow moment of the machine does not pass for its speed.
    """
    spells, found = [time_per_call(call, machine, 1, least)], []
    for other in others:
        found.append(time_per_call(other, machine, 1, least))
        spells.append(time_per_call(call, machine, 1, least))
    return [statistics.median(spells), *found]


@contextlib.contextmanager
def left_as_it_was(model: torch.nn.Module, *parts) -> Iterator[None]:
    """Give the model's buffers, such as running means, and the states of `parts` their values back at the end."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states = processes.gather([part.state_dict() for part in parts], whole=False)  # on the CPU: the device may be full
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for part, state in zip(parts, states):
            part.load_state_dict(state)


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within it no layer drops values out; after it, the model trains on as before, each part in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def compile_or_eager(
    model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor, machine: Machine
) -> tuple[Callable, str]:
    """The compiled model once it has run on tokens, targets (B, T), else the model itself; and a note that says which.

    Compilation happens at the first call, so failures (no C++ compiler, no Triton on Windows, an old card) show
    here and not in the loop. Leaves weights and buffers as they were, and no gradients.
    """
    start = time.perf_counter()
    torch.compiler.reset()  # of former runs: what has been compiled too often is left eager
    try:
        compiled = torch.compile(model, dynamic=False)
        with left_as_it_was(model), machine.autocast():
            with evaluation_mode(compiled), torch.no_grad():  # first: after it, FSDP has gathered other parameters
                compiled(tokens, targets)
            compiled(tokens, targets).backward()
        model.zero_grad(set_to_none=True)
        return compiled, f"compiled in {time.perf_counter() - start:.0f} s"
    except Exception as error:
        model.zero_grad(set_to_none=True)
        if is_out_of_memory(error):  # the loop will try again with a smaller micro-batch
            return compiled, "compiled at the first step"
        torch.compiler.reset()
        return model, f"eager, since torch.compile failed ({type(error).__name__}: {first_line(error)})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the system behind a CPU, had no memory left for a tensor or for a kernel's own buffers."""
    on_gpu = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")  # also within the compiler's errors; cuBLAS, cuDNN
    on_cpu = ("can't allocate memory", "could not create a primitive", "bad_alloc")  # torch, oneDNN, C++
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in on_gpu + on_cpu)
