"""Tables and plots from run folders; only :mod:`.document` and what it reads need Detectron2."""
