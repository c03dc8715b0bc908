"""Multistep methods: SciPy's and torchdiffeq's numbers, gradients, jumps, landings, and where f is asked."""
import math
import warnings

import pytest
import torch
from scipy.integrate import solve_ivp

from neuralode_nb.ode.base import layout_of, norm_for
from neuralode_nb.ode.control import I
from neuralode_nb.ode.detest import DETEST
from neuralode_nb.ode.differences import gentle
from neuralode_nb.ode.loop import march
from neuralode_nb.ode.multistep import MULTISTEP, adams, bdf, explicit_adams, implicit_adams
from neuralode_nb.ode.problems import PROBLEMS
from neuralode_nb.ode.steps import Plan
from neuralode_nb.ode.stiff_problems import STIFF

ADAPTIVE = [name for name, make in MULTISTEP.items() if make().adaptive]
each_adaptive = pytest.mark.parametrize("name", ADAPTIVE)
each = pytest.mark.parametrize("name", [name for name in MULTISTEP if name != "fixed_adams"])


def run(f, y0, times, method, rtol=1e-6, atol=1e-8, t=None, differentiable=False, steps=None, **options):
    layout = layout_of(y0)
    return march(Plan(f, y0, times, layout, method, rtol, atol, norm_for(None, layout), I, stepper=method.stepper,
                      grid=steps and (lambda times: steps), **options), t, differentiable)


def numpy_field(problem):
    return lambda t, y: problem.f(torch.tensor(t).double(), torch.from_numpy(y)).numpy()


@pytest.mark.parametrize("name", ["robertson", "hires", "pollution", "heat", "brusselator", "allen_cahn"])
def test_bdf_takes_about_as_many_steps_as_scipy_and_ends_near_the_tolerance(name):
    problem, rtol = STIFF[name], 1e-4
    atol = rtol * (1e-3 if name in ("robertson", "pollution") else 1e-2)
    y0, end = problem.y0.double(), torch.as_tensor(problem.final).double()
    with torch.no_grad(): ours = run(problem.f, y0, list(problem.span), bdf(), rtol, atol)
    theirs = solve_ivp(numpy_field(problem), problem.span, y0.numpy(), "BDF", rtol=rtol, atol=atol)
    assert ours.failure is None
    assert ours.stats.accepted <= 1.55 * (len(theirs.t) - 1)
    error = ((ours.y[-1] - end).abs() / (atol + rtol * end.abs())).max().item()
    assert error < (20 if name == "hires" else 10)


def test_adams_asks_f_less_often_than_lsoda():
    ours = theirs = 0
    for problem in DETEST.values():
        y0 = problem.y0.double()
        with torch.no_grad(): found = run(problem.f, y0, list(problem.span), adams(), 1e-6, 1e-8)
        assert found.failure is None
        ours += found.stats.f_evals
        theirs += solve_ivp(numpy_field(problem), problem.span, y0.numpy(), "LSODA", rtol=1e-6, atol=1e-8).nfev
    assert ours < theirs


@pytest.mark.parametrize("name", ["explicit_adams", "implicit_adams", "fixed_adams"])
@pytest.mark.parametrize("order", [4, 5, 8, 12])
def test_grids_give_the_numbers_of_torchdiffeq(name, order):
    from torchdiffeq import odeint
    unstable = name == "explicit_adams" and order > 8       # soon, with any step: look at the beginning only
    problem, t = PROBLEMS["lotka_volterra"], torch.linspace(0, 4, 401, dtype=torch.float64)[:30 if unstable else None]
    y0 = problem.y0.double()
    theirs = odeint(problem.f, y0, t, method=name, rtol=1e-7, atol=1e-9, options=dict(max_order=order))
    with torch.no_grad(): ours = run(problem.f, y0, t.tolist(), MULTISTEP[name](order), 1e-7, 1e-9, steps=t.tolist())
    assert torch.allclose(ours.y, theirs, rtol=1e-10, atol=0)


def test_a_corrector_that_gives_up_does_as_torchdiffeq_does():
    from torchdiffeq import odeint
    f, t, y0 = lambda t, y: -12 * y + t.cos(), torch.linspace(0, 2, 31, dtype=torch.float64), torch.ones(2).double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = odeint(f, y0, t, method="implicit_adams", rtol=1e-9, atol=1e-11, options=dict(max_iters=3))
        ours = run(f, y0, t.tolist(), implicit_adams(max_iters=3), 1e-9, 1e-11, steps=t.tolist())
    assert any("did not converge in max_iters=3" in str(w.message) for w in said)
    assert torch.allclose(ours.y, theirs, rtol=1e-8)


def oscillation(t, y): return torch.stack([y[1], -4 * y[0] + t.sin() - .1 * y[1] * y[0]])


@each
@pytest.mark.parametrize("wanted", ["y0", "rate", "t"])
def test_gradients_are_those_of_the_steps(name, wanted):
    leaves = dict(y0=torch.tensor([1., .3]).double(), rate=torch.tensor(.7).double(),
                  t=torch.tensor([0., .1, .2, .3, .45, .5, .8, .85, .9]).double())

    def end(x):
        now = leaves | {wanted: x}
        t = now["t"]
        steps = t.detach().tolist()
        f = lambda t, y: now["rate"] * oscillation(t, y) + torch.cat([y[1:] * y[1:], y[:1] * t.cos()])
        found = run(f, now["y0"], steps, MULTISTEP[name](), 1e-12, 1e-13, differentiable=True, steps=steps,
                    t=t if t.requires_grad else None)
        return found.y[-3:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # a fixed corrector of few iterations cannot reach 1e-12
        assert torch.autograd.gradcheck(end, leaves[wanted].clone().requires_grad_(), eps=1e-6, atol=2e-6, rtol=2e-5)


@each_adaptive
def test_observations_between_steps_have_a_gradient(name):
    rate = torch.tensor(.7).double().requires_grad_()
    f, y0, times = lambda t, y: rate * oscillation(t, y), torch.tensor([1., .3]).double(), [0., .37, .81, 1.]
    steps = [i / 10 for i in range(11)]
    def observed(rate):
        f = lambda t, y: rate * oscillation(t, y)
        return run(f, y0, times, MULTISTEP[name](), 1e-10, 1e-12, differentiable=True, steps=steps).y
    assert torch.autograd.gradcheck(observed, rate, atol=1e-6)
    assert run(f, y0, times, MULTISTEP[name](), differentiable=True).y.requires_grad


@each_adaptive
@pytest.mark.parametrize("span", [(0., 3.), (3., 0.)])
def test_f_is_asked_inside_the_span_only(name, span):
    asked = []
    def f(t, y):
        asked.append(t.item())
        return oscillation(t, y)
    found = run(f, torch.tensor([1., .3]).double(), list(span), MULTISTEP[name]())
    assert found.failure is None and min(asked) >= 0 and max(asked) <= 3


@each_adaptive
def test_any_landing_is_met(name):
    y0, stops = torch.tensor([1., .3]).double(), (.1, .100001, .5, 1.3, 1.31, 2.)
    direct = run(oscillation, y0, [0., 3.], MULTISTEP["adams"](), 1e-11, 1e-12)
    landed = run(oscillation, y0, [0., 3.], MULTISTEP[name](), 1e-8, 1e-10, step_t=stops)
    assert (landed.y[-1] - direct.y[-1]).abs().max() < 1e-6


@each_adaptive
def test_a_jump_of_f_and_a_state_from_outside_begin_anew(name):
    f = lambda t, y: torch.where(t < 1, -y, 2 * y)
    found = run(f, torch.ones(1).double(), [0., 2.], MULTISTEP[name](), 1e-8, 1e-10, jump_t=(1.,))
    assert found.y[-1].item() == pytest.approx(math.e, rel=1e-6)
    found = run(lambda t, y: -y, torch.ones(1).double(), [0., 2.], MULTISTEP[name](), 1e-8, 1e-10, step_t=(1.,),
                resets={1.: lambda y: y + 1})
    assert found.y[-1].item() == pytest.approx((1 + math.e) * math.exp(-2), rel=1e-6)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_types_are_kept(name, dtype):
    turn = 1j if dtype.is_complex else -1.
    f, y0, method = lambda t, y: turn * y, torch.ones(3, dtype=dtype), MULTISTEP[name](5)
    found = run(f, y0, [0., .33, 1.], method, 1e-4, 1e-6, steps=None if method.adaptive else [i / 20 for i in range(21)])
    exact = torch.exp(torch.tensor([0., turn * .33, turn], dtype=dtype))
    assert found.y.dtype == dtype
    assert (found.y - exact[:, None]).abs().max() < 1e-3


@each_adaptive
def test_a_field_that_writes_into_one_buffer_does_no_harm(name):
    buffer = torch.empty(2).double()
    def f(t, y): return buffer.copy_(oscillation(t, y))
    def slopes(t, y): return torch.tensor([[0., 1.], [-4 - .1 * y[1], -.1 * y[0]]]).double()
    y0 = torch.tensor([1., .3]).double()
    with torch.no_grad():
        a, b = (run(g, y0, [0., 3.], MULTISTEP[name](), options=dict(jacobian=slopes)) for g in (f, oscillation))
    assert torch.equal(a.y, b.y)


@pytest.mark.parametrize("make", [adams, bdf])
def test_a_gentle_grid_starts_without_loss(make):
    problem = PROBLEMS["manufactured"]
    with torch.no_grad():
        abrupt = run(problem.f, problem.y0, list(problem.span), make(4), 1e-12, 1e-12, steps=torch.linspace(0, 2, 81).tolist())
        smooth = run(problem.f, problem.y0, list(problem.span), make(4), 1e-12, 1e-12, steps=gentle(0., 2., 80))
    assert problem.error(smooth.y[-1]) < .1 * problem.error(abrupt.y[-1])


def test_explicit_adams_asks_f_once_per_step_after_the_beginning():
    steps = torch.linspace(0, 1, 51).tolist()
    found = run(oscillation, torch.tensor([1., .3]).double(), [0., 1.], explicit_adams(5), steps=steps)
    assert found.stats.f_evals == 50 + 2 * 3
