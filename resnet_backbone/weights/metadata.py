"""What a safetensors file of ours says of itself, as the texts of its header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from resnet_backbone.weights.checkpoint import ModelSpec, Origin
from resnet_backbone.weights.preprocessing import Preprocessing, WeightsError, one_line

METADATA_KEY = "resnet_backbone.preprocessing"
MODEL_KEY = "resnet_backbone.model"  # the network's name, number of classes and options
ORIGIN_KEY = "resnet_backbone.origin"
SCHEMA_KEY = "resnet_backbone.schema"  # absent in files of before version 1
SCHEMA = 1
MEAN_IMAGE_KEY = "preprocessing.mean_image"  # a tensor beside the weights


class Notes(NamedTuple):
    """What a file says of itself; None for parts that were not written.

    Attributes:
        has_mean_image: it holds a per-pixel mean beside the channel means.
    """

    preprocessing: Preprocessing | None
    model: ModelSpec | None
    origin: Origin | None
    has_mean_image: bool = False


def write_notes(
    preprocessing: Preprocessing, model: ModelSpec | None = None, origin: Origin | None = None
) -> dict[str, str]:
    """The header's texts; what is None is left out."""
    parts = {METADATA_KEY: preprocessing, MODEL_KEY: model, ORIGIN_KEY: origin}
    texts = {key: part.to_json() for key, part in parts.items() if part is not None}
    return {SCHEMA_KEY: str(SCHEMA), **texts}


def read_notes(metadata: Mapping[str, str], where: str) -> Notes:
    """What a header says.

    Args:
        metadata: of any safetensors file.
        where: the file, for messages.

    Raises:
        WeightsError: written by a later version of this package, or unreadable.
    """
    schema = metadata.get(SCHEMA_KEY, "0")
    if not schema.isdecimal() or len(schema) > 9:
        raise WeightsError(f"{where}: unreadable {SCHEMA_KEY} in its metadata ({schema[:80]!r})")
    if int(schema) > SCHEMA:
        raise WeightsError(
            f"{where} was written in form {schema}, this version of resnet_backbone reads "
            f"up to {SCHEMA}: install a newer one"
        )
    parts = []
    for key, kind in ((METADATA_KEY, Preprocessing), (MODEL_KEY, ModelSpec), (ORIGIN_KEY, Origin)):
        try:
            parts.append(kind.from_json(metadata[key]) if key in metadata else None)
        except (ValueError, RecursionError) as error:
            raise WeightsError(
                f"{where}: unreadable {key} in its metadata ({one_line(error)})"
            ) from error
    return Notes(*parts)
