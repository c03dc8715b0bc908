"""Implicit–explicit steps: orders, stiff sums, what the stiff part alone costs, gradients, and fields in one piece."""
import math
import warnings
from functools import lru_cache

import pytest
import torch
from scipy.integrate import solve_ivp

from neuralode_nb.ode.catalogue import Implicit
from neuralode_nb.ode.imex import IMEX_METHODS, Imex, Split
from neuralode_nb.ode.imex_methods import AdditiveTableau
from neuralode_nb.ode.problems import PROBLEMS, observed_order
from neuralode_nb.ode.solve import solve
from neuralode_nb.ode.tableau import Tableau

each = pytest.mark.parametrize("name", IMEX_METHODS)
EULERS = AdditiveTableau("eulers", Tableau("forward", [[], [1]], [0, 1]), Tableau("backward", [[0, 0], [0, 1]], [0, 1]))


def turning(t, y):
    return (1 + t.cos()) * torch.stack([y[0] * y[1], -y[0] * y[0]])


def rest(t, y):
    return PROBLEMS["manufactured"].f(t, y) - turning(t, y)


@pytest.mark.parametrize("make", [*IMEX_METHODS.values(), lambda: Imex(EULERS)])
def test_orders_at_the_end_and_between(make):
    problem, method = PROBLEMS["manufactured"], make()
    t0, t1 = problem.span
    inside = [t0, *(t0 + (t1 - t0) * x for x in (.237, .459, .831)), t1]
    exact, errors = torch.stack([problem.exact(t) for t in inside]), {}

    def integrate(problem, n):
        found = solve(Split(rest, turning), problem.y0.double(), inside, method, step_size=(t1 - t0) / n, rtol=1e-12, atol=1e-12)
        errors[n] = (found.y - exact)[1:-1].abs().amax().item()
        return found.y[-1]

    with torch.no_grad(): assert abs(observed_order(integrate, problem, (64, 128)) - method.order) < .15
    between = min(method.order, method.pair.dense_order + 1 if method.pair.implicit.dense else 4)
    assert math.log2(errors[64] / errors[128]) > between - .35


def van_der_pol(eps):
    return Split(lambda t, y: torch.stack([y[1], 0 * y[1]]),
                 lambda t, y: torch.stack([0 * y[0], ((1 - y[0]**2) * y[1] - y[0]) / eps]))


@lru_cache
def oscillator_at(end):
    "The oscillator of the next test by another solver."
    flat = lambda t, y: [y[1], ((1 - y[0]**2) * y[1] - y[0]) * 1e3]
    return torch.from_numpy(solve_ivp(flat, (0, end), [2., -2 / 3], "Radau", rtol=1e-10, atol=1e-12).y[:, -1])


@each
def test_a_stiff_oscillator_is_followed(name):
    f, y0, rtol, exact = van_der_pol(1e-3), torch.tensor([2., -2 / 3], dtype=torch.float64), 1e-5, oscillator_at(1.2)
    with torch.no_grad(): found = solve(f, y0, [0., 1.2], IMEX_METHODS[name](), rtol=rtol, atol=rtol)
    assert ((found.y[-1] - exact).abs() / (rtol + rtol * exact.abs())).max() < 20
    assert found.stats.accepted < 1500


def ring(n, counts):
    def change(u, by): return torch.roll(u, -by)
    def stiff(t, u):
        counts["stiff"] += 1
        return (change(u, 1) - 2 * u + change(u, -1)) * (n * n / 5)
    def explicit(t, u):
        counts["explicit"] += 1
        return -(change(u, 1) - change(u, -1)) * (n / 2) + 8 * u * (1 - u) * (1 + (5 * t).sin() / 2)
    x = torch.arange(n).double() / n
    return Split(explicit, stiff), .9 * torch.exp(-100 * (x - .3)**2)


def test_the_stiff_part_is_solved_for_less_often_than_the_whole():
    spent = {}
    for method in ("kvaerno5", IMEX_METHODS["kencarp4"](), IMEX_METHODS["kencarp5"]()):
        counts = dict(stiff=0, explicit=0)
        f, y0 = ring(60, counts)
        with torch.no_grad(): found = solve(f, y0, [0., .5], method, rtol=1e-6, atol=1e-6)
        spent[found.method] = found.stats.jacobians, counts["stiff"], found.y[-1]
    for name in ("kencarp4", "kencarp5"):
        assert spent[name][0] == 1 < spent["kvaerno5"][0] and spent[name][1] < spent["kvaerno5"][1]
        assert (spent[name][2] - spent["kvaerno5"][2]).abs().max() < 1e-5


class Pull(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(30., dtype=torch.float64))

    def forward(self, t, s, k): return dict(x=-self.rate * s["x"]**3, v=-self.rate * k * s["v"])


def moving(gradient="direct", method="kencarp4", **options):
    "A loss of args, state, times and a parameter, and these."
    f = Split(lambda t, s, k: dict(x=k * s["v"].sin() + t.cos(), v=s["x"] * t), Pull())
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, [.8, .5], [0., .37, 1.])]

    def loss(k, y0, t):
        y = solve(f, dict(x=y0[:1], v=y0[1:]), t, IMEX_METHODS[method](), args=k, gradient=gradient, **options).y
        return (y["x"][1:].square() + y["v"][1:].sin()).sum()
    return loss, [*inputs, f.stiff.rate]


@each
def test_gradients_of_state_time_args_and_parameters(name):
    fixed = dict(step_size=.21, rtol=1e-12, atol=1e-12, method=name)
    loss, inputs = moving("checkpoint", **fixed)
    found = torch.autograd.grad(loss(*inputs[:3]), inputs)
    loss, inputs = moving("direct", **fixed)
    for g, other in zip(found, torch.autograd.grad(loss(*inputs[:3]), inputs)): assert torch.allclose(g, other, rtol=1e-8)
    with torch.no_grad():
        for x, g in zip(inputs, found):
            for i in range(x.numel()):
                ends, flat, old = [], x.view(-1), x.view(-1)[i].item()
                for change in (1e-5, -1e-5):
                    flat[i] = old + change
                    ends.append(loss(*inputs[:3]).item())
                flat[i] = old
                assert math.isclose(g.view(-1)[i].item(), (ends[0] - ends[1]) / 2e-5, rel_tol=1e-5, abs_tol=1e-6)


def test_gradients_with_adaptive_steps():
    found = []
    for gradient in ("direct", "checkpoint"):
        loss, inputs = moving(gradient, rtol=1e-6, atol=1e-6)
        found.append(torch.autograd.grad(loss(*inputs[:3]), inputs))
    for g, other in zip(*found): assert torch.allclose(g, other, rtol=1e-4, atol=1e-6)


def test_backward_in_time_at_jumps_complex_and_in_single_precision():
    method = IMEX_METHODS["kencarp4"]()
    f = Split(lambda t, y: torch.where(t < 1, 1., -1.) * torch.ones_like(y), lambda t, y: -2 * y)
    told = solve(f, torch.zeros(1).double(), [0., 2.], method, jump_t=[1.], rtol=1e-8, atol=1e-8)
    half = .5 - .5 * math.exp(-2)
    assert abs(told.y[-1].item() - ((half + .5) * math.exp(-2) - .5)) < 1e-7
    back = solve(f, told.y[-1], [2., 0.], method, jump_t=[1.], rtol=1e-9, atol=1e-9)
    assert back.y[-1].abs().item() < 1e-6
    f = Split(lambda t, y: 1j * y, lambda t, y: -100 * (y - torch.exp(1j * t)))
    turn = solve(f, torch.ones(1, dtype=torch.complex128), [0., 1.], method, rtol=1e-8, atol=1e-8)
    assert abs(turn.y[-1].item() - (100 - 0j) / 100 * complex(math.cos(1), math.sin(1))) < 1e-6
    single = solve(van_der_pol(.1), torch.tensor([2., 0.]), [0., 1.], method, rtol=1e-4, atol=1e-4)
    double = solve(van_der_pol(.1), torch.tensor([2., 0.]).double(), [0., 1.], method, rtol=1e-9, atol=1e-9)
    assert single.y.dtype == torch.float32 and (single.y[-1] - double.y[-1]).abs().max() < 2e-3


def test_dense_output_and_a_jacobian_by_differences():
    for method in (IMEX_METHODS["kencarp4"](), Implicit(IMEX_METHODS["kencarp5"](), "differences")):
        f = Split(lambda t, y: 100 * t.sin() + t.cos() + 0 * y, lambda t, y: -100 * y)
        found = solve(f, torch.zeros(1).double(), [0., 3.], method, dense=True, rtol=1e-8, atol=1e-8)
        t = torch.linspace(0, 3, 40).double()
        assert (found(t)[:, 0] - t.sin()).abs().max() < 1e-5


def test_under_autocast_and_without_gradients_both_parts_are_called_alike():
    net, seen = torch.nn.Linear(2, 2), []
    def explicit(t, y):
        seen.append(torch.is_autocast_enabled("cpu"))
        return net(y)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        f = Split(explicit, lambda t, y: -50 * y)
        found = solve(f, torch.ones(2), [0., 1.], IMEX_METHODS["kencarp3"](), rtol=1e-2, atol=1e-2)
    assert all(seen) and found.y.dtype == torch.float32


@each
def test_a_field_in_one_piece_and_other_misuse_are_refused(name):
    one, method = torch.ones(2).double(), IMEX_METHODS[name]()
    with pytest.raises(TypeError, match=r"write f = Split\(explicit, stiff\)"): solve(lambda t, y: -y, one, [0., 1.], method)
    with pytest.raises(ValueError, match="cannot step per sample"):
        solve(Split(lambda t, y: y, lambda t, y: -y), one[:, None], [0., 1.], method, batch="sample")
    with pytest.raises(ValueError, match="returned shape"): solve(Split(lambda t, y: y, lambda t, y: y[:1]), one, [0., 1.], method)
    with pytest.raises(ValueError, match="adjoint"):
        solve(Split(lambda t, y: y, lambda t, y: -y), one.requires_grad_(), [0., 1.], method, gradient="adjoint")


def test_equations_without_a_solution_end_with_a_status():
    f = Split(lambda t, y: 1 + 0 * y, lambda t, y: y**2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solve(f, torch.zeros(1).double(), [0., 10.], Imex(EULERS), step_size=5., throw=False)
    assert not found.status.ok
