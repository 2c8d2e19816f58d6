"""Checkpoints: complete or absent, verified when read, and nothing in them that could be executed.

runs/<name>/checkpoints/step_00000100/
    model.safetensors    the weights by their role names; a tied head is stored once
    training.pt          optimizer states: tensors and plain values only
    state.json           step, tokens, seconds, …, the checksums of the two files beside it and its own

Only whole ones count, and only whole ones are ever removed. One that is damaged stays for its owner to look at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from machinery.errors import UserError, first_line, told
from machinery.files import (
    flush,
    free_bytes,
    json_digest,
    make_folder,
    publish,
    read_json,
    refuse_link,
    regular_file,
    remove,
    sha256,
)
from machinery.processes import gather, shard_like

T = TypeVar("T")
FILES = ("model.safetensors", "training.pt")
WEIGHTS = FILES[:1]  # all that a model needs, which is not trained further
FRACTIONS = ("F16", "BF16", "F32", "F64")  # what weights may be made of
MOVE_AWAY = "move that checkpoint away to go on from the one before it, or use a new run_name"
NAME = re.compile(r"step_(\d{8,})(?:\.(\d+))?")  # .1, .2, …: moved out of the way of a newer one of the same step


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used."""


def take_checkpoint(
    run: Path,
    model: torch.nn.Module,
    optimizers: list,
    state: dict,
    keep: int,
    writes: bool = True,
    keep_step: int | None = None,
) -> Callable[[], Path]:
    """Copy a checkpoint of a run into memory; what is returned writes `checkpoints/step_…` and gives its path.

    It is written beside, flushed, renamed; then older ones are removed. Of the whole ones stay the `keep` newest, this
    one among them, and the one of `keep_step`; where the disk is full, older ones than the newest before make room.
    `state` holds "step" and whatever else continues the run, as JSON values. Writing raises `CheckpointError` where it
    cannot. Where several processes train, all call this, since weights may be shared out among them; one `writes`.
    """
    target = run / "checkpoints" / f"step_{state['step']:08d}"
    weights = gather(_without_ties(model), keep=writes)
    training = {"optimizers": gather([optimizer.state_dict() for optimizer in optimizers], keep=writes)}

    def write() -> Path:
        needed = _bytes_needed(weights, training)
        try:
            try:
                _write(target, weights, training, state)
            except Exception:  # each library reports a full disk in its own way
                whole = [path for path in checkpoint_folders(run) if _is_whole(path)]
                if free_bytes(run) > 1.2 * needed or len(whole) < 2:
                    raise
                _remove_older(whole[-1], 1, keep_step)
                _write(target, weights, training, state)
        except Exception as error:
            free = free_bytes(run)
            raise CheckpointError(
                f"{target} was not written ({first_line(error)}): it takes {needed / 1e9:,.4f} GB and {free / 1e9:,.4f}"
                f" GB are free there; earlier checkpoints, if any, are kept, and a run goes on from them"
            ) from None
        _remove_older(target, keep, keep_step)
        return target

    return write if writes else lambda: target


class Saver:
    """Writes the checkpoints of a run beside its training, one at a time. What fails is told, and the run goes on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self._pool = say, ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self.failed = False  # to write the last one

    def save(self, run: Path, model: torch.nn.Module, optimizers: list, state: dict, *rest) -> None:
        """Begin with `take_checkpoint` and its writing, once the one before is on the disk."""
        self.wait()
        self.failed, self._writing = False, self._pool.submit(take_checkpoint(run, model, optimizers, state, *rest))

    def wait(self) -> None:
        """Until nothing is being written."""
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except CheckpointError as error:
            self.failed = True
            self.say(str(error))

    def then(self, call: Callable[[], None]) -> None:
        """Do something once nothing is being written, also where waiting for that is interrupted."""
        self._pool.submit(call).result()


def _write(target: Path, weights: dict[str, Tensor], training: dict, state: dict) -> None:
    """Write the three files beside and have them take the name `target`. What has the name already is moved away."""
    folder, beside = target.parent, target.with_name(f".{target.name}.part")
    refuse_link(folder)
    make_folder(folder)
    for log in folder.parent.glob("*.jsonl"):  # on the disk before what goes on from them
        with contextlib.suppress(OSError):
            flush(log)
    for left in folder.glob(".step_*.part"):  # by a process that was cut off
        remove(left)
    beside.mkdir()
    try:
        save_file(weights, beside / "model.safetensors")
        torch.save(training, beside / "training.pt")
        state = state | {"files": {name: sha256(beside / name) for name in FILES}}
        (beside / "state.json").write_text(
            json.dumps(state | {"sha256": json_digest(state)}, indent=1), encoding="utf-8"
        )
        publish(beside, target)
    finally:
        remove(beside)


def _remove_older(newest: Path, keep: int, keep_step: int | None) -> None:
    """Of the whole checkpoints beside `newest`, keep the last `keep` - 1 and that of `keep_step`; remove the others,
    and any earlier one of the same step. One to which somebody has added files stays, as damaged ones do.
    """
    stay = {newest.name} if keep_step is None else {newest.name, f"step_{keep_step:08d}"}
    older = [path for path in checkpoint_folders(newest.parents[1]) if path.name not in stay and _is_whole(path)]
    older = [path for path in older if {file.name for file in path.glob("*")} == {*FILES, "state.json"}]
    same = [path for path in older if path.stem == newest.name]  # this step, before it was scored again
    older = [path for path in older if path.stem != newest.name]
    for path in same + older[: max(0, len(older) - keep + 1)]:
        leaving = path.with_name(f".{path.name}.part")
        with contextlib.suppress(OSError):  # what cannot be removed stays; the new one is written all the same
            path.rename(leaving)  # in one moment: cut off after it, no half of a checkpoint has the name of one
            remove(leaving)


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, oldest first.

    Raises `CheckpointError` where the folder of them is a link or cannot be read: that is not to have none.
    """
    folder = run / "checkpoints"
    with told(folder, CheckpointError, "cannot be read", "is it a folder that you may read?"):
        refuse_link(folder)
        found = [folder / name for name in os.listdir(folder)] if os.path.lexists(folder) else []
        named = [(NAME.fullmatch(path.name), path) for path in found]  # also a file or a link: it is not a whole one
    ages = {path: (int(match[1]), int(match[2] or 1 << 62)) for match, path in named if match}
    return sorted(ages, key=ages.get)


def newest_checkpoint(run: Path, files: Sequence[str] = FILES) -> Path | None:
    """The newest checkpoint of a run whose `files` are whole, None where there are none; what is not whole is told.

    Raises `CheckpointError` where there are some and none of them is whole.
    """
    folders = checkpoint_folders(run)
    for path in reversed(folders):
        try:
            read_state(path, files)
            return path
        except CheckpointError as error:
            if not os.path.lexists(path):  # its run goes on and has removed it, for a newer one
                return newest_checkpoint(run, files)
            print(f"{error}; trying the one before it")
    if folders:
        raise CheckpointError(
            f"{run}: none of its {len(folders)} checkpoints can be read; bring one back from a copy, or begin anew with"
            " another run_name or resume='never'"
        )
    return None


def read_newest(run: Path, read: Callable[[Path], T], step: int | None = None) -> T:
    """What `read` gives of the weights of the newest checkpoint, or that of `step`; of the next one where the run goes
    on and removes it meanwhile. Raises `CheckpointError` where there is none.
    """
    if step is not None:
        path, known = run / "checkpoints" / f"step_{step!s:0>8}", [folder.name for folder in checkpoint_folders(run)]
        if path.name not in known:
            raise CheckpointError(f"{path} is not there; there are {', '.join(known) or 'none'}")
        read_state(path, WEIGHTS)  # verifies it
        return read(path)
    while path := newest_checkpoint(run, WEIGHTS):
        try:
            return read(path)
        except CheckpointError:
            if os.path.lexists(path):
                raise
    raise CheckpointError(f"{run} has no checkpoint yet")


def read_state(path: Path, needed: Sequence[str] = FILES) -> dict:
    """The contents of state.json. Raises `CheckpointError` unless it and the `needed` files match their checksums."""
    with told(path, CheckpointError, "not a whole checkpoint"):
        for part in (path, *(path / name for name in ("state.json", *needed))):
            refuse_link(part)
            if not part.exists():
                raise CheckpointError(f"{part}: is missing, so this is not a whole checkpoint; bring it back")
        state = read_json(path / "state.json")
        expected, files = state.pop("sha256"), state["files"]
        if expected != json_digest(state) or set(files) != set(FILES):
            raise CheckpointError(f"{path / 'state.json'}: content does not match its checksum")
        for name in needed:
            if sha256(path / name) != files[name]:
                raise CheckpointError(f"{path / name}: content does not match its checksum")
        if (name := NAME.fullmatch(path.name)) and int(name[1]) != state["step"]:
            raise CheckpointError(f"{path}: holds step {state['step']}; give it the name of that step")
    return state


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_state(path))
    except UserError:
        return False


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: list | tuple = (), origin: dict[str, object] | None = None
) -> dict:
    """Restore weights, and with `optimizers` their states; returns the saved state.

    Hyperparameters of the optimizers (rates, decay) stay as they are now. Raises `CheckpointError` for
    another architecture or optimizer, for a file that holds more than tensors and plain values, and where the
    checkpoint says that it is of a run of another `origin`.
    """
    state = read_state(path, FILES if optimizers else WEIGHTS)
    with told(path / "state.json", CheckpointError, "its origin is odd", MOVE_AWAY):
        there, here = state.get("origin", {}), origin or {}  # one of an earlier version says nothing
        for name in sorted(there.keys() & here.keys()):
            if there[name] != here[name]:
                raise CheckpointError(
                    f"{path} is of another run, whose {name} was {there[name]!r}, and here it is {here[name]!r};"
                    f" {MOVE_AWAY}"
                )
    fresh = [_states_after_a_step(optimizer) for optimizer in optimizers]
    load_weights(path, model)
    if optimizers:
        with told(path / "training.pt", CheckpointError, "refused", MOVE_AWAY):
            training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
            for optimizer, saved, states in zip(optimizers, training["optimizers"], fresh, strict=True):
                _restore(optimizer, saved, states)
    return state


def _states_after_a_step(optimizer: torch.optim.Optimizer) -> list[dict]:
    """What this optimizer keeps for each of its parameters, by a step without gradient, at rate zero.

    A kernel that is given a state of another shape writes past its end.
    """
    parameters, rates = _parameters(optimizer), [group["lr"] for group in optimizer.param_groups]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return [dict(optimizer.state.get(p, {})) for p in parameters]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _restore(optimizer: torch.optim.Optimizer, saved: dict, fresh: list[dict]) -> None:
    """Give an optimizer its saved state. Raises `ValueError` unless all of it is of the kind that `fresh` is."""
    parameters = _parameters(optimizer)
    if any(fresh) and not saved["state"]:
        raise ValueError("it holds no state of an optimizer")
    for number, values in saved["state"].items():
        like, expected = parameters[number], fresh[number] if number >= 0 else {}
        for name in expected.keys() | values.keys():
            there, here = _kind(values.get(name)), _kind(expected.get(name))
            if there != here:
                raise ValueError(f"{name} of parameter {number} is {there} there and {here} here")
            if torch.is_tensor(values[name]) and values[name].shape == like.shape:
                values[name] = shard_like(values[name], like)
    groups = optimizer.state_dict()["param_groups"]  # rates and decay as they are now
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("its groups hold other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _kind(value: object) -> str:
    """A value's type; of a tensor also its shape."""
    if not torch.is_tensor(value):
        return type(value).__name__
    if value.layout != torch.strided or value.is_meta or 0 in value.stride():
        return "no dense tensor"
    return f"{str(value.dtype)[6:]} {tuple(value.shape)}"


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Copy a checkpoint's weights into `model`. Raises `CheckpointError` when names or shapes differ."""
    check_weights(path, model)
    copy_weights(read_weights(path), model)


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], model: torch.nn.Module) -> None:
    """Copy whole tensors into `model`, whose own may be sharded, by their names."""
    for name, tensor in _without_ties(model).items():
        tensor.copy_(shard_like(weights[name], tensor))


def read_weights(path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights by their names. Raises `CheckpointError`."""
    with told(path / "model.safetensors", CheckpointError, "not readable"):
        return load_file(path / "model.safetensors")


def check_weights(path: Path, model: torch.nn.Module) -> None:
    """Raise `CheckpointError` unless names and shapes are those of `model`, which may be without memory ("meta")."""
    with (
        told(path / "model.safetensors", CheckpointError, "not readable"),
        safe_open(regular_file(path / "model.safetensors"), framework="pt") as file,
    ):
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: _outline(part.get_shape(), part.get_dtype() in FRACTIONS) for name, part in parts.items()}
    tensors = _without_ties(model).items()
    expected = {name: _outline(tensor.shape, tensor.is_floating_point()) for name, tensor in tensors}
    if expected != found:
        name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
        raise CheckpointError(
            f"{path}: {name} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} in the model;"
            " build the model from the run's config.json, with the classes that it was trained with"
        )


def _outline(shape: Iterable[int], fractions: bool) -> str:
    return f"{tuple(shape)}{'' if fractions else ', not of floating point'}"


def _without_ties(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state with each parameter once, under its first name."""
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again -= {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in again}


def _bytes_needed(weights: dict[str, Tensor], training: dict) -> int:
    states = [v for saved in training["optimizers"] for state in saved["state"].values() for v in state.values()]
    return sum(t.nbytes for t in [*weights.values(), *states] if torch.is_tensor(t))
