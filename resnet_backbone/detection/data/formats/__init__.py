"""Tolerant readers for the files that annotation tools write."""
