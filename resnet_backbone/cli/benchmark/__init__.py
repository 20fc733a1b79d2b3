"""What tools/benchmark.py measures: candidates that take turns, and their table."""
