"""Implicit and Rosenbrock methods: orders, stiff problems, gradients, and the equations of a step when they fail."""
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from neuralode_nb import SolveError, Status, solve
from neuralode_nb.ode.catalogue import METHODS, Implicit, find_method
from neuralode_nb.ode.methods import TABLEAUS
from neuralode_nb.ode.multistep import MULTISTEP
from neuralode_nb.ode.stiff_problems import STIFF

D = torch.float64
NAMES = [name for name in METHODS if name not in TABLEAUS and name not in MULTISTEP and hasattr(find_method(name), "dense_order")]
ADAPTIVE = [name for name in NAMES if find_method(name).adaptive]
FAMILIES = ["kvaerno5", "trapezoid", "gl4", "radau5", "rodas5p"]     # of steppers, and of what they carry over
each_method = pytest.mark.parametrize("method", NAMES)
each_family = pytest.mark.parametrize("method", FAMILIES)


def wave(t, y):
    "Two nonlinear equations that depend on time."
    u, v = y.unbind(-1)
    return torch.stack([v*torch.cos(1.3*t) - .3*u**2, u*torch.sin(2*t + .4) - .4*u*v], -1)


START = torch.tensor([1., .5], dtype=D)


def march(method, n, f=wave, y0=START, end=2., places=1):
    "n fixed steps, seen at `places` points in each."
    t = torch.linspace(0, end, places*n + 1, dtype=D)
    with torch.no_grad(): return solve(f, y0, t, method, step_size=end/n, rtol=1e-12, atol=1e-13).y


@pytest.fixture(scope="module")
def exact():
    "The wave at 128 equal steps of time."
    with torch.no_grad(): return solve(wave, START, torch.linspace(0, 2, 129, dtype=D), "dopri8", rtol=1e-13, atol=1e-14).y

# ------------------------------------------------------------------------------------------------- order, stability


@each_method
def test_the_order_is_as_claimed(method, exact):
    p = find_method(method).order
    n = 16 if p >= 5 else 64 if p == 4 else 32
    coarse, fine = ((march(method, m)[-1] - exact[-1]).norm() for m in (n//2, n))
    slope = math.log2(coarse/fine)
    assert slope >= p - .15
    assert slope <= p + .15 or method == "rodas4"      # its terms of order five outweigh those of order four at these steps


@each_method
def test_between_steps_the_order_is_as_claimed(method, exact):
    p = min(find_method(method).order, find_method(method).dense_order + 1)
    coarse, fine = ((march(method, n, places=2) - exact[::64//n])[1::2].abs().max() for n in (16, 32))
    assert math.log2(coarse/fine) >= p - .15


@pytest.mark.parametrize("method", [m for m in NAMES if m not in ("implicit_midpoint", "trapezoid", "gl2", "gl4", "gl6")])
def test_one_huge_step_lands_on_the_slow_solution(method):
    # L-stability: R(z) -> 0, so that what is left of the start is small; the step is a million times longer than 1/λ
    f = lambda t, y: -1e6*(y - t.cos())
    end = march(method, 1, f, torch.tensor([10.], dtype=D), 1.)[-1, 0]
    assert abs(end - math.cos(1.)) < .05


@each_method
def test_backward_in_time_retraces_forward(method):
    there = march(method, 64)
    with torch.no_grad(): back = solve(wave, there[-1], [2., 0.], method, step_size=1/32).y[-1]
    assert (back - START).abs().max() < {1: .2, 2: 3e-3}.get(find_method(method).order, 1e-4)

# -------------------------------------------------------------------------------------------------- the stiff set

# Accepted steps of Radau of SciPy 1.17 at rtol = 1e-4 and 1e-7, with the atol of `allowed`
RADAU = {"prothero_robinson_stiff": (7, 38), "van_der_pol": (281, 1414), "robertson": (115, 547), "hires": (54, 271),
         "orego": (356, 1824), "pollution": (27, 122), "heat": (16, 88), "brusselator": (49, 255), "allen_cahn": (24, 114)}
MISSED = {  # what does not meet the bar: (problem, rtol, method): why
    ("orego", 1e-4, "kvaerno5"): "error 10.06 × tolerance; the iterations are not to blame: 10.30 with κ / 30",
    ("orego", 1e-7, "kvaerno5"): "error 40 × tolerance in half of Radau's steps; 27 with κ / 30: local errors that add up",
    ("prothero_robinson_stiff", 1e-4, "kvaerno5"): "11 steps, 1.57 × Radau's 7",
    ("prothero_robinson_stiff", 1e-7, "kvaerno5"): "98 steps, 2.6 × Radau's 38: stage order 2 on the slow manifold",
}


def cases():
    for name in RADAU:
        for rtol in (1e-4, 1e-7):
            for method in ("kvaerno5", "radau5", "rodas5p"):
                reason = MISSED.get((name, rtol, method))
                yield pytest.param(name, rtol, method, marks=[pytest.mark.xfail(strict=True, reason=reason)] if reason else [])


@pytest.mark.parametrize("name, rtol, method", list(cases()))
def test_stiff_problems_end_near_the_tolerance_in_about_the_steps_of_radau(name, rtol, method):
    problem, atol = STIFF[name], rtol*(1e-3 if name in ("robertson", "pollution") else 1e-2)
    end = torch.as_tensor(problem.final, dtype=D)
    with torch.no_grad(): found = solve(problem.f, problem.y0.double(), list(problem.span), method, rtol=rtol, atol=atol)
    assert ((found.y[-1] - end).abs()/(atol + rtol*end.abs())).max() <= 10
    assert found.stats.accepted <= 1.5*RADAU[name][rtol < 1e-5]


def test_jacobians_and_factors_are_kept_while_they_serve():
    problem = STIFF["brusselator"]
    with torch.no_grad():
        costs = {m: solve(problem.f, problem.y0.double(), [0., 10.], m, rtol=1e-5).stats for m in ("kvaerno5", "radau5", "rodas5p")}
    assert costs["kvaerno5"].jacobians < costs["kvaerno5"].accepted and costs["radau5"].jacobians < costs["radau5"].accepted/2
    assert costs["rodas5p"].jacobians == costs["rodas5p"].accepted
    for stats in costs.values(): assert stats.lu >= stats.accepted/2 and stats.f_evals > stats.accepted


@pytest.mark.parametrize("method", ["kvaerno5", "radau5", "rodas5p", "bdf"])
def test_a_field_that_writes_into_its_own_buffer_is_no_trouble(method):
    rates, buffer = torch.tensor([1., 5., 50.]).double(), torch.empty(3).double()
    J, y0 = (lambda t, y: torch.diag(rates*(-1 - t.sin()))), torch.ones(3).double()
    with torch.no_grad():
        again, fresh = (solve(f, y0, [0., 1.], Implicit(method, jacobian=J)).y[-1] for f in (
            lambda t, y: torch.mul(y*rates, -1 - t.sin(), out=buffer), lambda t, y: y*rates*(-1 - t.sin())))
    assert torch.equal(again, fresh)

# ------------------------------------------------------------------------------------------------------- gradients


def loss(method, gradient, w, y0, t, scale):
    f = lambda t, y, args: torch.tanh(y @ w)*(1 + t.cos())*args
    return (solve(f, y0, t, method, args=scale, step_size=.175, gradient=gradient, rtol=1e-8, atol=1e-10).y**2).sum()


def inputs():
    return [x.requires_grad_() for x in (
        torch.tensor([[-1., 2.], [-2., -1.]], dtype=D), torch.tensor([[1., .5], [.3, -.4]], dtype=D),
        torch.tensor([0., .3, .65], dtype=D), torch.tensor(1.2, dtype=D))]


@each_family
def test_gradients_direct_checkpoint_and_by_differences_agree(method):
    given = inputs()
    direct, checkpoint = (torch.autograd.grad(loss(method, g, *given), given) for g in ("direct", "checkpoint"))
    for a, b in zip(direct, checkpoint): assert (a - b).abs().max() < 1e-6
    for i, slope in enumerate(direct):
        way = torch.randn_like(given[i])
        with torch.no_grad():
            ends = [loss(method, "direct", *[x + h*way if j == i else x for j, x in enumerate(given)]) for h in (1e-4, -1e-4)]
        assert abs((slope*way).sum() - (ends[0] - ends[1])/2e-4) < 1e-6*(1 + slope.norm())


@each_family
def test_two_steps_pass_the_checks_of_first_and_second_derivatives(method):
    def end(w, y0, t, gradient):
        return solve(lambda t, y: torch.tanh(y*w)*(1 + t.cos()), y0, t, method, step_size=.3, gradient=gradient,
                     rtol=1e-10, atol=1e-10).y[1:]
    given = [torch.tensor([.5, -1.], dtype=D, requires_grad=True), torch.tensor([1., .5], dtype=D, requires_grad=True),
             torch.tensor([0., .5], dtype=D, requires_grad=True)]     # no multiple of step_size
    for gradient in ("direct", "checkpoint"):
        assert gradcheck(lambda *x: end(*x, gradient), given, atol=1e-6)     # noqa: B023
    assert gradgradcheck(lambda *x: end(*x, "direct"), given, atol=1e-5)

# -------------------------------------------------------------------------------------- equations without a solution


@pytest.mark.parametrize("method", ["implicit_euler", "gl4"])
def test_a_grid_whose_equations_have_no_solution_ends_with_a_remedy(method):
    f = lambda t, y: y**2 + 1
    with pytest.raises(SolveError, match="smaller step_size") as error:
        solve(f, torch.ones(1, dtype=D), [0., 10.], method, step_size=10.)
    assert error.value.failure.status is Status.newton_failed
    found = solve(f, torch.ones(1, dtype=D), [0., 10.], method, step_size=10., throw=False)
    assert found.status is Status.newton_failed and found.y[-1] == 1 and found.failure.time == 0


def test_an_adaptive_solve_shortens_steps_until_equations_have_solutions():
    with torch.no_grad(): found = solve(lambda t, y: y**2 + 1, torch.zeros(1, dtype=D), [0., 1.5], "kvaerno5", first_step=1.5)
    assert found.stats.rejected > 0 and abs(found.y[-1, 0] - math.tan(1.5)) < 5e-3

# --------------------------------------------------------------------------------------------------- what users bring


def coupled(t, y): return torch.stack([-50*y[0]**2 + y[1], y[0] - 2*y[1]*t])
def coupled_jacobian(t, y):
    one = torch.ones_like(t)
    return torch.stack([torch.stack([-100*y[0], one]), torch.stack([one, -2*t])])


@pytest.mark.parametrize("method", ["kvaerno5", "radau5", "rodas5p", "trapezoid"])
def test_jacobians_by_hand_and_by_differences_give_the_same_answer(method):
    steps = {} if find_method(method).adaptive else dict(step_size=.01)
    with torch.no_grad():
        plain, hand, differences = (solve(coupled, START, [0., 1.], m, **steps) for m in (
            method, Implicit(method, jacobian=coupled_jacobian), Implicit(method, jacobian="differences")))
    assert (hand.y - plain.y).abs().max() < 1e-9 and (differences.y - plain.y).abs().max() < 1e-5
    assert hand.stats.jacobians == plain.stats.jacobians and differences.stats.f_evals >= plain.stats.f_evals


@pytest.mark.parametrize("method", ["kvaerno5", "radau5", "rodas5p"])
def test_a_jacobian_of_the_wrong_shape_is_named(method):
    with pytest.raises(ValueError, match=r"jacobian returned shape \(2,\) for a state of 2 numbers: it must return \(2, 2\)"):
        solve(coupled, START, [0., 1.], Implicit(method, jacobian=lambda t, y: y))


@each_family
def test_complex_states_are_pairs_of_real_ones(method):
    f = lambda t, z: (1j - .1)*z + .1*z.conj()*torch.sin(t)            # not holomorphic
    pair = lambda t, y: torch.view_as_real(f(t, torch.view_as_complex(y)))
    y0 = torch.tensor([1 + .5j, -.3j], dtype=torch.complex128)
    t = torch.linspace(0, 1, 21, dtype=D)
    with torch.no_grad():
        z, y = solve(f, y0, t, method).y, solve(pair, torch.view_as_real(y0), t, method).y
    assert (torch.view_as_real(z) - y).abs().max() < 1e-5


@each_family
def test_float32_and_structured_states(method):
    t = torch.linspace(0, 1, 21, dtype=D)
    with torch.no_grad():
        exact = solve(wave, START, t, method, rtol=1e-9, atol=1e-9).y
        single = solve(wave, START.float(), t.float(), method, rtol=1e-5, atol=1e-6).y
        parts = solve(lambda t, y: (wave(t, torch.cat([y[0], y[1]['v']]))[:1], {'v': wave(t, torch.cat([y[0], y[1]['v']]))[1:]}),
                      (START[:1], {'v': START[1:]}), t, method, rtol=1e-9, atol=1e-9).y
    assert single.dtype == torch.float32 and (single - exact).abs().max() < 2e-4
    assert (torch.cat([parts[0], parts[1]['v']], -1) - exact).abs().max() < 1e-6


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_jump_is_landed_on_and_seen_from_both_sides(method):
    f = lambda t, y: torch.where(t < .5, -y, 5 - 20*y)
    with torch.no_grad(): found = solve(f, torch.ones(1, dtype=D), [0., 1.], method, jump_t=[.5], rtol=1e-5, atol=1e-6)
    half = math.exp(-.5)
    assert abs(found.y[-1, 0] - (.25 + (half - .25)*math.exp(-10))) < 1e-4
