"""What the classification tools share on the command line."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from resnet_backbone.classification.trainer import TrainingDiverged
from resnet_backbone.runtime.distributed import leave
from resnet_backbone.runtime.signals import EXIT_STOPPED, Stopped

SHOW_TRACEBACK = "RESNET_BACKBONE_TRACEBACK"


def one_line_errors(main: Callable) -> Callable:
    """Wrong input (ValueError, OSError, ImportError) ends a tool with one line and status 2.

    Divergence gives status 3, a stop by a signal ``EXIT_STOPPED``. With the environment variable
    ``RESNET_BACKBONE_TRACEBACK`` set, tracebacks are shown.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except Stopped as stopped:
            print(f"stopped by {stopped}; go on with --resume", file=sys.stderr)
            raise SystemExit(EXIT_STOPPED) from None
        except (ValueError, OSError, ImportError, TrainingDiverged) as error:
            if os.environ.get(SHOW_TRACEBACK):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(3 if isinstance(error, TrainingDiverged) else 2) from None
        finally:
            leave()

    return wrapped


def launch(module: str, processes: int, arguments: list[str]) -> None:
    """Runs a module by torchrun with one process per GPU on this machine, and exits as it does.

    Torchrun's own exit status is 1 whatever happened; here it is that of the processes. SIGTERM,
    SIGINT and SIGUSR1 are passed on to them.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    options = ["--standalone", f"--nproc-per-node={processes}", "--module", module, *arguments]
    try:
        run.run(run.parse_args(options))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # processes that torchrun ended because another one failed have negative codes
        raise SystemExit(max(codes) if max(codes) > 0 else 1) from None
    except SignalException:
        raise SystemExit(EXIT_STOPPED) from None
    raise SystemExit(0)


def set_up_logging(folder: Path | None, is_main: bool) -> None:
    """Messages go to the terminal and to ``log.txt``; other processes show warnings only."""
    root = logging.getLogger("resnet_backbone")
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    root.propagate = False
    root.handlers.clear()
    form = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None and is_main:
        handlers.append(logging.FileHandler(folder / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
