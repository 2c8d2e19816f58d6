"""What a run left, for whoever comes after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from machinery.checkpoints import check_weights, load_weights, newest_checkpoint
from machinery.errors import UserError
from machinery.files import read_json
from machinery.tokenizers import tokenizer_from_dict


class SavedRun:
    """The files of a run: `config` as a dictionary, `encoding`, and `checkpoint`, the newest one that is whole.

    Raises `UserError` for a folder that is no run, or has no checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        self.config = read_json(folder / "config.json")
        self.encoding = tokenizer_from_dict(read_json(folder / "tokenizer.json"))
        self.checkpoint = newest_checkpoint(folder)
        if self.checkpoint is None:
            raise UserError(f"{folder} has no checkpoint yet")

    def model(self, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """The model that `build()` makes, with the weights of the checkpoint, in evaluation mode.

        Names and shapes are compared before memory is taken.
        """
        with torch.device("meta"):
            check_weights(self.checkpoint, build())
        model = build()
        load_weights(self.checkpoint, model)
        return model.eval()
