"""Runs of Weights & Biases and of MLflow, by the real packages, without a network."""

import itertools
import json
import logging
import struct

import pytest
from runs import NumberTrainer, rows

from resnet_backbone.detection.config import UsageError
from resnet_backbone.detection.engine import writers
from resnet_backbone.detection.engine.schedule import check_training
from resnet_backbone.runtime.errors import Stopped

CONFIG = "quickstart/faster_rcnn_R_18_FPN.yaml"
KEYS = dict(SOLVER__IMS_PER_BATCH=2, SOLVER__STEPS=(), SOLVER__AMP__ENABLED=False, SEED=1)


class Small(NumberTrainer):
    @classmethod
    def test(cls, cfg, model):
        return {"bbox": {"AP50": 42.0, "AP50-cat's (tail)": float("nan")}}

    def run_step(self):
        super().run_step()
        if self.iter == self.cfg.VIS_PERIOD - 1:
            self.stopping = "SIGTERM"


def train(cfg, **keys):
    cfg = cfg.clone()
    cfg.merge_from_list([word for k, v in keys.items() for word in (k.replace("__", "."), v)])
    trainer = Small(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def interrupt_and_resume(make_cfg, folder, logger):
    """45 iterations, stopped after the thirtieth; what metrics.json then has."""
    keys = KEYS | dict(SOLVER__MAX_ITER=45, TEST__EVAL_PERIOD=15, OUTPUT_DIR=str(folder))
    cfg = make_cfg(CONFIG, RESNET_BACKBONE__LOGGERS=[logger], **keys)
    with pytest.raises(Stopped):
        train(cfg, VIS_PERIOD=30)
    first = (folder / f"{logger}_run.txt").read_text()
    train(cfg)
    assert (folder / f"{logger}_run.txt").read_text() == first
    written = rows(folder)
    assert [row["iteration"] for row in written] == [14, 19, 29, 39, 44]
    return first, written


def test_mlflow(make_cfg, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'runs'}")
    run_id, written = interrupt_and_resume(make_cfg, tmp_path / "night", "mlflow")
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "night")
    assert run.data.params["SOLVER.MAX_ITER"] == "45" and len(run.data.params) > 200
    losses = [(m.step, m.value) for m in client.get_metric_history(run_id, "total_loss")]
    assert losses == [(row["iteration"], row["total_loss"]) for row in written]
    evaluated = [m.step for m in client.get_metric_history(run_id, "bbox/AP50")]
    assert evaluated == [14, 29, 44] and "bbox/AP50-cat_s _tail_" in run.data.metrics
    results = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/results.json")
    assert results["results"]["bbox"]["AP50"] == 42.0
    assert len(client.search_runs([run.info.experiment_id])) == 1


def wandb_records(path):
    """What a run wrote: protocol buffers in LevelDB's log format, in blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb(make_cfg, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    run_id, written = interrupt_and_resume(make_cfg, tmp_path / "night", "wandb")
    wandb.teardown()  # waits for its own process to write
    files = sorted((tmp_path / "night" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert len(files) == 2  # W&B joins the two when they are synchronized
    history, config, summary, codes = [], {}, {}, []
    for record in itertools.chain(*map(wandb_records, files)):
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        if items:
            history.append((record.history.step.num, json.loads(items["total_loss"])))
        config |= {one.key: one.value_json for one in record.run.config.update}
        summary |= {"/".join(i.nested_key) or i.key: i.value_json for i in record.summary.update}
        codes += [record.exit.exit_code] if record.HasField("exit") else []
    assert history == [(row["iteration"], row["total_loss"]) for row in written]
    assert config["SOLVER.MAX_ITER"] == "45" and len(config) > 200
    assert float(summary["results/bbox/AP50"]) == 42 and codes == [1, 0]


UNUSABLE = {"neptune": "is not one of wandb, mlflow"}
UNUSABLE["wandb"] = r"is not installed: pip install 'resnet_backbone\[wandb\]'"


@pytest.mark.parametrize("name, message", UNUSABLE.items())
def test_loggers_that_cannot_be(make_cfg, monkeypatch, name, message):
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"LOGGERS: {name} {message}"):
        check_training(make_cfg(RESNET_BACKBONE__LOGGERS=[name]))


class Failing(writers.LoggerWriter):
    name = "json"  # a package that is there

    def start(self, cfg, title, known):
        if title == "refused":
            raise RuntimeError("no key,\nlog in first")
        return "1"

    def log(self, iteration, row):
        raise RuntimeError("the service is away")

    def finish(self, failed):
        raise RuntimeError("the service is away")


def test_a_service_that_fails_does_not_end_the_training(make_cfg, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(writers.LOGGERS, "json", Failing)
    cfg = make_cfg(CONFIG, OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=3, **KEYS)
    with caplog.at_level(logging.WARNING):
        train(cfg, RESNET_BACKBONE__LOGGERS=["json"])
    lines = [record.getMessage() for record in caplog.records]
    parts = "iteration 2", "the end of the run"
    expected = [f"json: {what} is not logged (the service is away)" for what in parts]
    assert [line for line in lines if "not logged" in line] == expected
    with pytest.raises(UsageError, match="LOGGERS: json cannot start: no key, log in first"):
        train(cfg, RESNET_BACKBONE__LOGGERS=["json"], OUTPUT_DIR=str(tmp_path / "refused"))
