"""Key maps against the libraries themselves: strict loads both ways, the same logits."""

import pytest
import timm
import torch
import torchvision
from drawn_networks import meta_state, on_meta, randomize
from libraries import BOTTLENECKS, CLASSES, LIBRARIES, assert_close, assert_same, detectron2_resnet
from torch import nn

from resnet_backbone.weights.architecture import infer_models
from resnet_backbone.weights.checkpoint import ModelSpec
from resnet_backbone.weights.keymaps import LAYOUTS, recognize
from resnet_backbone.weights.keymaps.table import without_counters

RESNETS = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
VGGS = [f"vgg{depth}{suffix}" for depth in (11, 13, 16, 19) for suffix in ("", "_bn")]
STRIDES = {"torchvision": (False,), "timm": (False,)}
NETWORKS = [
    (library, name, stride)
    for library in LIBRARIES
    for name in RESNETS
    for stride in (STRIDES.get(library, (False, True)) if name in BOTTLENECKS else (False,))
] + [(library, name, False) for library in ("torchvision", "timm") for name in VGGS]

QUICK = [(library, "resnet18", False) for library in LIBRARIES]
QUICK += [("torchvision", "resnet50", False), ("huggingface", "resnet50", False)]
QUICK += [("huggingface", "resnet50", True), ("detectron2", "resnet50", True)]
QUICK += [("timm", "vgg11", False), ("torchvision", "vgg11_bn", False), ("timm", "vgg11_bn", False)]


def spec_of(name, stride_in_1x1=False):
    options = {"stride_in_1x1": stride_in_1x1} if name in BOTTLENECKS else {}
    return ModelSpec(name, CLASSES, options)


def narrow(library, theirs, ours):
    """VGG's two hidden linear layers are 119 million parameters: narrower ones in both."""
    widths = [(512 * 49, 16), (16, 16), (16, CLASSES)]
    ours.fc6, ours.fc7, ours.linear = (nn.Linear(*pair) for pair in widths)
    if library == "torchvision":
        for index, pair in zip((0, 3, 6), widths, strict=True):
            theirs.classifier[index] = nn.Linear(*pair)
    else:
        theirs.pre_logits.fc1 = nn.Conv2d(512, 16, 7)
        theirs.pre_logits.fc2 = nn.Conv2d(16, 16, 1)
        theirs.head.fc = nn.Linear(16, CLASSES)


@pytest.mark.parametrize("library, name, stride", QUICK)
@torch.no_grad()
def test_both_ways(library, name, stride):
    """Theirs in our network, and ours in theirs: strict, the same logits, the same tensors."""
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs, spec = LIBRARIES[library](name, stride), spec_of(name, stride)
        ours = spec.build()
    if name.startswith("vgg"):
        narrow(library, theirs, ours)
    randomize(theirs.to_empty(device="cpu"))
    ours.to_empty(device="cpu").eval()
    layout, images = LAYOUTS[library], torch.randn(1, 3, 64, 64)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}

    tensors = layout.to_ours(state)
    ours.load_state_dict(tensors, strict=True)
    logits = theirs(images)
    assert_close(ours(images), logits)

    back = layout.from_ours(tensors, spec)
    theirs.load_state_dict(back, strict=True)
    assert_same(layout.to_ours(back), tensors)
    if name.endswith("_bn"):  # biases before a norm have become part of its mean
        assert_close(theirs(images), logits)
        assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in state.items()}
    else:
        assert_same(back, without_counters(state) if library == "detectron2" else state)


@pytest.mark.parametrize("library, name, stride", NETWORKS)
def test_keys_and_shapes(library, name, stride):
    """Of every network, without values."""
    spec, layout = spec_of(name, stride), LAYOUTS[library]
    state = on_meta(LIBRARIES[library], name, stride).state_dict()
    ours = without_counters(on_meta(spec.build).state_dict())
    tensors = layout.to_ours(state)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in ours.items()}
    assert infer_models(tensors) == [ModelSpec(name, CLASSES)]
    back = layout.from_ours(tensors, spec)
    expected = without_counters(state) if library == "detectron2" else state
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in expected.items()}
    shared = {"timm": "torchvision" if name.startswith("resnet") else "timm"}
    assert recognize(state) == {**shared, "detectron2": "resnet_backbone"}.get(library, library)


def test_nothing_is_copied_or_changed():
    state = torchvision.models.resnet18().state_dict()
    keys = list(state)
    tensors = LAYOUTS["torchvision"].to_ours(state)
    assert list(state) == keys
    assert tensors["res3.0.shortcut.weight"] is state["layer2.0.downsample.0.weight"]
    back = LAYOUTS["torchvision"].from_ours(tensors, ModelSpec("resnet18"))
    assert back["layer2.0.downsample.0.weight"] is state["layer2.0.downsample.0.weight"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_biases_are_not_changed_in_place(batch_norm):
    name = "vgg11_bn" if batch_norm else "vgg11"
    model = on_meta(torchvision.models.get_model, name).features
    state = randomize(model.to_empty(device="cpu")).state_dict(prefix="features.")
    before = {key: value.clone() for key, value in state.items()}
    for library in ("torchvision", "timm"):
        tensors = LAYOUTS[library].to_ours(state)
        LAYOUTS[library].from_ours(tensors, infer_models(tensors)[0])
        assert_same(state, before)


def test_transformers_networks_without_head():
    """ResNetModel and ResNetBackbone have no prefix; ResNetForImageClassification has one."""
    transformers = pytest.importorskip("transformers")
    layout = LAYOUTS["huggingface"]
    config = transformers.ResNetConfig(downsample_in_bottleneck=True)
    for kind in (transformers.ResNetModel, transformers.ResNetBackbone):
        state = on_meta(kind, config).state_dict()
        assert recognize(state) == "huggingface"
        tensors = layout.to_ours(state)
        assert infer_models(tensors) == [ModelSpec("resnet50")]
        assert layout.from_ours(tensors, ModelSpec("resnet50")).keys() == state.keys()


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_other_norms_of_detectron2(norm):
    theirs = on_meta(detectron2_resnet, "resnet50", norm=norm)
    tensors = LAYOUTS["detectron2"].to_ours(theirs.state_dict())
    spec = infer_models(tensors)[0]
    assert spec == ModelSpec("resnet50", None, {"norm": "GN"} if norm == "GN" else {})
    back = LAYOUTS["detectron2"].from_ours(tensors, spec)
    theirs.load_state_dict(back, strict=True, assign=True)


def test_timm_group_norm():
    """Its tensors are those of batch norms without their statistics: it is not guessed at."""
    state = on_meta(timm.create_model, "resnet50_gn").state_dict()
    for name in (recognize(state), "timm"):
        with pytest.raises(ValueError, match="norm of stem.conv1 has no running_mean, but torchv"):
            LAYOUTS[name].to_ours(state)


@pytest.mark.parametrize(
    "library, spec, message",
    [
        ("torchvision", ModelSpec("resnet18", 9, {"shortcut": "A"}), "resnet18 has shortcut='A'"),
        ("detectron2", ModelSpec("resnet50", 9, {"shortcut": "C"}), "do .*: resnet_backbone$"),
        ("timm", ModelSpec("plain18"), "plain18 has shortcut='none'.*: resnet_backbone$"),
        ("torchvision", ModelSpec("cifar_resnet20"), "only this package has cifar_resnet20"),
        ("timm", ModelSpec("bn_inception"), "only this package has bn_inception"),
        ("caffe2", ModelSpec("resnet18", 9, {"activation": "prelu"}), "activation='prelu'"),
        ("timm", ModelSpec("resnet50", 9, {"caffe_pool": True}), "caffe_pool=True"),
        ("timm", ModelSpec("resnet50", 9, {"norm": "GN"}), "'GN'.*: detectron2, caffe2, "),
        ("detectron2", ModelSpec("resnet50", 9, {"norm": ""}), "norm=''.*: resnet_backbone$"),
        ("huggingface", ModelSpec("vgg16"), "vgg16 has norm=''.*torchvision, timm, detec"),
        ("caffe2", ModelSpec("vgg16_bn"), "norm='BN'.*: torchvision, timm, detectron2, "),
        (
            "torchvision",
            ModelSpec("resnet50", 9, {"stride_in_1x1": True}),
            "stride_in_1x1=False.*: huggingface, detectron2, caffe2, resnet_backbone$",
        ),
        ("torchvision", ModelSpec("resnet18", 9, {"in_channels": 1}), "3 channels, not 1.*: timm"),
        ("timm", ModelSpec("resnet50", 9, {"dilations": [1, 1, 1, 2]}), "dilates.*: detectron2"),
        ("timm", ModelSpec("timm/resnet50"), "unknown model 'timm/resnet50'"),
    ],
)
def test_networks_that_a_library_lacks(library, spec, message):
    name = spec.name.removeprefix("timm/")
    with pytest.raises(ValueError, match=message):
        LAYOUTS[library].from_ours(meta_state(name), spec)


def test_what_does_not_differ_is_not_refused():
    for options in ({"norm": "FrozenBN"}, {"norm": "SyncBN"}, {"stride_in_1x1": False}):
        for library in ("torchvision", "timm", "huggingface", "detectron2", "caffe2"):
            tensors = meta_state("resnet50")
            LAYOUTS[library].from_ours(tensors, ModelSpec("resnet50", 1000, options))
    tensors = meta_state("resnet18")
    LAYOUTS["torchvision"].from_ours(tensors, ModelSpec("resnet18", 9, {"stride_in_1x1": True}))


@pytest.mark.parametrize("library", ["torchvision", "timm", "huggingface", "caffe2"])
def test_tensors_that_are_not_of_the_network(library):
    tensors = {**meta_state("resnet18"), "res2.0.gate.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="key 'res2.0.gate.weight' is not one of"):
        LAYOUTS[library].from_ours(tensors, ModelSpec("resnet18"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnext50_32x4d", "grouped convolution .ResNeXt"),
        ("wide_resnet50_2", "a wide ResNet"),
        ("resnet50d", "'conv1.0.weight' .* deep stem of ResNet-C/D"),
        ("seresnet50", "squeeze-and-excitation"),
        ("ecaresnet50t", "ResNet-C/D"),
        ("resnet26", r"no ResNet of the paper has \(2, 2, 2, 2\) bott"),
        ("resnetv2_50", "keys belong to no ResNet or VGG"),
        ("alexnet", "no VGG has its convolutions at these indices"),
        ("convnext_atto", "keys belong to no ResNet or VGG"),
    ],
)
def test_relatives_are_refused(name, message):
    has_it = name in torchvision.models.list_models()
    library = torchvision.models.get_model if has_it else timm.create_model
    state = on_meta(library, name).state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        infer_models(LAYOUTS[recognize(state)].to_ours(state))
    assert "\n" not in str(caught.value)


def test_relatives_in_transformers_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], downsample_in_first_stage=True
    )
    state = on_meta(transformers.ResNetForImageClassification, config).state_dict()
    with pytest.raises(ValueError, match="tensors of resnet34 with shortcut='C' are missing"):
        infer_models(LAYOUTS[recognize(state)].to_ours(state))


def test_cifar_networks_of_others_are_refused():
    keys = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight"]
    state = {key: torch.ones(16, 3, 3, 3) for key in keys}
    with pytest.raises(ValueError, match="layer2.0.shortcut.0.* shortcut of a CIFAR network"):
        LAYOUTS[recognize(state)].to_ours(state)
    del state["layer2.0.shortcut.0.weight"]
    with pytest.raises(ValueError, match="norm of stem.conv1 has no running_mean"):
        LAYOUTS[recognize(state)].to_ours(state)


def test_unknown_layouts():
    with pytest.raises(ValueError, match="caffe2; the first are a.weight, b.weight, c$"):
        recognize({key: torch.ones(1) for key in ("a.weight", "b.weight", "c", "d")})
    with pytest.raises(ValueError, match="the first are none"):
        recognize({})
