"""The batch script of docs/guides/clusters.md on a Slurm cluster of three nodes on this machine."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
from drawn_images import fill
from runs import PROJECT, arguments, assert_same_run, assert_same_tensors
from safetensors.torch import load_file

from resnet_backbone.classification.data.archives import write_shards
from resnet_backbone.classification.data.imagenet import read_image_folder
from resnet_backbone.runtime.launch import _free_port

pytestmark = pytest.mark.slow
GUIDE = PROJECT / "docs" / "guides" / "clusters.md"
NODES = ("node1", "node2", "node3")
SEARCHED = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
CONFIG = """
ClusterName=tested
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
NodeName=node3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Of the trainers, small enough for a minute.
CLASSIFIER = """--config-file imagenet/resnet18 data.format=shards data.crop=32
data.short_side=[36,48] data.workers=0 evaluation.short_side=36 evaluation.crop=32
evaluation.batch_size=4 evaluation.every=0 train.batch_size=4 train.micro_batch=2 train.device=cpu
schedule.milestones=[] schedule.lr=0.01 schedule.iterations=40 output.checkpoint_every=5
output.log_every=5 output.tensorboard=false""".split()
DETECTOR = dict(SOLVER__MAX_ITER=40, SOLVER__CHECKPOINT_PERIOD=5, SOLVER__BASE_LR=0.001)
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return found


def kill(processes, number=signal.SIGKILL):
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def has_checkpoint(folder: Path) -> bool:
    """Of either trainer."""
    return any(folder.glob("checkpoints/[0-9]*")) or (folder / "last_checkpoint").exists()


def waits_for(process: int, number: int) -> bool:
    """Whether a signal has been sent to a process that is stopped."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


class Cluster:
    """Its daemons, and the jobs that it runs; all of them have ``SLURM_CONF`` in common."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        self.environment |= {"PATH": SEARCHED, "PYTHONPATH": str(PROJECT)}
        ports = [_free_port() for _ in range(4)]
        facts = dict(folder=folder, host=socket.gethostname(), user=getpass.getuser(), ports=ports)
        (folder / "slurm.conf").write_text(CONFIG.format(**facts))
        for name in ("state", *NODES):
            (folder / name).mkdir()
        key = folder / "munge.key-file"
        key.touch(0o600)
        key.write_bytes(os.urandom(32))
        script = re.search(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
        (folder / "train.sbatch").write_text(script)

    def start(self, *command: str, **variables: str) -> None:
        environment = self.environment | variables
        with open(self.folder / "daemons.log", "a") as log:
            subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment)

    def start_node(self, name: str) -> None:
        self.start("slurmd", "-D", "-N", name, SLURMD_NODENAME=name)  # as the job's processes

    def start_all(self) -> None:
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={self.folder}/munge.{name}" for name in names]
        self.start("munged", "--foreground", "--force", *files)
        wait_until((self.folder / "munge.socket").exists, 30)
        self.start("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        wait_until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "3", 60)

    def ask(self, *command: str) -> str:
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run(command, **streams, env=self.environment, cwd=self.folder)
        return done.stdout.strip()

    def submit(self, command: list[str], *options: str) -> str:
        """The number of a job that runs a training by the script."""
        fixed = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--output=%j.log"]
        job = self.ask("sbatch", *fixed, *options, "train.sbatch", *command)
        assert job.isdecimal(), job
        return job

    def facts(self, job: str) -> dict[str, str]:
        pairs = (word.partition("=") for word in self.ask("scontrol", "show", "job", job).split())
        return {key: value for key, _, value in pairs}

    def log(self, job: str) -> str:
        return (self.folder / f"{job}.log").read_text()

    def finish(self, job: str) -> dict[str, str]:
        """What Slurm says of a job that has ended well."""
        wait_until(lambda: self.facts(job)["JobState"] in ENDED, 600)
        facts = self.facts(job)
        assert facts["JobState"] == "COMPLETED", self.log(job)
        return facts

    def stop_in_the_middle(self, job: str, folder: Path) -> int:
        """A training process that is not on the first node, held by SIGSTOP."""
        wait_until(lambda: has_checkpoint(folder))
        ranks = (self.processes(SLURM_JOB_ID=job, RANK=rank) for rank in range(2))
        worker = min(set(chain(*ranks)) - set(self.processes(SLURM_JOB_ID=job, SLURM_NODEID=0)))
        os.kill(worker, signal.SIGSTOP)
        assert not (folder / "results.json").exists()
        return worker

    def processes(self, **variables: object) -> list[int]:
        """Those of this cluster that have these environment variables."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"], **variables}
        wanted, found = {f"{key}={value}".encode() for key, value in wanted.items()}, []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted <= set(path.read_bytes().split(b"\0")):
                    found.append(int(path.parent.name))
            except OSError:  # it has ended, or is another user's
                pass
        return found

    def stop_all(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 10
            while (left := self.processes()) and time.monotonic() < deadline:
                kill(left, number)
                time.sleep(0.5)
        assert not left


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    wanted = ("munged", "slurmctld", "slurmd", "sbatch", "torchrun", "resnet-backbone")
    missing = [name for name in wanted if not shutil.which(name, path=SEARCHED)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start_all()
        yield cluster
    finally:
        cluster.stop_all()


@pytest.fixture(scope="module", params=["train-classifier", "train-net"])
def training(request, tmp_path_factory, write_voc):
    """Function: run folder -> the command of a small training."""
    data, tool = tmp_path_factory.mktemp("data"), ["resnet-backbone", request.param]
    if request.param == "train-net":
        write_voc(data / "VOC2007", {"train": range(7), "test": range(3)})
        return lambda folder: [*tool, *arguments(data / "VOC2007", folder, **DETECTOR)]
    pytest.importorskip("webdataset")
    images = fill(data / "val", count=12)
    write_shards(read_image_folder(images), data / "train", samples_per_shard=5)
    where = [f"data.root={data}/train", f"data.val_root={images}"]
    return lambda folder: [*tool, *CLASSIFIER, *where, "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def whole(cluster, training, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert cluster.finish(cluster.submit(training(folder)))["Restarts"] == "0"
    return folder


def assert_same(folder: Path, other: Path) -> None:
    if (folder / "final.safetensors").exists():
        assert_same_tensors(*(load_file(one / "final.safetensors") for one in (folder, other)))
    else:
        assert_same_run(folder, other)


def test_a_job_that_its_time_limit_cuts_goes_on(cluster, training, whole, tmp_path):
    folder = tmp_path / "run"
    job = cluster.submit(training(folder), "--time=2", "--signal=B:USR1@30")
    worker = cluster.stop_in_the_middle(job, folder)  # an iteration that lasts until the signal
    wait_until(lambda: waits_for(worker, signal.SIGTERM))
    os.kill(worker, signal.SIGCONT)
    assert int(cluster.finish(job)["Restarts"]) >= 1  # more on a slow machine
    assert "stopped by SIGTERM" in cluster.log(job)
    assert_same(folder, whole)


@pytest.mark.parametrize("training", ["train-classifier"], indirect=True)
@pytest.mark.parametrize("what", ["process", "node"])
def test_what_is_killed_starts_again(cluster, training, whole, tmp_path, what):
    """torchrun starts processes again, in the same job; for a lost node Slurm takes the third."""
    folder = tmp_path / "run"
    job = cluster.submit(training(folder))
    worker = cluster.stop_in_the_middle(job, folder)
    node = next(name for name in NODES if worker in cluster.processes(SLURMD_NODENAME=name))
    kill([worker] if what == "process" else cluster.processes(SLURMD_NODENAME=node))
    assert cluster.finish(job)["Restarts"] == ("0" if what == "process" else "1")
    assert "resuming at iteration" in cluster.log(job)
    assert_same(folder, whole)
    if what == "node":
        cluster.start_node(node)
        cluster.wait_for_nodes()
