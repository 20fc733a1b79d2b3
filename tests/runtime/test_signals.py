"""What a command that is run for another one makes of signals."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from resnet_backbone.runtime.errors import Stopped
from resnet_backbone.runtime.signals import EXIT_STOPPED, StopRequest, Watched, run_child

WAIT = """
import os, pathlib, signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(number))
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {os.getsid(0)}")
deadline = time.monotonic() + 60
while not got and time.monotonic() < deadline:
    time.sleep(0.02)
sys.exit(got[0])
"""


def python(code, *words):
    return [sys.executable, "-c", code, *map(str, words)]


def signalled(path, number):
    """Sends a signal to this process once the child has written its file."""

    def work():
        while not (path.exists() and path.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_statuses_of_a_child_that_nobody_stopped():
    assert run_child(python("import sys; sys.exit(3)")) == (3, False)
    assert run_child(python("import os; os.kill(os.getpid(), 9)")) == (128 + 9, False)


TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize("sent, received", [(TERM, TERM), (INT, INT), (HUP, TERM)])
def test_signals_are_passed_on(tmp_path, sent, received):
    """The child is out of reach of the terminal, which would signal it a second time."""
    before = signal.signal(sent, signal.default_int_handler)  # nohup's tests ignore SIGHUP
    try:
        thread = signalled(tmp_path / "child", sent)
        assert run_child(python(WAIT, tmp_path / "child")) == (received, True)
        thread.join()
        pid, session = (tmp_path / "child").read_text().split()
        assert pid == session and signal.getsignal(sent) == signal.default_int_handler
    finally:
        signal.signal(sent, before)


def test_under_nohup_the_terminal_may_go():
    code = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_child(python(code)) == (0, False)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_signal_while_the_child_is_being_started(monkeypatch):
    class Slow(subprocess.Popen):
        def __init__(self, *words, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    assert run_child(python("import time; time.sleep(60)")) == (EXIT_STOPPED, True)


def test_a_child_that_dies_of_what_was_passed_on(tmp_path):
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('x'); time.sleep(60)"
    thread = signalled(tmp_path / "child", signal.SIGTERM)
    assert run_child(python(code, tmp_path / "child")) == (EXIT_STOPPED, True)
    thread.join()


def test_a_request_remembers_and_a_second_interrupt_is_one(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.name == "SIGUSR1"
        assert "SIGUSR1: stopping after this iteration\n" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts, and is answered
        assert stop.name == "SIGUSR1" and capfd.readouterr().err == ""
    with StopRequest() as stop:
        stop.step_seconds = 29.7
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        assert "SIGINT: stopping after this iteration, about 30 s\n" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_watched_evaluation():
    stop = StopRequest()
    batches = Watched(["a", "b", "c"], stop, rounds=3)
    assert list(batches) == ["a", "b", "c"] and len(batches) == 3
    seen = []
    with pytest.raises(Stopped, match="SIGTERM"):
        for batch in batches:
            seen.append(batch)
            stop.name = "SIGTERM"
    assert seen == ["a"]


class OneOfTwo:
    """The process that a signal reached, of two."""

    size, is_main = 2, False

    def any(self, flag):
        return flag

    def gather(self, value):
        return ["", value]


@pytest.mark.parametrize("world", [None, OneOfTwo()], ids=["alone", "two"])
@pytest.mark.parametrize("error", [RuntimeError, ConnectionRefusedError, EOFError])
def test_an_evaluation_whose_workers_the_signal_ended(error, world):
    class Workers(list):
        def __iter__(self):
            yield self[0]
            raise error("DataLoader worker (pid 7) is killed by signal: Terminated.")

    stop = StopRequest(world)
    with pytest.raises(error, match="DataLoader worker"):
        list(Watched(Workers("abc"), stop, rounds=3))  # no signal to this process: it is an error
    stop.explains = lambda error: bool(setattr(stop, "name", "SIGTERM") or stop.name)
    with pytest.raises(Stopped, match="SIGTERM"):
        list(Watched(Workers("abc"), stop, rounds=3))


def test_a_signal_in_the_last_batches_of_two_processes():
    stop = StopRequest(OneOfTwo())
    batches = iter(Watched(["a", "b"], stop, rounds=2))
    assert [next(batches), next(batches)] == ["a", "b"]
    stop.name = "SIGINT"
    with pytest.raises(Stopped, match="SIGINT"):
        next(batches)
