"""FOAM on parameters that FSDP2 shards over two processes, against one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from foam_lightning import FOAM
from tests.support.training import free_port, mesh_of_one_process

WORLD = 2


def network():
    """Build it the same in every process; 7 and 5 rows do not divide by two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 7), nn.SiLU(), nn.Linear(7, 5), nn.SiLU(), nn.Linear(5, 1))


def optimizer_of(model, options):
    parameters = list(model.parameters())
    return FOAM(
        [{"params": parameters[:2], "level": 1}, {"params": parameters[2:], "level": 3}],
        lr=0.05,
        weight_decay=0.1,
        **options,
    )


def batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(2 * WORLD, 10, generator=random) for _ in range(4)]


def alone(options):
    model = network()
    optimizer = optimizer_of(model, options)
    for x in batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def one_of_two(rank, port, folder, options):
    """Train a shard, count what `step` communicates, save the whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    torch.set_num_threads(1)
    url = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=WORLD)
    model = network()
    fully_shard(model)
    optimizer = optimizer_of(model, options)
    talked = 0
    for x in batches():
        optimizer.zero_grad()
        model(x[rank * 2 : rank * 2 + 2]).square().mean().backward()
        with CommDebugMode() as communication:
            optimizer.step()
        talked += communication.get_total_counts()
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    shapes = [
        {key: tuple(value.shape) for key, value in optimizer.state[p].items() if key != "step"}
        for p in model.parameters()
    ]
    if rank == 0:
        torch.save({"weights": whole, "talked": talked, "shapes": shapes}, folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["fused", "plain"])
def test_two_processes_equal_one_and_step_does_not_communicate(options, tmp_path):
    port = free_port()
    torch.multiprocessing.spawn(one_of_two, (port, tmp_path, options), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, expected in alone(options).items():
        torch.testing.assert_close(found["weights"][name], expected, atol=1e-6, rtol=0)
    assert found["talked"] == 0
    # Of the whole matrices, not of the shards: (7, 10) at level 1.
    assert found["shapes"][0]["exp_avg"] == (7, 5)


def test_sharded_columns_do_not_fold():
    from torch.distributed.tensor import Shard, distribute_tensor

    with mesh_of_one_process() as mesh:
        param = nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh, [Shard(1)]))
        param.grad = distribute_tensor(torch.ones(4, 8), mesh, [Shard(1)])
        with pytest.raises(RuntimeError, match=r"\(4, 8\) .*sharded columns"):
            FOAM([param], level=1).step()
        FOAM([param], level=0).step()
        assert (param.full_tensor() < 1).all()
