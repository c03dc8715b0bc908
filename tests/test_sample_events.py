"""Events and dense output of samples with steps of their own: exact, differentiable, and the same in any company."""
import math

import pytest
import torch

from neuralode_nb import Event, Status, solve

D = torch.float64
KINDS = ["tsit5", "dopri5", "kvaerno5", "rodas5p"]
each_kind = pytest.mark.parametrize("method", KINDS)
HEIGHTS = torch.tensor([1., .5, 2., 3.], dtype=D)
G, R = torch.tensor(9.81, dtype=D), torch.tensor(.9, dtype=D)


def samples(f, y0, t, method="tsit5", **options): return solve(f, y0, t, method, batch="sample", **options)


def turn(t, y): return torch.stack([y[:, 1], -y[:, 0]], 1)


def balls(h, until, g=G, r=R, method="tsit5", **options):
    floor = Event(lambda t, y: y[:, 0], -1, jump=lambda t, y: torch.stack([0*y[:, 0], -r*y[:, 1]], 1))
    fall = lambda t, y: torch.stack([y[:, 1], -g + 0*y[:, 0]], 1)
    return samples(fall, torch.stack([h, 0*h], 1), until, method, events=floor, **options)


def bounces(h, n, g=G, r=R):
    "Exact times, (n, samples)."
    return (2*h/g).sqrt()*(1 + 2*(torch.stack([r**i for i in range(n)]).cumsum(0) - 1))[:, None]

# ------------------------------------------------------------------------------------------------------- when and where


@each_kind
def test_thirty_bounces_from_every_height(method):
    exact = bounces(HEIGHTS, 31)
    with torch.no_grad(): found = balls(HEIGHTS, torch.stack([0*HEIGHTS, exact[-1] + 1e-4], 1), method=method)
    happened = found.events[0]
    assert happened.count.tolist() == [31]*4 and len(happened) == 31
    assert (happened.t - exact).abs().max() < 1e-9
    assert happened.y[..., 0].abs().max() < 1e-12 and (happened.y[..., 1] < 0).all()
    assert found.status == [Status.success]*4


@each_kind
def test_times_are_within_ten_tolerances(method):
    phase = torch.linspace(0, 3, 7, dtype=D)
    y0 = torch.stack([phase.sin(), phase.cos()], 1)
    with torch.no_grad(): sol = samples(turn, y0, [0., 10.], method, rtol=1e-6, atol=1e-6, events=lambda t, y: y[:, :1] + .5)
    exact = (math.pi + math.pi/6 - phase) % (2*math.pi)
    assert sol.status == [Status.terminated_by_event]*7
    assert (sol.events[0].t[0] - exact).abs().max() < 1e-5
    assert (sol.y[-1, :, 0] + .5).abs().max() < 1e-9


def corner(method, batch):
    "Two balls: one meets both walls at once, the other one wall after the other; the time of both is a third event."
    turned = lambda i: lambda t, y: y*torch.tensor([-1. if j == i else 1. for j in range(4)])
    of = lambda y, j: y[..., j]
    walls = [Event(lambda t, y, i=i: 1 - of(y, 2 + i), -1, jump=turned(i)) for i in range(2)]
    faster = torch.tensor([2., 2., 1., 1.])
    clock = Event(lambda t, y: t.reshape(-1) - 1. if batch else t - 1., jump=lambda t, y: faster*y)
    roll = lambda t, y: torch.cat([0*y[..., :2], y[..., :2]], -1)
    y0 = torch.tensor([[1., 1., 0., 0.], [1., .5, 0., 0.]], dtype=D)
    if batch: return [samples(roll, y0, [0., 2.5], method, events=[*walls, clock])]
    return [solve(roll, y, [0., 2.5], method, events=[*walls, clock]) for y in y0]


@each_kind
def test_events_of_one_time_all_happen(method):
    (found,), alone = corner(method, True), corner(method, False)
    for i in range(3):
        for b, one in enumerate(alone):
            mine, theirs = found.events[i].of(b), one.events[i]
            assert len(mine) == len(theirs) == 1
            assert torch.allclose(mine.t, theirs.t, atol=1e-9) and torch.allclose(mine.y, theirs.y, atol=1e-9)
    assert torch.allclose(found.y[-1], torch.stack([one.y[-1] for one in alone]), atol=1e-8)
    assert found.events[0].t[0].tolist() == found.events[2].t[0].tolist() == pytest.approx([1., 1.])
    assert found.events[1].t[0].tolist() == pytest.approx([1., 1.5])


@each_kind
@pytest.mark.parametrize("batch", [True, False])
def test_an_event_right_after_another_does_not_repeat_it(method, batch):
    "The jump of the first leads to just before the second, too near for the time to tell."
    near = torch.ones(1, 1, dtype=D) - 1e-14
    clock = Event(lambda t, y: t.reshape(-1) - 1000.5 if batch else t - 1000.5, jump=lambda t, y: near if batch else near[0])
    level = Event(lambda t, y: y[..., 0] - 1., 1, terminal=False)
    f, y0 = lambda t, y: torch.ones_like(y), torch.zeros(1, 1, dtype=D)
    options = dict(method=method, events=[clock, level])
    sol = samples(f, y0, [1000., 1002.], **options) if batch else solve(f, y0[0], [1000., 1002.], **options)
    assert [len(e) for e in sol.events] == [1, 1]
    assert torch.allclose(sol.y[-1].flatten(), torch.tensor([2.5], dtype=D))


def test_a_terminal_event_together_with_a_jump_ends():
    both = [Event(lambda t, y: y[:, 0] - .5, jump=lambda t, y: 2*y), lambda t, y: y[:, 0] - .5]
    found = samples(lambda t, y: -y, torch.tensor([[1.], [2.]], dtype=D), [0., 9.], events=both)
    assert [e.count.tolist() for e in found.events] == [[1, 1], [1, 1]]
    assert found.status == [Status.terminated_by_event]*2
    assert torch.allclose(found.events[1].t[0], torch.tensor([2., 4.], dtype=D).log(), atol=1e-5)


@pytest.mark.parametrize("method, step", [("rk4", .1), ("implicit_midpoint", .02)])
def test_fixed_steps_land_on_events_too(method, step):
    y0 = torch.tensor([[0., 1.], [1., 0.]], dtype=D)
    low = Event(lambda t, y: y[:, 1], -1)
    sol = samples(turn, y0, [0., 10.], method, step_size=step, events=low)
    late = (sol.events[0].t[0] - torch.tensor([math.pi/2, 2*math.pi], dtype=D)).abs().max()
    assert late < 2.2e-4                                          # t h²/12 for the midpoint rule
    assert sol.y[-1, :, 1].abs().max() < 1e-12


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("direction, times", [(0, [1, 2, 3]), (1, [2]), (-1, [1, 3])])
def test_direction_is_that_of_g_along_each_solve(direction, times, way):
    y0 = torch.tensor([[0., 1.], [0., 2.]], dtype=D)
    zero = Event(lambda t, y: way*y[:, 0], direction, terminal=False)
    with torch.no_grad(): sol = samples(turn, y0, [0., 10.*way], rtol=1e-9, events=zero)
    assert torch.allclose(sol.events[0].t, way*math.pi*torch.tensor(times, dtype=D)[:, None].expand(-1, 2), atol=1e-7)


def test_both_directions_of_time_in_one_batch():
    y0, t = torch.tensor([[0., 1.], [0., 1.]], dtype=D), torch.tensor([[0., 5.], [0., -5.]], dtype=D)
    with torch.no_grad(): sol = samples(turn, y0, t, rtol=1e-9, events=lambda t, y: y[:, 0])
    assert torch.allclose(sol.events[0].t[0], torch.tensor([math.pi, -math.pi], dtype=D), atol=1e-8)


def test_several_functions_end_some_samples_and_not_others():
    y0 = torch.tensor([[0., 1.], [0., .2], [0., 3.]], dtype=D)
    ends = torch.tensor([[3.5], [9.], [9.]])
    events = [Event(lambda t, y: y[:, 0], terminal=False), lambda t, y: y[:, 0] - 2, lambda t, y: t - ends]
    with torch.no_grad(): sol = samples(turn, y0, torch.linspace(0, 8, 9, dtype=D), rtol=1e-9, events=events)
    assert sol.status == [Status.terminated_by_event, Status.success, Status.terminated_by_event]
    assert [e.count.tolist() for e in sol.events] == [[1, 2, 0], [0, 0, 1], [1, 0, 0]]
    assert sol.events[0].t.isnan().tolist() == [[False, False, True], [True, False, True]]
    assert abs(sol.events[1].t[0, 2] - math.asin(2/3)) < 1e-8 and abs(sol.events[2].t[0, 0] - 3.5) < 1e-12
    assert torch.equal(sol.y[4:, 0], sol.events[2].y[:, 0].expand(5, 2))        # frozen where it ended
    assert torch.allclose(sol.y[-1, 1, 0], .2*torch.tensor(8., dtype=D).sin(), atol=1e-7)
    alone = sol.events[0].of(1)
    assert torch.allclose(alone.t, math.pi*torch.tensor([1., 2.], dtype=D)) and alone.y.shape == (2, 2)
    assert len(sol.events[0].of(2)) == 0


def test_observations_before_at_and_after_a_jump():
    kick = Event(lambda t, y: t[:, 0] - torch.tensor([1., 2.], dtype=D), jump=lambda t, y: y + 10)
    t = torch.tensor([0., .5, 1., 1.5, 2., 2.5], dtype=D)
    with torch.no_grad(): sol = samples(lambda t, y: torch.ones_like(y), torch.zeros(2, 1, dtype=D), t, events=kick)
    assert torch.allclose(sol.y[:, 0, 0], t + torch.tensor([0, 0, 0, 10, 10, 10]), atol=1e-12)
    assert torch.allclose(sol.y[:, 1, 0], t + torch.tensor([0, 0, 0, 0, 0, 10]), atol=1e-12)


def test_two_functions_that_cross_at_once_both_happen():
    same = [Event(lambda t, y: y[:, 0], terminal=False), Event(lambda t, y: 2*y[:, 0], terminal=False)]
    y0 = torch.tensor([[0., 1.], [0., 2.]], dtype=D)
    for method in KINDS:
        with torch.no_grad(): sol = samples(turn, y0, [0., 4.], method, events=same)
        for e in sol.events: assert (e.t[0] - math.pi).abs().max() < 1e-4
        assert torch.allclose(sol.y[-1, :, 0], y0[:, 1]*math.sin(4), atol=1e-4)

# ----------------------------------------------------------------------------------------------------- in any company


@pytest.mark.parametrize("controller", ["i", "pid"])
@each_kind
def test_a_sample_has_the_same_events_alone_and_in_a_batch(method, controller):
    ends = torch.stack([0*HEIGHTS, torch.linspace(1, 3, 4, dtype=D), torch.linspace(2, 4, 4, dtype=D)], 1)
    options = dict(method=method, controller=controller, rtol=1e-5)
    with torch.no_grad():
        together = balls(HEIGHTS, ends, **options)
        for rows in ([0], [1], [2], [3], [3, 0, 2]):
            some = balls(HEIGHTS[rows], ends[rows], **options)
            assert torch.equal(together.y[:, rows], some.y)
            for name in ("accepted", "rejected", "f_evals")[:3 if method in KINDS[:2] else 2]:    # Newton's iterations are shared
                assert torch.equal(getattr(together.stats, name)[rows], getattr(some.stats, name)), name
            for k, i in enumerate(rows):
                (a, b) = (s.events[0].of(j) for s, j in ((together, i), (some, k)))
                assert torch.equal(a.t, b.t) and torch.equal(a.y, b.y)


def test_a_sample_that_fails_does_not_disturb_the_events_of_others():
    def f(t, y): return torch.where(y.abs() > 5, torch.nan, y*y)
    y0 = torch.tensor([[.1], [2.], [.5]], dtype=D)
    events = Event(lambda t, y: y[:, 0] - .8, terminal=False)
    sol = samples(f, y0, [0., 1.], rtol=1e-9, atol=1e-9, events=events, throw=False)
    assert [s.ok for s in sol.status] == [True, False, True] and sol.events[0].count.tolist() == [0, 0, 1]
    assert abs(sol.events[0].t[0, 2] - (2 - 1/.8)) < 1e-7


def test_an_accumulation_of_bounces_ends_with_a_status_not_with_a_hang():
    with torch.no_grad(): sol = balls(HEIGHTS[:2], [0., 4.], r=torch.tensor(.3, dtype=D), max_steps=2000, throw=False)
    assert all(isinstance(s, Status) for s in sol.status) and (sol.stats.accepted <= 2000).all()

# ----------------------------------------------------------------------------------------------------------- gradients


def differences(value, inputs, eps=1e-5):
    "Central differences of all values by every number of the inputs, (values, *input)."
    found = []
    for i, x in enumerate(inputs):
        slope = []
        for k in range(x.numel()):
            move = torch.zeros_like(x).view(-1).index_fill(0, torch.tensor(k), eps).view_as(x)
            with torch.no_grad(): up, down = (value(*[z + s*move if j == i else z for j, z in enumerate(inputs)]) for s in (1, -1))
            slope.append((up - down)/(2*eps))
        found.append(torch.stack(slope, -1).view(-1, *x.shape))
    return found


WAYS = [("tsit5", "direct"), ("dopri5", "checkpoint"), ("kvaerno5", "checkpoint"), ("rodas5p", "direct")]
each_way = pytest.mark.parametrize("method, gradient", WAYS)
PRECISE = dict(rtol=1e-8, atol=1e-8)


def agree(value, inputs, digits):
    "Autograd and central differences of several values; a later one is differentiated in a graph already used."
    inputs = [x.clone().requires_grad_() for x in inputs]
    values = value(*inputs)
    expected = differences(value, inputs)
    for k, one in enumerate(values):
        found = torch.autograd.grad(one, inputs, allow_unused=True, retain_graph=True)
        for a, b in zip(found, expected):
            a, b = torch.zeros_like(b[k]) if a is None else a, b[k]
            assert torch.allclose(a, b, rtol=digits, atol=digits), (k, a, b)


@each_way
def test_bounces_are_differentiable(method, gradient):
    t = torch.tensor([[0., .6, 1.3], [.1, .5, 1.7], [0., 1., 2.]], dtype=D)
    def value(h, g, r, t):
        sol = balls(h, t, g, r, method, gradient=gradient, **PRECISE)
        assert sol.events[0].count.tolist() == [2, 3, 2]
        times, states = sol.events[0].t.nan_to_num(), sol.events[0].y.nan_to_num()
        return torch.stack([times.square().sum(), states.sin().sum(), sol.y[-1].sin().sum(), sol.y.square().sum() + times[1].sum()])
    agree(value, (HEIGHTS[:3], G, R, t), 2e-6)


@each_way
def test_parameters_of_event_functions_jumps_and_args_count(method, gradient):
    y0 = torch.tensor([[1., .5], [2., .1], [.2, .3]], dtype=D)
    def value(y0, level, kick, rate):
        f = lambda t, y, a: -a["rate"]*y*(1 + .3*t.cos())
        low = Event(lambda t, y, a: y[:, 0] - level - .01*a["rate"]*t[:, 0], jump=lambda t, y, a: y + kick*t*a["rate"])
        done = Event(lambda t, y, a: t[:, 0] - 1.7 - .1*y[:, 1])
        sol = samples(f, y0, torch.tensor([0., .5, 1., 3.], dtype=D), method, args={"rate": rate}, events=[low, done],
                      gradient=gradient, **PRECISE)
        assert sol.status == [Status.terminated_by_event]*3 and sol.events[0].count.tolist() == [3, 1, 0]
        times = sol.events[0].t.nan_to_num().sum() + sol.events[1].t.square().sum()
        return torch.stack([sol.y.sin().sum(), times, sol.events[1].y.cos().sum()])
    agree(value, (y0, torch.tensor(.4, dtype=D), torch.tensor([.3, .2], dtype=D), torch.tensor(1., dtype=D)), 1e-5)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_a_parameter_of_the_event_function_alone(gradient):
    level = torch.tensor([.5, .25], dtype=D, requires_grad=True)
    sol = samples(lambda t, y: -y, torch.ones(2, 1, dtype=D), [0., 5.], events=lambda t, y: y[:, 0] - level, rtol=1e-10, atol=1e-12,
                  gradient=gradient)
    found, = torch.autograd.grad(sol.events[0].t.sum(), level)
    assert torch.allclose(found, -1/level.detach(), rtol=1e-7)                     # t = -log(level)


def test_gradients_by_both_ways_agree_with_joint_solves_one_by_one():
    w = torch.tensor([[.5, -.3], [.8, .2]], dtype=D, requires_grad=True)
    y0, t = torch.tensor([[1., .5], [-.5, 1.]], dtype=D), torch.tensor([0., 1., 2.5], dtype=D)
    def total(sol): return sol.y.square().sum() + sol.events[0].t.nan_to_num().sum()
    options = dict(rtol=1e-9, atol=1e-9)
    each = Event(lambda t, y: y[:, 0] - .3*t[:, 0], jump=lambda t, y: y + w[0])
    one = Event(lambda t, y: y[0] - .3*t, jump=lambda t, y: y + w[0])
    f = lambda t, y: torch.tanh(y @ w.T) - y.roll(1, -1)
    together = [torch.autograd.grad(total(samples(f, y0, t, events=each, gradient=g, **options)), w)[0]
                for g in ("direct", "checkpoint")]
    apart = torch.autograd.grad(sum(total(solve(f, y, t, events=one, **options)) for y in y0), w)[0]
    assert (together[0] - together[1]).abs().max() < 1e-9 and (together[0] - apart).abs().max() < 1e-6


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_second_derivatives_through_an_event_are_refused(gradient):
    y0 = torch.ones(1, 1, dtype=D, requires_grad=True)
    t = samples(lambda t, y: -y, y0, [0., 5.], events=lambda t, y: y[:, 0] - .5, gradient=gradient).events[0].t
    first, = torch.autograd.grad(t.sum(), y0, create_graph=True)
    assert abs(first.item() - 1) < 1e-5
    with pytest.raises(RuntimeError, match="no second derivatives"): torch.autograd.grad(first.sum(), y0)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_a_function_that_touches_zero_has_no_gradient_and_says_so(gradient):
    y0 = torch.tensor([[-1.], [-9.]], dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match=r"events\[0\] has no slope at its zero t=1 in sample 0"):
        sol = samples(lambda t, y: torch.ones_like(y), y0, [0., 2.], events=lambda t, y: torch.sign(y), gradient=gradient)
        sol.y.sum().backward()

# ---------------------------------------------------------------------------------------------------- what users bring


def test_structured_states_and_a_jump_in_place():
    y0 = {"height": HEIGHTS.clone(), "speed": torch.zeros(4, 1, dtype=D)}
    fall = lambda t, y: {"height": y["speed"][:, 0], "speed": -G + 0*y["speed"]}
    def bounce(t, y):
        y["speed"].mul_(-R)
        return y
    with torch.no_grad():
        sol = samples(fall, y0, [0., 2.], events=Event(lambda t, y: y["height"], -1, jump=bounce))
        plain = balls(HEIGHTS, [0., 2.])
    assert sol.events[0].y["speed"].shape == (len(sol.events[0]), 4, 1)
    assert torch.allclose(sol.events[0].t, plain.events[0].t, equal_nan=True)
    assert torch.allclose(sol.y["height"][-1], plain.y[-1, :, 0])


def test_a_network_may_be_the_event_function_of_single_precision_states():
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    y0 = torch.randn(8, 2)
    sol = samples(lambda t, y: turn(t, y), y0, [0., 7.], events=Event(lambda t, y: net(y), terminal=False))
    assert sol.events[0].t.dtype == torch.float64 and (sol.events[0].count > 0).any()
    inside = net(sol.events[0].y)[..., 0]
    assert inside[~sol.events[0].t.isnan()].abs().max() < 1e-5
    sol.events[0].t[0].nansum().backward()
    assert net.weight.grad.isfinite().all() and net.weight.grad.abs().max() > 0


def test_times_of_zero_length_and_an_empty_batch():
    t = torch.tensor([[0., 0.], [0., 2.]], dtype=D)
    sol = balls(HEIGHTS[:2], t)
    assert sol.events[0].count[0] == 0 and sol.events[0].count[1] > 1 and torch.equal(sol.y[-1, 0], sol.y[0, 0])
    none = samples(turn, torch.zeros(0, 2, dtype=D), [0., 1.], events=lambda t, y: y[:, 0])
    assert none.y.shape == (2, 0, 2) and none.events[0].t.shape == (0, 0)


def good(t, y): return y[:, 0] - .5


@pytest.mark.parametrize("events, words", [
    (lambda t, y: y, r"events\[0\] returned shape \(2, 3\)"),
    (lambda t, y: y.sum(), r"events\[0\] returned shape \(\)"),
    ([good, lambda t, y: y[:1, 0]], r"events\[1\] returned shape \(1,\)"),
    (lambda t, y: y[:, 0]*1j, "real number per sample"),
    (Event(good, jump=lambda t, y: y[0]), r"jump of events\[0\] returned \[\(3,\)\]"),
    (Event(good, jump=lambda t, y: (y,)), r"whole batch like y0"),
    (Event(good, jump=lambda t, y: None), "whole batch like y0"),
    (3, "function=3"), (lambda t: t, "positional")])
def test_what_is_no_event_of_a_sample_is_said(events, words):
    with pytest.raises((TypeError, ValueError), match=words):
        samples(lambda t, y: -y, torch.ones(2, 3, dtype=D), [0., 1.], events=events)


def test_the_adjoint_is_refused_with_events_too():
    with pytest.raises(ValueError, match="gradient='adjoint' is not available with batch='sample'"):
        balls(HEIGHTS.clone().requires_grad_(), [0., 1.], gradient="adjoint")

# -------------------------------------------------------------------------------------------------------- dense output


@each_kind
def test_dense_output_is_a_function_of_each_samples_time(method):
    rate = torch.tensor([[.3], [1.], [5.]], dtype=D)
    f = lambda t, y: -rate*y*t.cos()
    own = torch.tensor([[0., 2.], [1., -1.], [.5, 3.]], dtype=D)
    exact = lambda t: (-rate[:, 0]*(t.sin() - own[:, 0].sin())).exp()
    y0 = torch.ones(3, 1, dtype=D)
    with torch.no_grad(): sol = samples(f, y0, own, method, rtol=1e-8, atol=1e-8, dense=True)
    t = own[:, :1] + torch.rand(3, 40, dtype=D)*(own[:, 1:] - own[:, :1])
    t = torch.cat([own, t], 1)
    assert sol(t).shape == (42, 3, 1) and (sol(t)[..., 0] - exact(t.t())).abs().max() < 1e-4
    assert torch.allclose(sol(own), sol.y, rtol=1e-12, atol=1e-12)
    common = torch.linspace(.5, 1., 5, dtype=D)
    assert sol(common).shape == (5, 3, 1) and torch.equal(sol(common), sol(common.expand(3, -1)))
    assert torch.equal(sol(.75), sol(torch.tensor([.75]))[0])


def test_dense_output_refuses_times_outside_a_samples_own_interval():
    own = torch.tensor([[0., 2.], [1., -1.]], dtype=D)
    sol = samples(lambda t, y: -y, torch.ones(2, 1, dtype=D), own, dense=True)
    for t, words in [(1.5, r"t=1.5 is outside the solve of sample 1, which covers \[-1, 1\]"),
                     (torch.tensor([[0., 1.], [0., -3.]]), "t=-3 is outside the solve of sample 1"), (math.nan, "sample 0"),
                     (torch.zeros(3, 2), r"t has shape \(3, 2\)"), (torch.zeros(2, 1, 1), "or \\(2, times\\)")]:
        with pytest.raises(ValueError, match=words): sol(t)


def test_dense_output_follows_jumps_and_ends_where_a_sample_does():
    with torch.no_grad():
        sol = balls(HEIGHTS, [0., 2.], dense=True)
        for t in sol.events[0].of(0).t:
            near = sol(torch.stack([t - 1e-9, t, t + 1e-9]))[:, 0, 1]
            assert near[1] < 0 and abs(near[0] - near[1]) < 1e-6 and abs(near[2] + R*near[1]) < 1e-6
        ended = samples(turn, torch.tensor([[0., 1.]], dtype=D), [0., 9.], dense=True, events=lambda t, y: y[:, 0])
    with pytest.raises(ValueError, match=r"sample 0, which covers \[0, 3.14159\]"): ended(4.)


def test_dense_output_of_structures_and_of_samples_that_stand_still():
    y0, t = {"a": torch.ones(2, 3, dtype=D), "b": torch.ones(2, dtype=D)}, torch.tensor([[0., 0.], [0., 1.]], dtype=D)
    sol = samples(lambda t, y: {"a": -y["a"], "b": 2*y["b"]}, y0, t, dense=True)
    found = sol(torch.tensor([[0.], [.5]]))
    assert found["a"].shape == (1, 2, 3) and torch.equal(found["a"][0, 0], y0["a"][0])
    assert abs(found["b"][0, 1] - math.e) < 1e-4
    still = samples(lambda t, y: -y, torch.ones(2, 1), [0.], dense=True)
    assert torch.equal(still(0.), torch.ones(2, 1))


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_dense_output_carries_gradients_with_direct(method):
    own = torch.tensor([[0., 2.], [1., -1.]], dtype=D)
    def value(rate, y0, own, at):
        sol = samples(lambda t, y: -rate*y*t.cos(), y0, own, method, dense=True, gradient="direct", **PRECISE)
        return sol(at).sin().sum()[None]
    inputs = [torch.tensor([[.5], [2.]], dtype=D), torch.ones(2, 1, dtype=D), own, torch.tensor([[.3, 1.5], [.2, -.4]], dtype=D)]
    agree(value, inputs, 1e-5)


def test_dense_output_without_a_graph_is_refused_where_gradients_are_wanted():
    y0 = torch.ones(2, 1, dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match="only with gradient='direct'"): samples(lambda t, y: -y, y0, [0., 1.], dense=True)
    with torch.no_grad(): assert samples(lambda t, y: -y, y0, [0., 1.], dense=True)(.5).shape == (2, 1)
