"""The commands, one module each: run as ``python tools/COMMAND.py``."""
