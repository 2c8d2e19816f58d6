# ruff: noqa: E501
"""Call 3: a real run of `day` on the Python files of this machine, for some minutes, with everything on; then the export.

$OUT: day.md, day.json, metrics.jsonl, samples.jsonl, curves.png, the preflight and the progress in train.log.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a program that is started by its path

import torch

from data_utils import prepare_data
from machinery.figures import draw_run
from machinery.files import read_jsonl
from machinery.huggingface import export_hf
from machinery.machine import Machine
from model_utils import flops_per_token
from tools.common import lm
from tools.gpu.common import DATA, OUT, Report, options


class Both:
    """Standard output, kept in a file as well."""

    def __init__(self, file) -> None:
        self.file, self.screen = file, sys.stdout

    def __getattr__(self, name: str):
        return getattr(self.screen, name)  # closed, isatty, encoding, …

    def write(self, text: str) -> None:
        self.screen.write(text)
        self.file.write(text)

    def flush(self) -> None:
        self.screen.flush()
        self.file.flush()


def configured(**values):
    folder = str(WORK / "data") if DRY or DEVICE == "cpu" else str(DATA)
    base = {"device": DEVICE, "runs_dir": str(WORK), "data_dir": folder, "run_name": "day", "resume": "auto",
            "prompt": "import os\nimport sys\n\n\ndef"}  # fmt: skip
    if DRY:
        return lm.Config.from_preset("smoke", **(base | {"max_steps": 0, "max_hours": 6 / 3600} | values))
    # The learning rate of `demo`'s text and the times of a run of minutes; the model and the batch are `day`'s
    base |= {"source": "python+site", "batch_tokens": 524288, "eval_tokens": 131072}
    base |= {"eval_every": 40, "sample_every": 80, "checkpoint_every": 100}
    return lm.Config.from_preset("day", **(base | values))


def data() -> None:
    begun = time.monotonic()
    tokens = prepare_data(configured())
    manifest = tokens.manifest
    report.say(
        f"data after {time.monotonic() - begun:.0f} s: {manifest['tokens']}, {manifest['bytes']} bytes,"
        f" complete {manifest['complete']}, {tokens.folder}"
    )
    report.keep(data_seconds=time.monotonic() - begun, tokens=manifest["tokens"])


def train_day() -> None:
    seconds = report.left() - RESERVE
    # The budget's clock begins after the preflight; the training graph may be in no cache
    config = configured() if DRY else configured(max_hours=max(3, seconds - 90) / 3600)
    report.say(f"training for {config.max_hours * 3600:.0f} s by the budget's clock")
    begun = time.monotonic()
    with (OUT / "train.log").open("w") as file, contextlib.redirect_stdout(Both(file)):
        summary = lm.train(config)
    report.say(f"train() took {time.monotonic() - begun:.0f} s")
    run = WORK / "day"
    lines = read_jsonl(run / "metrics.jsonl")
    steps = [line for line in lines if "train_loss" in line]
    rates = [line["tokens_per_second"] for line in steps[2:]] or [line["tokens_per_second"] for line in steps]
    spread = statistics.quantiles(rates, n=10) if len(rates) > 9 else [min(rates), max(rates)]
    report.say(json.dumps(summary, default=str))
    report.say(
        f"{len(steps)} steps; loss {steps[0]['train_loss']:.3f} → {steps[-1]['train_loss']:.3f}; tokens/s median"
        f" {statistics.median(rates):,.0f}, 10% under {spread[0]:,.0f}, 10% over {spread[-1]:,.0f}"
    )
    overall = summary["tokens"] / summary["train_seconds"]
    flops = flops_per_token(lm.build_model(config), config)
    mfu = overall * flops / machine.peak_flops if machine.peak_flops else float("nan")
    report.say(f"with evaluations, samples and checkpoints: {overall:,.0f} tokens/s, MFU {mfu:.1%}")
    for line in lines:
        if "val_bpb" in line:
            at = f"step {line['step']:5d} {line['tokens']:12,} tokens {line['seconds']:6.0f} s"
            report.say(f"    {at} val_bpb {line['val_bpb']:.4f}")
    slow = sorted(steps[2:], key=lambda line: line["tokens_per_second"])[:5]
    report.say(f"slowest steps: {[(line['step'], round(line['tokens_per_second'])) for line in slow]}")
    report.say(f"gradient norms: {[round(line['grad_norm'], 2) for line in steps[:: max(1, len(steps) // 12)]]}")
    for sample in read_jsonl(run / "samples.jsonl")[-2:]:
        report.say(f"sample of step {sample['step']}: {sample['prompt']!r} {sample['text'][:300]!r}")
    report.keep(summary=summary, overall=overall, overall_mfu=mfu)


def files() -> None:
    run = WORK / "day"
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(run / name, OUT / name)
    draw_run(read_jsonl(run / "metrics.jsonl")).savefig(OUT / "curves.png", dpi=100)


def resumed() -> None:
    """The checkpoint into a new model: the same held-out loss, without the compiler."""
    _, model, encoding = lm.load_run(WORK / "day", machine.device)
    config = configured()
    scores = lm.evaluate(model, prepare_data(config), machine, 4, math.inf)
    said = report.numbers["summary"]["val_bpb"]
    report.say(f"loaded again, not compiled: val_bpb {scores['val_bpb']:.5f}, the run said {said:.5f}")
    text = lm.write_text(model, encoding, machine, config.prompt, 100, temperature=0.7, top_k=50, seed=1)
    report.say(f"it writes {text!r}")


def export() -> None:
    """The export, loaded by transformers on the device: the same logits in float32."""
    import transformers

    folder = export_hf(WORK / "day", WORK / "huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    _, ours, encoding = lm.load_run(WORK / "day", machine.device)
    torch.set_float32_matmul_precision("highest")
    ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary("def main():\n    return")]], device=DEVICE)
    with torch.no_grad():
        a, b = theirs(ids).logits.float(), ours(ids).float()
    report.say(
        f"{type(theirs).__name__}: logits differ by {(a - b).abs().max().item():.1e} of {b.abs().max().item():.1f};"
        f" {sum(p.stat().st_size for p in Path(folder).rglob('*')) / 1e6:.0f} MB"
    )


def main() -> None:
    global report, machine, DRY, DEVICE, WORK, RESERVE
    chosen = options(__doc__, 540)
    report = Report("day", chosen.seconds, chosen.only)
    DRY, DEVICE = chosen.dry, chosen.device
    WORK = Path(tempfile.mkdtemp(prefix="lmh-day-"))
    RESERVE = 15 if DRY else 75  # seconds for the last evaluation, checkpoint, figures and export
    machine = Machine.find(DEVICE)
    report.say(f"{machine.name}, torch {torch.__version__}, {machine.dtype}")
    report.part("data", data)
    report.part("train", train_day, RESERVE)
    report.part("files", files)
    report.part("resumed", resumed, 5)
    report.part("export", export, 10)
    report.say(f"{report.failed} failed; {report.left():.0f} s left")
    with contextlib.suppress(Exception):
        prepare_data(configured()).stop()
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
