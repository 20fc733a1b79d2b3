"""Weights and checkpoints of whole detectors."""
