"""The orders that methods claim, and the tolerances that solves keep.

Two definitions of "error <= 10 x tolerance" are held, both with rtol = atol = tol in float64.
*Local*, what a solver controls: a step of the solve against the exact flow from the state where the step began,
root mean square of the deviation over tol (1 + |y|), on all problems. *Global*, what a user sees: the end state
against SciPy at 1e-13, largest |deviation| / (tol (1 + |y|)), on the problems that do not amplify errors by
themselves; orbits and close encounters do, and every solver's global error grows on them.
"""
import math
from functools import cache

import pytest
import torch
from scipy.integrate import solve_ivp

from neuralode_nb import odeint, solve
from neuralode_nb.ode.detest import DETEST
from neuralode_nb.ode.methods import TABLEAUS, find_tableau
from neuralode_nb.ode.problems import PROBLEMS, observed_order

manufactured = PROBLEMS["manufactured"]   # nonlinear and non-autonomous
ALL = {**PROBLEMS, **DETEST}
CALM = ["decay", "logistic", "cosine", "prothero_robinson", "manufactured", "A1", "A2", "A3", "A4", "B2", "B3",
        "C1", "C2", "C3", "C4", "E1", "E4", "E5"]
TOLERANCES = [1e-3, 1e-6, 1e-9]
EXPLICIT = tuple(TABLEAUS)
each_method = pytest.mark.parametrize("method", EXPLICIT)
each_tolerance = pytest.mark.parametrize("tol", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad(): yield


# ------------------------------------------------------------------------------------------------------------- order

STEPS = {1: (256, 512, 1024), 2: (64, 128, 256), 3: (32, 64, 128), 4: (32, 64, 128), 5: (32, 64, 128),
         8: (16, 20, 24, 32)}


@each_method
@pytest.mark.parametrize("anew", [False, True], ids=["derivatives carried over", "derivatives evaluated anew"])
def test_the_observed_order_is_the_claimed_one(method, anew):
    def integrate(problem, n):
        grid = torch.linspace(*problem.span, n + 1, dtype=torch.float64)
        return solve(problem.f, problem.y0, problem.span, method, step_size=problem.span[1] / n,
                     jump_t=grid if anew else None).y[-1]
    claimed = find_tableau(method).order
    assert observed_order(integrate, manufactured, STEPS[claimed]) == pytest.approx(claimed, abs=.15)


@each_method
def test_the_order_backward_in_time_is_the_same(method):
    claimed, (t0, t1) = find_tableau(method).order, manufactured.span
    sizes, errors = STEPS[claimed][::2], []
    for n in sizes:
        y = solve(manufactured.f, manufactured.final, [t1, t0], method, step_size=(t1 - t0) / n).y[-1]
        errors.append((y - manufactured.y0).abs().max().item())
    assert math.log(errors[0] / errors[1], sizes[1] / sizes[0]) == pytest.approx(claimed, abs=.5)


@each_method
def test_dense_output_has_the_order_it_states(method):
    "One step from the exact solution leaves an error of h to the power dense_order + 1 inside the step."
    claimed, errors = find_tableau(method).dense_order + 1, []
    sizes = [.004, .002] if claimed < 5 else [.05, .025]
    for h in sizes:
        worst = []
        for start in (0., .4, .8, 1.2, 1.6):
            step = solve(manufactured.f, manufactured.exact(start), [start, start + h], method, step_size=h, dense=True)
            times = start + h * torch.tensor([.2, .4, .6, .8], dtype=torch.float64)
            worst.append((step(times) - manufactured.exact(times)).norm().item())
        errors.append(math.hypot(*worst))
    slope = math.log(errors[0] / errors[-1], sizes[0] / sizes[-1])
    assert slope == pytest.approx(claimed, abs=.15)


@pytest.mark.parametrize("interp, order", [("linear", 2), ("cubic", 4)])
def test_the_two_interpolations_of_torchdiffeq_have_their_orders(interp, order):
    errors = []
    for n in (20, 40):
        t = torch.linspace(*manufactured.span, 7 * n + 1, dtype=torch.float64)
        y = odeint(manufactured.f, manufactured.y0, t, method="rk4", options={"step_size": 2 / n, "interp": interp})
        errors.append((y - manufactured.exact(t)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=.15)


# --------------------------------------------------------------------------------------------------------- tolerance


@cache
def by_scipy(name):
    "The end state of a problem by SciPy's DOP853 at a relative tolerance of 1e-13."
    p = ALL[name]
    f = lambda t, y: p.f(t, torch.from_numpy(y)).numpy()
    return torch.from_numpy(solve_ivp(f, p.span, p.y0.numpy(), "DOP853", rtol=1e-13, atol=1e-15).y[:, -1])


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8"])
@pytest.mark.parametrize("name", CALM)
def test_the_global_error_stays_below_ten_times_the_tolerance(name, method):
    p = ALL[name]
    for tol in TOLERANCES:
        y = solve(p.f, p.y0, p.span, method, rtol=tol, atol=tol).y[-1]
        ratio = ((y - by_scipy(name)).abs() / (tol + tol * by_scipy(name).abs())).max().item()
        assert ratio <= 10, f"{ratio:.3g} times the tolerance {tol:g}"


def accepted_steps(p, method, tol):
    "(start, length, state at start, state at end) of every accepted step."
    steps = []
    class Field(torch.nn.Module):
        def forward(self, t, y): return p.f(t, y)
        def callback_accept_step(self, t, y, h): steps.append((t.item(), h.item(), y))
    t = torch.tensor(p.span, dtype=torch.float64)
    last = odeint(Field(), p.y0, t, method=method, rtol=tol, atol=tol)[-1]
    return [(t, h, y, y1) for (t, h, y), y1 in zip(steps, [y for _, _, y in steps[1:]] + [last])]


def local_error(p, t, h, y, y1, tol):
    "Deviation of one step from the exact flow (eighth order, four substeps), in units of what is allowed."
    exact = solve(p.f, y, [t, t + h], "dopri8", step_size=h / 4).y[-1]
    allowed = tol + tol * torch.maximum(y.abs(), y1.abs())
    return ((y1 - exact) / allowed).norm().item() / math.sqrt(len(y))


@each_tolerance
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8"])
def test_the_local_error_stays_below_ten_times_the_tolerance_on_all_problems(method, tol):
    worst = {}
    for name, p in (PROBLEMS if tol < 1e-6 else ALL).items():
        steps = accepted_steps(p, method, tol)
        worst[name] = max(local_error(p, *steps[i], tol) for i in {0, len(steps) // 2, len(steps) - 1})
    beyond = {name: ratio for name, ratio in worst.items() if ratio > 10}
    # dopri5 with torchdiffeq's error weights (two thirds of the paper's) passes 10 on C5 and D1 at 1e-3: 11.5 and 10.1 measured
    assert set(beyond) <= ({"C5", "D1"} if method == "dopri5" and tol == 1e-3 else set()), beyond
    assert len(worst) - len(beyond) >= 12 and max(worst.values()) < 12


@pytest.mark.parametrize("method", ["adaptive_heun", "bosh3", "fehlberg45"])
@pytest.mark.parametrize("name", ["manufactured", "lotka_volterra", "B2", "E3"])
def test_the_local_error_of_the_other_pairs_stays_below_ten_times_the_tolerance(name, method):
    tol = 1e-3 if method == "adaptive_heun" else 1e-5
    for step in accepted_steps(ALL[name], method, tol)[::9]: assert local_error(ALL[name], *step, tol) <= 10


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dopri8"])
def test_a_tighter_tolerance_gives_a_smaller_error_in_proportion(method):
    p = PROBLEMS["lotka_volterra"]
    errors = [p.error(solve(p.f, p.y0, p.span, method, rtol=tol, atol=tol).y[-1]) for tol in (1e-4, 1e-6, 1e-8)]
    for loose, tight in zip(errors, errors[1:]): assert 5 < loose / tight < 5000


def test_the_answers_stored_with_the_problems_agree_with_scipy():
    assert max(ALL[name].error(by_scipy(name)) for name in CALM) < 1e-9


# ------------------------------------------------------------------- the defects of others that orders would have shown


def test_each_explicit_method_evaluates_f_at_its_nodes():
    "torchdyn's rk4 and torchdiffeq's gl4 have wrong nodes: first order on any f that depends on time."
    for method in EXPLICIT:
        times = []
        def f(t, y): times.append(t.item()); return y * t      # noqa: B023
        solve(f, torch.ones(1, dtype=torch.float64), [1., 3.], method, step_size=2.)
        nodes = [1 + 2 * float(c) for c in find_tableau(method).c]
        assert len(times) >= len(nodes) - 1 and times == pytest.approx(nodes[:len(times)], abs=1e-15), method


def test_tsit5_propagates_its_fifth_order_solution():
    "torchdiffeq's propagates the fourth-order one; the last stage is then not where the next step begins."
    stats = solve(manufactured.f, manufactured.y0, [0., 2.], "tsit5").stats
    assert stats.f_evals == 2 + 6 * (stats.accepted + stats.rejected)    # the last derivative is the next step's first
