"""Configs by path and by name."""

from pathlib import Path

import pytest

from resnet_backbone.runtime.configs import config_folder, find_config

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = CONFIGS / "detection" / "voc" / "faster_rcnn_R_50_FPN.yaml"


@pytest.mark.parametrize(
    "name",
    [
        "voc/faster_rcnn_R_50_FPN",
        "voc/faster_rcnn_R_50_FPN.yaml",
        "detection/voc/faster_rcnn_R_50_FPN",
        "configs/detection/voc/faster_rcnn_R_50_FPN.yaml",
        FILE,
    ],
)
def test_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name, "detection") == FILE
    other = find_config("cifar10/resnet20", "classification")
    assert other == CONFIGS / "classification" / "cifar10" / "resnet20.yaml"


def test_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc").mkdir()
    own = Path("voc", "faster_rcnn_R_50_FPN.yaml")
    own.write_text("")
    assert find_config(own, "detection") == own


@pytest.mark.parametrize(
    "name, hint",
    [
        ("voc/fastr_rcnn_R_50_FPN", "did you mean voc/faster_rcnn_R_50_FPN?"),
        (
            "configs/detection/voc/faster_rcnn_R50_FPN.yaml",
            "did you mean voc/faster_rcnn_R_50_FPN?",
        ),
        ("/nowhere/else", f"no such config file; Ready ones are in {CONFIGS / 'detection'}"),
    ],
)
def test_typos(name, hint):
    with pytest.raises(ValueError) as caught:
        find_config(name, "detection")
    assert str(caught.value).startswith(f"{name}: no such config file; ")
    assert hint in str(caught.value)


def test_what_the_wheel_has_comes_first(tmp_path, monkeypatch):
    assert config_folder() == CONFIGS
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr("resnet_backbone.runtime.configs.PACKAGE", tmp_path)
    assert config_folder() == tmp_path / "configs"
