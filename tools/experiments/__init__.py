"""Questions answered by training: a tool for yours, and the five that this project was started from."""

from tools.experiments.findings import answer
from tools.experiments.tool import compare_sweep, curves, equal_size, plot_sweep, sweep

__all__ = ["answer", "compare_sweep", "curves", "equal_size", "plot_sweep", "sweep"]
