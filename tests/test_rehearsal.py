"""The rehearsal of GPU runs: what it would run is possible, and where it cannot run it says so."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import LM

import rehearsal.__main__ as rehearsal

CUDA_BUILD = torch.version.cuda and sys.platform == "linux"


@pytest.mark.parametrize("card, processes, overrides", rehearsal.JOBS)
def test_every_job_is_a_run_of_day_on_a_known_card(card, processes, overrides):
    config = LM.Config.from_preset("day", **overrides)
    assert card in rehearsal.CARDS and (processes == 1 or config.micro_batch != "auto")


@pytest.mark.skipif(bool(CUDA_BUILD), reason="this PyTorch is built for CUDA")
def test_a_build_without_cuda_is_one_line():
    with pytest.raises(SystemExit, match="is built without CUDA; on Linux, pip install torch brings"):
        rehearsal.main()


@pytest.mark.long
@pytest.mark.skipif(not CUDA_BUILD, reason="needs PyTorch's CUDA build, on Linux")
def test_a_run_gets_through(tmp_path: Path):
    row = rehearsal.rehearse(rehearsal.ADA, 1, {"n_layer": 2}, rehearsal.build_stand_in(tmp_path), tmp_path)
    assert row["status"] == "finished" and row["how"] == "compiled"
    assert row["taken (GB)"] == pytest.approx(row["predicted (GB)"], rel=0.15)
