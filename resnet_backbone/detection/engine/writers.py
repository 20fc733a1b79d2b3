"""Writers of training metrics: ``metrics.json``, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.util import find_spec

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import EventWriter, get_event_storage

from resnet_backbone.detection.config import saved_values
from resnet_backbone.runtime.errors import UsageError
from resnet_backbone.runtime.files import keep_rows, naming, write_text

logger = logging.getLogger(__name__)

WINDOW = 20  # iterations between two rows of metrics, and window of their medians
MOST_PARAMETERS = 100  # per request to MLflow


class RowWriter(EventWriter):
    """Passes the metrics of each iteration once and in order to :meth:`write_row`.

    Args:
        written: the last iteration that is already written.
    """

    def __init__(self, written: int = -1):
        self.written = written

    def write(self) -> None:
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(WINDOW)
        for name, (value, iteration) in latest.items():
            if iteration > self.written:
                rows[iteration][name] = value
        for iteration, row in sorted(rows.items()):
            self.written = iteration
            self.write_row(iteration, row)

    def write_row(self, iteration: int, row: dict[str, float]) -> None:
        raise NotImplementedError


class MetricsFile(RowWriter):
    """Detectron2's ``metrics.json``: one JSON object per line, each iteration once and in order.

    Rows from iteration `start` on and an incomplete last row are removed first.
    """

    def __init__(self, path: str, start: int = 0):
        rows, _ = keep_rows(path, lambda row: row["iteration"] < start)
        super().__init__(max((row["iteration"] for row in rows), default=-1))
        self._path, self._file = path, open(path, "a", encoding="utf-8")

    def write(self) -> None:
        with naming(self._path):
            super().write()
            self._file.flush()

    def write_row(self, iteration: int, row: dict[str, float]) -> None:
        self._file.write(json.dumps({**row, "iteration": iteration}, sort_keys=True) + "\n")

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


class LoggerWriter(RowWriter):
    """A run of an experiment tracker; a resumed training continues it.

    The run's id is in ``<name>_run.txt`` in the run folder. If the service fails, the training
    continues, and a warning says what is not logged. The package's own environment variables, such
    as WANDB_MODE and MLFLOW_TRACKING_URI, select the destination and offline mode.

    Args:
        final: returns the results at the end, {"results": {...}, "best": ...}.
        resumes: whether to continue the folder's run instead of starting a new one.
        written: see :class:`RowWriter`.
    """

    name: str  # of the package and of our pip extra

    def __init__(self, cfg: CfgNode, final: Callable[[], Mapping], resumes: bool, written: int):
        super().__init__(written)
        self.package, self.final = importlib.import_module(self.name), final
        path = os.path.join(cfg.OUTPUT_DIR, f"{self.name}_run.txt")
        known = ""
        if resumes and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                known = file.read().strip()
        title = os.path.basename(os.path.abspath(cfg.OUTPUT_DIR))
        try:
            run = self.start(cfg, title, known)
        except Exception as error:  # packages have their own error classes
            hint = " ".join(str(error).split())
            raise UsageError(
                f"RESNET_BACKBONE.LOGGERS: {self.name} cannot start: {hint}"
            ) from error
        write_text(path, run)

    def start(self, cfg: CfgNode, title: str, known: str) -> str:
        """Starts a run, or continues the `known` one; returns its id."""
        raise NotImplementedError

    def log(self, iteration: int, row: dict[str, float]) -> None:
        raise NotImplementedError

    def finish(self, failed: bool) -> None:
        """Writes the results and ends the run."""
        raise NotImplementedError

    def write_row(self, iteration: int, row: dict[str, float]) -> None:
        self._try(f"iteration {iteration}", lambda: self.log(iteration, row))

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # an error or a signal ends the training
        self._try("the end of the run", lambda: self.finish(failed))

    def _try(self, what: str, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:
            logger.warning("%s: %s is not logged (%s)", self.name, what, error)


class WandbWriter(LoggerWriter):
    """Weights & Biases: metrics by iteration, the config, and the results in the summary."""

    name = "wandb"

    def start(self, cfg: CfgNode, title: str, known: str) -> str:
        options = dict(id=known or None, resume="allow", config=saved_values(cfg))
        self.run = self.package.init(dir=cfg.OUTPUT_DIR, name=title, **options)
        return self.run.id

    def log(self, iteration: int, row: dict[str, float]) -> None:
        self.run.log(row, step=iteration)

    def finish(self, failed: bool) -> None:
        self.run.summary.update(flatten_results_dict(self.final()))
        self.run.finish(exit_code=int(failed))


class MLflowWriter(LoggerWriter):
    """MLflow: metrics by iteration, the config as parameters, ``results.json`` as an artifact."""

    name = "mlflow"

    def start(self, cfg: CfgNode, title: str, known: str) -> str:
        run = self.package.start_run(run_id=known or None, run_name=title)
        values = [] if known else [*saved_values(cfg).items()]  # parameters cannot change later
        for place in range(0, len(values), MOST_PARAMETERS):
            self.package.log_params(dict(values[place : place + MOST_PARAMETERS]))
        return run.info.run_id

    def log(self, iteration: int, row: dict[str, float]) -> None:
        names = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in row.items()}
        self.package.log_metrics(names, step=iteration)

    def finish(self, failed: bool) -> None:
        self.package.log_dict(dict(self.final()), "results.json")
        self.package.end_run("FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[LoggerWriter]] = {one.name: one for one in (WandbWriter, MLflowWriter)}
"""Names in ``RESNET_BACKBONE.LOGGERS`` -> writers."""


def check_loggers(cfg: CfgNode) -> None:
    """Raises UsageError for unknown names in ``RESNET_BACKBONE.LOGGERS`` or missing packages."""
    for name in cfg.RESNET_BACKBONE.LOGGERS:
        key = f"RESNET_BACKBONE.LOGGERS: {name}"
        if name not in LOGGERS:
            raise UsageError(f"{key} is not one of {', '.join(LOGGERS)}")
        if find_spec(name) is None:
            raise UsageError(f"{key} is not installed: pip install 'resnet_backbone[{name}]'")
