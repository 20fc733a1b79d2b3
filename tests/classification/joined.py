"""A function in two processes that are joined together."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from resnet_backbone.runtime.processes import World


def _work(rank, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(function(World(rank, 2), *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def two_processes(tmp_path):
    """Function: what ``function(world, *arguments)``, of a module, returns on each of two."""

    def call(function, *arguments):
        mp.spawn(_work, (tmp_path, function, arguments), nprocs=2)
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]

    return call
