"""Backbones, heads and poolers for Detectron2."""
