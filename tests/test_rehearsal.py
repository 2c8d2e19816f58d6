"""The rehearsal of GPU runs: what it would run is possible, and where it cannot run it says so."""

import sys

import pytest
import torch
from conftest import LM

import tools.rehearsal.__main__ as rehearsal

CUDA_BUILD = torch.version.cuda and sys.platform == "linux"


@pytest.mark.parametrize("card, processes, overrides", rehearsal.JOBS)
def test_every_job_is_a_run_of_day_on_a_known_card(card, processes, overrides):
    LM.Config.from_preset("day", **overrides)
    assert card in rehearsal.CARDS and processes in (1, 2)


@pytest.mark.skipif(bool(CUDA_BUILD), reason="this PyTorch is built for CUDA")
def test_a_build_without_cuda_is_one_line():
    with pytest.raises(SystemExit, match="is built without CUDA; on Linux, pip install torch brings"):
        rehearsal.main()


@pytest.mark.long
@pytest.mark.skipif(not CUDA_BUILD, reason="needs PyTorch's CUDA build, on Linux")
def test_a_run_gets_through(tmp_path, monkeypatch):
    """In spite of a broken one before it, which is told, and counted in the exit status."""
    broken, good = (rehearsal.ADA, 1, {"n_layer": 0}), (rehearsal.ADA, 1, {"n_layer": 2})
    monkeypatch.setattr(rehearsal, "JOBS", [broken, good])
    monkeypatch.setattr(rehearsal, "RESULT", tmp_path / "rehearsal.md")
    with pytest.raises(SystemExit, match="(?s)^not finished: .*n_layer is 0"):
        rehearsal.main()
    assert (tmp_path / "rehearsal.md").read_text().count("| compiled |") == 1
