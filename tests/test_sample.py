"""Every sample its own steps: the same alone as in company, with times, failures, stops and gradients of its own."""
import math

import pytest
import torch

from neuralode_nb import PID, SolveError, Status, solve
from neuralode_nb.ode.control import I

D = torch.float64
KINDS = ["tsit5", "kvaerno3", "rodas5p"]                     # explicit, diagonally implicit, Rosenbrock
each_kind = pytest.mark.parametrize("method", KINDS)
MU = torch.logspace(-1, 1.2, 6, dtype=D)[:, None]
STARTS = torch.tensor([[2., 0.], [.5, -1.], [-1., 2.], [.1, .1], [1.5, 1.], [-2., -.3]], dtype=D)


def oscillator(mu):
    "Van der Pol's equation with a parameter for each row."
    def f(t, y):
        u, v = y.split(1, -1)
        return torch.cat([v, mu*(1 - u*u)*v - u + .1*torch.sin(t)], -1)
    return f


def samples(f, y0, t, method="tsit5", **options): return solve(f, y0, t, method, batch="sample", **options)


def one_by_one(y0, t, method="tsit5", mu=MU, **options):
    "Each sample in a batch of its own."
    rows = t if isinstance(t, torch.Tensor) and t.ndim == 2 else [t]*len(y0)
    return [samples(oscillator(mu[i:i + 1]), y0[i:i + 1], rows[i], method, **options).y[:, 0] for i in range(len(y0))]


# ------------------------------------------------------------------------------------------- the same in any company


@pytest.mark.parametrize("controller", ["i", "pi", "pid"])
@each_kind
def test_a_sample_gets_the_same_bits_alone_and_in_a_batch(method, controller):
    t = torch.linspace(0, .5, 5, dtype=D)
    with torch.no_grad():
        together = samples(oscillator(MU), STARTS, t, method, rtol=1e-4, controller=controller)
        alone = one_by_one(STARTS, t, method, rtol=1e-4, controller=controller)
        some = samples(oscillator(MU[[4, 1, 2]]), STARTS[[4, 1, 2]], t, method, rtol=1e-4, controller=controller)
    for i, y in enumerate(alone): assert torch.equal(together.y[:, i], y)
    assert torch.equal(together.y[:, [4, 1, 2]], some.y)
    assert torch.equal(together.stats.accepted[[4, 1, 2]], some.stats.accepted)


@each_kind
def test_a_sample_is_as_accurate_as_a_joint_solve(method):
    with torch.no_grad():
        found = samples(oscillator(MU), STARTS, [0., 1.], method, rtol=1e-6, atol=1e-8).y[-1]
        exact = solve(oscillator(MU), STARTS, [0., 1.], "dopri8", rtol=1e-11, atol=1e-12).y[-1]
    assert (found - exact).abs().max() < 2e-4


def test_mixed_stiffness_costs_less_than_half_of_a_joint_solve():
    mu = torch.logspace(-1, math.log10(50), 64, dtype=D)[:, None]
    y0 = torch.randn(64, 2, dtype=D)
    with torch.no_grad():
        apart = samples(oscillator(mu), y0, [0., 10.], rtol=1e-5)
        joint = solve(oscillator(mu), y0, [0., 10.], rtol=1e-5)
    assert int(apart.stats.f_evals.sum()) <= .4*64*joint.stats.f_evals

# ------------------------------------------------------------------------------------------------------------- times


@each_kind
def test_times_padded_repeated_unsorted_and_in_both_directions(method):
    nan = math.nan
    t = torch.tensor([[0., .5, 1., 1.], [1., .2, .4, -.3], [0., 2., nan, 1.3], [0., nan, nan, nan], [.5, .5, 2., 1.],
                      [0., 0., 0., 0.]], dtype=D)
    with torch.no_grad():
        found = samples(oscillator(MU), STARTS, t, method, rtol=1e-6)
        assert found.y.shape == (4, 6, 2) and torch.equal(found.y[..., 0].isnan(), t.t().isnan())
        for i, row in enumerate(t):
            asked = row[~row.isnan()]
            for k, end in enumerate(row):
                if end.isnan(): continue
                if end == row[0]: exact = STARTS[i]
                else:
                    ends = [row[0].item(), end.item()]
                    exact = solve(oscillator(MU[i]), STARTS[i], ends, "dopri8", rtol=1e-11, atol=1e-12).y[-1]
                assert (found.y[k, i] - exact).abs().max() < 1e-3*(1 + exact.abs().max())
            alone = samples(oscillator(MU[i:i + 1]), STARTS[i:i + 1], asked[None], method, rtol=1e-6).y[:, 0]
            assert torch.equal(found.y[~row.isnan(), i], alone)


@pytest.mark.parametrize("gradient", ["checkpoint", "direct"])
def test_observations_are_the_same_read_off_at_once_or_later(gradient, monkeypatch):
    mu, t = MU.clone().requires_grad_(), torch.linspace(0, 2, 40, dtype=D)
    def found():
        y = samples(oscillator(mu), STARTS, t, rtol=1e-4, gradient=gradient).y
        return y.detach(), *torch.autograd.grad((y*torch.cos(t)[:, None, None]).sum(), mu)
    later = found()
    monkeypatch.setattr("neuralode_nb.ode.sample.ROOM", 0)       # nothing may wait
    for a, b in zip(found(), later): torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("waiting, seen", [([0., 2.], 0), (torch.linspace(0, 2, 40, dtype=D), 1)])
def test_a_step_without_observations_keeps_nothing(waiting, seen, monkeypatch):
    from neuralode_nb.ode.sample import SampleOutput
    count, wait = [0], SampleOutput.wait
    def counted(self, *words):
        count[0] += 1
        return wait(self, *words)
    monkeypatch.setattr(SampleOutput, "wait", counted)
    with torch.no_grad(): s = samples(oscillator(MU), STARTS, waiting, rtol=1e-4)
    assert count[0] > 5 if seen else count[0] == 0
    assert s.y.isfinite().all() and s.stats.accepted.max() > 5


def test_one_row_of_times_serves_all_samples():
    t = torch.tensor([0., 1., .5], dtype=D)
    with torch.no_grad():
        assert torch.equal(samples(oscillator(MU), STARTS, t).y, samples(oscillator(MU), STARTS, t.expand(6, -1)).y)


@each_kind
def test_stops_are_landed_on_and_jumps_seen_from_both_sides(method):
    f = lambda t, y: torch.where(t < .5, 1., 3.)*torch.ones_like(y) - 0*y
    y0, ends = torch.zeros(2, 1, dtype=D), torch.tensor([[0., 1.], [1., 0.]], dtype=D)
    with torch.no_grad(): found = samples(f, y0, ends, method, jump_t=[.5], rtol=1e-8, atol=1e-8)
    assert torch.allclose(found.y[-1, :, 0], torch.tensor([2., -2.], dtype=D), atol=1e-12)
    assert found.stats.rejected.sum() == 0
    seen = []
    def spy(t, y):
        seen.append(t.detach().flatten().clone())
        return -y
    with torch.no_grad(): samples(spy, y0, ends, method, step_t=[.25, .7])
    for stop in (.25, .7): assert any((times == stop).any() for times in seen)


@pytest.mark.parametrize("method", ["rk4", "trapezoid", "rodas5p"])
def test_fixed_steps_are_those_of_a_joint_solve(method):
    t = torch.tensor([0., .5, 1.], dtype=D)
    with torch.no_grad():
        found = samples(oscillator(MU/10), STARTS, t, method, step_size=.1)
        joint = solve(oscillator(MU/10), STARTS, t, method, step_size=.1)
    assert found.stats.accepted.tolist() == [10]*6
    assert (found.y - joint.y).abs().max() < 1e-4

# ---------------------------------------------------------------------------------------------------------- failures


def explodes(t, y): return torch.where(y.abs() > 5, torch.nan, y*y)


@each_kind
def test_a_sample_that_fails_is_frozen_and_named_and_the_others_go_on(method):
    y0 = torch.tensor([[.1], [2.], [.5]], dtype=D)
    found = samples(explodes, y0, [0., .8, 1.], method, throw=False)
    assert [s.ok for s in found.status] == [True, False, True]
    assert list(found.failure) == [1] and found.failure[1].sample == 1
    assert torch.allclose(found.y[-1, [0, 2]], 1/(1/y0[[0, 2]] - 1), rtol=1e-3)
    assert "1 of 3 samples failed" in found.explain() and "sample 1" in found.explain()
    with pytest.raises(SolveError, match="sample 1") as error: samples(explodes, y0, [0., .8, 1.], method)
    assert error.value.failure.sample == 1 and torch.equal(error.value.solution.y, found.y)


def test_each_sample_has_its_own_budget_of_steps():
    rate = torch.tensor([[1.], [1000.]], dtype=D)
    found = samples(lambda t, y: -rate*y, torch.ones(2, 1, dtype=D), [0., 5.], max_steps=100, throw=False)
    assert found.status == [Status.success, Status.max_steps]
    assert found.stats.accepted[1] + found.stats.rejected[1] == 100


def test_equations_without_a_solution_freeze_their_sample_only():
    f = lambda t, y: torch.tensor([[0.], [1.]], dtype=D)*(y**2 + 1) - .1*y
    found = samples(f, torch.ones(2, 1, dtype=D), [0., 10., 20.], "implicit_euler", step_size=10., throw=False)
    assert found.status == [Status.success, Status.newton_failed]


def test_a_start_that_is_not_finite_is_its_own_affair():
    found = samples(lambda t, y: -y, torch.tensor([[1.], [math.nan]], dtype=D), [0., 1.], throw=False)
    assert found.status == [Status.success, Status.non_finite_state]
    assert torch.allclose(found.y[-1, 0], torch.tensor(-1.).double().exp(), rtol=1e-5)

# --------------------------------------------------------------------------------------------------------- gradients


def derivatives(method, gradient, rtol=1e-6, nested=False):
    "Of a sum of squares by y0, t and parameters of f; of these derivatives again, if `nested`."
    w = torch.tensor([[.5, -.3], [.8, .2]], dtype=D, requires_grad=True)
    y0 = torch.tensor([[1., .4], [-.3, .8], [.2, -.9]], dtype=D, requires_grad=True)
    t = torch.tensor([[0., .5, 1., 1.], [1., .2, .4, -.3], [0., 1.1, math.nan, .7]], dtype=D, requires_grad=True)
    mu = torch.tensor([[.5], [1.], [1.4]], dtype=D)
    def loss(y): return (torch.nan_to_num(y)**2).sum()
    if gradient == "one by one":
        total = 0
        for i, row in enumerate(t):
            ts = row[~row.isnan()]
            ts = ts[torch.argsort(ts.detach(), descending=i == 1)]
            f = lambda t, y, i=i: torch.tanh(y @ w)*mu[i]*(1 + t.cos())
            total = total + loss(solve(f, y0[i], ts, method, gradient="direct", rtol=1e-10, atol=1e-12).y)
    else: total = loss(samples(lambda t, y: torch.tanh(y @ w)*mu*(1 + t.cos()), y0, t, method, gradient=gradient, rtol=rtol,
                               atol=rtol/100).y)
    first = torch.autograd.grad(total, [w, y0, t], create_graph=nested)
    if not nested: return first
    return torch.autograd.grad(sum((torch.nan_to_num(g)**2).sum() for g in first), [w, y0])


@pytest.mark.parametrize("method, digits", [("tsit5", 1e-10), ("kvaerno5", 1e-6), ("rodas5p", 1e-10)])
def test_gradients_agree_with_one_another_and_with_solves_one_by_one(method, digits):
    direct, checkpoint = derivatives(method, "direct"), derivatives(method, "checkpoint")
    for a, b in zip(direct, checkpoint): assert (a - b).nan_to_num().abs().max() < digits
    for a, b in zip(direct, derivatives("tsit5", "one by one")): assert (a - b).nan_to_num().abs().max() < 1e-3


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_gradients_can_be_differentiated_again(method):
    for a, b in zip(derivatives(method, "direct", 1e-5, True), derivatives(method, "checkpoint", 1e-5, True)):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def test_a_failed_sample_does_not_spoil_the_gradients_of_others():
    y0 = torch.tensor([[.1], [2.], [.5]], dtype=D, requires_grad=True)
    for gradient in ("direct", "checkpoint"):
        y = samples(explodes, y0, [0., 1.], throw=False, gradient=gradient).y[-1]
        found, = torch.autograd.grad(y[[0, 2]].sum(), y0)
        assert torch.allclose(found[[0, 2]], (1/(1 - y0[[0, 2]])**2).detach(), rtol=1e-4) and found[1] == 0

# ---------------------------------------------------------------------------------------------------- what users bring


def test_a_state_may_be_a_structure():
    y0 = {"a": torch.ones(3, 2, dtype=D), "b": torch.ones(3, 1, dtype=D)}
    t = torch.tensor([[0., 1.], [0., 2.], [0., -1.]], dtype=D)
    found = samples(lambda t, y: {"a": -y["a"], "b": -2*y["b"]}, y0, t, rtol=1e-8)
    assert torch.allclose(found.y["a"][-1], (-t[:, 1:]).exp().expand(3, 2), rtol=1e-6)
    assert torch.allclose(found.y["b"][-1], (-2*t[:, 1:]).exp(), rtol=1e-6)


def test_a_norm_and_tolerances_of_the_users_own():
    seen = []
    def norm(y):
        seen.append(y.shape)
        return y.abs().max()
    with torch.no_grad():
        strict = samples(oscillator(MU), STARTS, [0., 1.], norm=norm)
        plain = samples(oscillator(MU), STARTS, [0., 1.])
        loose = samples(oscillator(MU), STARTS, [0., 1.], rtol=torch.tensor([1e-6, 1e-2], dtype=D),
                        atol=torch.tensor([1e-8, 1e-2], dtype=D))
    assert set(seen) == {torch.Size([2])}
    assert (strict.stats.accepted >= plain.stats.accepted).all()
    assert loose.stats.accepted.sum() < plain.stats.accepted.sum()


def test_a_controller_of_the_users_own():
    class Mine:
        "The rule of the library, from outside."
        def init(self): return I.init()
        def next(self, state, ratio, order): return I.next(state, ratio, order)
    with torch.no_grad():
        mine, ours = (samples(oscillator(MU), STARTS, [0., 1.], controller=c) for c in (Mine(), PID()))
    assert (mine.stats.accepted == ours.stats.accepted).all() and (mine.y - ours.y).abs().max() < 1e-6


def test_a_state_of_one_number_or_none_for_each_sample():
    assert samples(lambda t, y: -y, torch.ones(3, 0, dtype=D), [0., 1.]).y.shape == (2, 3, 0)
    found = samples(lambda t, y: -y, torch.ones(3, dtype=D), [0., 1.]).y[-1]
    assert torch.allclose(found, torch.tensor(-1.).double().exp(), rtol=1e-5)

# ------------------------------------------------------------------------------------------------------------ misuse

TWO = torch.ones(2, 1, dtype=D)


@pytest.mark.parametrize("changes, words", [
    (dict(gradient="adjoint", y0=torch.ones(2, 1, dtype=D, requires_grad=True)),
     "gradient='adjoint' is not available with batch='sample'"),
    (dict(method="radau5"), "'radau5' cannot step per sample"),
    (dict(method="gl4", step_size=.1), "'gl4' cannot step per sample"),
    (dict(method="rk4"), "takes fixed steps"),
    (dict(y0=torch.ones(())), "first axis of samples"),
    (dict(y0={"a": TWO, "b": torch.ones(3, 1, dtype=D)}), "first axis of samples"),
    (dict(t=torch.zeros(3, 2, dtype=D)), r"t has shape \(3, 2\)"),
    (dict(t=torch.zeros(1, 2, 2, dtype=D)), r"t has shape \(1, 2, 2\)"),
    (dict(t=torch.tensor([[0., 1., 2.], [0., 1., -1.]], dtype=D)), r"t\[1\] has times on both sides of its start"),
    (dict(t=torch.tensor([[0., 1.], [math.nan, 1.]], dtype=D)), r"t\[1\] must begin with a finite time"),
    (dict(t=torch.tensor([[0., 1.], [0., math.inf]], dtype=D)), r"t\[1\] must"),
], ids=lambda x: None if isinstance(x, str) else next(iter(x)))
def test_misuse_is_named(changes, words):
    given = dict(f=lambda t, y: -y, y0=TWO, t=[0., 1.]) | changes
    with pytest.raises(ValueError, match=words): solve(batch="sample", **given)


def test_an_unknown_batch_is_named():
    with pytest.raises(ValueError, match="batch='samples' is not available"): solve(lambda t, y: -y, TWO, [0., 1.], batch="samples")
