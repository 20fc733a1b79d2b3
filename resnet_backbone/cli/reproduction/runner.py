"""Running steps: each once, in a folder of its own."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from resnet_backbone.cli.reproduction.plan import PlanError
from resnet_backbone.cli.reproduction.steps import Step
from resnet_backbone.runtime.files import alone, write_json
from resnet_backbone.runtime.signals import EXIT_STOPPED, run_child

logger = logging.getLogger(__name__)

DONE = "step.json"


class Runner:
    """Runs the steps that are not done; what is done stays.

    A step is done when its folder has a ``step.json``, written after its command. The folder's
    name has the hash of everything that the result depends on: other inputs lie in another
    folder, and nothing is overwritten.

    Args:
        root: of the project: commands run there.
        output: folder of the steps.
    """

    def __init__(self, root: Path, output: Path):
        self.root, self.output = root, output

    def run(self, steps: Sequence[Step], stages: Sequence[str]) -> int:
        """Runs those of the stages, in order.

        Returns:
            0, or the exit status of the command that ended otherwise: 75 where it was stopped.

        Raises:
            PlanError: a step of another stage is needed and not done, a command did not leave its
                product.
            BlockingIOError: another process works in the same folder.
        """
        with alone(self.output) as lock:
            for number, step in enumerate(steps, 1):
                if step.stage not in stages or is_done(step):
                    continue
                for needed in step.inputs:
                    if not is_done(needed):
                        raise PlanError(
                            f"{step.name} needs {needed.name}: add --stage {needed.stage}"
                        )
                status = self._run_one(step, f"{number}/{len(steps)}", lock)
                if status:
                    return status
        return 0

    def _run_one(self, step: Step, place: str, lock: int) -> int:
        shown = show(step, self.root)
        logger.info("\n== %s %s\n%s", place, step.name, shown)
        step.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        status, stop = run_command(step.words(), self.root, lock)
        if status:
            logger.error(
                "%s ended with status %d; the same command goes on from here", step.name, status
            )
            return status
        if not step.path.exists():
            raise PlanError(f"{step.name} left no {step.path}; see its output above")
        content = {
            "step": step.name,
            "key": step.key,
            "command": shown,
            "inputs": {needed.name: needed.key for needed in step.inputs},
            "seconds": round(time.monotonic() - started, 1),
            "date": time.strftime("%Y-%m-%d"),
        }
        write_json(step.folder / DONE, content, indent=1)
        logger.info("-- %s: %.0f s", step.name, content["seconds"])
        return EXIT_STOPPED if stop else 0


def run_command(words: Sequence[str], root: Path, lock: int) -> tuple[int, bool]:
    """:func:`run_child` of a tool.

    Args:
        words: name of the tool, arguments.
        root: of the project.
        lock: open file that it holds too: should this process be killed, the lock stays.
    """
    command = [sys.executable, str(root / "tools" / words[0]), *words[1:]]
    return run_child(command, cwd=root, pass_fds=(lock,))


def is_done(step: Step) -> bool:
    return (step.folder / DONE).is_file() and step.path.exists()


def show(step: Step, root: Path) -> str:
    """The command as it would be typed in the folder of the project."""
    tool, *arguments = (word.replace(f"{root}/", "") for word in step.words())
    return shlex.join(["python", f"tools/{tool}", *arguments])
