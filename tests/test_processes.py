"""Two processes, started as a user would, find what one process finds."""
import os
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from neuralode_nb.lab.train import fit
from neuralode_nb.models.anchors import AnchoredEnsemble
from neuralode_nb.models.blocks import ODEBlock
from neuralode_nb.models.ensemble import Ensemble, gather_members, members_of_rank
from neuralode_nb.models.fields import MLP

DOUBLE = dict(dtype=torch.float64)
MEMBERS = 5


def make(seed):
    torch.manual_seed(seed)
    block = ODEBlock(MLP(2, 8, time=True).double(), rtol=1e-8, atol=1e-8)
    return torch.nn.Sequential(torch.nn.Linear(2, 2, **DOUBLE), block)


def data():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(16, 2, generator=generator, **DOUBLE), torch.randn(16, 2, generator=generator, **DOUBLE)


def trained(model, loss, batch, **options):
    "Weights after two epochs of the library's training loop; `batch` samples in each process at a time."
    loader = DataLoader(TensorDataset(*data()), batch_size=batch)
    history = fit(model, loss, loader, epochs=2, optimizer=torch.optim.SGD(model.parameters(), lr=.1), device="cpu",
                  progress=False, **options)
    return [p.detach().clone() for p in model.parameters()], [row["loss"] for row in history.rows]


def block_in_parallel(batch, **options):
    return trained(make(0), lambda model, pair: (model(pair[0]) - pair[1]).square().mean(), batch, **options)


def ensemble_in_parallel(batch):
    ensemble = Ensemble(make, 3)
    return trained(ensemble, lambda model, pair: ensemble.loss(model(pair[0]), pair[1]), batch)


def members_in_shares():
    "Anchored members, trained in a loop of each process's own; what all of them predict."
    ensemble, (x, y) = AnchoredEnsemble(make, members_of_rank(MEMBERS), observations=32, noise=.1, start="model"), data()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=.02)
    for _ in range(3):
        optimizer.zero_grad()
        ensemble.loss(ensemble(x), y).backward()
        optimizer.step()
    return gather_members(ensemble(x), MEMBERS), gather_members(ensemble.anchors, MEMBERS)


def a_share_in_parallel():
    "What the training loop says to members that are not the same in every process."
    ensemble = Ensemble(make, members_of_rank(4))
    try: trained(ensemble, lambda model, pair: ensemble.loss(model(pair[0]), pair[1]), 4)
    except RuntimeError as error: return str(error)


def work(batch):
    "Everything that the test compares."
    return {"block": block_in_parallel(batch), "clipped": block_in_parallel(batch, clip=.05),
            "ensemble": ensemble_in_parallel(batch), "shares": members_in_shares()}


def launchers(machines, port):
    "The command lines, one for each machine, that start two processes in all."
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(2 // machines), "--master_port", port]
    if machines == 1: return [run]
    return [[*run, "--nnodes", "2", "--node_rank", str(i), "--master_addr", "127.0.0.1"] for i in range(2)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one machine", "two machines"])
def two(request, tmp_path_factory):
    "What each of two processes has found."
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available(): pytest.skip("no gloo here")
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*line, __file__, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                env=settings) for line in launchers(request.param, port)]
    try: errors = [process.communicate(timeout=180)[1] for process in running]
    finally:
        for process in running: process.kill()
    assert [process.returncode for process in running] == [0] * len(running), errors[0][-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(found, expected):
    return all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("what", [block_in_parallel, ensemble_in_parallel], ids=["block", "ensemble"])
def test_data_parallel_training_is_training_on_the_whole_batch(two, what):
    weights, losses = what(8)                    # 4 samples in each of two processes are 8 at a time
    name = "block" if what is block_in_parallel else "ensemble"
    for rank in two:
        assert close(rank[name][0], weights)
        assert rank[name][1] == pytest.approx(losses, abs=1e-6)
    assert losses[1] < losses[0]


def test_clipping_sees_the_whole_gradient(two):
    weights, _ = block_in_parallel(8, clip=.05)
    assert close(two[0]["clipped"][0], weights) and not close(two[0]["block"][0], weights)


def test_members_in_shares_are_the_members_of_one_process(two):
    predictions, anchors = members_in_shares()
    for rank in two:
        assert rank["shares"][0].shape == (MEMBERS, 16, 2) and close([rank["shares"][0]], [predictions])
        assert torch.equal(rank["shares"][1], anchors)


def test_a_share_is_not_averaged_with_another(two):
    for rank in two: assert "DistributedDataParallel is not needed" in rank["refused"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator(cpu=True)                        # joins the processes
    found = work(4) | {"refused": a_share_in_parallel()}
    torch.save(found, os.path.join(sys.argv[1], f"{os.environ['RANK']}.pt"))
    torch.distributed.destroy_process_group()
