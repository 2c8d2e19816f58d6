"""Questions answered by training: a tool for yours, and the four that this project was started from."""

from tools.experiments.findings import answer
from tools.experiments.tool import curves, equal_size, plot_sweep, sweep

__all__ = ["answer", "curves", "equal_size", "plot_sweep", "sweep"]
