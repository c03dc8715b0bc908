"""Gradients of a solve: exact where exactness is claimed, equal to central differences, free of leaks."""
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves

from neuralode_nb import Adjoint, SolveError, odeint, odeint_adjoint, odeint_dense, solve
from neuralode_nb.ode.methods import TABLEAUS, find_tableau

EXPLICIT = tuple(TABLEAUS)
ADAPTIVE = [m for m in EXPLICIT if find_tableau(m).adaptive]
EXACT = ["direct", "checkpoint"]
ALL = [*EXACT, "adjoint"]
each_exact = pytest.mark.parametrize("gradient", EXACT)
each_gradient = pytest.mark.parametrize("gradient", ALL)
each_way = pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
DOUBLE = dict(dtype=torch.float64)
TIGHT = dict(rtol=1e-10, atol=1e-10)


class Field(nn.Module):
    "A small network that depends on time, in float64."
    def __init__(self, n=3, dtype=torch.float64):
        super().__init__()
        self.a, self.b = nn.Linear(n + 1, 5, dtype=dtype), nn.Linear(5, n, dtype=dtype)

    def forward(self, t, y):
        time = torch.full_like(y[..., :1], 1) * torch.sin(2 * t)
        return self.b(torch.tanh(self.a(torch.cat([y, time], -1))))


def gradients(f, y0, t, method="tsit5", weight=None, **options):
    "Gradients of a weighted sum of all outputs with respect to the leaves in y0, t and the parameters of f."
    y = tree_leaves(solve(f, y0, t, method, **options).y)
    inputs = [x for x in tree_leaves([y0, t, list(f.parameters())]) if isinstance(x, torch.Tensor) and x.requires_grad]
    wave = lambda x: torch.cos(torch.arange(x.numel(), **DOUBLE)).view(x.shape) if weight is None else weight
    return torch.autograd.grad(sum((wave(x) * x.abs()**2).sum() for x in y), inputs)


def closeness(found, expected):
    "Largest deviation, relative to the size of each gradient."
    return max(((a - b).norm() / (b.norm() + 1e-12)).item() for a, b in zip(found, expected, strict=True))


def start(*shape, **kind):
    "A state that asks for a gradient."
    return torch.linspace(.2, 1.1, math.prod(shape), **{**DOUBLE, **kind}).view(shape).requires_grad_()


def times(*values, way=1):
    "Times that ask for a gradient."
    return (way * torch.tensor(values, **DOUBLE)).requires_grad_()


# ----------------------------------------------------------------------------------- against central differences


@each_way
@each_exact
@pytest.mark.parametrize("method", ["tsit5", "dopri8", "bosh3", "rk4", "euler"])
def test_gradients_of_state_and_every_time_agree_with_central_differences(method, gradient, way):
    "Fixed steps: with adaptive ones the differences would also see the choice of steps."
    field = Field()
    def f(y0, t): return solve(field, y0, t, method, gradient=gradient, step_size=.21).y
    inputs = (start(1, 3), times(0., .3, .62, 1., way=way))
    assert gradcheck(f, inputs, eps=1e-6, atol=1e-6, rtol=1e-6, fast_mode=method != "rk4")


@each_exact
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_gradients_of_parameters_and_args_agree_with_central_differences(method, gradient):
    field = Field()
    names = [n for n, _ in field.named_parameters()]
    def f(rate, shift, *parameters):
        def rhs(t, y, args):
            weights = dict(zip(names, args["weights"]))
            return args["rate"] * torch.func.functional_call(field, weights, (t, y)) + args["shift"][0]
        args = {"rate": rate, "shift": [shift, "unused"], "weights": parameters}
        return solve(rhs, start(2, 3).detach(), [0., .3, 1.], method, args=args, gradient=gradient, step_size=.23).y
    inputs = (start(1), start(3), *[p.detach().clone().requires_grad_() for p in field.parameters()])
    assert gradcheck(f, inputs, eps=1e-6, atol=1e-6, rtol=1e-6, fast_mode=method != "rk4")


@each_way
@each_gradient
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_gradients_agree_with_central_differences_to_the_tolerance(method, gradient, way):
    tol = {"adaptive_heun": 1e-4, "fehlberg2": 1e-4, "bosh3": 1e-6}.get(method, 1e-9)
    def f(y0, t, w):
        return solve(lambda t, y: w * torch.cos(t + y), y0, t, method, gradient=gradient, rtol=tol, atol=tol).y
    inputs = (start(2), times(0., .4, 1., way=way), start(1))
    allowed = max(1e-5, (300 if method == "fehlberg2" else 30) * tol)     # its steps change most under t ± eps
    assert gradcheck(f, inputs, eps=1e-2 if tol > 1e-6 else 1e-3, atol=allowed, rtol=1e-2, fast_mode=True)


@each_way
@each_gradient
@pytest.mark.parametrize("stops", ["jump_t"])
def test_the_stops_stay_where_they_are_when_t_is_differentiated(stops, gradient, way):
    "y' = y before the jump, y' = -y after it: y(t1) = exp(2 jump - t0 - t1), whichever way time runs."
    jump, t = .5 * way, times(0., 1., way=way)
    f = lambda t, y: torch.where(t < jump, 1., -1.) * y
    y = solve(f, torch.ones(1, **DOUBLE), t, gradient=gradient, **TIGHT, **{stops: [jump]}).y[-1]
    assert torch.allclose(torch.autograd.grad(y.sum(), t)[0], -way * y.detach(), rtol=1e-6)


# --------------------------------------------------------------------------------- the methods agree among themselves


@each_way
@pytest.mark.parametrize("method", EXPLICIT)
def test_checkpoint_is_direct_to_ten_digits(method, way):
    field, t = Field(), times(0., .21, .5, .5, .93, 1., way=way)
    options = dict(rtol=1e-4, atol=1e-4) if method in ADAPTIVE else dict(step_size=.1)
    direct, checkpoint = (gradients(field, start(4, 3), t, method, gradient=g, **options) for g in EXACT)
    assert closeness(checkpoint, direct) < 1e-10


@each_way
@pytest.mark.parametrize("method", EXPLICIT)
def test_the_adjoint_agrees_to_its_tolerance(method, way):
    low = method in ("euler", "fehlberg2", "adaptive_heun")
    allowed, tol = (5e-2, 1e-4) if low else (1e-3, 1e-6) if method == "bosh3" else (1e-4, 1e-8)
    field, t = Field(), times(0., .33, .5, 1., way=way)
    options = dict(rtol=tol, atol=tol) if method in ADAPTIVE else dict(step_size=.01 if low else .02)
    direct, adjoint = (gradients(field, start(3), t, method, gradient=g, **options) for g in ("direct", "adjoint"))
    assert closeness(adjoint, direct) < allowed


def test_the_error_of_the_adjoint_falls_with_its_own_tolerance():
    field, errors = Field(), []
    exact = gradients(field, start(3), times(0., 1.), gradient="direct", rtol=1e-12, atol=1e-12)
    for tol in (1e-4, 1e-7, 1e-10):
        found = gradients(field, start(3), times(0., 1.), gradient=Adjoint(rtol=tol, atol=tol), rtol=1e-12, atol=1e-12)
        errors.append(closeness(found, exact))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-8


@pytest.mark.parametrize("adjoint", [
    Adjoint(method="dopri8"), Adjoint(method="rk4", step_size=.01), Adjoint(norm="seminorm"), Adjoint(max_step=.05),
    Adjoint(first_step=.01), Adjoint(norm=lambda parts: max(p.abs().max() for p in parts)), Adjoint(controller="pi")],
    ids=["method", "fixed steps", "seminorm", "max_step", "first_step", "norm", "controller"])
def test_the_adjoint_may_have_settings_of_its_own(adjoint):
    field = Field()
    direct, found = (gradients(field, start(3), times(0., .5, 1.), gradient=g, rtol=1e-9, atol=1e-9)
                     for g in ("direct", adjoint))
    assert closeness(found, direct) < 1e-5


def test_the_seminorm_takes_no_more_evaluations():
    field, evaluations = Field(), []
    for norm in (None, "seminorm"):
        solution = solve(field, start(3), [0., 5.], gradient=Adjoint(norm=norm), rtol=1e-6, atol=1e-9)
        (100 * solution.y.sum()).backward()
        evaluations.append(solution.stats.backward_f_evals)
    assert evaluations[1] <= evaluations[0]


# ---------------------------------------------------------------------------------------------- kinds of state


@each_gradient
@pytest.mark.parametrize("structure", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": [b]}], ids=["tuple", "dict"])
def test_the_parts_of_a_structured_state_get_their_gradients(structure, gradient):
    w = start(1)
    def f(t, y):
        a, b = tree_leaves(y)
        return structure(w * torch.sin(b.sum() + t) * a, torch.cos(a.sum()) * b)
    def of(gradient):
        a, b = start(2), start(3, 2)
        y = solve(f, structure(a, b), times(0., .5, 1.), gradient=gradient, **TIGHT).y
        return torch.autograd.grad(sum((x**2).sum() for x in tree_leaves(y)), [a, b, w])
    assert closeness(of(gradient), of("direct")) < (1e-6 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_the_gradient_of_an_output_that_is_not_used_is_not_needed(gradient):
    a, b = start(2), start(3)
    y = solve(lambda t, y: {"a": -y["a"], "b": y["b"]}, {"a": a, "b": b}, [0., 1.], gradient=gradient).y
    y["a"][-1].sum().backward()
    assert torch.allclose(a.grad, torch.full((2,), math.exp(-1), **DOUBLE), rtol=1e-4)
    assert b.grad is None or b.grad.abs().max() < 1e-12


@each_gradient
def test_complex_states_and_parameters(gradient):
    w = torch.tensor([.3 + 1j, -.2 + .5j], dtype=torch.complex128, requires_grad=True)
    def of(gradient):
        y0 = torch.tensor([1 + 1j, 2 - 1j], dtype=torch.complex128, requires_grad=True)
        t = times(0., .5, 1.)
        y = solve(lambda t, y: w * y * torch.cos(t), y0, t, gradient=gradient, **TIGHT).y
        return torch.autograd.grad((y.abs()**2).sum() + y.real.sum() - 2 * y.imag[1:].sum(), [y0, t, w])
    assert closeness(of(gradient), of("direct")) < (1e-6 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_a_real_parameter_of_a_complex_state_gets_a_real_gradient(gradient):
    w, y0 = start(1), torch.tensor([1 + 1j], dtype=torch.complex128)
    y = solve(lambda t, y: 1j * w * y, y0, [0., 1.], gradient=gradient, **TIGHT).y
    y[-1].real.sum().backward()
    phase = torch.exp(1j * w.detach()) * y0
    assert w.grad.dtype == torch.float64 and torch.allclose(w.grad, (1j * phase).real, rtol=1e-6)


@each_exact
def test_complex_gradients_agree_with_central_differences(gradient):
    def f(y0, w):
        return solve(lambda t, y: w * y * y.conj() * t, y0, [0., .3, .8], "rk4", gradient=gradient, step_size=.2).y
    y0 = torch.tensor([1 + 1j, .5 - 1j], dtype=torch.complex128, requires_grad=True)
    w = torch.tensor([.3 + 1j], dtype=torch.complex128, requires_grad=True)
    assert gradcheck(f, (y0, w), eps=1e-6, atol=1e-6)


@each_gradient
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-3), (torch.bfloat16, 6e-2), (torch.float16, 3e-2)])
def test_gradients_in_lower_precision_come_in_that_precision(gradient, dtype, allowed):
    torch.manual_seed(1)
    exact_field, field = Field(), Field(dtype=torch.float32)
    field.load_state_dict(exact_field.state_dict())
    low, y0 = field.to(dtype), start(4, 3, dtype=dtype)
    expected = gradients(exact_field, start(4, 3), torch.tensor([0., .5, 1.]), weight=1.)
    y = solve(low, y0, [0., .5, 1.], gradient=gradient, rtol=1e-3, atol=1e-3).y
    found = torch.autograd.grad((y.float()**2).sum(), [y0, *low.parameters()])
    assert all(g.dtype == dtype for g in found)
    assert closeness([g.double() for g in found], expected) < allowed


def test_gradients_under_autocast_are_those_of_direct():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    found = []
    for gradient in EXACT:
        y0 = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = solve(lambda t, y: net(y), y0, [0., .3, 1.], "rk4", gradient=gradient, step_size=.25).y
        found.append(torch.autograd.grad((y**2).sum(), [y0, *net.parameters()]))
    assert closeness(found[1], found[0]) < 2e-2      # f sees y rounded to eight bits: a last bit of y may tip the rounding


# ---------------------------------------------------------------------------------------------- what f depends on


def decay(w, gradient, f=None, **options):
    "Gradient for w of the end of y' = -w y; the truth is -exp(-w)."
    y = solve(f or (lambda t, y: -w * y), torch.ones(1, **DOUBLE), [0., 1.], gradient=gradient, **TIGHT, **options).y
    return torch.autograd.grad(y[-1].sum(), w)[0]


@each_gradient
def test_a_tensor_in_a_closure_is_found(gradient):
    w = start(1)
    assert torch.allclose(decay(w, gradient), -torch.exp(-w), rtol=1e-6)


class Holder:
    "Not a module: a callable that keeps its weight where nobody looks."
    def __init__(self, w): self.deep = {"list": [{"w": w}]}
    def __call__(self, t, y): return -self.deep["list"][0]["w"] * y
    def method(self, t, y): return self(t, y)


@each_gradient
@pytest.mark.parametrize("kind", ["object", "bound method", "partial", "default", "global", "keyword", "nested"])
def test_a_tensor_is_found_wherever_f_keeps_it(kind, gradient):
    from functools import partial
    w = start(1)
    inner = lambda t, y: -w * y
    f = {"object": Holder(w), "bound method": Holder(w).method, "partial": partial(lambda w, t, y: -w * y, w),
         "default": lambda t, y, w=w: -w * y, "keyword": partial(lambda t, y, *, w: -w * y, w=w),
         "nested": lambda t, y: inner(t, y),
         "global": eval("lambda t, y: -weight * y", {"weight": w})}[kind]
    assert torch.allclose(decay(w, gradient, f), -torch.exp(-w), rtol=1e-6)


@each_gradient
def test_gradients_flow_on_into_what_an_activation_was_made_of(gradient):
    "f uses a tensor computed outside, as a decoder uses an encoding."
    encoder = nn.Linear(2, 3, dtype=torch.float64)
    x, y0 = torch.ones(2, **DOUBLE), start(3)
    def of(gradient):
        code = encoder(x)
        y = solve(lambda t, y: torch.tanh(code * y), y0, [0., 1.], gradient=gradient, **TIGHT).y
        return torch.autograd.grad(y[-1].sum(), [y0, *encoder.parameters()])
    assert closeness(of(gradient), of("direct")) < (1e-6 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_one_tensor_may_be_state_and_parameter_at_once(gradient):
    def of(gradient):
        x = start(3)
        y = solve(lambda t, y: torch.sin(x * y), x * 1, [0., 1.], gradient=gradient, **TIGHT).y
        return torch.autograd.grad(y[-1].sum(), [x])
    assert closeness(of(gradient), of("direct")) < (1e-6 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_one_tensor_may_be_in_args_and_in_a_closure_at_once(gradient):
    def of(gradient):
        w = start(1)
        f = lambda t, y, args: -w * args["w"] * y
        y = solve(f, start(2).detach(), [0., 1.], args={"w": w}, gradient=gradient, **TIGHT).y
        return torch.autograd.grad(y[-1].sum(), [w])
    assert closeness(of(gradient), of("direct")) < (1e-6 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_shared_parameters_and_submodules(gradient):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, dtype=torch.float64)
            self.again = nn.ModuleList([self.first, nn.Sequential(nn.Tanh(), nn.Linear(3, 3, dtype=torch.float64))])
            self.weight = self.first.weight
        def forward(self, t, y):
            for part in self.again: y = part(y)
            return y @ self.weight
    field = Shared()
    direct, found = (gradients(field, start(2, 3), times(0., .5), gradient=g, **TIGHT) for g in ("direct", gradient))
    assert closeness(found, direct) < (1e-5 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_a_parameter_that_f_uses_only_later_in_time(gradient):
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Parameter(start(1).detach()), nn.Parameter(start(1).detach())
        def forward(self, t, y): return -(self.early if t < .5 else self.late) * y
    field = Switch()
    y = solve(field, torch.ones(1, **DOUBLE), [0., 1.], gradient=gradient, jump_t=[.5], **TIGHT).y
    y[-1].sum().backward()
    for p in field.parameters(): assert torch.allclose(p.grad, -.5 * torch.exp(-field.early.detach()), rtol=1e-5)


@each_gradient
def test_a_closure_tensor_that_f_uses_only_later_in_time(gradient):
    early, late = start(1), [start(1) * 1]       # the second one is not a leaf and lies in a list
    f = lambda t, y: -(early if t < .5 else late[0]) * y
    y = solve(f, torch.ones(1, **DOUBLE), [0., 1.], gradient=gradient, jump_t=[.5], **TIGHT).y
    for g in torch.autograd.grad(y[-1].sum(), [early, late[0]]):
        assert torch.allclose(g, -.5 * torch.exp(-early), rtol=1e-5)


@each_gradient
def test_a_parameter_that_f_does_not_use_gets_zero_or_none(gradient):
    field = Field()
    field.unused = nn.Linear(7, 2, dtype=torch.float64)
    frozen = field.a.bias.requires_grad_(False)
    solve(field, start(3).detach(), [0., 1.], gradient=gradient).y.sum().backward()
    assert field.b.weight.grad.abs().sum() > 0 and frozen.grad is None
    for p in field.unused.parameters(): assert p.grad is None or not p.grad.any()


@each_gradient
def test_a_field_that_ignores_the_state_or_returns_a_constant(gradient):
    w, y0 = start(2), start(2)
    y = solve(lambda t, y: w * t, y0, [0., 1.], gradient=gradient).y
    of_w, of_y0 = torch.autograd.grad(y[-1].sum(), [w, y0])
    assert torch.allclose(of_w, torch.full((2,), .5, **DOUBLE), rtol=1e-5)
    assert torch.allclose(of_y0, torch.ones(2, **DOUBLE))
    y = solve(lambda t, y: torch.ones(2, **DOUBLE), y0, [0., 1.], gradient=gradient).y
    assert torch.allclose(torch.autograd.grad(y[-1].sum(), y0)[0], torch.ones(2, **DOUBLE))


@each_gradient
def test_a_solve_that_nothing_depends_on_carries_no_graph(gradient):
    y = solve(lambda t, y: -y, torch.ones(2), [0., 1.], gradient=gradient).y
    assert not y.requires_grad


@each_gradient
def test_no_graph_is_made_where_gradients_are_off(gradient):
    field = Field()
    with torch.no_grad(): assert not solve(field, start(3), [0., 1.], gradient=gradient).y.requires_grad
    with torch.inference_mode(): assert not solve(field, start(3), [0., 1.], gradient=gradient).y.requires_grad
    y = solve(field, start(3), [0., 1.], gradient=gradient).y     # nothing that was kept is spoiled by inference mode
    y.sum().backward()


@each_gradient
def test_a_field_that_differentiates_inside(gradient):
    "A gradient flow, f = -dE/dy, needs gradients switched on inside the solver (torchdiffeq issues 151, 179, 209)."
    energy = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 1)).double()
    def f(t, y):
        with torch.enable_grad():
            x = y if y.requires_grad else y.detach().requires_grad_()
            return -torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]
    def of(gradient):
        y0 = start(3, 2)
        y = solve(f, y0, [0., .5, 1.], gradient=gradient, rtol=1e-9, atol=1e-9).y
        return torch.autograd.grad((y**2).sum(), [y0, *energy.parameters()], allow_unused=True)
    found, expected = of(gradient), of("direct")
    assert (found[-1] is None or not found[-1].any()) and expected[-1] is None      # the last bias does not matter
    assert closeness(found[:-1], expected[:-1]) < (1e-5 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_a_field_made_of_function_transforms(gradient):
    w = start(2, 2)
    def f(t, y): return torch.func.vmap(lambda x: torch.func.jacrev(lambda z: torch.sin(w @ z))(x).diagonal())(y)
    def of(gradient):
        y0 = start(3, 2)
        y = solve(f, y0, [0., .5], gradient=gradient, rtol=1e-9, atol=1e-9).y
        return torch.autograd.grad((y**2).sum(), [y0, w])
    assert closeness(of(gradient), of("direct")) < (1e-5 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_a_solve_inside_a_field(gradient):
    w = start(1)
    def of(gradient):
        y0 = start(2)
        inner = lambda y: solve(lambda t, z: -w * z, y, [0., .5], "rk4", step_size=.25, gradient="checkpoint").y[-1]
        y = solve(lambda t, y: inner(y), y0, [0., .5], gradient=gradient, rtol=1e-8, atol=1e-8).y
        return torch.autograd.grad(y[-1].sum(), [y0, w])
    assert closeness(of(gradient), of("direct")) < (1e-5 if gradient == "adjoint" else 1e-10)


# ------------------------------------------------------------------------------------------------ times and outputs


@each_gradient
@each_way
def test_outputs_inside_steps_carry_gradients(gradient, way):
    "Fifty outputs, a few steps: most lie inside a step."
    t = (way * torch.linspace(0, 1, 50, **DOUBLE)).requires_grad_()
    field = Field()
    direct, found = (gradients(field, start(3), t, gradient=g, rtol=1e-8, atol=1e-8) for g in ("direct", gradient))
    assert closeness(found, direct) < (2e-4 if gradient == "adjoint" else 1e-10)


@each_gradient
def test_repeated_times_share_a_gradient(gradient):
    field = Field()
    y0, t = start(3), times(0., 0., .5, .5, 1., 1.)
    found = gradients(field, y0, t, gradient=gradient, weight=1., **TIGHT)
    once = gradients(field, start(3), s := times(0., .5, 1.), gradient="direct", weight=2., **TIGHT)
    assert torch.allclose(found[0], once[0], rtol=1e-6)
    assert torch.allclose(found[1].view(3, 2).sum(1), once[1], rtol=1e-5) and s.requires_grad


@each_gradient
@pytest.mark.parametrize("t", [(0.,), (1., 1.)], ids=str)
def test_a_solve_of_no_length_passes_gradients_through(gradient, t):
    y0, field = start(3), Field()
    y = solve(field, y0, t, gradient=gradient).y
    assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], torch.full((3,), float(len(t)), **DOUBLE))


@each_gradient
def test_the_gradient_of_the_end_is_f_and_that_of_the_start_is_minus_f(gradient):
    t, y0 = times(0., 1.), torch.ones(1, **DOUBLE)
    y = solve(lambda t, y: (1 + t) * y, y0, t, gradient=gradient, rtol=1e-11, atol=1e-11).y
    g, = torch.autograd.grad(y[-1].sum(), t)
    end = math.exp(1.5)
    assert torch.allclose(g, torch.tensor([-end, 2 * end], **DOUBLE), rtol=1e-6)


def test_times_in_a_list_keep_their_gradient():
    t1 = torch.tensor(1., **DOUBLE, requires_grad=True)
    y = solve(lambda t, y: y, torch.ones(1, **DOUBLE), [0., t1]).y
    assert torch.allclose(torch.autograd.grad(y[-1].sum(), t1)[0], torch.tensor(math.e, **DOUBLE), rtol=1e-5)


@each_gradient
def test_a_half_precision_or_single_precision_time_gets_its_gradient_in_its_type(gradient):
    t = torch.tensor([0., .5, 1.], dtype=torch.float32, requires_grad=True)
    solve(lambda t, y: t * y, torch.ones(2, **DOUBLE), t, gradient=gradient).y.sum().backward()
    assert t.grad.dtype == torch.float32 and t.grad.abs().min() >= 0 and t.grad[-1] > 0


def test_dense_output_is_differentiable_with_direct():
    w, y0 = start(1), start(2)
    solution = solve(lambda t, y: -w * y, y0, [0., 1.], gradient="direct", dense=True, **TIGHT)
    g = torch.autograd.grad(solution(.7).sum(), [w, y0])
    assert torch.allclose(g[0], -.7 * torch.exp(-.7 * w) * y0.sum(), rtol=1e-6)
    y = odeint_dense(lambda t, y: -w * y, y0, torch.tensor(0.), torch.tensor(1.), **TIGHT)
    assert torch.allclose(torch.autograd.grad(y(.7).sum(), w)[0], g[0], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- twice, and often


@each_exact
@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_second_derivatives_agree_with_central_differences(method, gradient):
    field = Field(2)
    def f(y0, t): return solve(field, y0, t, method, gradient=gradient, step_size=.35).y[1:]   # no grid jumps under t + eps
    assert gradgradcheck(f, (start(2), times(0., .4, .9)), atol=1e-5, rtol=1e-5, fast_mode=True)


def test_second_derivatives_of_checkpoint_are_those_of_direct():
    field, found = Field(), []
    for gradient in EXACT:
        y0 = start(2, 3)
        y = solve(field, y0, [0., .5, 1.], gradient=gradient).y
        inputs = [y0, *field.parameters()]
        first = torch.autograd.grad((y**2).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), inputs, allow_unused=True))
    assert all((a is None) == (b is None) for a, b in zip(*found))
    pairs = [(a, b) for a, b in zip(*found) if a is not None]
    assert closeness([a for a, _ in pairs], [b for _, b in pairs]) < 1e-9


def test_the_adjoint_refuses_to_be_differentiated_twice_and_says_what_to_use():
    y0 = start(2)
    y = solve(lambda t, y: -y**2, y0, [0., 1.], gradient="adjoint").y
    with pytest.raises(RuntimeError, match="(?s)twice.*checkpoint"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


@each_exact
def test_a_graph_that_is_kept_can_be_used_again(gradient):
    field, y0 = Field(), start(3)
    y = solve(field, y0, [0., .5, 1.], gradient=gradient).y
    first = torch.autograd.grad(y[1].sum(), y0, retain_graph=True)[0]
    both = torch.autograd.grad(y[1].sum(), y0, retain_graph=True)[0]
    assert torch.equal(first, both)


@each_gradient
def test_gradients_accumulate_over_several_solves(gradient):
    field, total = Field(), 0
    for t1 in (.5, 1.): total = total + solve(field, start(3).detach(), [0., t1], gradient=gradient).y[-1].sum()
    total.backward()
    joint = [p.grad.clone() for p in field.parameters()]
    field.zero_grad()
    for t1 in (.5, 1.): solve(field, start(3).detach(), [0., t1], gradient=gradient).y[-1].sum().backward()
    assert closeness(joint, [p.grad for p in field.parameters()]) < 1e-12


@each_gradient
def test_a_parameter_changed_between_forward_and_backward_is_noticed(gradient):
    field = Field()
    y = solve(field, start(3), [0., 1.], gradient=gradient).y
    with torch.no_grad(): field.b.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): y.sum().backward()


@each_gradient
def test_anomaly_detection_finds_nothing(gradient):
    field = Field()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        solve(field, start(3), times(0., .5, 1.), gradient=gradient).y.sum().backward()


def test_a_training_step_learns_the_same_with_every_gradient():
    losses = {}
    for gradient in ALL:
        torch.manual_seed(0)
        field = Field()
        for _ in range(5):
            loss = (solve(field, start(4, 3).detach(), [0., .5, 1.], gradient=gradient).y**2).mean()
            with torch.no_grad():
                for p, g in zip(field.parameters(), torch.autograd.grad(loss, list(field.parameters()))): p -= .1 * g
        losses[gradient] = loss.item()
    assert losses["checkpoint"] == pytest.approx(losses["direct"], rel=1e-9)
    assert losses["adjoint"] == pytest.approx(losses["direct"], rel=1e-4)


@each_gradient
@pytest.mark.parametrize("odeint_", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_the_functions_of_torchdiffeq_give_the_same_gradient(odeint_, gradient):
    field, y0 = Field(), start(3)
    y = odeint_(field, y0, times(0., .5, 1.), rtol=1e-9, atol=1e-9)
    other = solve(field, y0, times(0., .5, 1.), "dopri5", rtol=1e-9, atol=1e-9, gradient=gradient).y
    for p, q in zip(*(torch.autograd.grad((x**2).sum(), [y0, *field.parameters()]) for x in (y, other))):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------- no leaks


def count_tensors():
    "Tensors alive in Python."
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@each_gradient
@pytest.mark.parametrize("backward", [True, False], ids=["after backward", "without backward"])
def test_nothing_survives_a_solve_without_the_help_of_the_collector(gradient, backward):
    class Tracked(Field): pass
    solve(Field(), start(3), [0., 1.], gradient=gradient)        # coefficients are made once and kept
    gc.collect()
    before = count_tensors()
    gc.disable()
    try:
        field, y0 = Tracked(), start(3)
        solution = solve(field, y0, times(0., .5, 1.), gradient=gradient)
        if backward: solution.y.sum().backward()
        kept = [weakref.ref(x) for x in (field, y0, solution, solution.y)]
        del field, y0, solution
        assert [ref() for ref in kept] == [None] * 4
        assert count_tensors() <= before
    finally:
        gc.enable()


@each_gradient
def test_nothing_survives_a_solve_that_failed(gradient):
    class Tracked(Field):
        def forward(self, t, y): return super().forward(t, y) + (y**3 if t < .5 else torch.nan)
    gc.collect()
    gc.disable()
    try:
        field = Tracked()
        ref = weakref.ref(field)
        try: solve(field, start(3), [0., 1.], gradient=gradient)
        except SolveError: pass
        del field
        assert ref() is None
    finally:
        gc.enable()


@each_gradient
def test_the_number_of_tensors_does_not_grow_with_the_number_of_solves(gradient):
    field, counts = Field(), []
    for n in (2, 20):
        for _ in range(n): solve(field, start(3), [0., .5], gradient=gradient).y.sum().backward()
        gc.collect()
        counts.append(count_tensors())
    assert counts[0] == counts[1]
