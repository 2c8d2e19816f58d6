"""Checkpoints: complete or absent, verified when read, and nothing in them that could be executed.

runs/<name>/checkpoints/step_00000100/
    model.safetensors    the weights by their role names; a tied head is stored once
    training.pt          optimizer states: tensors and plain values only
    state.json           step, tokens, seconds, …, the checksums of the two files beside it and its own
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from machinery.errors import UserError
from machinery.processes import gather, shard_like

FILES = ("model.safetensors", "training.pt")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used."""


def save_checkpoint(
    run: Path, model: torch.nn.Module, optimizers: list, state: dict, keep: int, writes: bool = True
) -> Path:
    """Write `checkpoints/step_…` of a run beside, flush, rename, read back; only then remove all but the `keep` newest.

    `state` holds "step" and whatever else continues the run, as JSON values. Raises `CheckpointError` when the
    disk is too full; what was there before is untouched. Where several processes train, all call it, since weights
    may be shared out among them, and one `writes`: the files are the same.
    """
    folder = run / "checkpoints"
    target = folder / f"step_{state['step']:08d}"
    beside = folder / f".{target.name}.part"
    weights = gather(_without_ties(model), keep=writes)
    states = gather([optimizer.state_dict() for optimizer in optimizers], keep=writes)
    training = {"optimizers": states}
    if not writes:
        return target
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, beside / "model.safetensors")
        torch.save(training, beside / "training.pt")
        state = state | {"files": {name: _sha256(beside / name) for name in FILES}}
        (beside / "state.json").write_text(json.dumps(state | {"sha256": _digest(state)}, indent=1), encoding="utf-8")
        for path in [*beside.iterdir(), beside]:
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library reports a full disk in its own way
        shutil.rmtree(beside, ignore_errors=True)
        needed, free = _bytes_needed(model, optimizers), shutil.disk_usage(run).free
        raise CheckpointError(
            f"checkpoint {target.name} was not written ({first_line(error)}): it takes {needed / 1e9:.2f} GB and"
            f" {free / 1e9:.2f} GB are free there; earlier checkpoints are kept"
        ) from None
    read_state(target)
    for old in checkpoint_folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(path for path in folders if path.is_dir() and re.fullmatch(r"step_\d{8,}", path.name))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; one that is not is named and passed over."""
    for path in reversed(checkpoint_folders(run)):
        try:
            read_state(path)
            return path
        except CheckpointError as error:
            print(f"{error}; trying the one before it")
    return None


def read_state(path: Path) -> dict:
    """The contents of state.json. Raises `CheckpointError` unless all three files match their checksums."""
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        expected, files = state.pop("sha256"), state["files"]
        if expected != _digest(state) or set(files) != set(FILES):
            raise CheckpointError(f"{path / 'state.json'}: content does not match its checksum")
        for name in FILES:
            if _sha256(path / name) != files[name]:
                raise CheckpointError(f"{path / name}: content does not match its checksum")
        numbers = [state.get("step"), state.get("tokens", 0), state.get("micro_batch") or 0]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise CheckpointError(f"{path / 'state.json'}: step, tokens and micro_batch are {numbers}, not counts")
        if not (0 <= state.get("seconds", 0) < math.inf and isinstance(state.get("scores", {}), dict)):
            raise CheckpointError(f"{path / 'state.json'}: seconds or scores are not what they should be")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({first_line(error)})") from None
    return state


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: list = ()) -> dict:
    """Restore weights, and with `optimizers` their states; returns the saved state.

    Hyperparameters of the optimizers (rates, decay) stay as they are now. Raises `CheckpointError` for
    another architecture or optimizer, and for a file that holds more than tensors and plain values.
    """
    state = read_state(path)
    load_weights(path, model)
    if optimizers:
        try:
            training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
            for optimizer, saved in zip(optimizers, training["optimizers"], strict=True):
                groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                for index, values in saved["state"].items():
                    like = parameters[index]
                    saved["state"][index] = {
                        name: shard_like(value, like) if value.shape == like.shape else value
                        for name, value in values.items()
                    }
                optimizer.load_state_dict(saved)
                for group, kept in zip(optimizer.param_groups, groups):
                    group.update(kept)
        except (pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path / 'training.pt'}: refused ({first_line(error)}); use a new run_name"
            ) from None
    return state


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Copy a checkpoint's weights into `model`. Raises `CheckpointError` when names or shapes differ."""
    check_weights(path, model)
    weights = load_file(path / "model.safetensors")
    with torch.no_grad():
        for name, tensor in _without_ties(model).items():
            tensor.copy_(shard_like(weights[name], tensor))


def check_weights(path: Path, model: torch.nn.Module) -> None:
    """Raise `CheckpointError` unless names and shapes are those of `model`, which may be without memory ("meta")."""
    try:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / 'model.safetensors'}: not readable ({first_line(error)})") from None
    expected = {name: tuple(tensor.shape) for name, tensor in _without_ties(model).items()}
    if expected != found:
        name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
        raise CheckpointError(
            f"{path}: {name} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} in the model;"
            " build the model from the run's config.json"
        )


def _without_ties(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state with each parameter once, under its first name."""
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again -= {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in again}


def _bytes_needed(model: torch.nn.Module, optimizers: list) -> int:
    tensors = list(_without_ties(model).values())
    states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
    return sum(t.numel() * t.element_size() for t in [*tensors, *states] if torch.is_tensor(t))


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:160]


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder (folders cannot be flushed on Windows)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
