"""Events: found where they are, used as they should be, differentiated, and the same as torchdiffeq's."""
import math

import pytest
import torch
import torchdiffeq

from neuralode_nb import Event, SolveError, Status, odeint, odeint_adjoint, odeint_event, solve

DTYPE = torch.float64
GRADIENTS = ["direct", "checkpoint", "adjoint"]
METHODS = ["tsit5", "dopri8", "bosh3", "kvaerno5", "rodas5p", "radau5", "bdf"]


def turn(t, y): return torch.stack([y[1], -y[0]])


def start(*numbers): return torch.tensor(numbers, dtype=DTYPE)


@pytest.mark.parametrize("method", METHODS)
def test_the_time_is_within_ten_tolerances(method):
    with torch.no_grad():
        sol = solve(turn, start(0., 1.), [0., 10.], method, rtol=1e-6, atol=1e-6, events=lambda t, y: y[0] + 0.5)
    assert sol.status is Status.terminated_by_event and sol.status.ok
    assert abs(sol.events[0].t[0].item() - (math.pi + math.pi / 6)) < 1e-5
    assert abs(sol.y[-1, 0].item() + 0.5) < 1e-9            # on the zero, whatever the error of the time


@pytest.mark.parametrize("method, step", [("rk4", 0.1), ("implicit_midpoint", 0.02)])
def test_fixed_steps_land_on_events_too(method, step):
    sol = solve(turn, start(0., 1.), [0., 10.], method, step_size=step, events=lambda t, y: y[1])
    assert abs(sol.events[0].t[0].item() - math.pi / 2) < 1e-4 and abs(sol.y[-1, 1].item()) < 1e-12


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("direction, times", [(0, [1, 2, 3]), (1, [2]), (-1, [1, 3])])
def test_direction_is_that_of_g_along_the_solve(direction, times, way):
    zero = Event(lambda t, y: way * y[0], direction, terminal=False)
    sol = solve(turn, start(0., 1.), [0., 10. * way], rtol=1e-9, events=zero)
    assert sol.status is Status.success
    assert torch.allclose(sol.events[0].t, way * math.pi * start(*times), atol=1e-7)


def test_several_functions_first_come_first():
    events = [Event(lambda t, y: y[0], terminal=False), lambda t, y: t - 7., lambda t, y: y[0] - 5]
    sol = solve(turn, start(0., 1.), [0., 20.], events=events)
    assert [len(e) for e in sol.events] == [2, 1, 0] and sol.events[2].y.shape == (0, 2)
    assert abs(sol.events[1].t[0] - 7) < 1e-12 and sol.t[-1] == 20
    assert torch.equal(sol.y[-1], sol.events[1].y[0])        # what was not reached repeats the state at the event


def ball(gravity, rest, height, until, **options):
    floor = Event(lambda t, y: y[0], -1, jump=lambda t, y: torch.stack([0 * y[0], -rest * y[1]]))
    fall = lambda t, y: torch.stack([y[1], -gravity + 0 * y[0]])
    return solve(fall, torch.stack([height, 0 * height]), [0., until], events=floor, **options)


def test_thirty_bounces():
    g, r, h = start(9.81, 0.9, 1.0)
    found = ball(g, r, h, 8.24).events[0].t
    exact = (2 * h / g).sqrt() * (1 + 2 * torch.stack([r**i for i in range(1, 31)]).cumsum(0))
    assert len(found) == 31 and (found[1:] - exact).abs().max() < 1e-9


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_bounce_times_are_differentiable(gradient):
    inputs = [x.clone().requires_grad_() for x in start(9.81, 0.9, 1.0)]
    def last(*inputs): return ball(*inputs, 3.0, gradient=gradient, rtol=1e-9, atol=1e-9)
    sol = last(*inputs)
    for pick in (lambda s: s.events[0].t[-1], lambda s: s.y[-1].sum(), lambda s: s.events[0].y[-1, 1]):
        found = torch.autograd.grad(pick(sol), inputs, retain_graph=True)
        for i, slope in enumerate(found):
            shift = [torch.where(torch.arange(3) == i, 1e-5, 0.).double()[k] for k in range(3)]
            with torch.no_grad():
                up, down = (pick(last(*[y + s * e for y, e in zip(inputs, shift)])) for s in (1, -1))
            assert abs((up - down) / 2e-5 - slope) < 1e-5 * max(1, abs(slope)), (i, slope)


def test_a_parameter_in_the_event_function_counts():
    level = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    sol = solve(lambda t, y: -y, start(1.), [0., 5.], events=lambda t, y: y[0] - level, rtol=1e-10, atol=1e-12)
    slope, = torch.autograd.grad(sol.events[0].t[0], level)
    assert abs(slope + 1 / 0.5) < 1e-7                      # t = -log(level)


def test_times_asked_for_after_an_event_move_with_the_solution_not_with_the_event():
    rate = torch.tensor(1.0, dtype=DTYPE, requires_grad=True)
    kick = Event(lambda t, y: y[0] - 0.5, jump=lambda t, y: y + 1)
    sol = solve(lambda t, y: -rate * y, start(1.), [0., 0.2, 1.0], events=kick, rtol=1e-10, atol=1e-12)
    assert abs(sol.y[-1, 0] - 3 * math.exp(-1)) < 1e-8                 # 1.5 exp(-rate (1 - log(2) / rate))
    assert abs(torch.autograd.grad(sol.y[-1, 0], rate)[0] + 3 * math.exp(-1)) < 1e-7


def test_structured_states_and_args():
    def fall(t, y, g): return {"height": y["speed"], "speed": -g + 0 * y["speed"]}
    y0 = {"height": start(10.), "speed": start(0.)}
    g = torch.tensor(9.8, dtype=DTYPE, requires_grad=True)
    sol = solve(fall, y0, [0., 5.], args=g, events=lambda t, y, g: y["height"][0])
    assert abs(sol.events[0].t[0] - math.sqrt(20 / 9.8)) < 1e-9 and sol.events[0].y["speed"].shape == (1, 1)
    assert abs(torch.autograd.grad(sol.events[0].t[0], g)[0] + 0.5 * math.sqrt(20 / 9.8) / 9.8) < 1e-9


@pytest.mark.parametrize("events, words", [
    (3, "function=3"), (Event(lambda t, y: y), "one number"), (lambda t: t, "positional")])
def test_what_is_no_event_is_said(events, words):
    with pytest.raises((TypeError, ValueError), match=words): solve(turn, start(0., 1.), [0., 1.], events=events)


def test_combinations_that_are_not_defined_are_refused():
    for changes, words in (({"dense": True}, "dense=True"), ({"batch": "sample"}, "a real number per sample")):
        with pytest.raises(ValueError, match=words):
            solve(turn, torch.eye(2).double(), [0., 1.], events=lambda t, y: y[0, 0], **changes)


def test_a_function_that_touches_zero_has_no_gradient_and_says_so():
    y0 = start(-1.).requires_grad_()
    with pytest.raises(ValueError, match="no slope"):
        solve(lambda t, y: torch.ones_like(y), y0, [0., 2.], events=lambda t, y: torch.sign(y[0]))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_odeint_event_is_torchdiffeqs(interface, reverse):
    def run(event, odeint):
        height = torch.tensor(10., dtype=DTYPE, requires_grad=True)
        gravity = torch.tensor(9.8, dtype=DTYPE, requires_grad=True)
        func = torch.nn.Module()
        func.gravity = torch.nn.Parameter(gravity)
        func.forward = lambda t, y: (y[1], -func.gravity + 0 * y[0])
        t, (h, v) = event(func, (height, 0 * height), torch.tensor(0., dtype=DTYPE), event_fn=lambda t, y: y[0],
                          reverse_time=reverse, odeint_interface=odeint, method="dopri5", rtol=1e-10, atol=1e-10)
        return t, h, v, *torch.autograd.grad(t + v[-1], [height, func.gravity])
    ours = run(odeint_event, {"odeint": odeint, "odeint_adjoint": odeint_adjoint}[interface])
    for mine, theirs in zip(ours, run(torchdiffeq.odeint_event, getattr(torchdiffeq, interface))):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-7)


def test_odeint_event_with_fixed_steps_goes_on_until_it_happens():
    t, states = odeint_event(lambda t, y: torch.ones_like(y), start(0.), torch.tensor(0.), event_fn=lambda t, y: y - 7.25,
                             method="rk4", options={"step_size": 0.005})
    assert abs(t - 7.25) < 1e-9 and states.shape == (2, 1)


def test_an_event_that_never_happens_is_a_failure_with_a_cause():
    with pytest.raises(SolveError, match="max_steps"):
        odeint_event(lambda t, y: -y, start(1.), torch.tensor(0.), event_fn=lambda t, y: y + 1, options={"max_num_steps": 200})


@pytest.mark.parametrize("method", ["tsit5", "rk4", "radau5"])
@pytest.mark.parametrize("second", [lambda t, y: y[0] - .3, lambda t, y: .3 - y[0], lambda t, y: 7 * (y[1] - .7),
                                    lambda t, y: t - .3],
                         ids=["same", "other way", "scaled", "of time"])
@pytest.mark.parametrize("more", [dict(), dict(step_t=[.3])], ids=["inside a step", "at its end"])
def test_events_at_the_same_time_all_happen(method, second, more):
    f, y0 = lambda t, y: torch.stack([1 + 0 * y[0], 0 * y[0] - 1]), torch.tensor([0., 1.], dtype=torch.float64)
    more = more | (dict(step_size=.25) if method == "rk4" else {})
    events = [Event(lambda t, y: y[0] - .3, terminal=False), Event(second, terminal=False)]
    for given in (events, events[::-1]):
        found = solve(f, y0, [0., 1.], method, events=given, **more)
        for one in found.events: assert len(one) == 1 and abs(one.t.item() - .3) < 1e-9
    ended = solve(f, y0, [0., 1.], method, events=[events[0], Event(second)], throw=False, **more)
    assert ended.status.name == "terminated_by_event" and [len(one) for one in ended.events] == [1, 1]
    jumps = [Event(events[0].function, jump=lambda t, y: y + 10), Event(second, jump=lambda t, y: 2 * y)]
    assert solve(f, y0, [0., .5], method, events=jumps[:1], **more).y[-1, 0].item() == pytest.approx(10.5)
    assert solve(f, y0, [0., .5], method, events=jumps, **more).y[-1, 0].item() == pytest.approx(20.8)
