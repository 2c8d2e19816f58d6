"""What a run left, for whoever comes after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiktoken
import torch

from machinery.checkpoints import check_weights, load_weights, read_newest
from machinery.errors import DataError, told
from machinery.files import IS_IT_A_RUN, folder_path, read_json
from machinery.run_folder import model_code, tell_other_code
from machinery.settings import FOLDERS, Settings
from machinery.tokenizers import tokenizer_from_dict

COPY = "bring it back from a copy of the run"


def tokenizer_of_run(folder: Path, config: dict) -> tiktoken.Encoding:
    """The tokenizer of a run with this config.json. Raises `DataError` where it cannot be the one of its model."""
    path, rows = folder / "tokenizer.json", config.get("vocab_size")
    encoding = tokenizer_from_dict(read_json(path, advice=COPY), path, COPY)
    if type(rows) is int and encoding.n_vocab > rows:
        raise DataError(
            f"{path} has {encoding.n_vocab} tokens and the model of this run {rows} rows for them (vocab_size): it is"
            f" of another run; {COPY}"
        )
    return encoding


class SavedRun:
    """The files of a run: `config` as a dictionary, `encoding`, and the model of its newest checkpoint, or of `step`.

    Raises `UserError` for a folder that is no run.
    """

    def __init__(self, folder: str | Path, step: int | None = None) -> None:
        folder = folder_path(folder)
        self._path, self._step = folder / "config.json", step
        self.config = read_json(self._path, advice=IS_IT_A_RUN)
        self.encoding = tokenizer_of_run(folder, self.config)

    def settings(self, kind: type[Settings]) -> Settings:
        """The config as a `kind` of settings. Raises `UserError` for fields and values that it does not have."""
        known = {n: v for n, v in self.config.items() if not (n in FOLDERS and str(v).startswith("…/"))}  # of elsewhere
        if str(known.get("tokenizer")).startswith("…/"):  # a folder elsewhere; here is what it held
            known["tokenizer"] = str(self._path.parent)
        with told(self._path):
            return kind.from_dict(known)

    def model(self, build: Callable[[], torch.nn.Module], device: str | torch.device = "cpu") -> torch.nn.Module:
        """The model that `build()` makes, with the weights of the checkpoint, on a device and in evaluation mode.

        Names and shapes are compared before memory is taken. Raises `UserError`, also where there is no checkpoint.
        """
        with told(f"device {device!r}", advice="'cpu' and Machine.find().device are there"):
            if torch.empty(0, device=torch.device(device)).is_meta:
                raise ValueError("it holds shapes and no weights")

        with torch.device("meta"):
            outline = build()
        tell_other_code(self._path.parent, model_code(outline))

        def load(checkpoint: Path) -> torch.nn.Module:
            check_weights(checkpoint, outline)
            model = build()
            load_weights(checkpoint, model)
            return model

        return read_newest(self._path.parent, load, self._step).to(device).eval()
