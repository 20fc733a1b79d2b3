"""Names and addresses of weights, with downloaders that copy; conventions as the libraries say."""

import hashlib
import http.server
import json
import pickle
import shutil
import threading
import urllib.error
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from drawn_networks import randomize
from safetensors.torch import save_file
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from resnet_backbone.models import build_model
from resnet_backbone.weights import PREPROCESSINGS, WeightsError, sources
from resnet_backbone.weights.load import load_weights, save_weights
from resnet_backbone.weights.reading import read_checkpoint
from resnet_backbone.weights.sources import download, resolve

V1 = torchvision.models.ResNet18_Weights.IMAGENET1K_V1


@pytest.fixture(scope="module")
def resnet18():
    """Torchvision's, with three classes and statistics that matter."""
    torch.manual_seed(0)
    return randomize(torchvision.models.resnet18(num_classes=3))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch's cache in a folder of the test, and a downloader that knows what is put into it."""
    served, calls = {}, []

    def fetch(url, target, hash_prefix=""):
        calls.append((url, hash_prefix))
        if url not in served and "any" not in served:
            raise urllib.error.URLError("Name or service not known")
        shutil.copy(served.get(url) or served["any"], target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(sources, "fetch", fetch)
    served["calls"] = calls
    return served


def assert_same_function(model, reference, source, **options):
    found = load_weights(model, source, **options)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), reference(x), rtol=1e-4, atol=1e-4)
    return found


def ours(**options):
    return build_model("resnet18", num_classes=3, **options)


def test_torchvision(hub, resnet18, tmp_path, monkeypatch):
    torch.save(resnet18.state_dict(), tmp_path / "x.pth")
    digest = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(sources, "published_hash", lambda weights: digest[:8])
    hub[V1.url] = tmp_path / "x.pth"
    for name in ("torchvision://resnet18/IMAGENET1K_V1", "torchvision://resnet18", V1.url):
        found = assert_same_function(ours(), resnet18, name)
        assert found.same_input(PREPROCESSINGS["torchvision"])
        assert (found.resize_size, found.crop_size, found.interpolation) == (256, 224, "bilinear")
    assert hub["calls"] == [(V1.url, digest[:8])]  # once
    assert (tmp_path / "hub" / "checkpoints" / V1.url.rpartition("/")[2]).is_file()
    read = read_checkpoint("torchvision://resnet18")
    assert read.origin.format == "torchvision" and read.origin.sha256 == digest
    assert "IMAGENET1K_V1.transforms()" in read.origin.reference


def test_another_file_in_torchvisions_place(hub, resnet18, tmp_path):
    """A cached file is checked again: torch does so at the download alone."""
    target = tmp_path / "hub" / "checkpoints" / V1.url.rpartition("/")[2]
    target.parent.mkdir(parents=True)
    torch.save(resnet18.state_dict(), target)
    with pytest.raises(WeightsError, match="sha256 begins with .*, not f37072fd; remove it"):
        read_checkpoint("torchvision://resnet18/IMAGENET1K_V1")


def test_torchvisions_files_are_known_by_their_hash(resnet18, tmp_path, monkeypatch):
    path = tmp_path / "renamed.pth"
    torch.save(resnet18.state_dict(), path)
    with pytest.raises(WeightsError, match="does not state which input"):
        read_checkpoint(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    hashes = {V1: digest[:8]}
    monkeypatch.setattr(sources, "published_hash", lambda weights: hashes.get(weights, "0" * 8))
    assert read_checkpoint(path).preprocessing.crop_size == 224
    with pytest.raises(WeightsError, match="its content states another preprocessing than 'msra'"):
        read_checkpoint(path, "msra")


@pytest.mark.parametrize(
    "name, message",
    [
        ("torchvision://resnet19", "torchvision has no 'resnet19'"),
        ("torchvision://fcn_resnet50", "fcn_resnet50 is not among this package's networks"),
        ("torchvision://resnext50_32x4d", "is not among this package's networks, which are resn"),
        ("torchvision://resnet50/V3", "has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, not 'V3'"),
        ("timm://resnet50.zz", "resnet50.zz: .*list_pretrained"),
        ("timm://resnet", "timm://resnet: .*list_pretrained"),
        ("timm://resnetblur50.bt_in1k", "timm's resnetblur50 is not among this package's networks"),
        ("catalog://x", "use one of ImageNetPretrained/MSRA/R-50"),
        ("ftp://host/x.pth", "unknown kind of source; use a local path or one of torchvision://"),
        ("https://host/x.zip", "only .safetensors, .pth"),
        ("https://host/", "not the address of a file"),
        ("detectron2://../x.pkl", "not the address of a file"),
        ("https://host/a/x.pth", "Name or service not known.*put it at .*/host/a/x.pth$"),
        ("torchvision://resnet18", "resnet18-f37072fd.pth cannot be down.*checkpoints/resnet18-f"),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "dl.fbaipublicfiles.com/detectron2/Ima"),
    ],
)  # fmt: skip
def test_what_cannot_be_had(hub, snapshot, name, message):
    with pytest.raises(WeightsError, match=message) as error:
        resolve(name)
    assert len(str(error.value).splitlines()) == 1
    assert not hub["calls"] or "put it at" in str(error.value)


MSRA, CONVERTED = PREPROCESSINGS["msra"], PREPROCESSINGS["torchvision"]
GROUP_NORM = replace(sources.DETECTRON2_DEFAULT, stride_in_1x1=False)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", MSRA),
        ("https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl", MSRA),
        ("catalog://ImageNetPretrained/MSRA/R-101", MSRA),
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", CONVERTED),
        ("catalog://ImageNetPretrained/FAIR/R-50-GN", GROUP_NORM),
        ("detectron2://COCO-Detection/faster_rcnn_R_50_C4_1x/137257644/model_final.pkl", None),
        ("https://host/R-50.pkl?download=true", None),
    ],
)
def test_addresses_with_a_convention(hub, tmp_path, name, expected):
    hub["any"] = tmp_path / "file"
    hub["any"].write_bytes(b"")
    found = resolve(name)
    assert found.path.is_file() and "hub/resnet_backbone" in str(found.path)
    assert ("MSRA" in str(found.path)) == ("MSRA" in name)  # R-50.pkl is two networks' name
    assert expected is found.preprocessing or found.preprocessing.same_input(expected)


@pytest.mark.parametrize("first, second", [("x.pth?id=1", "x.pth?id=2"), ("x.pth", "x.pth?id=1"),
                                           (":8443/x.pth", "/x.pth")])  # fmt: skip
def test_addresses_that_differ_in_their_query_have_two_places(hub, tmp_path, first, second):
    found = []
    for number, end in enumerate((first, second)):
        url = f"https://host{end if end[0] in ':/' else f'/{end}'}"
        hub[url] = tmp_path / str(number)
        hub[url].write_text(url)
        found.append(resolve(url).path)
        assert found[-1].read_text() == url and found[-1].name == "x.pth"
        assert resolve(url).path == found[-1]
    assert len(set(found)) == 2 and len(hub["calls"]) == 2


def test_the_author_of_a_detectron2_pickle(resnet18, tmp_path):
    """As tools/convert-torchvision-to-d2.py writes it; other authors prove nothing."""
    state = ours().state_dict()
    model = {key.replace("linear.", "stem.fc."): value.numpy() for key, value in state.items()}
    for author, known in (("torchvision", True), ("somebody", False)):
        path = tmp_path / f"{author}.pkl"
        content = {"model": model, "__author__": author, "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
        if known:
            assert read_checkpoint(path).preprocessing.same_input(CONVERTED)
        else:
            with pytest.raises(WeightsError, match="name it .preprocessing., msra"):
                read_checkpoint(path)


@pytest.fixture
def snapshot(monkeypatch):
    """Folders in place of Hugging Face's repositories."""
    served = {}

    def fetch(repo_id, revision=None, allow_patterns=None):
        if repo_id not in served:
            raise ConnectionError("Cannot\nconnect")
        return str(served[repo_id])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return served


def test_timm(snapshot, tmp_path):
    torch.manual_seed(0)
    reference = timm.create_model("resnet18", num_classes=3).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    snapshot["timm/resnet34.ra4_e3600_r224_in1k"] = tmp_path
    snapshot["timm/resnet18.a1_in1k"] = tmp_path
    found = assert_same_function(ours(), reference, "timm://resnet18.a1_in1k")
    assert found.same_input(PREPROCESSINGS["torchvision"])
    assert (found.resize_size, found.interpolation) == (235, "bicubic")
    with pytest.raises(WeightsError, match="has NaN|lacks|another|is a|fit|shape"):
        load_weights(build_model("resnet34", num_classes=3), "timm://resnet34.ra4_e3600_r224_in1k")
    other = read_checkpoint("timm://resnet34.ra4_e3600_r224_in1k").preprocessing
    assert other.mean == (0.5, 0.5, 0.5) and not other.same_input(found)


def test_timms_config_beside_its_weights(tmp_path):
    """What timm.models.save_for_hf writes."""
    torch.manual_seed(0)
    reference = timm.create_model("resnet18", num_classes=3).eval()
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=True)
    expected = timm.data.resolve_data_config(pretrained_cfg=reference.pretrained_cfg)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        found = assert_same_function(ours(), reference, source)
        assert (found.mean, found.interpolation) == (expected["mean"], expected["interpolation"])
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="does not state"):  # another file's config
        read_checkpoint(tmp_path / "other.safetensors")


def as_timm(folder, architecture, **changes):
    """A folder with timm's config.json."""
    config = {"architecture": architecture, "num_classes": 3, "global_pool": "avg", **changes}
    known = timm.get_pretrained_cfg("resnet18.a1_in1k").to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": known}))
    return folder


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "tv_resnet50", "ssl_resnet18",
    "gluon_resnet101_v1b", "resnet152", "vgg11", "vgg16_bn"])  # fmt: skip
def test_timms_networks_that_are_ours(tmp_path, name):
    arguments = {"num_classes": 3, "in_chans": 3, "global_pool": "avg"}
    assert resolve(as_timm(tmp_path, name, model_args=arguments)).preprocessing is not None


@pytest.mark.parametrize(
    "name, changes",
    [
        *((name, {}) for name in ("resnetblur18", "resnetblur50", "resnetaa50", "resnet18d",
          "resnet50_clip", "resnet50_gn", "resnetv2_50", "wide_resnet50_2", "resnext50_32x4d",
          "paper_resnet50", "gluon_resnet50_v1d", "seresnet50", "resnet26", "resnet", 5)),
        ("resnet18", {"model_args": {"act_layer": "silu"}}),
        ("resnet18", {"model_args": {"num_classes": 3, "output_stride": 8}}),
        ("resnet18", {"model_args": {"global_pool": "max"}}),
        ("vgg16", {"global_pool": "max"}),
        ("resnet18", {"model_args": {"a\nb" * 100: 1}}),
    ],
)  # fmt: skip
def test_timms_look_alikes_are_refused(tmp_path, name, changes):
    what = f"timm builds this {name} with" if changes else f"timm's {name} is not among this"
    with pytest.raises(WeightsError, match=f"config.json: {what}.* timm itself$") as error:
        resolve(as_timm(tmp_path, name, **changes))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu"}, {"hidden_act": None}, {"downsample_in_first_stage": True}]
)
def test_hugging_faces_look_alikes_are_refused(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    resolve(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(WeightsError, match=f"config.json: {next(iter(change))} is .*transformers"):
        resolve(tmp_path)


def write_hugging_face(folder, depth=18, stride_in_1x1=False):
    torch.manual_seed(0)
    kind = dict(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    if depth == 50:
        kind = dict(layer_type="bottleneck", downsample_in_bottleneck=stride_in_1x1)
    model = ResNetForImageClassification(ResNetConfig(num_labels=3, **kind)).eval()
    model.save_pretrained(folder)
    known = PREPROCESSINGS["torchvision"]
    options = dict(image_mean=list(known.mean), image_std=list(known.std))
    processor = ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875, **options)
    processor.save_pretrained(folder)
    return lambda x: model(x).logits


def test_hugging_face(snapshot, tmp_path):
    reference = write_hugging_face(tmp_path)
    snapshot["microsoft/resnet-18"] = tmp_path
    for source in (tmp_path, "hf://microsoft/resnet-18", "hf://microsoft/resnet-18@main"):
        found = assert_same_function(ours(), reference, source)
        assert found.same_input(PREPROCESSINGS["torchvision"])
        assert (found.resize_size, found.crop_size) == (256, 224)
    with pytest.raises(WeightsError, match="cannot be downloaded .Cannot connect.*give that fold"):
        read_checkpoint("hf://microsoft/resnet-34")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="has none of model.safetensors"):
        read_checkpoint("hf://microsoft/resnet-18")


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_hugging_faces_stride(tmp_path, stride_in_1x1):
    reference = write_hugging_face(tmp_path, 50, stride_in_1x1)
    assert read_checkpoint(tmp_path).model.options == {"stride_in_1x1": stride_in_1x1}
    build = dict(num_classes=3, stride_in_1x1=stride_in_1x1)
    assert_same_function(build_model("resnet50", **build), reference, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match="does not state which input"):
        read_checkpoint(tmp_path)
    wrong, right = ("torchvision", "msra") if stride_in_1x1 else ("msra", "torchvision")
    assert read_checkpoint(tmp_path, right).model.options == {"stride_in_1x1": stride_in_1x1}
    with pytest.raises(WeightsError, match=f"config.json.*by its stride.*than '{wrong}'"):
        read_checkpoint(tmp_path, wrong)


PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "size": 224}


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", json.dumps({"architecture": "resnet18", "pretrained_cfg": 5})),
        ("config.json", json.dumps({"architecture": "resnet18", "model_args": 5})),
        ("config.json", json.dumps({"pretrained_cfg": {}})),
        ("config.json", json.dumps({"downsample_in_bottleneck": "yes"})),
        ("preprocessor_config.json", json.dumps(PROCESSOR | {"image_std": [0, 1, 1]})),
        ("preprocessor_config.json", json.dumps(PROCESSOR | {"image_mean": None})),
        ("preprocessor_config.json", "[" * 100_000),
    ],
)
def test_configs_that_cannot_be_understood(tmp_path, name, content):
    (tmp_path / "config.json").write_text('{"downsample_in_bottleneck": true}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    resolve(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match="config.json"):
        resolve(tmp_path)


@pytest.fixture
def server(tmp_path):
    """A web server for a folder; files named cut... end before their announced length."""
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            data = source.read()
            outputfile.write(data[: len(data) // 2] if "cut" in self.path else data)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", tmp_path / "www"
        found.shutdown()


def test_downloads_are_whole_or_not_there(server, tmp_path):
    address, folder = server
    content = bytes(range(256)) * 1000
    for name in ("good.pth", "cut.pth"):
        (folder / name).write_bytes(content)
    digest, target = hashlib.sha256(content).hexdigest(), tmp_path / "cache" / "x.pth"
    for url, sha256, message in (
        (f"{address}/gone.pth", "", "404"),
        (f"{address}/good.pth", "0" * 8, "hash"),
        (f"{address}/cut.pth", "", "broke off"),
        (f"{address}/a file.pth", "", "control characters"),
        ("http://host:abc/x.pth", "", "nonnumeric port"),
        ("http://127.0.0.1:9/x.pth", "", "refused"),
    ):
        with pytest.raises(WeightsError, match=f"(?s){message}.*put it at {target}"):
            download(url, target, sha256)
        assert list(target.parent.iterdir()) == []
    assert download(f"{address}/good.pth", target, digest[:8]).read_bytes() == content
    assert download("http://127.0.0.1:9/x.pth", target) == target  # it is there


def test_the_metadata_of_a_file_agrees_with_its_place(hub, tmp_path):
    url = "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/x.safetensors"
    save_weights(ours(), tmp_path / "x.safetensors", replace(CONVERTED, source=""))
    hub[url] = tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match="metadata states another preprocessing than its or"):
        read_checkpoint(url)
