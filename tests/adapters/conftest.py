"""Weights files and images for the tests of the adapters."""

import numpy as np
import pytest
import torch
from drawn_networks import randomize

from resnet_backbone import build_model
from resnet_backbone.weights import get_preprocessing, save_weights


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """Function (name, preprocessing) -> (file with metadata, the network in it), random weights."""
    folder, made = tmp_path_factory.mktemp("weights"), {}

    def make(name, preprocessing="msra", **options):
        key = (name, preprocessing, *sorted(options.items()))
        if key not in made:
            torch.manual_seed(1)
            found = get_preprocessing(preprocessing)
            if name.startswith("resnet") and int(name[6:]) >= 50:
                options["stride_in_1x1"] = found.stride_in_1x1
            if name.startswith("vgg"):
                options["out_features"] = ("pool5",)  # the head is large
            network = randomize(build_model(name, **options))
            path = folder / f"{len(made)}_{name}.safetensors"
            save_weights(network, path, found)
            made[key] = path, network
        return made[key]

    return make


@pytest.fixture(scope="session")
def photo_bytes():
    """A colorful picture, RGB, (1, 3, 96, 128): no two channels are alike."""
    y, x = np.mgrid[0:96, 0:128]
    red = 128 + 100 * np.sin(x / 9.0)
    green = 90 + 80 * np.cos(y / 7.0) * np.sin(x / 31.0)
    blue = 60 + x * 0.5 + y * 0.6
    pixels = np.stack([red, green, blue], axis=0).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels)[None]


@pytest.fixture(scope="session")
def photo(photo_bytes):
    """The same in 0..1, (3, 96, 128)."""
    return photo_bytes[0] / 255
