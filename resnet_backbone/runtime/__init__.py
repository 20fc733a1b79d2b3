"""Shared by all runs: processes, signals, seeds, atomic writes, run folders, one-line errors."""
