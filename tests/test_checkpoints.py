"""Checkpoints and other files on disk: complete or absent, never through a link, and nothing whole is lost."""

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import threading
from concurrent.futures import Future

import pytest
import torch

from machinery import checkpoints, files
from machinery.checkpoints import (
    CheckpointError,
    Saver,
    check_weights,
    checkpoint_folders,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    read_newest,
    read_state,
    take_checkpoint,
)
from machinery.errors import LONGEST, DataError, FileError, UserError, first_line, told
from machinery.files import no_links, read_json, read_jsonl, sha256, write_atomic, write_json
from machinery.tokenizers import tokenizer_from_dict

posix = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and permissions of POSIX")


def small_model(seed=0, optimizer=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight  # tied
    return model, [optimizer(model.parameters())]


def step(model, optimizers):
    model(torch.arange(8)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def save(run, number, keep=2, **options):
    """A checkpoint of step `number`, whose weights tell which it is."""
    model, optimizers = small_model(seed=number)
    step(model, optimizers)
    return take_checkpoint(run, model, optimizers, {"step": number}, keep, **options)()


def names(run):
    return [path.name for path in checkpoint_folders(run)]


def damage(path, name="model.safetensors"):
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 255
    (path / name).write_bytes(content)


def seal(path, **changes):
    """Rewrite state.json with checksums that match, as someone who means harm would."""
    state = json.loads((path / "state.json").read_text()) | changes
    state.pop("sha256")
    state["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in state["files"]}
    sealed = state | {"sha256": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}
    (path / "state.json").write_text(json.dumps(sealed))


# --------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])  # whose states are factored
def test_checkpoint_restores_weights_and_optimizer(tmp_path, optimizer):
    model, optimizers = small_model(optimizer=optimizer)
    step(model, optimizers)
    take_checkpoint(tmp_path, model, optimizers, {"step": 1, "tokens": 64, "seconds": 1.5}, keep=2)()
    step(model, optimizers)
    other, others = small_model(seed=1, optimizer=optimizer)
    state = load_checkpoint(newest_checkpoint(tmp_path), other, others)
    assert (state["step"], state["tokens"], state["seconds"]) == (1, 64, 1.5)
    step(other, others)
    assert torch.equal(model[0].weight, other[0].weight)
    assert other[0].weight is other[1].weight


def test_only_the_newest_are_kept_and_nothing_is_executable(tmp_path):
    for number in (1, 2, 3, 4):
        save(tmp_path, number)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    newest = newest_checkpoint(tmp_path)
    assert sorted(path.name for path in newest.iterdir()) == ["model.safetensors", "state.json", "training.pt"]
    torch.load(newest / "training.pt", weights_only=True)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_step_to_keep_is_never_pruned(tmp_path):
    for number in (1, 2, 3, 4):
        save(tmp_path, number, keep=1, keep_step=2 if number > 1 else None)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]
    save(tmp_path, 5, keep=1, keep_step=4)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_a_checkpoint_of_the_same_step_takes_its_place_and_no_older_one_goes(tmp_path):
    save(tmp_path, 1)
    first = sha256(save(tmp_path, 2) / "model.safetensors")
    model, optimizers = small_model(seed=9)
    path = take_checkpoint(tmp_path, model, optimizers, {"step": 2}, keep=2)()  # scored again, with a smaller budget
    assert newest_checkpoint(tmp_path) == path and names(tmp_path) == ["step_00000001", "step_00000002"]
    assert first != sha256(path / "model.safetensors")
    take_checkpoint(tmp_path, model, optimizers, {"step": 2}, keep=1)()
    assert names(tmp_path) == ["step_00000002"]


def test_a_checkpoint_written_beside_training_is_of_the_moment_it_was_asked_for(tmp_path):
    (model, optimizers), said = small_model(), []
    step(model, optimizers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {k: v.clone() for k, v in optimizers[0].state_dict()["state"][0].items()}
    saver = Saver(said.append)
    saver.save(tmp_path, model, optimizers, {"step": 1}, 2, True, None)
    for _ in range(20):
        step(model, optimizers)
    saver.wait()
    assert not torch.equal(before["0.weight"], model[0].weight) and not said
    load_checkpoint(tmp_path / "checkpoints/step_00000001", model, optimizers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    restored = optimizers[0].state_dict()["state"][0]
    assert all(torch.equal(moments[name], restored[name]) for name in moments)


@pytest.mark.parametrize("error", [None, MemoryError, ValueError, TypeError])
def test_a_checkpoint_that_cannot_be_written_ends_no_training_and_is_told_once(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error("so it is")

    (model, optimizers), said = small_model(), []
    step(model, optimizers)
    if error:
        monkeypatch.setattr(torch, "save", fail)
    else:
        (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = Saver(said.append)
    saver.save(tmp_path, model, optimizers, {"step": 1}, 2, True, None)
    saver.wait()
    saver.wait()
    assert len(said) == 1 and f"step_00000001 was not written ({'so it is' if error else ''}" in said[0]
    assert error is None or not names(tmp_path)


def test_what_follows_a_checkpoint_waits_for_it_whoever_stops_waiting(tmp_path, monkeypatch):
    (model, optimizers), done, write, go = small_model(), [], checkpoints._write, threading.Event()
    monkeypatch.setattr(checkpoints, "_write", lambda *what: (go.wait(), write(*what), done.append("written")))
    saver = Saver(print)
    saver.save(tmp_path, model, optimizers, {"step": 1}, 1, True, None)
    monkeypatch.setattr(Future, "result", lambda future: (_ for _ in ()).throw(KeyboardInterrupt))
    for wait in (saver.wait, lambda: saver.then(lambda: done.append("after it"))):
        with pytest.raises(KeyboardInterrupt):
            wait()
    assert not done
    monkeypatch.undo()
    go.set()
    saver.then(lambda: None)
    assert done == ["written", "after it"] and names(tmp_path) == ["step_00000001"]


# ------------------------------------------------------------------------------------ damaged and foreign


@pytest.mark.parametrize("kind", ["flip", "truncate", "remove", "state", "empty"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, kind):
    for number in (1, 2):
        save(tmp_path, number)
    newest = checkpoint_folders(tmp_path)[-1]
    file = newest / ("state.json" if kind == "state" else "model.safetensors")
    if kind == "flip":
        damage(newest)
    elif kind in ("truncate", "state"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "remove":
        file.unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    assert newest_checkpoint(tmp_path).name == "step_00000001"
    assert "step_00000002" in capsys.readouterr().out


def test_damaged_ones_do_not_count_and_stay(tmp_path):
    """What was just written is never pruned, however many broken ones have later names."""
    damage(save(tmp_path, 1))
    damage(save(tmp_path, 2), "training.pt")
    (tmp_path / "checkpoints" / "step_99999999").mkdir()
    broken = names(tmp_path)
    assert broken == ["step_00000001", "step_00000002", "step_99999999"]
    for number in (3, 4, 5):
        path = save(tmp_path, number, keep=1)
        assert newest_checkpoint(tmp_path) == path
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000005", "step_99999999"]
    again = save(tmp_path, 2, keep=1)  # of the step of a damaged one, which moves out of the way
    assert read_state(again)["step"] == 2 and "step_00000002.1" in names(tmp_path)


def test_a_copy_under_a_later_number_does_not_count_and_files_of_others_stay(tmp_path, capsys):
    shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoints" / "step_00000099")
    assert newest_checkpoint(tmp_path).name == "step_00000001"
    assert "step_00000099: holds step 1" in capsys.readouterr().out
    (tmp_path / "checkpoints/step_00000001/notes.txt").write_text("mine")
    save(tmp_path, 2, keep=1)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step_00000001", "step_00000003", "step_00000099"]


def test_where_none_is_whole_it_is_said(tmp_path, capsys):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest_checkpoint(tmp_path) is None
    damage(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be read.*resume='never'"):
        newest_checkpoint(tmp_path)
    assert "model.safetensors: content does not match its checksum" in capsys.readouterr().out


def test_a_file_in_the_place_of_a_checkpoint_is_told_and_not_passed_over(tmp_path, capsys):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    for path, left in ((second, first), (first, None)):
        shutil.rmtree(path)
        path.write_text("somebody's")
        if left:
            assert newest_checkpoint(tmp_path) == left
            assert f"{path.name}{os.sep}state.json" in (said := capsys.readouterr().out) and "before it" in said
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be read"):
        newest_checkpoint(tmp_path)
    save(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "step_00000002.1").read_text() == first.read_text() == "somebody's"


def test_a_step_that_is_none_is_one_line(tmp_path):
    path = save(tmp_path, 1)
    assert read_newest(tmp_path, str, 1) == read_newest(tmp_path, str, "1") == str(path)
    for odd in ("latest", 1.0, [1], "../1"):
        with pytest.raises(CheckpointError, match="is not there; there are step_00000001"):
            read_newest(tmp_path, str, odd)


def test_a_damaged_checkpoint_that_is_asked_for_by_its_step_is_refused(tmp_path):
    damage(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_newest(tmp_path, str, 1)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    save(tmp_path, 1)
    other = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    with pytest.raises(CheckpointError, match=r"0.weight is \(8, 4\) there and \(9, 4\) in the model"):
        load_checkpoint(newest_checkpoint(tmp_path), other)


def test_weights_are_checked_without_memory(tmp_path):
    path = save(tmp_path, 1)
    with torch.device("meta"):
        check_weights(path, small_model()[0])
        with pytest.raises(CheckpointError, match=r"0.weight is \(8, 4\) there and \(1099511627776, 4\)"):
            check_weights(path, torch.nn.Sequential(torch.nn.Embedding(1 << 40, 4)))


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    """With checksums that match, as someone who means harm would write it."""

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = save(tmp_path, 1)
    torch.save({"optimizers": [Harm()]}, path / "training.pt")
    seal(path)
    with pytest.raises(CheckpointError, match=r"training\.pt: refused"):
        load_checkpoint(path, *small_model())
    assert not (tmp_path / "executed").exists()


ODD_STATES = {  # what somebody may have done to the saved state of an optimizer
    "shape": lambda s: s["state"][0].update(exp_avg=torch.zeros(3, 3)),
    "flat": lambda s: s["state"][0].update(exp_avg=torch.zeros(32)),
    "number": lambda s: s["state"][0].update(exp_avg=torch.zeros(())),
    "row": lambda s: s["state"][0].update(exp_avg=torch.zeros(1, 4)),
    "expanded": lambda s: s["state"][0].update(exp_avg=torch.zeros(1).expand(8, 4)),
    "sparse": lambda s: s["state"][0].update(exp_avg=torch.zeros(8, 4).to_sparse()),
    "whole": lambda s: s["state"][0].update(exp_avg=torch.zeros(8, 4, dtype=torch.long)),
    "none": lambda s: s["state"][0].update(exp_avg=None),
    "text": lambda s: s["state"][0].update(step="1"),
    "without": lambda s: s["state"][0].pop("exp_avg_sq"),
    "empty": lambda s: s["state"].clear(),
    "more": lambda s: s["state"][0].update(exp_avg_sq=torch.zeros(2, 8, 4)),
    "parameter": lambda s: s["state"].update({7: s["state"][0]}),
    "negative": lambda s: s["state"].update({-1: s["state"][0]}),
    "list": lambda s: s.update(state=[]),
    "groups": lambda s: s.update(param_groups=[]),
    "strangers": lambda s: s["param_groups"][0].update(params=[9]),
    "nothing": lambda s: s.clear(),
}


@pytest.mark.parametrize("odd", ODD_STATES)
def test_odd_optimizer_states_are_one_line(tmp_path, odd):
    path = save(tmp_path, 1)
    training = torch.load(path / "training.pt", weights_only=True)
    ODD_STATES[odd](training["optimizers"][0])
    torch.save(training, path / "training.pt")
    seal(path)
    with pytest.raises(CheckpointError, match=r"training\.pt: refused \(.+\); move .* or use a new run_name"):
        load_checkpoint(path, *small_model())


@pytest.mark.parametrize("step", ["1", -1, 2])
def test_a_state_of_another_step_is_one_line(tmp_path, step):
    path = save(tmp_path, 1)
    seal(path, step=step)
    with pytest.raises(CheckpointError, match=f"holds step {step}; give it the name of that step"):
        read_state(path)


@posix
@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
def test_pipes_and_devices_are_not_waited_for(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        read_state(path)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="not a regular file"):
            load_weights(path, small_model()[0])
    os.mkfifo(tmp_path / "config.json")
    for odd in (tmp_path / "config.json", tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            read_json(odd)


# -------------------------------------------------------------------------------------------------- links


@posix
def test_nothing_is_written_or_removed_through_a_link(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    for number in (1, 2, 3):
        save(outside, number, keep=3)
    (outside / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    run.mkdir()
    (run / "checkpoints").symlink_to(outside / "checkpoints")
    for call in (lambda: save(run, 9, keep=1), lambda: newest_checkpoint(run)):
        with pytest.raises(CheckpointError, match="checkpoints is a link"):
            call()
    (run / "checkpoints").unlink()
    (run / "checkpoints").mkdir()
    for name in ("step_00000001", "step_00000009", ".step_00000009.part", ".step_00000002.part"):
        (run / "checkpoints" / name).symlink_to(outside / "checkpoints" / "step_00000001")
    with pytest.raises(CheckpointError, match="none of its 2"):
        newest_checkpoint(run)
    path = save(run, 9, keep=1)
    assert newest_checkpoint(run) == path and not path.is_symlink()
    (path / "training.pt").rename(tmp_path / "moved")
    (path / "training.pt").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"training.pt is a link"):
        read_state(path)
    for name in ("config.json", "config.json.part", "metrics.jsonl"):
        (run / name).symlink_to(outside / "file")
    with pytest.raises(FileError, match="metrics.jsonl is a link"):
        open(run / "metrics.jsonl", "a", opener=no_links)  # noqa: SIM115 - it does not open
    write_json(run / "config.json", {"a": 1})
    assert read_json(run / "config.json") == {"a": 1} and not (run / "config.json").is_symlink()
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before
    assert (outside / "file").read_text() == "mine"


# --------------------------------------------------------------------------------- disks and their errors


def refuse_to_flush(monkeypatch, number, of_folders):
    """Have fsync answer with an error for folders, or for files."""
    fsync = os.fsync

    def answer(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", answer)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EACCES])
def test_folders_that_cannot_be_flushed_are_no_fault(tmp_path, monkeypatch, number):
    refuse_to_flush(monkeypatch, number, of_folders=True)
    assert save(tmp_path, 1) == newest_checkpoint(tmp_path)
    write_json(tmp_path / "x.json", {})


@pytest.mark.parametrize("of_folders", [False, True], ids=["files", "folders"])
def test_a_disk_that_fails_is_told_and_loses_nothing(tmp_path, monkeypatch, of_folders):
    kept = save(tmp_path, 1, keep=1)
    write_json(tmp_path / "x.json", {"old": 1})
    refuse_to_flush(monkeypatch, errno.EIO, of_folders)
    with pytest.raises(CheckpointError, match=r"step_00000002 was not written \(Input/output error\)"):
        save(tmp_path, 2, keep=1)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    with pytest.raises(FileError, match=r"x.json: not written \(Input/output error\)"):
        write_json(tmp_path / "x.json", {"new": 1})
    assert newest_checkpoint(tmp_path) == kept
    assert not (tmp_path / "x.json.part").exists()


@pytest.mark.parametrize("keep_step", [None, 2])
def test_where_the_disk_is_full_older_checkpoints_make_room_and_the_newest_stays(tmp_path, monkeypatch, keep_step):
    (model, optimizers), written = small_model(), checkpoints._write
    step(model, optimizers)

    def used():
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    def write(target, *what):
        assert newest_checkpoint(tmp_path)
        if used() + size > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(target, *what)

    save(tmp_path, 1)
    size = used()
    room = 3.5 * size
    monkeypatch.setattr(checkpoints, "_write", write)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda run: max(0, room - used() - size))
    for number in range(2, 6):
        take_checkpoint(tmp_path, model, optimizers, {"step": number}, 3, True, keep_step)()
    assert names(tmp_path) == [f"step_0000000{n}" for n in (keep_step or 3, 4, 5)]
    room = 0
    with pytest.raises(CheckpointError, match="No space left"):
        take_checkpoint(tmp_path, model, optimizers, {"step": 6}, 3)()
    assert newest_checkpoint(tmp_path).name == "step_00000005"


def test_an_older_checkpoint_that_its_owner_removes_meanwhile_is_none_to_remove(tmp_path, monkeypatch):
    (model, optimizers), is_whole = small_model(), checkpoints._is_whole
    step(model, optimizers)

    def looked_at(path):  # which takes seconds
        found = is_whole(path)
        if path.name == "step_00000001":
            shutil.rmtree(path)
        return found

    for number in (1, 2):
        save(tmp_path, number)
    monkeypatch.setattr(checkpoints, "_is_whole", looked_at)
    take_checkpoint(tmp_path, model, optimizers, {"step": 3}, 1)()
    assert names(tmp_path) == ["step_00000003"]


@posix
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_new_files_are_for_all_who_may_read_the_folder(tmp_path, mask):
    old = os.umask(mask)
    try:
        path = save(tmp_path, 1)
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(old)
    for file in (*path.iterdir(), tmp_path / "x.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "no/such/folder"], ids=["long", "nul", "absent"])
def test_names_that_cannot_be_are_one_line(tmp_path, name):
    for call in (lambda: write_json(tmp_path / name, {}), lambda: read_json(tmp_path / name)):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_free_space_is_that_of_the_nearest_folder_whatever_the_name(tmp_path):
    for name in ("absent/a", "a" * 300, "a\0b"):
        assert files.free_bytes(tmp_path / name) > 0


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(UserError, match="not written"):
        write_atomic(tmp_path / "a", object())
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_checksum_is_of_what_is_there_now(tmp_path):
    path = tmp_path / "a"
    for content in (b"one", b"two", b"six"):  # of one length, within one tick of the clock
        path.write_bytes(content)
        assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_rests_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    monkeypatch.setattr(files.time, "time_ns", lambda: path.stat().st_ctime_ns + 10**10)
    files._read_sha256.cache_clear()
    assert sha256(path) == sha256(path)
    assert files._read_sha256.cache_info().hits == 1
    path.write_bytes(b"longer")
    assert sha256(path) == hashlib.sha256(b"longer").hexdigest()


# ------------------------------------------------------------------------------------------------ messages


def test_messages_are_one_printable_line_of_bounded_length():
    assert "\x1b" not in str(UserError("\x1b[2Ja\nb")) and "\n" not in str(UserError("a\nb"))
    assert len(str(UserError("x" * 10**6))) == LONGEST
    assert first_line(ValueError("a:\n  b\nc")) == "a: b" and first_line(ValueError()) == "ValueError"
    assert first_line(KeyError("x")) == "KeyError: 'x'"
    with pytest.raises(FileError, match="^here: No such file") as caught, told("here"):
        os.stat("/no/such/file")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, OSError)
    with pytest.raises(KeyboardInterrupt), told("here"):
        raise KeyboardInterrupt


def test_a_pattern_that_the_engine_panics_on_is_one_line(capfd):
    import base64
    import copy

    tokens = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
    fields = {"name": "x", "tokens": tokens, "special_tokens": {"<|endoftext|>": 256}}
    assert tokenizer_from_dict(fields | {"pattern": r"[\s\S]"}).n_vocab == 257
    with pytest.raises(DataError, match=r"^here: .*its pattern fails on this text \(.*[bB]acktrack"):
        tokenizer_from_dict(fields | {"pattern": r"(?:(?=[\s\S])[\s\S]+)+(?<=never)|[\s\S]"}, "here")
    late = tokenizer_from_dict(fields | {"pattern": r"(?:x+x+)+(?=y)|[\s\S]"})  # only on a text of many x
    for one in (late, copy.copy(late)):  # as threads do
        assert one.encode_ordinary("xx\ud800") == one.encode_ordinary_batch(["xx\ud800"])[0]
        for call, text in ((one.encode_ordinary, "x" * 60), (one.encode_ordinary_batch, ["x" * 60])):
            with pytest.raises(DataError, match="its pattern fails on this text"):
                call(text)
    with pytest.raises(DataError, match=r"None \(NoneType\) is no text"):
        late.encode_ordinary(None)
    assert not capfd.readouterr().err  # nor lines of Rust


def test_lines_that_a_crash_cut_short_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"step": 1}\n{"step": 2, "text": "\xff"}\n[1]\n' + b"[" * 10**5 + b'\n{"step": 3'
    )
    assert [line["step"] for line in read_jsonl(tmp_path / "a.jsonl")] == [1, 2]
