"""--seeds: runs of several seeds, their mean and spread."""

import json
import statistics

import pytest
from runs import arguments, read_results, start

from resnet_backbone.cli import train_net
from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine import results
from resnet_backbone.runtime.errors import EXIT_STOPPED
from resnet_backbone.runtime.files import alone


def test_seeds_of_the_command_line():
    assert results.read_seeds(["3", "0"]) == [3, 0]
    for words in (["1", "x"], ["1", "1"], ["-1"]):
        with pytest.raises(UsageError, match="whole numbers, each once, such as --seeds 1 2 3"):
            results.read_seeds(words)


def test_mean_and_sample_deviation():
    numbers = [{"AP": 1.0, "AP-cat": 5.0}, {"AP": 2.0, "AP-cat": None}, {"AP": 6.0}]
    found = results.summarize(numbers)
    assert found["AP"] == {"mean": 3.0, "std": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}
    assert found["AP-cat"] == {"mean": None, "std": None, "values": [5.0, None, None]}
    assert results.summarize([{"AP": 1.0}])["AP"]["std"] is None
    lines = results.format_summary(results.summarize(numbers)).splitlines()
    assert lines[2].split() == ["AP", "3.00", "2.65", "1.00", "2.00", "6.00"]
    assert lines[3].split() == ["AP-cat", "-", "-", "5.00", "-", "-"]


@pytest.mark.parametrize("status, stop", [(0, True), (EXIT_STOPPED, True), (1, False)])
def test_a_run_that_fails_or_is_stopped_is_the_last(tmp_path, monkeypatch, status, stop):
    """Also where the run of a seed ends well before it takes notice of a signal."""
    started = []

    def run_child(command, **options):
        started.append(command[1:])
        return status, stop

    monkeypatch.setattr(results, "run_child", run_child)
    with pytest.raises(SystemExit) as ended:
        results.train_seeds("a.tool", ["--resume"], [4, 5], str(tmp_path / "output"))
    assert ended.value.code == (status or EXIT_STOPPED)
    assert started == [["-m", "a.tool", "--resume", "--seed-run", "4"]]


def seeds_command(data, folder, *seeds, **keys):
    words = arguments(data, folder, "--seeds", *seeds, **keys)
    place = words.index("SEED")
    return words[:place] + words[place + 2 :]


def test_expectations_are_looked_at_when_all_seeds_are_done(tmp_path, monkeypatch, capsys):
    expected, values = "[['bbox', 'AP50', 50.0, 1.0]]", {1: 20.0, 2: 50.5, 3: 80.0}

    def train(module, words, seeds, output):
        assert seeds == list(values)
        for seed, value in values.items():
            folder = tmp_path / f"seed_{seed}"
            folder.mkdir(exist_ok=True)
            content = {"results": {"bbox": {"AP50": value}}}
            (folder / "results.json").write_text(json.dumps(content))

    monkeypatch.setattr(train_net, "train_seeds", train)
    words = seeds_command(tmp_path, tmp_path, "1", "2", "3", TEST__EXPECTED_RESULTS=expected)
    with pytest.raises(SystemExit) as ended:
        train_net.main(words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1 and "seed 2" not in said
    for seed, value in ((1, 20), (3, 80)):
        text = f"seed {seed}: TEST.EXPECTED_RESULTS: bbox/AP50 is {value}, expected 50 +- 1"
        assert text in said
    values |= {1: 49.5, 3: 50.0}
    train_net.main(words)


def test_two_commands_do_not_train_in_one_folder(tmp_path):
    with alone(tmp_path), pytest.raises(BlockingIOError, match="another process uses"):
        results.train_seeds("never.py", [], [1], str(tmp_path))


@pytest.mark.slow
def test_two_seeds(tmp_path, tiny_voc):
    data, folder = tiny_voc, tmp_path / "runs"
    keys = dict(SOLVER__MAX_ITER=1, SOLVER__IMS_PER_BATCH=2)

    def run(*options, **changes):
        process = start(seeds_command(data, folder, "1", "2", *options, **(keys | changes)))
        return process.communicate(timeout=300)[0], process.returncode

    output, code = run()
    assert code == 0, output[-3000:]
    summary = json.loads((folder / "seeds.json").read_text())
    results = [read_results(folder / f"seed_{seed}") for seed in (1, 2)]
    assert [one["seed"] for one in results] == summary["seeds"] == [1, 2]
    values = [one["results"]["bbox"]["AP50"] for one in results]
    found = summary["results"]["bbox/AP50"]
    assert found["values"] == values
    assert found["mean"] == pytest.approx(statistics.mean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))
    before = (folder / "seed_1" / "model_final.pth").stat().st_mtime_ns
    (folder / "seed_2" / "results.json").unlink()  # interrupted before it was written
    output, code = run()
    assert code == 0 and output.count("the run has ended") == 1, output[-3000:]
    assert (folder / "seed_1" / "model_final.pth").stat().st_mtime_ns == before
    assert json.loads((folder / "seeds.json").read_text())["results"] == summary["results"]
    output, code = run(SOLVER__MAX_ITER=2)
    assert code == 2 and "seed_1 was started with another SOLVER.MAX_ITER" in output
    assert json.loads((folder / "seeds.json").read_text())["results"] == summary["results"]
