"""Questions answered by training: a tool for yours, and the four that this project was started from."""

from experiments.findings import answer
from experiments.tool import curves, equal_size, plot_sweep, sweep

__all__ = ["answer", "curves", "equal_size", "plot_sweep", "sweep"]
