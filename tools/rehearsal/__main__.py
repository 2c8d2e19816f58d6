"""`day` on cards that are not there: PyTorch's CUDA build, compiler and allocator, with a stand-in for the driver.

python -m tools.rehearsal: a run of two steps for each line of JOBS, with preflight, evaluation, text and checkpoints,
in a process (or two) of its own. Kernels are compiled for the card but never executed (stand_in.c): what this shows is
that a run gets through, and the memory that it takes. It shows no speed and no loss. It writes results/rehearsal.md,
and needs Linux, gcc and the CUDA build of PyTorch, which `pip install torch` brings there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from data_utils import TokenData
from machinery.machine import Machine
from tools.common import RESULTS, ROOT, lm, table

RESULT = RESULTS / "rehearsal.md"
TOLERANCE = 0.1  # of the predicted memory, for compiled runs
CARDS = {  # capability, multiprocessors, bytes that PyTorch sees, shared memory of a block, threads of a multiprocessor
    "NVIDIA GeForce RTX 3060": (8, 6, 28, 12_490_000_000, 101376, 1536),
    "NVIDIA GeForce RTX 4090": (8, 9, 128, 25_250_000_000, 101376, 1536),
    "NVIDIA GeForce RTX 5090": (12, 0, 170, 33_670_000_000, 101376, 1536),
    "NVIDIA A100-SXM4-40GB": (8, 0, 108, 42_300_000_000, 166912, 2048),
    "Tesla T4": (7, 5, 40, 15_640_000_000, 65536, 1024),
}
ADA = "NVIDIA GeForce RTX 4090"
JOBS = [  # card, processes, what differs from `day`
    (ADA, 1, {}),
    *((ADA, 1, {"micro_batch": size}) for size in (1, 4, 32)),
    (ADA, 1, {"attention": "mha"}),
    (ADA, 1, {"ffn": "mlp"}),
    (ADA, 1, {"position": "none"}),
    (ADA, 1, {"position": "absolute", "norm": "layer"}),
    (ADA, 1, {"qk_norm": False}),
    (ADA, 1, {"tie_embeddings": False}),
    (ADA, 1, {"optimizer": "adamw"}),
    (ADA, 1, {"n_head": 16, "block_size": 4096}),
    (ADA, 1, {"n_layer": 24, "n_embd": 1536, "n_head": 12, "n_ffn": 4096}),
    (ADA, 1, {"dtype": "float32"}),
    (ADA, 1, {"compile": False}),
    ("NVIDIA GeForce RTX 3060", 1, {}),
    ("NVIDIA GeForce RTX 5090", 1, {}),
    ("NVIDIA A100-SXM4-40GB", 1, {}),
    ("Tesla T4", 1, {}),
    ("Tesla T4", 1, {"compile": False}),
    (ADA, 2, {"micro_batch": 8}),
    (ADA, 2, {"micro_batch": 8, "parallel": "fsdp"}),
]


def build_stand_in(folder: Path) -> Path:
    """Compile stand_in.c, and with it a function that does nothing for each that PyTorch may call and is not there."""
    packages = Path(torch.__file__).parents[1]
    (headers,) = packages.glob("nvidia/cu[0-9]*/include")
    include = [f"-I{headers}", f"-I{packages}/triton/backends/nvidia/include"]
    object_file, library = folder / "stand_in.o", folder / "libcuda.so.1"
    flags = ["-O1", "-w", "-fPIC"]
    subprocess.run(
        ["gcc", *flags, *include, "-c", Path(__file__).with_name("stand_in.c"), "-o", object_file], check=True
    )
    wanted = set(re.findall(r"\bcu[A-Z]\w+", (headers / "cuda.h").read_text()))  # looked up by name
    for part in (packages / "torch" / "lib").glob("*.so"):
        wanted |= set(symbols("--dynamic", "--undefined-only", part))
    ours = re.compile(r"(__)?cuda[A-Z]|cublas|nccl|cu(?!FFT|File)[A-Z]")
    missing = {name for name in wanted if ours.match(name)} - set(symbols("--defined-only", object_file))
    rest = folder / "rest.c"
    rest.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(missing)))
    subprocess.run(["gcc", *flags, "-shared", object_file, rest, "-o", library, "-ldl", "-lpthread"], check=True)
    return library


def symbols(*arguments) -> list[str]:
    """Names of an object file, by nm, without their versions."""
    lines = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1].split("@")[0] for line in lines if line.strip()]


def rehearse(card: str, processes: int, overrides: dict, library: Path, folder: Path) -> dict:
    """A row of the table: the job in processes of its own. Raises RuntimeError with what it wrote last."""
    env = os.environ | {
        "CARD": "|".join(map(str, (card, *CARDS[card]))), "CARDS": str(processes), "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent), "TRITON_LIBCUDA_PATH": str(library.parent), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes))),
    }  # fmt: skip
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "tools.rehearsal", json.dumps(overrides), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)  # gigabytes
    row = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
    if done.returncode or not row or json.loads(row)["status"] != "finished":
        raise RuntimeError(f"{card}, {overrides}: {done.stderr.strip()[-2000:]}")
    return {"card": card, "processes": processes, "day, but": json.dumps(overrides)} | json.loads(row)


def rehearse_job(overrides: dict, folder: str) -> None:
    """Within the job: train, and print as JSON what was predicted and what was taken."""
    from torch.nn.parallel import distributed

    distributed._verify_param_shape_across_processes = lambda *_, **__: None  # compares what comes from the other card
    item = torch.Tensor.item
    torch.Tensor.item = lambda tensor: item(tensor) or 1  # what comes back from the card is zero, and is divided by
    TokenData.bytes_of = lambda self, targets: targets.numel()
    config = lm.Config.from_preset("day", **{
        "source": "python", "data_dir": f"{folder}/data", "runs_dir": f"{folder}/runs", "run_name": "rehearsal",
        "resume": "never", "batch_tokens": 524288, "max_hours": 0.0,
        "max_steps": 2, "eval_every": 1, "eval_tokens": 65536, "sample_every": 1,
        "sample_tokens": 4, "checkpoint_every": 1,
    } | overrides)  # fmt: skip
    said, _ = io.StringIO(), Machine.find()  # joins the processes, of which all but one fall silent
    with contextlib.redirect_stdout(said):
        summary = lm.train(config)
    memory, size = re.search(r"([\d.]+) GB predicted at micro-batch (\d+)", said.getvalue()).groups()
    how = re.search(r"device .*?, (\w+), (\w+)", said.getvalue())
    print(json.dumps({
        "products in": how[1], "how": how[2], "micro-batch": int(size), "predicted (GB)": float(memory),
        "taken (GB)": summary["peak_memory_bytes"] / 1e9, "status": summary["status"],
        "out of memory": said.getvalue().count("out of memory; on"),
    }))  # fmt: skip


def write_rehearsal(rows: list[dict]) -> None:
    """results/rehearsal.md"""
    columns = {
        "card": "", "processes": "", "day, but": "", "products in": "", "how": "", "micro-batch": "",
        "predicted (GB)": ".2f", "taken (GB)": ".2f", "taken over predicted": ".2f", "out of memory": "",
    }  # fmt: skip
    ratios = [row["taken over predicted"] for row in rows if row["how"] == "compiled"]
    RESULT.write_text(f"""# A rehearsal on cards that are not there

`make rehearsal`: PyTorch {torch.__version__} and Triton, with a stand-in for NVIDIA's driver, cuBLAS and NCCL
([tools/rehearsal/stand_in.c](../tools/rehearsal/stand_in.c)). Each line is a run of `day` of two steps, with
preflight, evaluation, text and checkpoints. Everything happens as on the card, but the kernels, which are compiled for
it, are not executed: nothing is computed, so there is neither a speed nor a loss. Memory is what PyTorch's allocator
handed out at most, in each process. What this cannot show: whether results are right, how fast they come, and memory
that libraries take by themselves.

{table(rows, columns)}

Compiled runs take {min(ratios, default=0):.2f} to {max(ratios, default=0):.2f} of what the preflight predicts.
""")


def main() -> None:
    if not torch.version.cuda:
        sys.exit(
            f"PyTorch {torch.__version__} is built without CUDA; on Linux, pip install torch brings the build with it"
        )
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as name:
        library = build_stand_in(Path(name))
        for card, processes, overrides in JOBS:
            try:
                row = rehearse(card, processes, overrides, library, Path(name))
            except RuntimeError as error:
                failed.append(f"not finished: {error}")
                continue
            row["taken over predicted"] = row["taken (GB)"] / row["predicted (GB)"]
            print(row, flush=True)
            rows.append(row)
            if row["how"] == "compiled" and abs(row["taken over predicted"] - 1) > TOLERANCE:
                failed.append(f"not as predicted: {row}")
    write_rehearsal(rows)
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rehearse_job(json.loads(sys.argv[1]), sys.argv[2])
    else:
        main()
