"""Tables and pictures from result files; needs neither Detectron2 nor a GPU."""

from .curves import load_metrics, plot_training

__all__ = ["load_metrics", "plot_training"]
