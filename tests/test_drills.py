"""A short version of every fault drill; `make drill` is the long one."""

import shutil

import pytest

from tools.drills.hostile import fuzz
from tools.drills.power import power_cuts
from tools.drills.processes import interrupt_kernel, kill_tokenization, kill_training, terminate
from tools.drills.services import bad_network, bad_wandb
from tools.drills.storage import corrupt_checkpoints, corrupt_shards, full_disk

SHORT = [
    (kill_training, 3), (kill_tokenization, 2), (interrupt_kernel, 1), (terminate, 1), (full_disk, 1),
    (corrupt_checkpoints, 20), (corrupt_shards, 20), (fuzz, 400), (bad_network, 2), (bad_wandb, 1),
    (power_cuts, 40),
]  # fmt: skip


LONG = {kill_training, kill_tokenization, terminate, full_disk, bad_network, bad_wandb, power_cuts}  # 10 to 20 s each


@pytest.mark.parametrize(
    ("drill", "times"),
    [pytest.param(*case, id=case[0].__name__, marks=pytest.mark.long if case[0] in LONG else ()) for case in SHORT],
)
def test_drill(tmp_path, drill, times):
    if drill is power_cuts and not shutil.which("strace"):
        pytest.skip("strace is not installed: it records what a run writes")
    result = drill(tmp_path / "drill", times)
    assert result.injected >= times and result.survived == result.injected, result
    assert result.identical is not False, result
    assert result.lost is None or result.lost <= 10, result
