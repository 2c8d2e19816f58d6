"""Where a run computes: the device, its precision, its memory and its speed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from machinery.errors import UserError, first_line

# Dense 16-bit matrix rate with 32-bit accumulation, in TFLOP/s, from the vendors' data sheets (without
# sparsity). The first that stands as words in the device's name counts, so longer names come first.
DATASHEET_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A40": 149.7, "A10": 125, "RTX A6000": 154.8,
    "RTX 6000 Ada": 364, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71.2,
    "V100": 125, "T4": 65,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where a run computes and in which precision."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer state stay in float32
    name: str
    memory: int  # bytes
    peak_flops: float | None  # datasheet, dense, in this dtype; None where it is not known

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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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
        return min(self.memory, psutil.virtual_memory().available)

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
        if sys.platform == "linux":  # ru_maxrss would begin with what the process had that started this one
            (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        import resource  # only where there is Unix

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def find_machine(device: str = "auto", dtype: str = "auto") -> Machine:
    """Choose by capability: CUDA before CPU; bfloat16 where the device multiplies it, float16 on older GPUs.

    GPUs multiply bfloat16 from compute capability 8.0, CPUs with the instructions AVX512-BF16; others get float32.
    A process that torchrun started takes the CUDA device of its own number. Raises `UserError` for a device or
    precision that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            _say_unused_gpu()
    kind = device.split(":")[0]
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}.get(kind, 0)
    named = re.fullmatch(r"\w+:(\d+)", device)
    index = int(named[1]) if named else int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else 0
    if index >= count:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if count and not named:
            raise UserError(f"process {index} has no GPU to itself: there are {count}; use --nproc-per-node={count}")
        raise UserError(f"device is {device!r} but this machine has {', '.join(there)}; use device='auto'")
    place = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        has_bf16 = torch.cuda.get_device_capability(place) >= (8, 0)
    else:  # older versions of PyTorch do not tell
        has_bf16 = kind == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    if dtype == "auto":
        dtype = "bfloat16" if has_bf16 else "float16" if kind == "cuda" else "float32"
    if kind == "cuda" and dtype == "bfloat16" and not has_bf16:
        raise UserError(f"dtype is 'bfloat16' but {torch.cuda.get_device_name(place)} has none (capability under 8.0)")
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(place)
        name, memory = properties.name, properties.total_memory
        torch.set_float32_matmul_precision("high")  # TF32: 8 times the float32 rate, 10 bits of mantissa
    else:
        name, memory = cpu_name(), psutil.virtual_memory().total
        _keep_freed_memory()
    peak = datasheet_flops(name) if kind == "cuda" and dtype != "float32" else None
    return Machine(place, getattr(torch, dtype), name, memory, peak)


def datasheet_flops(name: str) -> float | None:
    """Dense 16-bit FLOP/s of the GPU of this name by its data sheet; None where that is not known."""
    known = (tflops * 1e12 for part, tflops in DATASHEET_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return None if "Laptop" in name else next(known, None)


@cache
def _say_unused_gpu() -> None:
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        print(
            f"there is an NVIDIA driver, but PyTorch {torch.__version__} finds no GPU: the CPU is used; see"
            " https://pytorch.org/get-started for the build that fits the driver"
        )


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _keep_freed_memory() -> None:
    """Have glibc reuse large buffers between steps instead of returning them to the system, page by page."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no library of no name
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def measure_matmul_flops(machine: Machine) -> float:
    """FLOP/s of a large square matrix product in the run's precision: the rate to hold a training step against."""
    size, calls = (8192, 10) if machine.device.type == "cuda" else (1024, 10)
    a, b = torch.randn(2, size, size, device=machine.device, dtype=machine.dtype)
    return 2 * size**3 / time_per_call(lambda: a @ b, machine, calls)


def time_per_call(call: Callable, machine: Machine, calls: int = 5) -> float:
    """Median seconds of a call, after one that is not timed."""
    seconds = []
    for _ in range(1 + calls):
        machine.synchronize()
        start = time.perf_counter()
        call()
        machine.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def compile_or_eager(
    model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor, machine: Machine
) -> tuple[Callable, str]:
    """The compiled model once it has run on tokens, targets (B, T), else the model itself; and a note that says which.

    Compilation happens at the first call, so failures (no C++ compiler, no Triton on Windows, an old card) show
    here and not in the loop. Leaves weights as they were, and no gradients.
    """
    start = time.perf_counter()
    torch.compiler.reset()  # of former runs: what has been compiled too often is left eager
    try:
        compiled = torch.compile(model, dynamic=False)
        with machine.autocast():
            compiled(tokens, targets).backward()
            with torch.no_grad():
                compiled(tokens, targets)
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
    on_gpu = ("out of memory", "ALLOC_FAILED")  # also within an error of the compiler; cuBLAS, cuDNN
    on_cpu = ("can't allocate memory", "could not create a primitive", "bad_alloc")  # torch, oneDNN, C++
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in on_gpu + on_cpu)
