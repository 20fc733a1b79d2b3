"""Tables and pictures from result files and weights; needs neither Detectron2 nor a GPU."""

from resnet_backbone.report.curves import load_metrics, plot_training
from resnet_backbone.report.errors import plot_errors
from resnet_backbone.report.responses import layer_responses, plot_responses
from resnet_backbone.report.runs import Run, load_run
from resnet_backbone.report.table import results_table

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
