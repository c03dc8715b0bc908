"""Symplectic and reversible steps: orders, energy, the way back, gradients, jumps, and fields that do not fit."""
import math

import pytest
import torch

from neuralode_nb.ode.methods import TABLEAUS
from neuralode_nb.ode.problems import PROBLEMS, observed_order
from neuralode_nb.ode.reversible import STRUCTURED, AsynchronousLeapfrog, Reversible, alf, reversible_heun
from neuralode_nb.ode.solve import solve
from neuralode_nb.ode.structure import SYMPLECTIC, invert, leapfrog, yoshida4

symplectic = pytest.mark.parametrize("name", SYMPLECTIC)
OTHERS = [reversible_heun(), alf(), AsynchronousLeapfrog(.8), Reversible("midpoint", .9), Reversible("bosh3"), Reversible("dopri5")]
others = pytest.mark.parametrize("method", OTHERS, ids=lambda m: m.name)
DOUBLE = dict(dtype=torch.float64)


def driven(t, s):
    return (1 + .5 * t.sin()) * s[1], -s[0].sin() + (2 * t).cos()


def pair():
    return torch.tensor([1., -.3], **DOUBLE), torch.tensor([.5, .2], **DOUBLE)


def swing(t, y):
    return torch.stack([y[1], .5 * (2 * t).cos() - y[0].sin() - .1 * y[1]])


@symplectic
def test_symplectic_orders_at_the_end_and_between_forward_and_backward(name):
    method = SYMPLECTIC[name]()
    for times in ([0., .731, 2.], [2., 1.377, 0.]):
        exact = solve(driven, pair(), times, "dopri8", rtol=1e-13, atol=1e-13).y
        errors = []
        for n in (50, 100):
            y = solve(driven, pair(), times, method, step_size=2 / n).y
            errors.append([max((a - b)[i].abs().max().item() for a, b in zip(y, exact)) for i in (1, 2)])
        between, end = (math.log2(a / b) for a, b in zip(*errors))
        assert abs(end - method.order) < .15 and between > method.order - .4


@symplectic
def test_two_evaluations_a_drift_and_one_step_needs_no_past(name):
    method, counts = SYMPLECTIC[name](), [0]
    def f(t, s):
        counts[0] += 1
        return driven(t, s)
    stats = solve(f, pair(), [0., 1.], method, step_size=.1).stats
    assert counts[0] - 3 == method.stages * 10 and stats.f_evals in (counts[0], counts[0] - 1)
    assert getattr(method.stepper, "one_step", True)


def test_the_energy_of_a_pendulum_stays_for_thousands_of_steps():
    f = lambda t, s: (s[1], -s[0].sin())
    energy = lambda s: s[1].square() / 2 - s[0].cos()
    times, start = torch.linspace(0, 900, 301).double(), (torch.tensor([2.], **DOUBLE), torch.tensor([0.], **DOUBLE))
    worst = {}
    for method in (leapfrog(), "rk4_classic"):
        with torch.no_grad(): e = energy(solve(f, start, times, method, step_size=.3).y)
        name = getattr(method, "name", method)
        worst[name] = [(e - e[0])[part].abs().max() for part in (slice(100), slice(-100, None))]
    assert worst["leapfrog"][1] < 1.2 * worst["leapfrog"][0]
    assert worst["rk4_classic"][1] > 2 * worst["rk4_classic"][0]


@symplectic
def test_a_solve_backward_ends_where_the_forward_one_began(name):
    there = solve(driven, pair(), [0., 20.], SYMPLECTIC[name](), step_size=.05).y
    back = solve(driven, tuple(x[-1] for x in there), [20., 0.], SYMPLECTIC[name](), step_size=.05).y
    for x, y in zip(back, pair()): assert (x[-1] - y).abs().max() < 1e-12


def differences(loss, x, i, eps=1e-5):
    "Central difference of a loss for entry i of x."
    flat, ends = x.view(-1), []
    for change in (eps, -2 * eps, eps):
        with torch.no_grad():
            flat[i] += change
            ends.append(loss().item())
    return (ends[0] - ends[1]) / (2 * eps)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@symplectic
def test_gradients_of_symplectic_steps(name, gradient):
    k, t = torch.tensor(1.3, **DOUBLE), torch.tensor([0., .37, 1.], **DOUBLE)
    inputs = [*pair(), k, t]
    for x in inputs: x.requires_grad_()
    f = lambda t, s, k: (k * s[1] * (1 + t), -(k * s[0]).sin() + t)
    def loss():
        q, p = solve(f, tuple(inputs[:2]), t, SYMPLECTIC[name](), args=k, step_size=.15, gradient=gradient).y
        return (q[1:].square() + p[1:].sin()).sum()
    found = torch.autograd.grad(loss(), inputs)
    for x, g in zip(inputs, found):
        for i in range(x.numel()): assert math.isclose(g.view(-1)[i], differences(loss, x, i), rel_tol=1e-6, abs_tol=1e-7)


@others
def test_direct_gradients_of_reversible_steps(method):
    y0, k, t = torch.tensor([1., .3], **DOUBLE), torch.tensor(1.3, **DOUBLE), torch.tensor([0., .37, 1.], **DOUBLE)
    inputs = [y0, k, t]
    for x in inputs: x.requires_grad_()
    f = lambda t, y, k: torch.stack([k * y[1], -(k * y[0]).sin() + t * y[1]])
    def loss(): return solve(f, y0, t, method, args=k, step_size=.15, gradient="direct").y[1:].sin().sum()
    found = torch.autograd.grad(loss(), inputs)
    for x, g in zip(inputs, found):
        for i in range(x.numel()): assert math.isclose(g.view(-1)[i], differences(loss, x, i), rel_tol=1e-6, abs_tol=1e-7)


@others
def test_reversible_orders_at_the_end_and_between(method):
    problem = PROBLEMS["manufactured"]
    t0, t1 = problem.span
    inside = [t0, t0 + (t1 - t0) / 3, t1]     # at 1/3 or 2/3 of a step for each n below
    errors = {}
    def integrate(problem, n):
        y = solve(problem.f, problem.y0.double(), inside, method, step_size=(t1 - t0) / n).y
        errors[n] = (y[1] - problem.exact(inside[1])).abs().max().item()
        return y[-1]
    assert abs(observed_order(integrate, problem, (64, 128, 256)) - method.order) < .2
    assert math.log2(errors[128] / errors[256]) > min(method.order, 4) - .4
    assert not method.stepper.one_step


@pytest.mark.parametrize("name", TABLEAUS)
def test_every_explicit_method_can_be_undone(name):
    method, t = Reversible(name), torch.linspace(0, 2, 21).double()
    start = torch.tensor([1., 0.], **DOUBLE)
    state = start, *method.begin(swing, t[0], start)
    for a, b in zip(t, t[1:]): state = method.step(swing, a, b, (b - a).item(), state)[0]
    assert (state[0] - start).abs().max() > .1
    for b, a in zip(t.flip(0), t.flip(0)[1:]): state = invert(method, swing, a, b, state)
    for x in state: assert (x - start).abs().max() < 1e-13


@pytest.mark.parametrize("method", [*OTHERS[:3], leapfrog(), yoshida4()], ids=lambda m: m.name)
def test_single_steps_of_many_lengths_can_be_undone(method):
    f = (lambda t, y: torch.cat([y[1:], t - y[:1].sin()])) if method.name in SYMPLECTIC else swing
    y, t = torch.tensor([1., .2], **DOUBLE), torch.rand(12, **DOUBLE).cumsum(0) / 6
    state = start = (y,) if method.name in SYMPLECTIC else (y, *method.begin(f, t[0], y))
    for a, b in zip(t, t[1:]):
        h = (b - a).item()
        state = method.step(f, a, b, h, *state)[:1] if method.name in SYMPLECTIC else method.step(f, a, b, h, state)[0]
    for b, a in zip(t.flip(0), t.flip(0)[1:]): state = invert(method, f, a, b, state)
    for x, y in zip(state, start): assert (x - y).abs().max() < 1e-11


@pytest.mark.parametrize("method", [reversible_heun(), alf(), Reversible("bosh3"), Reversible("tsit5")], ids=lambda m: m.name)
def test_adaptive_steps_keep_the_tolerance(method):
    start = torch.tensor([1., 0.], **DOUBLE)
    exact = solve(swing, start, [0., 3., 6.], "dopri8", rtol=1e-12, atol=1e-12).y
    for tol in (1e-3, 1e-4):
        found = solve(swing, start, [0., 3., 6.], method, rtol=tol, atol=tol)
        assert (found.y - exact).abs().max() < 10 * tol
    dense = solve(swing, start, [0., 3., 6.], method, rtol=tol, atol=tol, dense=True)
    assert (dense(3.) - exact[1]).abs().max() < 10 * tol


@others
def test_a_jump_is_met_from_either_side(method):
    switch = lambda t, y: torch.where(t < 1, 1., -1.) * torch.ones_like(y)
    assert solve(switch, torch.zeros(1).double(), [0., 2.], method, step_size=.3, jump_t=[1.]).y[-1].abs() < 1e-12


def test_a_jump_of_the_force():
    f = lambda t, s: (0 * s[1], torch.where(t < 1, 1., -1.) * torch.ones_like(s[0]))
    assert solve(f, pair(), [0., 2.], leapfrog(), step_size=.3, jump_t=[1.]).y[1][-1].sub(pair()[1]).abs().max() < 1e-12


@symplectic
def test_what_is_not_separable_or_no_pair_is_refused(name):
    q, p = pair()
    method = SYMPLECTIC[name]()
    def refused(f, y0, kind, match):
        with pytest.raises(kind, match=match): solve(f, y0, [0., 1.], method, step_size=.1)
    refused(lambda t, y: -y, q, TypeError, r"pass y0=\(q, p\)")
    refused(lambda t, s: dict(q=s["p"], p=-s["q"]), dict(q=q, p=p), TypeError, "y0 is dict")
    refused(lambda t, s: (s[1], -s[0], s[2]), (q, p, q), TypeError, "two tensors of one shape")
    refused(lambda t, s: (s[0], s[1]), (q, p[:1]), TypeError, "two tensors of one shape")
    refused(lambda t, s: ((s[1], -s[0][0]), s[0][1]), ((q, p), p), TypeError, "two tensors of one shape")
    refused(lambda t, s: (s[1] + .01 * s[0], -s[0]), (q, p), ValueError, "dq/dt changes with q")
    refused(lambda t, s: (s[1], -s[0] - .01 * s[1]), (q, p), ValueError, "dp/dt changes with p")
    with pytest.raises(ValueError, match="takes fixed steps"): solve(lambda t, s: (s[1], -s[0]), (q, p), [0., 1.], method)
    with pytest.raises(ValueError, match="cannot step per sample"):
        solve(lambda t, s: (s[1], -s[0]), (q, p), [0., 1.], method, step_size=.1, batch="sample")


def test_shapes_lists_single_precision_complex_and_nothing_at_all():
    f = lambda t, s: [s[1], -s[0]]
    for dtype, eps in ((torch.float32, 1e-3), (torch.complex128, 1e-5)):
        q = torch.randn(3, 2, 2, dtype=dtype)
        found = solve(f, [q, 0 * q], [0., 1.], yoshida4(), step_size=.1).y
        assert found[0].shape == (2, 3, 2, 2) and (found[0][-1] - math.cos(1) * q).abs().max() < eps
    assert solve(f, [q[:0], q[:0]], [0., 1.], leapfrog(), step_size=.1).y[0].shape == (2, 0, 2, 2)


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_field_that_breaks_ends_with_a_status(name):
    method = STRUCTURED[name]()
    bad = lambda t: torch.where(t < .5, 1., torch.nan)
    y0 = pair() if name in SYMPLECTIC else pair()[0]
    f = (lambda t, s: (s[1], -s[0] * bad(t))) if name in SYMPLECTIC else lambda t, y: -y * bad(t)
    assert not solve(f, y0, [0., 1.], method, step_size=.1, throw=False).status.ok


def test_misuse_of_the_wrapper():
    with pytest.raises(TypeError, match="explicit Tableau"): Reversible(leapfrog())
    with pytest.raises(ValueError, match="is not known"): Reversible("dopri6")
    with pytest.raises(ValueError, match="coupling=1.5"): Reversible("tsit5", 1.5)
    with pytest.raises(ValueError, match="damping=2.0"): AsynchronousLeapfrog(2.)


@others
def test_gradients_that_retrace_single_steps_are_refused(method):
    y0 = torch.tensor([1., .3], **DOUBLE, requires_grad=True)
    with pytest.raises(ValueError, match="direct"): solve(swing, y0, [0., 1.], method, step_size=.1, gradient="checkpoint")
