"""Tables and pictures from result files and weights; needs neither Detectron2 nor a GPU."""

from .curves import load_metrics, plot_training
from .errors import plot_errors
from .responses import layer_responses, plot_responses
from .runs import Run, load_run
from .table import results_table

__all__ = [
    "Run",
    "layer_responses",
    "load_metrics",
    "load_run",
    "plot_errors",
    "plot_responses",
    "plot_training",
    "results_table",
]
