"""The row of one's own card for results/cards.md, from what a run left: make card RUN=runs/day-1a2b3c"""

from __future__ import annotations

import sys
from pathlib import Path

from machinery.checkpoints import checkpoint_folders
from machinery.errors import UserError, told
from machinery.files import IS_IT_A_RUN, folder_path, read_json, read_jsonl
from tools.common import RESULTS, table

PAGE = RESULTS / "cards.md"
COLUMNS = {
    "card": "", "parameters": ",d", "text": "", "precision": "", "micro-batch": "d", "tokens/s": ",.0f",
    "of the data sheet": ".0%", "memory (GB)": ".1f", "loss after an hour": ".3f", "hours": ".2f",
    "bits per byte": ".4f", "torch": "", "date": "",
}  # fmt: skip


def card_row(run: Path) -> dict:
    """The row of a run. Raises `UserError` for a folder that is no run, or one that has not ended."""
    config, environment, summary = (
        read_json(run / f"{name}.json", {} if name == "summary" else None, IS_IT_A_RUN)
        for name in ("config", "environment", "summary")
    )
    if not summary.get("train_seconds"):
        raise UserError(f"{run} has no summary.json of training; let the run end, or stop it with Ctrl-C")
    evaluated = [line for line in read_jsonl(run / "metrics.jsonl") if line.get("val_loss") is not None]
    within = [line["val_loss"] for line in evaluated if line["seconds"] <= 3600]
    checkpoints = checkpoint_folders(run)
    state = read_json(checkpoints[-1] / "state.json") if checkpoints else {}
    return {
        "card": environment["device"], "parameters": summary["parameters"], "text": config["source"],
        "precision": environment["dtype"] + ("" if config["compile"] else ", eager"),
        "micro-batch": state.get("micro_batch"), "tokens/s": summary["tokens_per_second"],
        "of the data sheet": summary["mfu"], "memory (GB)": summary["peak_memory_bytes"] / 1e9,
        "loss after an hour": within[-1] if within and summary["train_seconds"] >= 3600 else None,
        "hours": summary["train_seconds"] / 3600, "bits per byte": summary["val_bpb"],
        "torch": environment["versions"]["torch"], "date": environment["started"][:10],
    }  # fmt: skip


def main() -> None:
    """Print the row, and where it goes."""
    if len(sys.argv) != 2:
        raise UserError("python -m tools.card RUN: which run? For example runs/day-1a2b3c")
    run = folder_path(sys.argv[1])
    with told(run, problem="its files do not hold what a row needs", advice=IS_IT_A_RUN):
        print(table([card_row(run)], COLUMNS).splitlines()[-1])
    print(f"\nAdd this line to the table in results/{PAGE.name}, and send it as a pull request.", file=sys.stderr)


if __name__ == "__main__":
    main()
