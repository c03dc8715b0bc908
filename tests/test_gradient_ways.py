"""Every way to differentiate a solve, against the graph of the whole solve: methods, states, times, and what f holds."""
import contextlib
import gc
import math
import re
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from neuralode_nb import Adjoint, Event, SolveError, odeint, solve
from neuralode_nb.ode.base import layout_of
from neuralode_nb.ode.reversible import Reversible
from neuralode_nb.ode.schedules import Checkpoint

DOUBLE = dict(dtype=torch.float64)
EXACT = {"checkpoint": "checkpoint", "three states": Checkpoint(3), "seven states": Checkpoint(7), "log states": Checkpoint("log"),
         "symplectic": "symplectic", "symplectic, three states": Checkpoint(3, symplectic=True)}
CONTINUOUS = ["adjoint", "interpolated", "gauss"]
ALL = {"direct": "direct", **EXACT, "forward": "forward", **{how: how for how in CONTINUOUS}, "reversible": "reversible"}
each_way = pytest.mark.parametrize("way", [way for way in ALL if "three" not in way and "seven" not in way])
each_direction = pytest.mark.parametrize("sign", [1, -1], ids=["forward in time", "backward in time"])
TIMES = .0, .21, .5, .93, 1.


def method_for(way):
    "A method that every gradient of this name is defined for."
    return Reversible("tsit5") if way == "reversible" else "tsit5"


class Field(nn.Module):
    "Depends on time, state and args; holds a shared, an unused and a frozen parameter."
    def __init__(self, n=3):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(n, n, **DOUBLE), nn.Linear(n, n, **DOUBLE), nn.Linear(2, 2, **DOUBLE)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, t, y): return self.second(torch.tanh(self.first(y))) * torch.cos(2 * t) - .3 * y


STATES = {
    "tensor": (lambda a: a, lambda y: y),
    "tuple": (lambda a: (a[0], a[1:, :2]), lambda y: torch.cat([y[0], y[1].reshape(-1)])),
    "dict": (lambda a: {"one": a[0], "two": [a[1:, :2]]}, lambda y: torch.cat([y["one"], y["two"][0].reshape(-1)])),
    "complex": (lambda a: torch.complex(a[0], a[1]), lambda y: torch.view_as_real(y).reshape(-1))}


def problem(state="tensor", sign=1):
    "(f, leaves, function of the leaves that gives y0, t): the leaves are all that is differentiated."
    torch.manual_seed(3)
    field, closure = Field(), torch.tensor(.4, **DOUBLE).requires_grad_()
    args = {"rate": torch.tensor([.7], **DOUBLE).requires_grad_(), "deep": [torch.tensor(.2, **DOUBLE).requires_grad_(), "a word"]}
    a = torch.linspace(-.8, 1.1, 6, **DOUBLE).view(2, 3).requires_grad_()
    t = (sign * torch.tensor(TIMES, **DOUBLE)).requires_grad_()
    make, flat = STATES[state]
    def f(t, y, args):
        v = flat(y).reshape(-1)
        u = torch.cat([v, v.new_zeros(-len(v) % 3)]).view(-1, 3)
        k = (args["rate"] * field(t, u) + closure * torch.sin(u.flip(-1) + t) + args["deep"][0]).reshape(-1)[:len(v)]
        leaves, like = list(tree_leaves(y)), []
        for x in leaves:
            n = 2 * x.numel() if x.is_complex() else x.numel()
            piece, k = k[:n], k[n:]
            like.append(torch.view_as_complex(piece.view(*x.shape, 2)) if x.is_complex() else piece.view(x.shape))
        return torch.utils._pytree.tree_unflatten(like, layout_of(y).spec) if state != "tensor" else like[0]
    leaves = [a, closure, args["rate"], args["deep"][0], *[p for p in field.parameters() if p.requires_grad]]
    return f, leaves, lambda: make(a), t, args


def gradients(method, gradient, state="tensor", sign=1, **options):
    "Gradients of a weighted sum of squares of all outputs: (of the times, of everything else). Those of `direct` are found once."
    if gradient != "direct": return found_gradients(method, gradient, state, sign, options)
    key = method, state, sign, *sorted(options.items())
    if key not in KNOWN: KNOWN[key] = found_gradients(method, gradient, state, sign, options)
    return KNOWN[key]


KNOWN = {}


def found_gradients(method, gradient, state, sign, options):
    "The same, found now."
    f, leaves, y0, t, args = problem(state, sign)
    y = tree_leaves(solve(f, y0(), t, method, args=args, gradient=gradient, **options).y)
    loss = sum((torch.cos(torch.arange(x.numel(), **DOUBLE)).view(x.shape) * x.abs()**2).sum() for x in y)
    found = torch.autograd.grad(loss, [t, *leaves], allow_unused=True)
    return found[0], [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found[1:])]


def off(found, expected):
    "Largest deviation, relative to the size of each gradient."
    return max(((a - b).norm() / (b.norm() + 1e-12)).item() for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------ the matrix: exact ways

EXPLICIT = [("tsit5", dict(rtol=1e-4, atol=1e-4)), ("dopri8", dict(rtol=1e-4, atol=1e-4)), ("bosh3", dict(rtol=1e-3, atol=1e-3)),
            ("rk4", dict(step_size=.11))]
IMPLICIT = [("kvaerno3", dict(rtol=1e-3, atol=1e-3)), ("trbdf2", dict(rtol=1e-3, atol=1e-3)),
            ("radau5", dict(rtol=1e-4, atol=1e-4)), ("rodas5p", dict(rtol=1e-4, atol=1e-4))]


@each_direction
@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("method, options, state", [(*EXPLICIT[0], state) for state in STATES] +
                         [(*m, "tensor") for m in EXPLICIT[1:]],
                         ids=[*STATES, "dopri8", "bosh3", "rk4"])
def test_explicit_methods_exactly(method, options, state, way, sign):
    t, rest = gradients(method, EXACT[way], state, sign, **options)
    t_direct, direct = gradients(method, "direct", state, sign, **options)
    assert off([t, *rest], [t_direct, *direct]) < 1e-8


@each_direction
@pytest.mark.parametrize("state", ["tensor", "dict"])
@pytest.mark.parametrize("way", ["checkpoint", "three states"])
@pytest.mark.parametrize("method, options", IMPLICIT, ids=[m for m, _ in IMPLICIT])
def test_implicit_methods_exactly(method, options, way, state, sign):
    t, rest = gradients(method, EXACT[way], state, sign, **options)
    t_direct, direct = gradients(method, "direct", state, sign, **options)
    assert off([t, *rest], [t_direct, *direct]) < 1e-8


@pytest.mark.parametrize("method", ["kvaerno3", "kvaerno5", "radau5"])
def test_checkpoint_is_direct_on_a_stiff_problem_too(method):
    "Equations that are solved less tightly in the forward pass than for the gradient show here."
    def slope(gradient):
        mu = torch.tensor(50., **DOUBLE).requires_grad_()
        f = lambda t, y: torch.stack([y[1], mu * (1 - y[0]**2) * y[1] - y[0]])
        y = solve(f, torch.tensor([2., 0.], **DOUBLE), [0., 2.], method, gradient=gradient, rtol=1e-3, atol=1e-5).y
        return torch.autograd.grad(y[-1, 0], mu)
    assert off(slope("checkpoint"), slope("direct")) < 1e-8


@each_direction
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("method, options", [("reversible_heun", dict(rtol=1e-3, atol=1e-3)), ("alf", dict(rtol=1e-3, atol=1e-3)),
    (Reversible("tsit5"), dict(rtol=1e-5, atol=1e-5)), (Reversible("rk4"), dict(step_size=.11))],
    ids=["heun", "alf", "tsit5", "rk4"])
def test_reversible_methods_exactly(method, options, state, sign):
    t, rest = gradients(method, "reversible", state, sign, **options)
    t_direct, direct = gradients(method, "direct", state, sign, **options)
    assert off([t, *rest], [t_direct, *direct]) < 1e-8


@each_direction
@pytest.mark.parametrize("way", ["reversible", "checkpoint", "log states"])
@pytest.mark.parametrize("method", ["leapfrog", "yoshida4"])
def test_symplectic_methods_exactly(method, way, sign):
    def of(gradient):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        z = [torch.ones(2, **DOUBLE).requires_grad_() for _ in "qp"]
        t = (sign * torch.tensor(TIMES, **DOUBLE)).requires_grad_()
        y = solve(lambda t, z: (z[1], net(z[0]) * torch.cos(t) - z[0]), tuple(z), t, method, step_size=.07, gradient=gradient).y
        return torch.autograd.grad((y[0]**2).sum() + (y[1][1:]**3).sum(), [*z, t, *net.parameters()])
    assert off(of(ALL[way]), of("direct")) < 1e-8


@each_direction
@pytest.mark.parametrize("state", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("method, options", EXPLICIT, ids=[m for m, _ in EXPLICIT])
def test_forward_is_exact_for_all_but_the_times(method, options, state, sign):
    _, rest = gradients(method, "forward", state, sign, **options)
    assert off(rest, gradients(method, "direct", state, sign, **options)[1]) < 1e-8


# ------------------------------------------------------------------------------------- the matrix: continuous ways

TIGHT = dict(rtol=1e-8, atol=1e-8)


@each_direction
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("way", CONTINUOUS)
def test_continuous_ways_to_their_tolerance(way, state, sign):
    others = [("dopri8", TIGHT), ("rk4", dict(step_size=.05))] if state == "tensor" else []
    for method, options in [("tsit5", TIGHT), *others]:
        t, rest = gradients(method, way, state, sign, **options)
        t_direct, direct = gradients(method, "direct", state, sign, **options)
        assert off([t, *rest], [t_direct, *direct]) < 1e-4, method


@pytest.mark.parametrize("method, way", [("adams", "adjoint"), ("adams", "gauss"), ("bdf", "gauss"),
    ("rodas5p", "gauss"), ("kvaerno5", "gauss"),
    ("bdf", Adjoint(method="tsit5")), ("rodas5p", Adjoint(kind="interpolated", method="tsit5"))], ids=str)
def test_continuous_ways_of_other_methods(method, way):
    tight = dict(rtol=1e-6, atol=1e-8) if isinstance(method, Reversible) else TIGHT
    t, rest = gradients(method, way, **tight)
    t_direct, direct = gradients(method, "direct", **tight)
    assert off([t, *rest], [t_direct, *direct]) < 1e-4


def test_what_the_quadrature_of_gauss_costs():
    "As many nodes as the order needs on a fixed grid, whatever the tolerances; no chase after rounding in single precision."
    def backward(dtype, method, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
        y0 = torch.linspace(-2, 2, 64).view(16, 4).to(dtype)
        found = solve(lambda t, y: net(y) * torch.cos(3 * t), y0, [0., 2.], method, gradient="gauss", **options)
        found.y[-1].square().sum().backward()
        return found.stats.backward_f_evals, found.stats.accepted
    for method, stages in (("rk4", 4), ("euler", 1)):
        evals, steps = backward(torch.float64, method, step_size=.2, rtol=1e-9, atol=0.)
        assert evals <= (stages + 2) * steps + 1
    for rtol in (1e-6, 1e-7, 1e-9):
        (double, steps), (single, more) = (backward(dtype, "tsit5", rtol=rtol, atol=rtol)
                                           for dtype in (torch.float64, torch.float32))
        assert single / more < 1.2 * double / steps, rtol


@pytest.mark.parametrize("way", ["forward", *CONTINUOUS])
def test_times_of_the_continuous_solution(way):
    found, direct = (gradients("tsit5", how, **TIGHT)[0] for how in (way, "direct"))
    assert off([found], [direct]) < 1e-4


@each_way
def test_central_differences_of_one_number_of_everything(way):
    "An independent judge for all ways at once."
    method, step, fine = Reversible("rk4") if way == "reversible" else "rk4", 1e-4, dict(step_size=.05)
    def loss(i=None, d=0.):
        f, leaves, y0, t, args = problem()
        with torch.no_grad():
            if i is not None: ([t, *leaves][i]).view(-1)[-1] += d
        with torch.no_grad() if i is not None else contextlib.nullcontext():
            y = solve(f, y0(), t, method, args=args, gradient=ALL[way], **fine).y
        return (y**2).sum(), [t, *leaves]
    value, leaves = loss()
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, torch.autograd.grad(value, leaves, allow_unused=True))]
    for i, g in enumerate(found):
        difference = (loss(i, step)[0] - loss(i, -step)[0]) / (2 * step)
        assert abs(g.reshape(-1)[-1] - difference) < 1e-5 * (1 + abs(difference)), i


@each_way
@each_direction
def test_every_copy_of_a_repeated_time_has_its_own_gradient(way, sign):
    "The solve starts at t[0]; y[i] moves with t[i] and t[0] only, and a copy of t0 with nothing."
    t = (sign * torch.tensor([0., 0., .5, .5, 1., 1.], **DOUBLE)).requires_grad_()
    y = solve(lambda t, y: -y, torch.ones(1, **DOUBLE), t, method_for(way), gradient=ALL[way], rtol=1e-9, atol=1e-11).y
    for i in (2, 3, 4, 5):
        expected = torch.zeros(6, **DOUBLE)
        expected[0], expected[i] = y[i].item(), -y[i].item()
        assert torch.allclose(torch.autograd.grad(y[i].sum(), t, retain_graph=True)[0], expected, atol=1e-5), i


# --------------------------------------------------------------------------------------------- jumps and stops of f


@each_way
@each_direction
@pytest.mark.parametrize("times, expected", [
    ((0., .8), (-1., -1.)), ((0., .5, .8), (-1., 0., -1.)), ((0., .5), (-1., 1.)), ((.5, .8), (1., -1.)),
    ((0., .3, .4, .8), (-1., 0., 0., -1.))], ids=["inside", "observed", "at the end", "at the start", "observations inside"])
def test_a_jump_stays_where_it_is(way, sign, times, expected):
    "y' = ±y: the derivatives of the last state by each time, divided by it. An observation at the jump does not move the jump."
    t = (sign * torch.tensor(times, **DOUBLE)).requires_grad_()
    f = lambda t, y: torch.where(sign * t < .5 if sign > 0 else sign * t <= .5, 1., -1.) * sign * y
    y = solve(f, torch.ones(1, **DOUBLE), t, method_for(way), jump_t=[.5 * sign], gradient=ALL[way], rtol=1e-9, atol=1e-11).y
    found = sign * torch.autograd.grad(y[-1].sum(), t)[0] / y[-1].item()
    assert torch.allclose(found, torch.tensor(expected, **DOUBLE), atol=1e-5)


@each_way
def test_an_observation_at_a_jump_arrives_from_the_left(way):
    t = torch.tensor([0., .5, 1.], **DOUBLE).requires_grad_()
    f = lambda t, y: torch.where(t < .5, 1., -1.) * y
    y = solve(f, torch.ones(1, **DOUBLE), t, method_for(way), jump_t=[.5], gradient=ALL[way], rtol=1e-9, atol=1e-11).y
    found = torch.autograd.grad(y[1].sum(), t)[0] / y[1].item()
    assert torch.allclose(found, torch.tensor([-1., 1., 0.], **DOUBLE), atol=1e-5)


@each_way
@pytest.mark.parametrize("stops", ["jump_t", "step_t"])
@pytest.mark.parametrize("method", ["own", "heun"])
def test_stops_inside_a_solve(way, stops, method):
    "The company of a reversible method starts anew at a jump."
    if method == "heun" and way != "reversible": pytest.skip("for methods with company")
    def of(gradient):
        w, y0 = torch.tensor(.8, **DOUBLE).requires_grad_(), torch.tensor([1., .3], **DOUBLE).requires_grad_()
        f = lambda t, y: torch.where(t < .4, w, -w * t) * torch.cos(y) if stops == "jump_t" else w * torch.cos(t + y)
        y = solve(f, y0, [0., .2, .7, 1.], "reversible_heun" if method == "heun" else method_for(way), gradient=gradient,
                  rtol=1e-6, atol=1e-6, **{stops: [.4, .6]}).y
        return torch.autograd.grad((y**2).sum(), [w, y0])
    assert off(of(ALL[way]), of("direct")) < (1e-4 if way in CONTINUOUS else 1e-8)


# ----------------------------------------------------------------------------------------------------------- events


@each_way
def test_a_terminal_event_and_its_time(way):
    "Free fall from h: t = √(2h/g), dt/dh = t / (2h), dt/dg = -t / (2g)."
    h, g = (torch.tensor(x, **DOUBLE).requires_grad_() for x in (5., 9.81))
    f = lambda t, y: torch.stack([y[1], -g + 0 * y[0]])
    found = solve(f, torch.stack([h, 0 * h]), [0., 3.], method_for(way), gradient=ALL[way], events=lambda t, y: y[0],
                  rtol=1e-9, atol=1e-9)
    t = found.events[0].t[0]
    of_h, of_g = torch.autograd.grad(t, [h, g])
    assert torch.allclose(torch.stack([t, of_h, of_g]), torch.stack([(2 * h / g).sqrt(), t / (2 * h), -t / (2 * g)]), rtol=1e-6)


@each_way
def test_a_ball_that_bounces(way):
    "Gradients through jumps, against the direct way; a parameter that only the jump uses."
    def of(gradient):
        bounce, g, h = (torch.tensor(x, **DOUBLE).requires_grad_() for x in (.8, 9.81, 2.))
        hit = Event(lambda t, y: y[0], direction=-1, jump=lambda t, y: torch.stack([0 * y[0], -bounce * y[1]]))
        y = solve(lambda t, y: torch.stack([y[1], -g - .1 * y[1]]), torch.stack([h, 0 * h]), [0., .5, 1., 1.5], method_for(way),
                  gradient=gradient, events=hit, rtol=1e-9, atol=1e-9).y
        return torch.autograd.grad((y**2).sum(), [bounce, g, h])
    assert off(of(ALL[way]), of("direct")) < (1e-4 if way in CONTINUOUS or way == "forward" else 1e-7)


# ------------------------------------------------------------------------------------------- solves that fail


def cut_short(way, events, create_graph=False):
    "A solve that uses up its steps between observations; gradients of all that came back, missed times included."
    w, y0 = torch.tensor(1.3, **DOUBLE).requires_grad_(), torch.ones(2, **DOUBLE).requires_grad_()
    t = torch.tensor([0., .1, 5., 10.], **DOUBLE).requires_grad_()
    more = {"events": lambda t, y: y[0] + 5} if events else {}
    back = dict(gradient=Adjoint(kind=way, max_steps=10_000)) if way in CONTINUOUS else dict(gradient=ALL[way])
    found = solve(lambda t, y: -w * y**2 * torch.cos(3 * t), y0, t, method_for(way), rtol=1e-8, atol=1e-8,
                  max_steps=25, throw=False, **back, **more)
    assert found.status.name == "max_steps"
    loss = (found.y * torch.arange(1, 5, **DOUBLE)[:, None]).sum()
    return torch.autograd.grad(loss, [w, y0, t], create_graph=create_graph, allow_unused=True)


@each_way
@pytest.mark.parametrize("events", [False, True], ids=["", "events"])
def test_a_solve_that_failed_has_the_gradient_of_what_there_is(way, events):
    exact = cut_short("direct" if way != "reversible" else "reversible", False)
    found = cut_short(way, events)
    assert found[0] is not None
    assert off(found[:2], exact[:2]) < (1e-4 if way in CONTINUOUS else 1e-8)


@pytest.mark.parametrize("way", ["adjoint", "interpolated", "gauss", "forward"])
def test_times_that_a_failed_solve_did_not_reach_have_no_gradient(way):
    found, exact = cut_short(way, False)[2], cut_short("direct", False)[2]
    assert torch.equal(found[2:], torch.zeros(2, **DOUBLE)) and torch.allclose(found, exact, rtol=1e-4)


@pytest.mark.parametrize("way", [*EXACT, "forward", "reversible"])
def test_a_solve_that_failed_with_create_graph(way):
    once, twice = cut_short(way, False), cut_short(way, False, create_graph=True)
    assert off(twice[:2], once[:2]) < 1e-8


# ------------------------------------------------------------------------------------------------ twice, and again


@pytest.mark.parametrize("way", [*EXACT, "forward", "reversible"])
def test_second_derivatives(way):
    def of(gradient):
        w, y0 = torch.tensor(.7, **DOUBLE).requires_grad_(), torch.tensor([.4, 1.], **DOUBLE).requires_grad_()
        y = solve(lambda t, y, w: torch.sin(w * y) * torch.cos(t), y0, [0., .3, 1.], method_for(way), args=w, gradient=gradient,
                  rtol=1e-5, atol=1e-5).y
        first = torch.autograd.grad((y**2).sum(), [w, y0], create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), [w, y0])]
    assert off(of(ALL[way]), of("direct")) < 1e-8


@pytest.mark.parametrize("way", CONTINUOUS)
def test_continuous_ways_refuse_to_be_differentiated_twice(way):
    y0 = torch.ones(2, **DOUBLE).requires_grad_()
    y = solve(lambda t, y: -y**2, y0, [0., 1.], gradient=way).y
    with pytest.raises(RuntimeError, match=f"(?s)gradient='{way}'.*twice.*checkpoint"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


@each_way
def test_backward_twice_with_the_graph_kept(way):
    f, leaves, y0, t, args = problem()
    y = solve(f, y0(), t, method_for(way), args=args, gradient=ALL[way], rtol=1e-5, atol=1e-5).y
    leaves = leaves[:-2]                         # but for the network that f does not use
    first, again = (torch.autograd.grad((y**2).sum(), [t, *leaves], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    one = torch.autograd.grad((y[-1]**2).sum(), leaves, retain_graph=True)
    rest = torch.autograd.grad((y[:-1]**2).sum(), leaves)
    assert off([a + b for a, b in zip(one, rest)], first[1:]) < (1e-4 if way in CONTINUOUS else 1e-9)


@pytest.mark.parametrize("symplectic", [False, True], ids=["", "symplectic"])
@pytest.mark.parametrize("states, allowed", [(3, 3), (7, 7), ("log", 3 + (100).bit_length())], ids=str)
def test_a_bounded_number_of_states_is_alive(states, allowed, symplectic):
    "States of a solve of 100 steps that live at any evaluation of f in the backward pass; each evaluation is of a state."
    rate, alive, most, y0 = torch.tensor(.5, **DOUBLE).requires_grad_(), {}, [0], torch.ones(7, **DOUBLE)
    def f(t, y):
        if (storage := y.untyped_storage())._cdata not in alive:
            alive[storage._cdata] = True
            weakref.finalize(storage, alive.pop, storage._cdata, None)
        most[0] = max(most[0], len(alive))
        return -rate * y
    y = solve(f, y0, [0., 1.], "euler", step_size=1 / 100, gradient=Checkpoint(states, symplectic=symplectic)).y
    gc.collect()
    forward, most[0] = most[0], 0
    assert forward <= allowed + 3
    y[-1].sum().backward()
    assert 0 < most[0] <= allowed + 3            # y0 itself, and the state and the result of the step at work


# -------------------------------------------------------------------------------------------------- what f may do


class Hamiltonian(nn.Module):
    "dH/dp, -dH/dq by autograd, without a thought for whether gradients are on."
    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def forward(self, t, y):
        slope, = torch.autograd.grad(self.energy(y).sum(), y, create_graph=True)
        return torch.cat([slope[..., 2:], -slope[..., :2]], -1)


class Enabled(Hamiltonian):
    "The same for whoever takes care."
    def forward(self, t, y):
        with torch.enable_grad(): return super().forward(t, y if y.requires_grad else y.detach().requires_grad_())


INSIDE = [(how, method_for(how)) for how in ALL] + [("checkpoint", "rodas5p"), ("checkpoint", "radau5"), ("direct", "bdf"),
          ("gauss", "kvaerno3"), ("reversible", "alf"), ("direct", "adams")]
inside_ids = [f"{how}, {method if isinstance(method, str) else 'Reversible'}" for how, method in INSIDE]


@pytest.mark.parametrize("way, method", INSIDE, ids=inside_ids)
def test_a_field_that_differentiates_inside(way, method):
    def of(field, gradient, method):
        torch.manual_seed(1)
        net, y0 = field(), torch.linspace(.1, 1, 8, **DOUBLE).view(2, 4).requires_grad_()
        y = solve(net, y0, [0., .5], method, gradient=gradient, rtol=1e-7, atol=1e-7).y
        return [y, *torch.autograd.grad((y**2).sum(), [y0, *list(net.parameters())[:-1]], allow_unused=True)]
    expected = of(Enabled, "direct", "tsit5")
    assert off(of(Hamiltonian, ALL[way], method), expected) < 1e-3
    assert off(of(Enabled, ALL[way], method), expected) < 1e-3


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "nothing requires grad"])
@pytest.mark.parametrize("way, method", INSIDE, ids=inside_ids)
def test_a_field_that_differentiates_inside_where_no_gradient_is_wanted(way, method, context):
    torch.manual_seed(1)
    net, y0 = Hamiltonian().requires_grad_(context != "nothing requires grad"), torch.linspace(.1, 1, 8, **DOUBLE).view(2, 4)
    careful = lambda t, y: net(t, y.detach().requires_grad_())
    expected = solve(careful, y0, [0., .5], rtol=1e-7, atol=1e-7, gradient="direct").y.detach()
    with contextlib.nullcontext() if context == "nothing requires grad" else getattr(torch, context)():
        y = solve(net, y0, [0., .5], method, gradient=ALL[way], rtol=1e-7, atol=1e-7).y
    assert not y.requires_grad and torch.allclose(y.clone(), expected, rtol=1e-5)


FAMILIES = ["tsit5", "rk4", "adams", "explicit_adams", "kvaerno5", "trbdf2", "radau5", "rodas5p", "bdf", "auto", "alf",
            "scipy_solver"]


@pytest.mark.parametrize("how", ["plain", "sample", "dense", "events", "resumed", "odeint"])
@pytest.mark.parametrize("method", FAMILIES)
def test_inference_mode_is_no_grad(method, how):
    "Same steps, evaluations, status and numbers, with tensors and parameters that were made in either mode."
    if how == "sample" and method not in ("tsit5", "kvaerno5", "trbdf2", "rodas5p"): pytest.skip("for methods that step per sample")
    if how == "resumed" and method in ("rk4", "explicit_adams"): pytest.skip("the steps of a grid are counted before")
    if how in ("events", "dense", "resumed") and method == "scipy_solver": pytest.skip("for methods of ours")
    def of(mode):
        with mode():
            torch.manual_seed(0)
            net, y0, k = nn.Linear(2, 2, **DOUBLE), torch.tensor([[2., .5], [1., 0.]], **DOUBLE), torch.tensor(5., **DOUBLE)
            t, rtol = torch.tensor([0., .4, 1.], **DOUBLE), torch.tensor([1e-2, 1e-3], **DOUBLE)
            f = lambda t, y, k: torch.tanh(net(y)) - k * (y - torch.cos(t.reshape(-1, 1))) ** 3
            fixed, tolerances = dict(step_size=.1) if method in ("rk4", "explicit_adams") else {}, dict(rtol=rtol, atol=1e-3)
            if how == "odeint": return odeint(lambda t, y: f(t, y, k), y0, t, method=method, options=fixed, **tolerances)
            options = dict(args=k, throw=False, **fixed, **tolerances)
            if how == "sample": options["batch"] = "sample"
            if how == "events": options["events"] = Event(lambda t, y, k: y[0, 0] - 1, terminal=False)
            if how == "resumed": options["resume"] = solve(f, y0, t, method, **options, max_steps=3)
            found = solve(f, y0, t, method, **options, dense=how == "dense")
            shown = [found(.7)] if how == "dense" else [found.events[0].t] if how == "events" else []
            return torch.cat([x.reshape(-1).double() for x in (found.y, *shown, *map(torch.as_tensor, (
                found.status, found.stats.accepted, found.stats.f_evals, found.stats.jacobians)))])
    assert torch.allclose(of(torch.no_grad), of(torch.inference_mode).clone(), rtol=1e-12, atol=1e-12)     # counts among them


@each_way
def test_a_field_under_autocast(way):
    def of(gradient):
        torch.manual_seed(0)
        net, y0 = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
        method = Reversible("rk4") if way == "reversible" else "rk4"
        with torch.autocast("cpu", torch.bfloat16):
            y = solve(lambda t, y: net(y), y0, [0., .3, 1.], method, gradient=gradient, step_size=.25).y
        return torch.autograd.grad((y**2).sum(), [y0, *net.parameters()])
    assert off(of(ALL[way]), of("direct")) < 5e-2


class Late:
    "Uses its network only later in time."
    def __call__(self, t, y): return -y if t < .5 else torch.tanh(self.net(y))


def late_field(kind, net):
    "A field that hides a network where looking at it does not find it."
    if kind == "attribute": f = Late(); f.net = net; return f
    if kind == "class attribute": return type("Shared", (Late,), {"net": net})()
    if kind == "property": return type("Asked", (Late,), {"net": property(lambda self: net)})()
    if kind == "slots":
        f = type("Lean", (), {"__slots__": ("net",), "__call__": Late.__call__})()
        f.net = net
        return f
    deep = {"a": {"b": {"c": {"d": net}}}}
    return lambda t, y: -y if t < .5 else torch.tanh(deep["a"]["b"]["c"]["d"](y))


@each_way
@pytest.mark.parametrize("kind", ["attribute", "class attribute", "property", "slots", "deep"])
def test_a_parameter_that_is_used_later_and_hidden_is_found_or_missed_aloud(kind, way):
    "Never a gradient that is silently None (peers, T3)."
    net, y0 = nn.Linear(2, 2, **DOUBLE), torch.ones(2, **DOUBLE).requires_grad_()
    try:
        y = solve(late_field(kind, net), y0, [0., 1.], method_for(way), gradient=ALL[way], jump_t=[.5]).y
        found = torch.autograd.grad(y[-1].sum(), net.weight, allow_unused=True)[0]
    except (RuntimeError, ValueError) as error:
        assert "args" in str(error) or "direct" in str(error)
    else: assert found is not None and found.abs().sum() > 0


@each_way
@pytest.mark.parametrize("frozen", [False, True], ids=["parameter", "frozen"])
def test_a_change_in_place_between_forward_and_backward_is_noticed(way, frozen):
    layer, y0 = nn.Linear(2, 2, **DOUBLE), torch.ones(2, **DOUBLE).requires_grad_()
    scale = torch.ones(2, **DOUBLE)
    y = solve(lambda t, y: torch.tanh(layer(y) * scale), y0, [0., 1.], method_for(way), gradient=ALL[way]).y
    exact = [p.clone() for p in torch.autograd.grad(y[-1].sum(), layer.weight, retain_graph=True)]
    with torch.no_grad(): (scale if frozen else layer.weight).mul_(3)
    try: found = torch.autograd.grad(y[-1].sum(), layer.weight)
    except RuntimeError as error: assert way == "reversible" or "inplace" in str(error) or "in place" in str(error)
    else: assert way == "forward" and off(found, exact) < 1e-12


# ------------------------------------------------------------------------------------------------------- refusals

METHODS = ["tsit5", "rk4", "kvaerno3", "rodas5p", "radau5", "bdf", "adams", "alf", Reversible("tsit5"), "auto"]
name_of = lambda method: method if isinstance(method, str) else "Reversible"
NAMES = ["direct", "checkpoint", "symplectic", "forward", "adjoint", "interpolated", "gauss", "reversible"]


def decay(method, gradient, grad=True, batch="joint"):
    "A small solve, and its gradient."
    y0, options = torch.ones(2, 1, **DOUBLE).requires_grad_(grad), dict(step_size=.1) if method == "rk4" else {}
    y = solve(lambda t, y: -y, y0, [0., .5], method, gradient=gradient, batch=batch, **options).y
    return torch.autograd.grad(y[-1].sum(), y0)[0] if grad else y


@pytest.mark.parametrize("gradient", NAMES)
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_what_is_not_defined_is_refused_before_the_solve_and_what_is_named_works(method, gradient):
    try: found = decay(method, gradient)
    except ValueError as error:
        named = re.findall(r"gradient='(\w+)'", str(error))[1:]
        assert named and str(error).startswith(f"gradient='{gradient}'")
        for way in named: decay(method, way)
    else: assert torch.allclose(found, torch.full((2, 1), math.exp(-.5), **DOUBLE), rtol=3e-3)


@pytest.mark.parametrize("batch", ["joint", "sample"])
@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "nothing"])
def test_nothing_is_refused_where_no_gradient_is_wanted(context, batch):
    refused = []
    for method in ["tsit5", "rodas5p", "bdf", "adams", "alf"] if batch == "joint" else METHODS[:3]:
        for gradient in [*NAMES, "auto", Checkpoint(3), Checkpoint("log", symplectic=True), Adjoint(kind="gauss")]:
            try:
                with contextlib.nullcontext() if context == "nothing" else getattr(torch, context)():
                    decay(method, gradient, False, batch)
            except ValueError as error: refused.append((name_of(method), gradient, str(error)))
    assert not refused


def test_settings_are_not_dropped_where_samples_step_apart():
    "Checkpoint(3) keeps three states there too, or is refused."
    y0 = torch.ones(4, 2, **DOUBLE).requires_grad_()
    try: y = solve(lambda t, y: -y, y0, [0., 5.], gradient=Checkpoint(3), batch="sample", rtol=1e-9, atol=1e-9).y
    except ValueError as error: assert "batch='sample'" in str(error)
    else: assert len(getattr(y.grad_fn.job.run.steps, "states", y.grad_fn.job.run.steps)) <= 3


# ----------------------------------------------------------------------------------------------- function transforms

TRANSFORMS = {
    "grad": lambda end, y0: torch.func.grad(lambda y: end(y).sum())(y0),
    "jacrev": lambda end, y0: torch.func.jacrev(end)(y0),
    "jacfwd": lambda end, y0: torch.func.jacfwd(end)(y0),
    "jvp": lambda end, y0: torch.func.jvp(end, (y0,), (torch.ones_like(y0),))[1],
    "vmap": lambda end, y0: torch.func.vmap(end)(torch.stack([y0, y0 + 1])),
    "vmap of grad": lambda end, y0: torch.func.vmap(torch.func.grad(lambda y: end(y).sum()))(torch.stack([y0, y0 + 1])),
    "hessian": lambda end, y0: torch.func.hessian(lambda y: (end(y)**2).sum())(y0)}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("way", ["direct", "checkpoint", "forward", "adjoint", "reversible"])
def test_function_transforms(way, transform):
    w, y0 = torch.tensor(.7, **DOUBLE), torch.linspace(.2, 1., 3, **DOUBLE)
    method = Reversible("rk4") if way == "reversible" else "rk4"
    end = lambda y: solve(lambda t, y: torch.sin(w * y) + t, y, [0., .4, 1.], method, step_size=.1, gradient=ALL[way]).y[-1]
    try: found = TRANSFORMS[transform](end, y0)
    except ValueError as error:                  # refused with a remedy
        assert way == "reversible" and "torch.func" in str(error) and "use " in str(error)
        return
    leaf = y0.clone().requires_grad_()
    whole = lambda y: solve(lambda t, y: torch.sin(w * y) + t, y, [0., .4, 1.], method, step_size=.1, gradient="direct").y[-1]
    jacobian = torch.autograd.functional.jacobian(whole, leaf)
    expected = {"grad": jacobian.sum(0), "jvp": jacobian.sum(1), "vmap": torch.stack([whole(y0), whole(y0 + 1)]),
                "vmap of grad": torch.stack([jacobian.sum(0), torch.autograd.functional.jacobian(whole, y0 + 1).sum(0)]),
                "hessian": torch.autograd.functional.hessian(lambda y: (whole(y)**2).sum(), y0)}.get(transform, jacobian)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["direct", "checkpoint", "symplectic", "forward", "adjoint", "gauss"])
def test_a_transform_over_parameters(way):
    net = nn.Linear(3, 3, **DOUBLE)
    def loss(p, gradient): return solve(lambda t, y: torch.tanh(torch.func.functional_call(net, p, (y,))), torch.ones(3, **DOUBLE),
                                        [0., 1.], "rk4", step_size=.1, gradient=gradient).y[-1].sum()
    found = torch.func.grad(loss)(dict(net.named_parameters()), way)
    expected = torch.autograd.grad(loss(dict(net.named_parameters()), "direct"), list(net.parameters()))
    assert off([g.detach() for g in found.values()], expected) < 1e-4


# ---------------------------------------------------------------------------------------------------------- no leaks


@each_way
@pytest.mark.parametrize("events", [False, True], ids=["", "events"])
def test_nothing_stays_alive(way, events):
    class Tracked(Field): pass
    field, y0 = Tracked(), torch.ones(3, **DOUBLE).requires_grad_()
    more = dict(events=lambda t, y: y[0] - 9) if events else {}
    t = torch.tensor([0., .5, 1.], **DOUBLE, requires_grad=True)
    solution = solve(field, y0, t, method_for(way), gradient=ALL[way], **more)
    solution.y.sum().backward()
    kept = [weakref.ref(x) for x in (field, y0, solution, solution.y)]
    del field, y0, solution
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


# ------------------------------------------------------------------------------------------------------------ safety


def drift(f, y0, times, parameters, **options):
    "(was there a warning, relative error of the adjoint's gradient)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, exact = (torch.autograd.grad((solve(f, y0, times, gradient=how, **options).y[-1]**2).sum(), parameters)
                        for how in ("adjoint", "direct"))
    return any("did not lead back" in str(w.message) for w in caught), off(found, exact)


@pytest.mark.parametrize("rtol, atol", [(1e-3, 1e-6), (1e-5, 1e-5), (1e-6, 1e-8), (1e-9, 1e-11), (1e-11, 1e-13)])
def test_no_false_alarm_of_the_drift(rtol, atol):
    p = torch.tensor([1.5, 1., 3., 1.], **DOUBLE).requires_grad_()
    prey = lambda t, y: torch.stack([p[0] * y[0] - p[1] * y[0] * y[1], -p[2] * y[1] + p[3] * y[0] * y[1]])
    warned, error = drift(prey, torch.ones(2, **DOUBLE), [0., 5.], [p], rtol=rtol, atol=atol)
    assert not warned or error > 1e-2
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        warned, error = drift(lambda t, y, net=net: net(y), torch.randn(8, 3, **DOUBLE), [0., 1.], list(net.parameters()),
                              rtol=rtol, atol=atol)
        assert not warned


@pytest.mark.parametrize("rtol, atol, rate", [(1e-6, 1e-8, 50.), (1e-3, 1e-6, 50.), (1e-9, 1e-11, 40.), (1e-3, 1e-3, 30.)])
def test_damping_sets_off_the_alarm(rtol, atol, rate):
    w = torch.tensor(rate, **DOUBLE).requires_grad_()
    warned, error = drift(lambda t, y: -w * (y - t.cos()), torch.ones(1, **DOUBLE), [0., 1.], [w], rtol=rtol, atol=atol)
    assert warned or error < 100 * rtol


def test_damping_sets_off_the_alarm_on_fixed_steps_too():
    w = torch.tensor(90., **DOUBLE).requires_grad_()
    warned, error = drift(lambda t, y: -w * (y - t.cos()), torch.ones(1, **DOUBLE), [0., 1.], [w], method="rk4", step_size=.01)
    assert warned or error < 1e-2


def test_gauss_sees_what_the_solution_does_not():
    "A parameter that is zero, of a term that is fast in time (SciMLSensitivity issue 1649)."
    for how in ("interpolated", "gauss"):
        w = torch.tensor(0., **DOUBLE).requires_grad_()
        f = lambda t, y, w=w: -y + w * torch.sin(100 * t)**2
        y = solve(f, torch.ones(1, **DOUBLE), [0., 1.], gradient=how, rtol=1e-7, atol=1e-9).y
        s = torch.linspace(0, 1, 200_001, **DOUBLE)
        truth = torch.trapezoid(torch.exp(s - 1) * torch.sin(100 * s)**2, s)
        assert abs(torch.autograd.grad(y[-1].sum(), w)[0] - truth) < 1e-5 * truth, how


@pytest.mark.parametrize("big", [1., 1e4, 1e8], ids=str)
def test_reversible_is_right_or_refuses_when_rounding_grows(big):
    "A small component beside a large one is not lost sight of."
    def of(gradient, n):
        w = torch.tensor(1., **DOUBLE).requires_grad_()
        f = lambda t, y: torch.stack([0 * y[0], -w * torch.sin(y[1]) + torch.sin(3 * t)])
        y = solve(f, torch.tensor([big, 1.], **DOUBLE), [0., 4.],
                  Reversible("midpoint", coupling=.9), gradient=gradient, step_size=4 / n).y
        return torch.autograd.grad(y[-1, 1]**2, w)
    refused = 0
    for n in (100, 300, 400):
        try: assert off(of("reversible", n), of("direct", n)) < 1e-4
        except RuntimeError as error:
            assert "did not lead back" in str(error)
            refused += 1
    assert refused < 3


@pytest.mark.parametrize("way", ["adjoint", "interpolated"])
def test_no_absolute_tolerance_is_right_or_refused_with_a_remedy(way):
    k = torch.tensor(1., **DOUBLE).requires_grad_()
    try:
        y = solve(lambda t, y: -k * y, torch.ones(2, **DOUBLE), [0., 2.], gradient=way, rtol=1e-6, atol=0.).y
        found, = torch.autograd.grad(y[-1].sum(), k)
    except (ValueError, SolveError) as error: assert "atol" in str(error)
    else: assert torch.allclose(found, -4 * torch.exp(-2 * k), rtol=1e-4)
