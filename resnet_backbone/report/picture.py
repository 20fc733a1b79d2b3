"""What all pictures share: colours, and writing a PNG in one go."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")


def assign_colors(keys: Iterable[Hashable]) -> dict[Hashable, str]:
    """A colour for each different key, in order of appearance; after seven they repeat."""
    return {key: COLORS[i % len(COLORS)] for i, key in enumerate(dict.fromkeys(keys))}


def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a picture (120 dpi): complete or not at all; its folder is made."""
    FigureCanvasAgg(figure)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
