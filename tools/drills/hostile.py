"""Input that nobody meant: each is accepted, or refused with one clear line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from data_utils import prepare_data
from machinery.checkpoints import newest_checkpoint
from machinery.errors import UserError
from machinery.run_folder import RunFolder, run_state
from machinery.shards import load_tokenizer
from machinery.sources import iter_documents
from tools.common import lm, quietly
from tools.drills.common import Result, tiny_config
from tools.drills.storage import damage

STRANGE = [
    None, True, -1, 0, 3, 7.5, 1e308, float("nan"), "", "x", "../../etc", "auto", "rope", [], {}, [1], "\x00", 2**70,
]  # fmt: skip


def fuzz(folder: Path, times: int) -> Result:
    """Feed configs, names, manifests, tokenizers, states and tables that nobody meant: a line each, and no more."""
    chance = random.Random(0)
    config = tiny_config(folder, run_name="fuzz", max_steps=10)
    quietly(lm.train, config)
    run, data = Path(config.runs_dir) / "fuzz", quietly(prepare_data, config)
    table = folder / "rows.jsonl"
    table.write_text('{"text": "one"}\n{"text": "two\\n"}\n')
    newest = quietly(newest_checkpoint, run)
    outside = {path: path.stat().st_mtime_ns for path in folder.parent.iterdir() if path != folder}

    def strange_config() -> None:
        values = config.to_dict()
        for name in chance.sample(list(values), chance.randint(1, 3)):
            values[name] = chance.choice(STRANGE)
        lm.Config.from_dict(values)

    def strange(path: Path, use: Callable) -> None:
        """Of a JSON file, half of the time one thing in its value is changed, and it is JSON still."""
        content = path.read_bytes()
        if path.suffix == ".json" and chance.random() >= 0.5:
            value = json.loads(content)
            mutate(value, chance)
            changed = json.dumps(value).encode()
        else:
            changed = damage(content, chance)
        path.write_bytes(changed)
        try:
            use()
        finally:
            path.write_bytes(content)

    def run_name() -> None:
        name = "".join(chance.choice("ab./\\ \x00~-_é") for _ in range(chance.randint(0, 6)))
        RunFolder(folder / "names", name)

    targets = [
        strange_config,
        run_name,
        lambda: strange(data.folder / "manifest.json", lambda: data.windows("train", 16, 0).read(0, 2)),
        lambda: strange(data.folder / "tokenizer.json", lambda: load_tokenizer(data.folder)),
        lambda: strange(run / "config.json", lambda: (run_state(run), lm.load_run(run))),
        lambda: strange(run / "summary.json", lambda: run_state(run)),
        lambda: strange(newest / "state.json", lambda: newest_checkpoint(run)),
        lambda: strange(table, lambda: list(iter_documents(str(table)))),
        lambda: strange(run / "metrics.jsonl", lambda: run_state(run)),
    ]
    odds = [40, 20, 10, 5, 3, 8, 5, 1, 8]
    unclear = []
    for _ in range(times):
        (target,) = chance.choices(targets, odds)
        try:
            quietly(target)
        except UserError as error:
            if "\n" in str(error) or len(str(error)) >= 600:
                unclear.append(str(error))
        except Exception as error:
            unclear.append(f"{type(error).__name__}: {error}")
    same = outside == {path: path.stat().st_mtime_ns for path in folder.parent.iterdir() if path != folder}
    note = "nothing written elsewhere" if same else "WROTE OUTSIDE"
    survived = times - len(unclear) if same else 0
    return Result("fuzzed input", times, survived, note="; ".join([note, *unclear[:3]]))


def mutate(value, chance: random.Random) -> None:
    """Change one thing, somewhere inside a JSON value, in place."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = chance.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and chance.random() < 0.8:
        mutate(value[key], chance)
    elif isinstance(value, dict) and chance.random() < 0.3:
        del value[key]
    else:
        value[key] = chance.choice(STRANGE)
