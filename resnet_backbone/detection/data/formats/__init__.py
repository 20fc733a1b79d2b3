"""The files that annotation tools write, read as far as they can be."""
