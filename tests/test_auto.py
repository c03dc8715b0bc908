"""The method that chooses, the advice that says why, and SciPy's solvers under the same loop."""
from dataclasses import replace

import pytest
import torch
from fastcore.test import test_close as close

from neuralode_nb import solve
from neuralode_nb.ode.advice import advise
from neuralode_nb.ode.auto import AUTO_METHODS, Auto, spectral_radius
from neuralode_nb.ode.base import layout_of, norm_for
from neuralode_nb.ode.checkpoint import Job
from neuralode_nb.ode.control import I
from neuralode_nb.ode.detest import DETEST
from neuralode_nb.ode.gradient import differentiable_march
from neuralode_nb.ode.loop import march
from neuralode_nb.ode.methods import find_tableau
from neuralode_nb.ode.problems import PROBLEMS
from neuralode_nb.ode.scipy_solver import SCIPY_SOLVERS, SciPy
from neuralode_nb.ode.steps import ExplicitStepper, Plan
from neuralode_nb.ode.stiff_problems import STIFF

one = torch.ones(1, dtype=torch.float64)


def relax(t, y, rate): return -rate * (y - t.cos())


def plan_of(f, y0, times, method, tol=1e-6, **options):
    layout = layout_of(y0)
    return Plan(f, y0, times, layout, method, tol, tol * 1e-2, norm_for(None, layout), I, stepper=method.stepper,
                parts=getattr(method, "parts", None), **options)


# ------------------------------------------------------------------------------------------------------------- auto

@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_auto_asks_f_no_more_often_than_tsit5_where_nothing_is_stiff(tol):
    with torch.no_grad():
        for name, p in (PROBLEMS if tol < 1e-5 else {**PROBLEMS, **DETEST}).items():
            ours, theirs = (solve(p.f, p.y0, p.span, m, rtol=tol, atol=tol).stats for m in (Auto(), "tsit5"))
            assert ours.f_evals <= 1.1 * theirs.f_evals, name


@pytest.mark.parametrize("name, tol", [(name, tol) for name in STIFF for tol in (1e-4, 1e-7) if (name, tol) != ("orego", 1e-7)])
def test_auto_ends_near_the_tolerance_where_something_is_stiff(name, tol):
    p, atol = STIFF[name], tol * (1e-6 if name in ("robertson", "pollution") else 1e-2)
    with torch.no_grad(): sol = solve(p.f, p.y0, p.span, Auto(), rtol=tol, atol=atol)
    assert ((sol.y[-1] - p.final).abs() / (atol + tol * p.final.abs())).max() < 10
    assert sol.stats.jacobians < sol.stats.accepted + sol.stats.rejected


def test_auto_goes_back_when_the_stiffness_is_over():
    def f(t, y): return torch.where(t < 2, -1e4, -1.) * (y - t.cos())
    plan = plan_of(f, one, [0., 30.], Auto(), jump_t=(2.,))
    run = march(plan, keep_steps=True)
    taken = [(start, plan.options["stiff at"][start]) for start, *_ in run.steps]
    assert run.failure is None and any(stiff for _, stiff in taken) and not taken[-1][1]
    assert sum(stiff for start, stiff in taken if start > 2) <= 12


@pytest.mark.parametrize("stiff", ["rodas5p", "kvaerno5"])
@pytest.mark.parametrize("gradient", ["checkpoint", "direct"])
def test_gradients_retrace_every_step_by_its_own_method(stiff, gradient):
    rate, y0 = torch.tensor(300., dtype=torch.float64, requires_grad=True), (2 * one).requires_grad_()
    t = torch.tensor([0., .01, .35, 2.], dtype=torch.float64, requires_grad=True)
    sol = solve(relax, y0, t, Auto(stiff), args=rate, rtol=1e-6, gradient=gradient)
    assert sol.stats.jacobians > 0
    r, ts = rate.detach().requires_grad_(), t.detach().requires_grad_()
    def exact(x): return (r**2 * x.cos() + r * x.sin()) / (r**2 + 1)
    start = y0.detach().requires_grad_()
    y = exact(ts[1:]) + (start - exact(ts[0])) * (-r * (ts[1:] - ts[0])).exp()
    ours = torch.autograd.grad(sol.y[1:].sum(), [rate, y0, t])
    for a, b in zip(ours, torch.autograd.grad(y.sum(), [r, start, ts])): close(a, b, eps=1e-3 * max(1., b.abs().max().item()))


def test_checkpoint_and_direct_agree_to_rounding_on_a_nonlinear_problem_that_changes_its_method():
    def f(t, y, mu): return torch.stack([y[1], mu * (1 - y[0]**2) * y[1] - y[0]])
    mu, found = torch.tensor(30., dtype=torch.float64, requires_grad=True), []
    for gradient in ("checkpoint", "direct"):
        sol = solve(f, torch.tensor([2., 0.]).double(), [0., 10., 30.], Auto(), args=mu, rtol=1e-4, gradient=gradient)
        assert 0 < sol.stats.jacobians < sol.stats.accepted + sol.stats.rejected
        found += torch.autograd.grad(sol.y[1:].sum(), mu)
    close(found[0] / found[1], one[0], eps=1e-5)


def test_twice_differentiable_under_checkpoints():
    rate = torch.tensor(200., dtype=torch.float64, requires_grad=True)
    y = solve(relax, one, [0., .01], Auto(), args=rate, rtol=1e-8).y[-1, 0]
    first, = torch.autograd.grad(y, rate, create_graph=True)
    second, = torch.autograd.grad(first, rate)
    assert second.isfinite() and abs(second) > 0


def test_many_observations_dense_output_and_other_kinds_of_state():
    ts = torch.linspace(0, 3, 40).double()
    r = 400.
    def exact(x): return (r**2 * x.cos() + r * x.sin()) / (r**2 + 1) + (1 - r**2 / (r**2 + 1)) * (-r * x).exp()
    sol = solve(lambda t, y: relax(t, y, r), one, ts, Auto(), rtol=1e-7, atol=1e-9, dense=True)
    close(sol.y[:, 0], exact(ts), eps=1e-5)
    close(sol(ts[1:] - .03)[:, 0], exact(ts[1:] - .03), eps=1e-5)
    back = solve(lambda t, s: {"a": 500 * s["a"], "b": s["b"]}, {"a": one, "b": one}, [1., 0.], Auto()).y
    close(back["b"][-1], (-one).exp(), eps=1e-4)
    turn = solve(lambda t, z: (1j - 500) * (z - t.cos()), torch.ones(1, dtype=torch.complex128), [0., 1.], Auto())
    assert turn.stats.jacobians > 0 and abs(turn.y[-1, 0] - .5403) < 5e-3
    assert solve(lambda t, y: -y, torch.ones(2), [0., 1.], Auto()).y.dtype == torch.float32


def test_what_auto_refuses():
    with pytest.raises(ValueError, match="Auto\\(stiff='bosh3'\\)"): Auto("bosh3")
    with pytest.raises(ValueError, match="batch='sample'|per sample|auto"):
        solve(lambda t, y: -y, torch.ones(2, 1), [0., 1.], Auto(), batch="sample")
    assert AUTO_METHODS["auto"]() == Auto()


def test_a_spectral_radius_is_never_underestimated():
    torch.manual_seed(0)
    J = torch.randn(20, 6, 6, dtype=torch.float64) * 10.**torch.randint(-3, 4, (20, 1, 1))
    exact = torch.linalg.eigvals(J).abs().amax(-1)
    for matrix, radius in zip(J, exact):
        assert radius * (1 - 1e-9) <= spectral_radius(matrix[None]) <= 1.5 * radius

# ------------------------------------------------------------------------------------------------------------ advice


def test_advice_is_the_expert_answer():
    orbit, robertson, swing = PROBLEMS["lotka_volterra"], STIFF["robertson"], torch.tensor([2., 0.]).double()
    mu = torch.linspace(.1, 50, 16).double()
    def oscillators(t, y): return torch.stack([y[:, 1], mu * (1 - y[:, 0]**2) * y[:, 1] - y[:, 0]], -1)
    assert advise(orbit.f, orbit.y0, orbit.span).method == "tsit5"
    assert advise(orbit.f, orbit.y0, orbit.span, rtol=1e-10).method == "dopri8"
    assert advise(robertson.f, robertson.y0, robertson.span, atol=1e-12).method == "rodas5p"
    assert advise(lambda t, y: torch.sign(torch.sin(20 * t + 3 * y)) - y, 0 * one, [0., 5.]).method == "bosh3"
    assert advise(oscillators, swing.expand(16, 2), [0., 5.], 1e-5).batch == "sample"
    assert advise(lambda t, y: y.mean(0) - y, torch.rand(4, 2), [0., 5.]).batch == "joint"
    many = advise(lambda t, y: -y, torch.ones(1000, 30), [0., 5.])
    assert many.gradient == "checkpoint" and many.batch == "joint" and "checkpoints keep" in str(many)


def test_advice_is_bounded_and_takes_any_state():
    count = 0
    def f(t, s, rate):
        nonlocal count
        count += 1
        return {"x": s["v"], "v": -rate * s["x"]}
    state = {"x": one, "v": 0 * one}
    said = advise(f, state, [0., 1e5], args=torch.tensor(4.).double(), budget=1000)
    assert count < 2000 and "symplectic" in str(said) and "covered" in str(said)
    with pytest.raises(ValueError, match="budget=5"): advise(f, state, [0., 1.], args=1., budget=5)

# ------------------------------------------------------------------------------------------------------------- scipy


@pytest.mark.parametrize("solver", SCIPY_SOLVERS)
def test_scipy_solves_what_ours_solve(solver):
    p = PROBLEMS["lotka_volterra"]
    ours = solve(p.f, p.y0, torch.linspace(*p.span, 11).double(), rtol=1e-9, atol=1e-11).y
    run = march(plan_of(p.f, p.y0, torch.linspace(*p.span, 11).double().tolist(), SciPy(solver), 1e-5))
    assert run.failure is None and run.stats.f_evals > run.stats.accepted > 5
    close(run.y, ours, eps=5e-3)
    run = march(plan_of(lambda t, y: y**2, one, [0., 2.], SciPy(solver), max_steps=500))
    assert run.failure is not None and .9 < run.failure.time <= 1.01


def test_scipy_has_the_adjoint_gradient():
    rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    plan = plan_of(lambda t, y: -rate * y**2, one, [0., .5, 1.], SciPy("BDF"), 1e-9)
    plan.source, plan.rebind = plan.f, lambda new: lambda t, y: -new[0] * y**2
    backward = replace(plan, method=find_tableau("tsit5"), stepper=ExplicitStepper, parts=None)
    y = differentiable_march(Job(plan, (rate,), backward), None, "adjoint").y
    close(torch.autograd.grad(y.sum(), rate)[0].item(), -.5 / 1.65**2 - 1 / 2.3**2, eps=1e-5)


def test_scipy_is_not_needed_to_import(monkeypatch):
    def missing(name): raise ImportError(name)
    monkeypatch.setattr("neuralode_nb.ode.scipy_solver.import_module", missing)
    with pytest.raises(ImportError, match="needs SciPy"): march(plan_of(lambda t, y: -y, one, [0., 1.], SciPy()))
