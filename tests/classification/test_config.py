"""The classification config: what it refuses, and that what it prints can be read again."""

from dataclasses import asdict
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_backbone.classification import config as module
from resnet_backbone.classification.config import KEYS, load_config, to_yaml
from resnet_backbone.classification.run import check_processes, count_epochs
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.processes import World

SYNTHETIC = ["data.format=synthetic"]


def refusal(*overrides, files=()):
    with pytest.raises(UsageError) as caught:
        load_config(files, [*SYNTHETIC, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("schedule.itterations=5", "did you mean schedule.iterations?"),
        ("batch_size=5", "did you mean train.batch_size?"),
        ("train.batchsize=5", "did you mean train.batch_size?"),
        ("trian.batch_size=3", "did you mean train.batch_size?"),
        ("evaluaton.batch_size=3", "did you mean evaluation.batch_size?"),
        ("traim.seed=3", "did you mean train.seed?"),
        ("optimizer.lr=3", "did you mean schedule.lr?"),
        ("data.size=64", "data has format, root, val_root"),
        ("colour=3", "a config has model, data"),
        ("train.batch_size=many", "could not be converted to Integer"),
        ("schedule.milestones=[a]", "schedule.milestones"),
        ("train=5", "write train.<key>=value"),
        ("train.seed", "key=value"),
        ("data.format=cifar", "did you mean cifar10?"),
        ("train.amp=fp8", "none, bf16, fp16"),
        ("schedule.iterations=0", "give 1 or more"),
        ("schedule.lr=0", "above 0"),
        ("schedule.lr=nan", "above 0"),
        ("schedule.scale=0", "above 0"),
        ("train.micro_batch=100", "does not divide 256 images"),
        ("schedule.milestones=[600000]", "between 0 and iterations, 600000"),
        ("schedule.milestones=[5,3]", "must rise"),
        ("data.crop=300", "data.short_side"),
        ("schedule.milestones=[-5,10]", "must rise between 0"),
        ("schedule.gamma=-1", "schedule.gamma"),
        ("schedule.lr=inf", "below inf"),
        ("optimizer.momentum=1.5", "below 1"),
        ("schedule.warmup_iterations=600001", "exceed the"),
        ("data.rand_augment=true", "inception"),
        ("data.class_list=x", "format imagenet"),
        ("train.ema=1", "below 1"),
        ("loss.label_smoothing=1.5", "below 1"),
        ("schedule.warmup_until_error=80", "warmup_lr"),
        ("data.augmentation=pad_crop", "use paper"),
        ("data.format=cifar10", "use pad_crop"),
        ("data.format=synthetic data.synthetic_size=64", "larger than data.synthetic_size"),
        ("data.format=imagenet", "data.root=PATH"),
        ("schedule.policy=cosine schedule.milestones=[5]", "remove one"),
        ("schedule.policy=plateau evaluation.every=0", "set evaluation.every"),
        ("schedule.warmup_iterations=5 schedule.warmup_until_error=80", "set one"),
        ("data.format=imagenet data.mean=pixel evaluation.crop=192", "data.mean=channel"),
    ],
)
def test_wrong_values_are_refused_in_one_line(override, hint):
    assert hint in refusal(*override.split())


def test_the_mean_of_channels_fits_any_evaluation():
    load_config([], ["data.root=x", "data.mean=channel", "evaluation.crop=192"])


def test_model_is_short_for_its_name():
    model = load_config([], [*SYNTHETIC, "model=resnet18", "model.options.shortcut=A"]).model
    assert (model.name, model.options) == ("resnet18", {"shortcut": "A"})
    model = load_config(["imagenet/resnet50"], ["data.root=x", "model=prelu_net_b"]).model
    assert (model.name, model.options) == ("prelu_net_b", {})


def test_text_is_read_as_it_is_and_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "mine.yaml"
    file.write_text("data: {val_root: ~/val}\n")
    for name in ("2024_10_05", "007", "yes", "a: b", "x{y}"):
        config = load_config([file], [f"output.dir={name}", "data.root=~/images"])
        assert (config.output.dir, config.data.root) == (name, "/home/me/images")
        assert config.data.val_root == "/home/me/val"
        (tmp_path / "saved.yaml").write_text(to_yaml(config))
        assert load_config([tmp_path / "saved.yaml"]).output.dir == name


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "solution"),
    [(32, 32, 2, "micro_batch=16"), (30, 8, 2, "micro_batch=5"), (32, 0, 3, "batch_size=33")],
)
def test_batches_that_processes_cannot_share(batch, micro, processes, solution):
    config = load_config([], [*SYNTHETIC, f"train.batch_size={batch}"])
    config.train.micro_batch = micro
    with pytest.raises(UsageError, match=f"give train.{solution}"):
        check_processes(config, World(0, processes))


def test_base_files_and_overlays_merge_in_order(tmp_path):
    (tmp_path / "base.yaml").write_text("schedule: {lr: 0.2, iterations: 70}\ntrain: {seed: 5}\n")
    (tmp_path / "sub").mkdir()
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("_BASE_: ../base.yaml\nschedule: {lr: 0.3}\n")
    (tmp_path / "more.yaml").write_text("schedule: {iterations: 90}\n")
    config = load_config([top, tmp_path / "more.yaml"], [*SYNTHETIC, "train.seed=6"])
    assert (config.schedule.lr, config.schedule.iterations, config.train.seed) == (0.3, 90, 6)


def test_bad_files_are_named(tmp_path):
    for name, text, message in (
        ("loop", "_BASE_: loop.yaml", "leads back"),
        ("lost", "_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("broken", "a: [1", "not a YAML file"),
        ("unknown", "schedule: {learning_rate: 1}", "unknown.yaml: unknown key schedule.learning"),
    ):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        assert message in refusal(files=[file])
    assert "no such config" in refusal(files=[tmp_path / "none.yaml"])


@given(st.floats(1e-3, 10), st.integers(1, 10**6))
def test_scale_shortens_everything_alike_and_once(scale, iterations):
    options = dict(milestones=[iterations // 2], warmup_iterations=9)
    schedule = module.ScheduleConfig(iterations, scale, **options)
    module.scale_schedule(schedule)
    assert schedule.iterations == max(1, round(iterations * scale))
    middle = round(iterations // 2 * scale)  # a very short schedule has no drop
    is_inside = 0 < middle < schedule.iterations or scale == 1
    assert schedule.milestones == [middle] * is_inside
    assert schedule.warmup_iterations == round(9 * scale)
    before = asdict(schedule)
    module.scale_schedule(schedule)
    assert schedule.scale == 1 and asdict(schedule) == before


def test_printed_config_reads_back(tmp_path):
    common = [*SYNTHETIC, "model.options.shortcut=C"]
    config = load_config([], [*common, "schedule.scale=0.5", "train.seed=9"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = load_config([tmp_path / "c.yaml"])
    assert asdict(again) == asdict(config) and module.differences(again, config) == []
    other = load_config([], common)
    assert module.differences(config, other) == ["schedule.iterations", "train.seed"]


def test_every_key_is_reachable():
    assert len(KEYS) > 50
    for name in KEYS:
        attrgetter(name)(module.Config())
        assert module.hint_for(name + "s") == f"did you mean {name}?"


def test_all_problems_are_told_at_once():
    words = ["schedule.lrate=1", "train.amp=fp8", "modle.name=x", "schedule.lr=-1"]
    message = refusal(*words, files=["imagenet/resnet50"])
    for word in ("schedule.lrate", "train.amp is 'fp8'", "modle.name", "schedule.lr is -1"):
        assert word in message
    message = refusal("evaluation.crop=300", "schedule.policy=cosine", "data.crop=999")
    assert "evaluation.crop is larger" in message and "data.short_side" in message


def test_what_is_not_set_follows_what_is():
    words = ["data.root=x", "schedule.iterations=6000", "train.batch_size=20"]
    config = load_config(["imagenet/resnet50"], words)
    assert config.schedule.milestones == [1500, 3000, 4500]  # of 6000, as in the file
    assert config.train.micro_batch == 20  # of 20; in the file 32
    given_too = load_config(["imagenet/resnet50"], [*words, "train.micro_batch=5"])
    assert given_too.train.micro_batch == 5


def test_epochs_become_iterations():
    words = ["data.root=x", "schedule.epochs=9.5", "train.batch_size=20"]
    config = load_config(["imagenet/resnet50"], words)
    line = count_epochs(config, 1001)
    assert config.schedule.iterations == 476 and "9.5 epochs of 1,001 images are 476" in line
    assert config.evaluation.every == config.output.checkpoint_every == 51
    assert config.schedule.milestones == [round(476 * share) for share in (0.25, 0.5, 0.75)]
    assert count_epochs(load_config(["imagenet/resnet50"], ["data.root=x"]), 1001) == ""
    with pytest.raises(UsageError, match="schedule.milestones is in iterations: give schedule.it"):
        load_config(["imagenet/resnet50"], [*words, "schedule.milestones=[200,300]"])
    with pytest.raises(UsageError, match="schedule.scale and schedule.epochs: give one of them"):
        load_config(["imagenet/resnet50"], [*words, "schedule.scale=0.5"])
