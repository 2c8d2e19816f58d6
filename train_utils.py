"""Around the training loop: schedules, budget, hardware, compilation, progress, and a safe stop.

Everything here is plumbing that a run leans on and a reader may take on trust. The loop itself, and all
that decides what is learned, stands in the notebook.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from notebook_utils import UserError

# ------------------------------------------------------------------------------------------- schedules
# Each is a pure function of progress, the fraction of the budget used (0 to 1), and gives the factor on
# the peak learning rate (0 to 1). `warmup` and `decay` are fractions of the budget too.


def wsd(progress: float, warmup: float, decay: float) -> float:
    """Warm up, stay, decay linearly to zero (Hu et al. 2024, MiniCPM; Hägele et al. 2024)."""
    return min(_warm(progress, warmup), (1 - progress) / decay if decay else 1.0, 1.0)


def cosine(progress: float, warmup: float, decay: float) -> float:
    """Warm up, then half a cosine down to zero (Loshchilov & Hutter 2017). `decay` is not used."""
    if progress < warmup:
        return _warm(progress, warmup)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))


def linear(progress: float, warmup: float, decay: float) -> float:
    """Warm up, then straight down to zero (Bergsma et al. 2025). `decay` is not used."""
    return wsd(progress, warmup, 1 - warmup)


def constant(progress: float, warmup: float, decay: float) -> float:
    """Warm up and stay: for runs without a known end. `decay` is not used."""
    return _warm(progress, warmup)


def _warm(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) if warmup else 1.0


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "wsd": wsd,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}


@dataclass(frozen=True)
class Budget:
    """What a run may spend; 0 means no limit of that kind. The first limit reached ends the run."""

    max_steps: int = 0
    max_tokens: int = 0
    max_hours: float = 0.0

    def progress(self, step: int, tokens: int, seconds: float) -> float:
        """Fraction of the budget used, 0 to 1: the largest over its limits."""
        used = [(step, self.max_steps), (tokens, self.max_tokens), (seconds, self.max_hours * 3600)]
        return min(1.0, max(amount / limit for amount, limit in used if limit))

    def tokens_needed(self, batch_tokens: int) -> int | None:
        """Upper bound on the tokens a run reads; None when only the clock limits it."""
        limits = [self.max_steps * batch_tokens, self.max_tokens and self.max_tokens + batch_tokens]
        return min((limit for limit in limits if limit), default=None)


# -------------------------------------------------------------------------------------------- hardware

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
        return model, f"eager, since torch.compile failed ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the system behind a CPU, had no memory left for a tensor or for a kernel's own buffers."""
    on_gpu = ("out of memory", "ALLOC_FAILED")  # also within an error of the compiler; cuBLAS, cuDNN
    on_cpu = ("can't allocate memory", "could not create a primitive", "bad_alloc")  # torch, oneDNN, C++
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in on_gpu + on_cpu)


class progress_bar:
    """One line that is drawn anew: share of the budget used, time left, and what `show` is given.

    Plain text, so that it looks the same in a terminal, a notebook and a saved page; at most 2,000 updates
    over a run limited by the clock, so that a day of them stays small.
    """

    def __init__(self, budget: Budget) -> None:
        self._bar = tqdm(
            total=1.0, file=sys.stdout, mininterval=max(0.5, budget.max_hours * 1.8),
            bar_format="{percentage:5.1f}% |{bar:20}| {remaining} left  {desc}",
        )  # fmt: skip

    def __enter__(self) -> progress_bar:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def show(self, progress: float, step: int, line: dict) -> None:
        """Move to `progress` (0 to 1), with what the last step measured after the bar."""
        if "train_loss" in line:
            mfu = f"{line['mfu']:.0%}" if line["mfu"] else "n/a"
            text = f"step {step:,}  loss {line['train_loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s  MFU {mfu}"
            self._bar.set_description_str(text, refresh=False)
        self._bar.update(progress - self._bar.n)

    def evaluated(self, step: int, tokens: int, seconds: float, val_bpb: float) -> None:
        """A line with what an evaluation found, that stays."""
        self.write(f"step {step:7,} {tokens:15,} tokens {seconds:8,.0f} s   {val_bpb:.4f} bits per byte held out")

    def write(self, text: str) -> None:
        """A line above the bar, that stays."""
        self._bar.write(text, file=sys.stdout)


class StopRequest:
    """Turns Ctrl-C, the notebook's stop button and SIGTERM into a request that the loop honours between steps.

    A second Ctrl-C interrupts at once, unless it comes within a second: torchrun passes on the one that the
    terminal has sent already.
    """

    def __init__(self) -> None:
        self.requested, self._when = False, 0.0

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._when > 1:
                raise KeyboardInterrupt
            return
        self.requested, self._when = True, time.monotonic()
        print("\nstopping after this step; a checkpoint is written first (interrupt again to stop at once)")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
