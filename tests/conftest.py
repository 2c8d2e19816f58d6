"""Shared by all tests: the notebook's definitions, one thread per worker, CUDA tests skipped where there is none."""

import gc
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # also for the kernels and processes that tests start
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("WANDB_API_KEY", None)

import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from machinery.notebook import load_definitions  # noqa: E402

matplotlib.use("agg")
torch.set_num_threads(1)
if os.name != "nt":  # where a wrong descriptor is an error
    os.fsync = lambda descriptor: None  # milliseconds, a hundred times a run; what a power cut leaves is a drill
LM = load_definitions()
# A law by which runs end at 3 bits per byte, all of them
FLAT_LAW = {"floor": 2.0, "alpha": 1e-9, "beta": 1e-9, "n": 0.0, "d": 1.0, "error": [[1e3, 0.5]]}


@pytest.fixture
def lm():
    """The notebook's definitions."""
    return LM


@pytest.fixture
def tiny(lm):
    """tiny(**overrides): the smallest config that still has every part."""

    def make(**overrides):
        values = {"n_embd": 32, "n_ffn": 48, "block_size": 16, "vocab_size": 257, "tokenizer": "bytes"}
        values |= {"batch_tokens": 64, "micro_batch": 4}
        return lm.Config.from_preset("smoke", **values | overrides)

    return make


@pytest.fixture
def texts(tmp_path):
    """A folder of text files with known contents; returns (glob, contents)."""
    contents = [f"Document {i}.\r\n" + f"line é {i} 🙂\n" * (20 + i) for i in range(40)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, content in enumerate(contents):
        (folder / f"{i:02d}.txt").write_bytes(content.encode())
    return str(folder / "*.txt"), contents


def pytest_configure(config):
    """Tests are of the CPU, also where there is a GPU: that is tested by `pytest -m cuda`."""
    if "cuda" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """The notebook comes first: it takes longest, and no core has to wait for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")


def pytest_runtest_setup(item):
    gc.freeze()  # a run collects garbage once, which takes 0.3 s beside all that tests import
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine, or not asked for with -m cuda")
