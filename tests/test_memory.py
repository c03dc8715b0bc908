"""What a solve keeps for its gradient, in bytes, on a convolutional field.

Everything is counted that lives on after the forward pass: what autograd saves (each storage once, parameters
left out) and the tensors that the graph's own nodes hold, which for `checkpoint` are the states at the steps.
"""
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from neuralode_nb import solve
from neuralode_nb.ode.certify import peak_memory
from neuralode_nb.ode.ways import Auto

STEPS = 1000


class Convolution(nn.Module):
    "Two convolutions with time as a channel."
    def __init__(self, n=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(n + 1, n, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(2, n)

    def forward(self, t, y):
        for layer in self.layers: y = torch.tanh(layer(torch.cat([torch.ones_like(y[:, :1]) * t, y], 1)))
        return self.norm(y)


def storages():
    "Bytes of each storage that Python or autograd's saved tensors can reach."
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type == "cpu"}


def kept(gradient, steps, method="rk4", outputs=2):
    "Bytes that a solve of so many steps keeps for its backward pass."
    field, y0 = Convolution(), torch.randn(2, 4, 8, 8, requires_grad=True)
    saved = {}
    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    before = storages()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = solve(field, y0, torch.linspace(0, 1, outputs), method, step_size=1 / steps, gradient=gradient).y
    everything = {**saved, **storages()}
    assert y.requires_grad
    return sum(size for place, size in everything.items() if place not in before)


def test_checkpoint_keeps_a_tenth_of_direct_over_a_thousand_steps():
    "Direct keeps every activation of every stage; what it keeps grows by the same amount with each step."
    few, many = kept("direct", 100), kept("direct", 200)
    direct, checkpoint = many + (many - few) * (STEPS - 200) / 100, kept("checkpoint", STEPS)
    assert checkpoint <= direct / 10, f"checkpoint {checkpoint / 2**20:.2f} MiB, direct {direct / 2**20:.2f} MiB"


def test_checkpoint_keeps_one_state_per_step():
    state = 2 * 4 * 8 * 8 * 4
    slope = (kept("checkpoint", 300) - kept("checkpoint", 100)) / 200
    assert state <= slope <= 1.1 * state


def test_the_adjoint_keeps_nothing_per_step():
    assert kept("adjoint", 200) == pytest.approx(kept("adjoint", 20), abs=1024)


def test_the_adjoint_keeps_its_outputs_and_no_more():
    state = 2 * 4 * 8 * 8 * 4
    slope = (kept("adjoint", 100, outputs=101) - kept("adjoint", 100, outputs=51)) / 50
    assert slope == pytest.approx(state, rel=.05)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_the_backward_pass_holds_one_step_at_a_time(gradient):
    "At no moment of the backward pass are more activations alive than those of a few steps."
    alive, most = weakref.WeakSet(), [0]
    class Watched(Convolution):
        def forward(self, t, y):
            out = super().forward(t, y)
            alive.add(out)
            most[0] = max(most[0], len(alive))
            return out
    y = solve(Watched(), torch.randn(1, 4, 8, 8), [0., 1.], "rk4", step_size=1 / 50, gradient=gradient).y
    y.sum().backward()
    assert 0 < most[0] <= 20


@pytest.mark.parametrize("method, options", [("tsit5", {}), ("rk4", dict(step_size=.05))], ids=["tsit5", "rk4"])
@pytest.mark.parametrize("width, hidden, batch", [(4, 16, 64), (8, 512, 16)], ids=["states", "parameters"])
def test_auto_stays_within_its_budget_or_says_what_it_needs(width, hidden, batch, method, options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
    y0 = torch.randn(batch, width)

    def work(gradient):
        f = lambda t, y: net(y) * torch.cos(4 * t)
        y = solve(f, y0, [0., 1.], method, gradient=gradient, rtol=1e-5, atol=1e-5, **options).y
        torch.autograd.grad(y[-1].square().sum(), list(net.parameters()))

    full, silent = peak_memory(lambda: work("direct"), y0.device), 0
    for share in (3, 1, .5, .2, .05):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            used = peak_memory(lambda share=share: work(Auto(memory=share * full)), y0.device)
        short = [w for w in told if "most frugal" in str(w.message)]
        assert used <= share * full or short
        silent += not short
    assert silent >= 2
