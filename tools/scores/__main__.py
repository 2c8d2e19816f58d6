"""The scores of a run, twice: by scoring.py, and by EleutherAI's lm_eval on its export.

    make scores RUN=runs/demo-44feb9

Both read the two task files in the run's folder, `scores/`, which are made where there are none, from the run's source:
SOURCE=/all/of/its/path where that is not below the current folder. Nothing is downloaded.
What was measured is kept beside them, in `scores.json`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from data_utils import prepare_data
from machinery.errors import UserError, plain_errors
from machinery.files import folder_path, read_json, read_note, write_json
from machinery.huggingface import export_hf
from machinery.machine import Machine
from tools.common import lm
from tools.scores.questions import (
    has_tasks,
    held_out_documents,
    make_questions,
    read_questions,
    read_texts,
    write_tasks,
)
from tools.scores.scoring import score_choices, score_documents

TASKS = {"endings": "heldout_endings", "documents": "heldout_documents"}  # file, and the task's name in lm_eval


def by_ours(run: Path, folder: Path, machine: Machine, source: str = "") -> dict[str, dict[str, float]]:
    """The scores of the newest checkpoint on the tasks in `folder`, which are made where there are none."""
    config, model, encoding = lm.load_run(run, machine.device)
    if not has_tasks(folder):
        data = prepare_data(replace(config, source=source or config.source))
        if read_note(run / "data.json").get("key", data.key) != data.key:
            raise UserError(
                f"{run} was begun with other text than source {source or config.source!r} holds now, so what is held"
                " out of that may be text that it was trained on; put the text back, or name its place by SOURCE"
            )
        texts = held_out_documents(data, 8 * config.eval_tokens)
        write_tasks(folder, make_questions(texts, config.block_size), texts)
    scores = {}
    if (folder / "endings.jsonl").exists():
        questions = read_questions(folder / "endings.jsonl")
        scores["endings"] = score_choices(model, encoding, questions, config.block_size, machine)
    if (folder / "documents.jsonl").exists():
        texts = read_texts(folder / "documents.jsonl")
        scores["documents"] = score_documents(model, encoding, texts, config.block_size, machine)
    return scores


def by_lm_eval(checkpoint: Path, folder: Path, block_size: int, device: str) -> dict[str, dict[str, float]]:
    """The scores of a Hugging Face checkpoint on the same tasks, from lm_eval, in float32."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"{error}; .venv/bin/pip install -r tools/requirements.txt brings what scores need") from None

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [name for name in TASKS if (folder / f"{name}.jsonl").exists()]
    model_args = {"pretrained": str(checkpoint.resolve()), "dtype": "float32", "max_length": block_size}
    with contextlib.chdir(folder):  # the task files name their data from here
        manager = TaskManager(include_path=".", include_defaults=False)
        tasks = [TASKS[name] for name in names]
        found = lm_eval.simple_evaluate("hf", model_args, tasks, task_manager=manager, batch_size=8, device=device)
    scores = {name: found["results"][TASKS[name]] for name in names}
    return {
        name: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, float)}
        for name, values in scores.items()
    }


def compare(run: Path, source: str = "") -> dict:
    """Both sets of scores with the versions that made them; printed, and written to scores/scores.json.

    Of a path elsewhere, a run keeps the end alone: then `source` is all of it.
    """
    folder, machine = run / "scores", Machine.find("auto", "float32")
    ours = by_ours(run, folder, machine, source)
    export = export_hf(run, folder / "export")
    theirs = by_lm_eval(export, folder, read_json(run / "config.json")["block_size"], str(machine.device))
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")}
    result = {"ours": ours, "lm_eval": theirs, "versions": versions}
    write_json(folder / "scores.json", result)
    print(f"{'':10s} {'':16s} {'ours':>10s} {'lm_eval':>10s}")
    for name, values in theirs.items():
        for key, value in values.items():
            print(f"{name:10s} {key:16s} {ours[name].get(key, float('nan')):10.5f} {value:10.5f}")
    if "endings" in ours:
        print(f"{'endings':10s} {'chance':16s} {ours['endings']['chance']:10.5f}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    return result


if __name__ == "__main__":
    plain_errors()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if len(sys.argv) not in (2, 3):
        raise UserError("python -m tools.scores RUN [SOURCE]: which run? For example runs/demo-44feb9")
    compare(folder_path(sys.argv[1]), *sys.argv[2:])
