"""What the benchmarks share: the notebook's definitions and where results go."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

from notebook_utils import load_definitions  # noqa: E402

lm = load_definitions()
