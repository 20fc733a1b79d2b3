"""Networks told from tensors: every network with every visible option, and what is refused."""

import itertools

import pytest
import torch
from drawn_networks import meta_state
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from resnet_backbone.models import list_models
from resnet_backbone.weights import architecture
from resnet_backbone.weights.architecture import constructor_options, infer_models, shapes_of
from resnet_backbone.weights.checkpoint import ModelSpec

SHORTCUTS = ("A", "B", "C", "highway", "none")
NORMS = ("BN", "GN", "")
ACTIVATIONS = ("relu", "prelu")


def visible_options(spec):
    """All options that tensors may show, with the defaults of the name."""
    options = {**constructor_options(spec.name), **spec.options}
    return {key: options[key] for key in architecture.VISIBLE_OPTIONS if key in options}


def check_found(name, num_classes, options):
    """Infers a network from its tensors; the one that was built must be found, and minimally."""
    state = meta_state(name, num_classes, **options)
    expected = visible_options(ModelSpec(name, num_classes, options))
    found = infer_models(state)
    matching = [spec for spec in found if visible_options(spec) == expected]
    assert len(matching) == 1, found
    for spec in found:
        again = meta_state(spec.name, spec.num_classes, **spec.options)
        assert shapes_of(again) == shapes_of(state)
        defaults = constructor_options(spec.name)
        assert all(defaults[key] != value for key, value in spec.options.items()), spec
    hidden = expected.get("shortcut") in ("A", "none")
    assert len(found) == (2 if hidden else 1)
    return matching[0]


NAMES = [*list_models(), "cifar_resnet8", "cifar_plain26"]
NAMES.remove("cifar_resnet1202")
DEEPEST = pytest.param("cifar_resnet1202", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*NAMES, DEEPEST])
def test_every_name(name):
    found = check_found(name, 7, {})
    assert found == ModelSpec(name, 7)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(
    "name, norms",
    [("resnet18", NORMS), ("resnet50", ("BN",)), ("cifar_resnet8", ("BN", ""))],  # GN needs 32
)
def test_options_of_residual_networks(name, norms, shortcut):
    for norm, activation in itertools.product(norms, ACTIVATIONS):
        options = dict(shortcut=shortcut, norm=norm, activation=activation, in_channels=4)
        found = check_found(name, 10, options)
        plain = name.replace("resnet", "plain")
        has_plain = shortcut == "none" and name != "resnet50"
        assert found.name == (plain if has_plain else name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["vgg11", "vgg16", "prelu_net_b", "bn_inception"])
def test_options_of_other_networks(name, norm):
    for activation in ACTIVATIONS:
        options = dict(norm=norm, activation=activation, in_channels=1)
        found = check_found(name, 3, options)
        is_vgg_bn = name.startswith("vgg") and norm == "BN"
        assert found.name == (f"{name}_bn" if is_vgg_bn else name)


@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN"])
def test_other_batch_norms_have_the_tensors_of_batch_norm(norm):
    assert infer_models(meta_state("resnet18", norm=norm)) == [ModelSpec("resnet18", 1000)]


@pytest.mark.parametrize(
    "name, stages, found",
    [
        ("resnet18", ("res2", "res3", "res4", "res5"), "resnet18"),
        ("resnet152", ("res3", "res5"), "resnet152"),
        ("vgg19_bn", ("conv4", "conv5"), "vgg19_bn"),
        ("cifar_resnet20", ("res4",), "cifar_resnet20"),
        ("resnet101", ("res4",), "resnet101"),
        ("resnet101", ("res3",), "resnet50"),  # the same blocks so far
        ("resnet34", ("res2",), "resnet34"),
        ("resnet152", ("stem",), "resnet18"),
        ("vgg16", ("conv4",), "vgg16"),
        ("vgg19", ("conv2",), "vgg13"),
        ("prelu_net_c", ("conv2",), "prelu_net_c"),
        ("prelu_net_c", ("conv1",), "prelu_net_a"),
        ("bn_inception", ("conv2",), "bn_inception"),
        ("bn_inception", ("inception4",), "bn_inception"),
    ],
)
def test_backbones_and_those_that_stop_early(name, stages, found):
    state = meta_state(name, out_features=stages)
    assert infer_models(state)[0] == ModelSpec(found)
    assert architecture.deepest_stage(state) == stages[-1]
    assert shapes_of(meta_state(found, out_features=stages)) == shapes_of(state)


def test_stages_without_projection_may_be_plain():
    """Up to res2 a ResNet-18 has no projection: its identities have no tensors."""
    state = meta_state("resnet18", out_features=["res2"])
    assert infer_models(state) == [ModelSpec("resnet18"), ModelSpec("plain18")]


def test_vgg_without_its_last_layer():
    """What a VGG detector has: fc6 and fc7, no classifier."""
    state = meta_state("vgg16")
    del state["linear.weight"], state["linear.bias"]
    assert infer_models(state) == [ModelSpec("vgg16")]
    del state["fc7.bias"]
    with pytest.raises(ValueError, match="1 tensors of vgg16 are missing, the first is fc7.bias"):
        infer_models(state)


STATES = {name: meta_state(name) for name in ("resnet18", "cifar_resnet8", "vgg11", "vgg13_bn")}
STATES["resnet50"] = meta_state("resnet50", activation="prelu")
STATES["resnet34"] = meta_state("resnet34", norm="", shortcut="highway")
STATES["plain18"] = meta_state("plain18", norm="GN")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_missing_tensor_is_an_error(data):
    state = dict(STATES[data.draw(st.sampled_from(sorted(STATES)))])
    del state[data.draw(st.sampled_from(sorted(state)))]
    with pytest.raises(ValueError) as caught:
        infer_models(state)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_other_shape_is_an_error(data):
    """All but the sizes that networks may choose: channels in and classes."""
    state = dict(STATES[data.draw(st.sampled_from(sorted(STATES)))])
    key = data.draw(st.sampled_from(sorted(state)))
    shape = list(state[key].shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    change = data.draw(st.sampled_from([-1, 1, 5, None]))
    if change is None:
        shape.append(1)
    else:
        shape[axis] += change
    state[key] = torch.empty(shape, device="meta")
    free_input = key in ("stem.conv1.weight", "stem.weight", "conv1.0.weight") and axis == 1
    if free_input and change is not None:
        assert infer_models(state)[0].options["in_channels"] == shape[1]
        return
    with pytest.raises(ValueError):
        infer_models(state)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(STATES)),
    st.sampled_from(["", "res2.", "res2.0.", "res6.0.", "conv1.0.", "conv1.3.", "stem.", "fc6."]),
    st.text(max_size=12) | st.sampled_from(["bias", "se.fc1.weight", "conv4.weight"]),
)
def test_any_unknown_key_is_an_error(name, prefix, suffix):
    key = prefix + suffix
    assume(key not in STATES[name])
    with pytest.raises(ValueError):
        infer_models({**STATES[name], key: torch.empty(1, device="meta")})


def replaced(name, key, *shape):
    return {**STATES[name], key: torch.empty(shape, device="meta")}


def without(name, *starts):
    return {k: v for k, v in STATES[name].items() if not k.startswith(starts)}


THREE_BLOCKS = replaced("cifar_resnet8", "res3.1.conv1.weight", 32, 32, 3, 3)
MANY_BLOCKS = replaced("cifar_resnet8", "res2.100000000.conv1.weight", 1)


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "of which every network.* there is none at all"),
        ({"blocks.0.attn.qkv.weight": torch.ones(1)}, "there is blocks.0.attn.qkv.weight"),
        (without("resnet18", "res3"), "there are tensors of res5, but none of res3"),
        (without("resnet18", "res3.0"), "res3 has tensors of res3.1, but not of all blocks before"),
        (without("resnet18", "res3.1"), r"no ResNet of the paper has \(2, 1, 2, 2\) basic"),
        (without("resnet18", "res5"), r"missing, the first is res5"),
        (without("vgg11", "conv5.1"), r"no VGG has \(1, 1, 2, 2, 1\) convolutions"),
        (without("cifar_resnet8", "res4"), "missing, the first is res4"),
        (THREE_BLOCKS, r"the same number of blocks in each stage, not \(1, 2, 1\)"),
        (replaced("resnet18", "stem.conv1.weight", 64, 3, 3, 3), "3x3, not 7x7: .* another stem"),
        (replaced("resnet50", "res2.0.conv2.weight", 64, 2, 3, 3), "grouped .*ResNeXt"),
        (
            replaced("resnet18", "linear.weight", 9),
            r"linear.weight has shape \(9,\), but needs 2 dimen",
        ),
        (replaced("resnet18", "res4.0.conv1.weight", 1), r"res4.0.conv1.weight has shape"),
        (replaced("resnet18", "res2.0.se.weight", 1), "resnet18 has no res2.0.se.weight"),
        (MANY_BLOCKS, "shape .1,., but needs 4 dimensions"),
        (without("resnet18", "stem.conv1.norm"), "neither a norm .* nor stem.conv1.bias"),
        (without("resnet18", "res4.0.conv2.norm"), "missing, the first is res4.0.conv2.norm"),
    ],
)
def test_refusals(state, message):
    with pytest.raises(ValueError, match=message):
        infer_models(state)


def test_tensors_of_a_stated_network():
    architecture.check_tensors(STATES["plain18"], ModelSpec("plain18", 1000, {"norm": "GN"}))
    with pytest.raises(ValueError, match="resnet18 with norm='GN' are missing, the first is res3"):
        architecture.check_tensors(STATES["plain18"], ModelSpec("resnet18", 1000, {"norm": "GN"}))
    with pytest.raises(ValueError, match=r"linear.weight has shape \(1000, 512\), but"):
        architecture.check_tensors(STATES["resnet18"], ModelSpec("resnet18", 5))


def test_spelling():
    options = {"norm": "GN", "shortcut": "A", "stride_in_1x1": True, "dilations": (1, 1, 1, 2)}
    found = architecture.spell(ModelSpec("resnet50", 9, options))
    assert found == "resnet50 with norm='GN', shortcut='A'"
    assert architecture.spell(ModelSpec("vgg16")) == "vgg16"


def test_constructor_options():
    assert constructor_options("cifar_plain14")["shortcut"] == "none"
    assert constructor_options("vgg16_bn")["norm"] == "BN"
    with pytest.raises(ValueError, match="unknown model 'timm/resnet50'"):
        constructor_options("timm/resnet50")
