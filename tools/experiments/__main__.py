"""`make experiments`: the findings that this project was started from, measured again.

Writes results/experiments/<finding>.csv and .png, and results/experiments.md. `--draw` makes figures and text anew from
the tables. `--scale gpu` is for a CUDA machine, and writes beside: it takes up to 14 GB of the card's memory for a run,
and 22 GB of disk, with 8 GB more for each run of the phase change that goes on at a time.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import matplotlib
import torch

from machinery.errors import UserError, plain_errors
from machinery.machine import cpu_name
from tools.experiments.findings import FINDINGS, RESULTS, answer


def repeat(name: str, scale: str, folder: Path, draw_only: bool = False, **options) -> str:
    """One finding: its figure, and a small table and a sentence about it, in Markdown."""
    finding, path = FINDINGS[name], folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    if not draw_only:
        print(f"{finding.TITLE}:", flush=True)
        finding.measure(finding.SCALES[scale], **options).to_csv(path, index=False, float_format="%.6g")
    figure, text = answer(name, folder)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    question = finding.__doc__.splitlines()[0].removeprefix(f"{finding.TITLE}: ")
    question = question[0].upper() + question[1:]
    return f"## {finding.TITLE}\n\n{question}\n\n![{finding.TITLE}]({folder.name}/{name}.png)\n\n{text}\n"


def page_head(scale: str) -> str:
    """What stands above the answers: what the figures are, and when and on what they were measured."""
    device = torch.cuda.get_device_name() if scale == "gpu" else cpu_name()
    about = f"{datetime.date.today()}, {device}, torch {torch.__version__.split('+')[0]}. Mean ± standard deviation"
    about += " over seeds. The data of each figure are in the .csv of the same name. To repeat: `make experiments`."
    return f"# Answers by experiment\n\n{about}\n\n"


def main() -> None:
    plain_errors()
    parser = argparse.ArgumentParser(prog="python -m tools.experiments", description=__doc__)
    parser.add_argument(
        "findings", nargs="*", default=list(FINDINGS), help=f"of {', '.join(FINDINGS)}; all unless named"
    )
    parser.add_argument("--scale", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0 is one per core, on a GPU what fits")
    parser.add_argument("--draw", action="store_true", help="figures and text only, from the tables on disk")
    chosen = parser.parse_args()
    if chosen.scale == "gpu" and not torch.cuda.is_available():
        raise UserError("--scale gpu but this machine has no CUDA device; leave it out")
    matplotlib.use("agg")
    folder = RESULTS / ("experiments" if chosen.scale == "cpu" else "experiments-gpu")
    device = "cuda" if chosen.scale == "gpu" else "cpu"
    page, parts, head = folder.with_suffix(".md"), {}, page_head(chosen.scale)
    if chosen.draw and page.exists():  # nothing is measured: what is there says when the tables were
        head = page.read_text(encoding="utf-8").split("## ")[0]
    for name in FINDINGS:
        if name in chosen.findings:
            parts[name] = repeat(name, chosen.scale, folder, chosen.draw, jobs=chosen.jobs, device=device)
        elif (folder / f"{name}.csv").exists():
            parts[name] = repeat(name, chosen.scale, folder, draw_only=True)
        page.write_text(head + "\n".join(parts.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
