"""Our entries in timm: every check of timm's own tests/test_models.py, in our words, and weights.

timm's tests are not in its wheel. They run over ``timm.list_models()``; ours over the registered
paper_* names, with the inputs' sizes cut down (their tests do that too). The checks of theirs that
do not apply: those of hosted ``test_*`` models' logits, and of downloaded weights, whose place here
is taken by the tests of ``from_checkpoint``.
"""

import math
from dataclasses import replace

import pytest
import timm
import torch
from drawn_networks import assert_close
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torchvision.models import feature_extraction

from resnet_backbone import build_model
from resnet_backbone.adapters.timm_models import NETWORKS, PaperResNet, from_checkpoint
from resnet_backbone.weights import InputNormalizer, Preprocessing, WeightsError
from resnet_backbone.weights.load import save_weights
from resnet_backbone.weights.preprocessing import get_preprocessing

NAMES = [f"paper_{name}" for name in NETWORKS]
QUICK = ["paper_resnet18", "paper_plain18"]
STRIDES = [2, 4, 8, 16, 32]

SLOW = {n: pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in QUICK}
every_entry = pytest.mark.parametrize("name", [*QUICK, *SLOW.values()])
some_entries = pytest.mark.parametrize("name", ["paper_resnet18", SLOW["paper_resnet50"]])


def images(size=64, batch=1, channels=3):
    return torch.randn(batch, channels, size, size)


def test_entries_are_listed():
    assert timm.list_models("paper_*") == sorted(NAMES, key=timm.models._registry._natural_key)
    assert set(timm.list_models(module="timm_models")) == set(NAMES)
    assert not timm.list_pretrained("paper_*")


@every_entry
def test_forward(name):
    model = timm.create_model(name).eval()
    x = images()
    logits = model(x)
    assert logits.shape == (1, 1000) and torch.isfinite(logits).all()
    model.set_grad_checkpointing()
    assert torch.allclose(model(x), logits, rtol=1e-4, atol=1e-5)


@every_entry
def test_backward(name):
    model = timm.create_model(name, num_classes=42).train()
    logits = model(images(batch=2))
    logits.mean().backward()
    assert logits.shape == (2, 42) and torch.isfinite(logits).all()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


@every_entry
def test_default_cfg(name):
    model = timm.create_model(name).eval()
    keys, cfg = model.state_dict().keys(), model.default_cfg
    assert cfg["first_conv"] + ".weight" in keys and cfg["classifier"] + ".weight" in keys
    assert model.num_classes == 1000 and model.head_hidden_size > 0
    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        maps = model.forward_features(x)
        pooled = model.forward_head(maps, pre_logits=True)
        assert maps.shape == (1, model.num_features, *cfg["pool_size"])
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), maps)
        model = timm.create_model(name, num_classes=0, global_pool="").eval()
        assert model(x).shape == maps.shape


def check_levels(maps, channels, reductions, size):
    assert len(maps) == len(channels)
    for x, count, reduction in zip(maps, channels, reductions, strict=True):
        assert x.shape == (1, count, math.ceil(size / reduction), math.ceil(size / reduction))
        assert torch.isfinite(x).all()


@every_entry
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    info = model.feature_info
    assert info.reduction() == STRIDES
    with torch.no_grad():
        check_levels(model(images(96)), info.channels(), info.reduction(), 96)


@pytest.mark.parametrize("out_indices", [(1, 2, 3, 4), (0, 2), (-1,), 2])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_every_feature_class(feature_cls, out_indices):
    torch.manual_seed(3)
    whole = timm.create_model("paper_resnet18").eval()
    torch.manual_seed(3)
    options = dict(features_only=True, out_indices=out_indices, feature_cls=feature_cls)
    model = timm.create_model("paper_resnet18", **options).eval()
    x = images()
    with torch.no_grad():
        maps = model(x)
        wanted = whole.forward_intermediates(x, intermediates_only=True)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    indices = range(5)[-out_indices:] if isinstance(out_indices, int) else out_indices
    assert len(maps) == len(indices)
    for index, channels, x in zip(indices, model.feature_info.channels(), maps, strict=True):
        assert torch.allclose(x, wanted[index], rtol=1e-4, atol=1e-5) and x.shape[1] == channels


@some_entries
def test_forward_intermediates(name):
    model = timm.create_model(name).eval()
    info, x = timm.models.FeatureInfo(model.feature_info, 5), images(96)
    last, maps = model.forward_intermediates(x)
    check_levels(maps, info.channels(), info.reduction(), 96)
    assert torch.equal(last, model.forward_features(x))
    for stop_early, expected in ((True, maps[2]), (False, last)):
        final, some = model.forward_intermediates(x, [1, 2], stop_early=stop_early)
        assert all(map(torch.equal, some, maps[1:3])) and torch.equal(final, expected)
    model.set_grad_checkpointing()
    assert torch.allclose(model.forward_intermediates(x)[0], last, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")


def traced(model):
    """torchvision's feature extractor of the logits, with timm's settings of the tracer."""
    settings = dict(leaf_modules=get_notrace_modules(), param_shapes_constant=True)
    settings["autowrap_functions"] = get_notrace_functions()
    assert feature_extraction.NodePathTracer(**settings).trace(model)
    names = feature_extraction.get_graph_node_names(model, tracer_kwargs=settings)
    nodes = dict(train_return_nodes=names[0][-1:], eval_return_nodes=names[1][-1:])
    return feature_extraction.create_feature_extractor(model, tracer_kwargs=settings, **nodes)


@every_entry
def test_fx(name):
    model = timm.create_model(name, num_classes=42).eval()
    graph, x = traced(model), images(batch=2)
    with torch.inference_mode():
        (logits,), wanted = graph.eval()(x).values(), model(x)
    # batch norms are folded in one of them, and random weights give logits of thousands
    assert torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    (logits,) = graph.train()(x).values()
    logits.mean().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())


@some_entries
def test_torchscript(name):
    """Of the model as it is, of its fx graph, and of the graph of its features."""
    model = timm.create_model(name, scriptable=True).eval()
    features = timm.create_model(name, features_only=True, feature_cls="fx").eval()
    x = images()
    with torch.inference_mode():
        pairs = [(torch.jit.script(model)(x), model(x))]
        pairs += zip(torch.jit.script(traced(model))(x).values(), [model(x)], strict=True)
        pairs += zip(torch.jit.script(features)(x), features(x), strict=True)
    for found, wanted in pairs:
        assert_close(found, wanted)


def test_the_network_is_ours():
    """The same weights in the package's own network give the same maps and logits."""
    model, ours = timm.create_model("paper_resnet50").eval(), build_model("resnet50").eval()
    names = {"conv1.": "stem.conv1.", "fc.": "linear."}
    tensors = {}
    for key, value in model.state_dict().items():
        start = key.split(".")[0] + "."
        tensors[names.get(start, start) + key.removeprefix(start)] = value
    ours.load_state_dict(tensors)
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), ours(x))
        assert torch.equal(model.forward_features(x), ours.forward_features(x)["res5"])


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("options", [{}, {"features_only": True}])
def test_output_stride(output_stride, options):
    model = timm.create_model("paper_resnet18", output_stride=output_stride, **options).eval()
    info = timm.models.FeatureInfo(list(model.feature_info), 5) if not options else None
    reductions = (info or model.feature_info).reduction()
    assert reductions == [min(stride, output_stride) for stride in STRIDES]
    with torch.no_grad():
        x = images()
        last = model(x)[-1] if options else model.forward_features(x)
    assert last.shape[-1] == 64 // output_stride


@pytest.mark.parametrize("pool, factor", [("avg", 1), ("max", 1), ("catavgmax", 2)])
def test_pooling(pool, factor):
    model = timm.create_model("paper_resnet18", global_pool=pool, num_classes=4).eval()
    assert model.head_hidden_size == 512 * factor and model(images()).shape == (1, 4)
    model.reset_classifier(9)
    assert model.global_pool.pool_type == pool and model(images()).shape == (1, 9)
    assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == "fc"
    assert not model.fc.training


def test_options_of_the_network():
    options = dict(stride_in_1x1=False, norm="GN", shortcut="C", device="meta")
    model = timm.create_model("paper_resnet50", **options)
    assert model.res3[0].conv2.stride == (2, 2) and model.res2[1].shortcut is not None
    assert isinstance(model.conv1.norm, torch.nn.GroupNorm) and model.conv1.weight.is_meta
    assert timm.create_model("paper_resnet50", device="meta").res3[0].conv1.stride == (2, 2)
    half = timm.create_model("paper_resnet18", dtype=torch.bfloat16)
    assert half.fc.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("indices, left", [([0], []), ([1, 2], ["res2", "res3"]), (1, None)])
def test_prune(indices, left):
    model = timm.create_model("paper_resnet18").eval()
    wanted, deepest = timm.models._features.feature_take_indices(5, indices)
    assert model.prune_intermediate_layers(indices) == wanted
    kept = [stage for stage in ("res2", "res3", "res4", "res5") if len(getattr(model, stage))]
    assert kept == (["res2", "res3", "res4", "res5"] if left is None else left)
    assert model(images()).shape[1] == model.feature_info[deepest]["num_chs"]


def test_layer_groups():
    model = timm.create_model("paper_resnet18", device="meta")
    for coarse, groups in ((True, 6), (False, 10)):
        found = group_parameters(model, model.group_matcher(coarse))
        assert len(found) == groups, found.keys()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.5)
    rates = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(rates) > 5 and max(rates) == 1


def test_grad_checkpointing_keeps_the_gradients():
    model, x = timm.create_model("paper_resnet18", num_classes=5).train(), images(batch=2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = []
    for enable in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append(model.conv1.weight.grad.clone())
        assert all(int(v) == 1 for k, v in model.state_dict().items() if k.endswith("_tracked"))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_weights_of_other_channels(tmp_path):
    network = build_model("resnet18", num_classes=3, in_channels=1)
    gray = Preprocessing("RGB", 1.0, (0.5,) * 3, (0.25,) * 3)
    save_weights(network, tmp_path / "x.safetensors", gray)
    model = timm.create_model(**from_checkpoint(tmp_path / "x.safetensors")).eval()
    x = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(model(x), network.eval()(x), rtol=1e-4, atol=1e-4)


INPUTS = [("resnet50", "torchvision"), ("resnet18", "torchvision"), ("plain18", "msra")]
INPUTS.append(pytest.param("resnet50", "msra", marks=pytest.mark.slow))


@pytest.mark.parametrize("name, preprocessing", INPUTS)
def test_weights_bring_their_preprocessing(name, preprocessing, weights_file, photo, photo_bytes):
    """timm's own data settings and our network's own input give the same logits."""
    path, network = weights_file(name, preprocessing)
    model = timm.create_model(**from_checkpoint(path)).eval()
    data = timm.data.resolve_data_config(model=model)
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        found = model(((photo - mean) / std)[None])
        wanted = network(InputNormalizer(get_preprocessing(preprocessing))(photo_bytes))
    assert_close(found, wanted)
    assert data["input_size"] == (3, 224, 224) and data["crop_pct"] == 224 / 256
    assert "state_dict" not in model.pretrained_cfg


def test_weights_of_features_other_classes_and_channels(weights_file):
    path, network = weights_file("resnet18", "msra")
    arguments = from_checkpoint(path)
    features = timm.create_model(**arguments, features_only=True, out_indices=(4,)).eval()
    assert torch.equal(features["res5"][0].conv1.weight, network.res5[0].conv1.weight)
    assert features.pretrained_cfg["mean"] == pytest.approx((0.48502, 0.457957, 0.407604), abs=1e-5)
    for classes in (5, 0):
        model = timm.create_model(**arguments, num_classes=classes, in_chans=1)
        assert model.num_classes == classes and model.conv1.weight.shape[1] == 1
        assert torch.equal(model.res5[0].conv1.weight, network.res5[0].conv1.weight)


def test_timm_saves_and_loads_them_with_their_preprocessing(weights_file, tmp_path):
    path, _ = weights_file("resnet50", "msra")
    model = timm.create_model(**from_checkpoint(path))
    timm.models.save_for_hf(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert again.res3[0].conv1.stride == (2, 2)
    assert tuple(again.pretrained_cfg["mean"]) == tuple(model.pretrained_cfg["mean"])
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_checkpoint_of_timms_trainer_loads(tmp_path):
    model = timm.create_model("paper_resnet18")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    again = timm.create_model("paper_resnet18", checkpoint_path=tmp_path / "last.pth.tar")
    assert torch.equal(again.fc.weight, model.fc.weight)


@pytest.mark.parametrize("layout", ["ours", "torchvision"])
@pytest.mark.parametrize("classes", [1000, 5])
def test_files_whose_input_would_be_lost_are_refused(layout, classes, weights_file, tmp_path):
    """timm loads unstrictly where the number of classes differs: next to nothing would load."""
    path, _ = weights_file("resnet18", "msra")
    if layout == "torchvision":
        path = tmp_path / "theirs.pth"
        torch.save(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(WeightsError, match="from_checkpoint"):
        timm.create_model("paper_resnet18", num_classes=1000, checkpoint_path=path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    with pytest.raises(WeightsError, match="from_checkpoint"):
        timm.create_model("paper_resnet18", num_classes=classes, **overlay)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bn_eps": 1e-3}, "BN eps 0.001, but timm builds batch norms with 1e-05"),
        ({"mean_image": torch.full((3, 32, 32), 110.0)}, "a per-pixel mean image, which timm"),
    ],
)
def test_inputs_that_timm_cannot_have(tmp_path, change, message):
    network = build_model("resnet18")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = change.get("bn_eps", module.eps)
    stated = replace(get_preprocessing("msra"), channel_order="RGB", **change)
    save_weights(network, tmp_path / "x.safetensors", stated)
    with pytest.raises(WeightsError, match=message):
        from_checkpoint(tmp_path / "x.safetensors")


def test_errors(weights_file):
    with pytest.raises(WeightsError, match="from_checkpoint"):
        timm.create_model("paper_resnet50", pretrained=True)
    with pytest.raises(WeightsError, match="holds a cifar_resnet20"):
        from_checkpoint(weights_file("cifar_resnet20", "torchvision")[0])
    with pytest.raises(ValueError, match="output_stride"):
        PaperResNet("resnet18", output_stride=4)
