"""The fields of the notebook's Config that concern text: for tests that do without the notebook."""

from dataclasses import dataclass
from types import SimpleNamespace

from data_utils import Batches, TokenData
from machinery import Machine


@dataclass(frozen=True)
class TextConfig:
    source: str
    val_source: str = ""
    val_fraction: float = 0.2
    text_column: str = "text"
    split_on: str = ""
    tokenizer: str = "bytes"
    vocab_size: int = 257
    block_size: int = 16
    data_dir: str = "data"
    runs_dir: str = "runs"
    batch_tokens: int = 64
    micro_batch: int = 4
    seed: int = 0
    max_steps: int = 0
    max_tokens: int = 0
    max_hours: float = 1.0


def batches_at(data: TokenData, config: TextConfig, device: str, position: int) -> Batches:
    """The batches of a run that has read so many windows."""
    at = SimpleNamespace(tokens=position * config.block_size, micro_batch=config.micro_batch)
    return Batches(data, config, Machine.find(device), at)
