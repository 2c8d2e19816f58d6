"""`make experiments`: the findings that this project was started from, measured again.

Writes results/experiments/<finding>.csv and .png, and results/experiments.md. `--draw` makes figures and text anew from
the tables. `--scale gpu` is for a CUDA machine, and writes beside: it takes up to 14 GB of the card's memory for a run,
and 22 GB of disk, with 8 GB more for each run of the phase change that goes on at a time.
"""

from __future__ import annotations

import argparse
import datetime
import re
from pathlib import Path

import matplotlib
import torch

from machinery.errors import UserError, plain_errors
from machinery.machine import cpu_name
from machinery.settings import one_of
from tools.experiments.findings import FINDINGS, RESULTS, answer

HEAD = """# Answers by experiment

Mean ± standard deviation over seeds. The data of each figure are in the .csv of the same name. To repeat:
`make experiments`.

"""


def repeat(name: str, scale: str, folder: Path, measured: str = "", **options) -> str:
    """One finding: its figure, and a small table and a sentence about it, in Markdown. It is measured unless `measured`
    says when and on what it was.
    """
    finding, path = FINDINGS[name], folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    if not measured:
        print(f"{finding.TITLE}:", flush=True)
        device = torch.cuda.get_device_name() if scale == "gpu" else cpu_name()
        measured = f"{datetime.date.today()}, {device}, torch {torch.__version__.split('+')[0]}"
        finding.measure(finding.SCALES[scale], **options).to_csv(path, index=False, float_format="%.6g")
    figure, text = answer(name, folder)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    question = finding.__doc__.splitlines()[0].removeprefix(f"{finding.TITLE}: ")
    question = question[0].upper() + question[1:]
    return f"## {finding.TITLE}\n\n*{measured}.* {question}\n\n![{finding.TITLE}]({folder.name}/{name}.png)\n\n{text}\n"


def measured_at(page: str, title: str) -> str:
    """What a page says of when and on what an answer was measured; "" where it has none."""
    found = re.search(rf"## {re.escape(title)}\n\n\*(.+?)\.\*", page)
    return found[1] if found else ""


def write_page(page: Path, parts: dict[str, str]) -> None:
    """The answers there are, in their order."""
    page.write_text(HEAD + "\n".join(parts[name] for name in FINDINGS if name in parts), encoding="utf-8")


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
    for name in chosen.findings:
        one_of("finding", name, FINDINGS)
    matplotlib.use("agg")
    folder = RESULTS / ("experiments" if chosen.scale == "cpu" else "experiments-gpu")
    device = "cuda" if chosen.scale == "gpu" else "cpu"
    page = folder.with_suffix(".md")
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    there = {name: finding for name, finding in FINDINGS.items() if (folder / f"{name}.csv").exists()}
    measured = {name: at for name, finding in there.items() if (at := measured_at(old, finding.TITLE))}
    for name in FINDINGS.keys() - there.keys() - {*([] if chosen.draw else chosen.findings)}:
        print(f"{name} is left out of {page}: there is no {folder / name}.csv")
    parts = {name: repeat(name, chosen.scale, folder, at) for name, at in measured.items()}
    for name in [] if chosen.draw else chosen.findings:
        parts[name] = repeat(name, chosen.scale, folder, jobs=chosen.jobs, device=device)
        write_page(page, parts)
    write_page(page, parts)


if __name__ == "__main__":
    main()
