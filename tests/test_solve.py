"""Every method solves every kind of state: dtypes, devices, shapes, structures, directions of time."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from neuralode_nb import PID, SolveError, Status, Tableau, odeint, odeint_dense, solve
from neuralode_nb.ode.methods import TABLEAUS, find_tableau

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
ROUNDING = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 1e-5, torch.complex64: 1e-5,
            torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXPLICIT = tuple(TABLEAUS)
ADAPTIVE = [m for m in EXPLICIT if find_tableau(m).adaptive]
FIXED = [m for m in EXPLICIT if m not in ADAPTIVE]

each_method = pytest.mark.parametrize("method", EXPLICIT)
each_device = pytest.mark.parametrize("device", DEVICES)


def growth(t, y):
    "y' = w y cos t for every tensor in y, with w = 1 for real and w = i for complex states."
    return tree_map(lambda x: x * torch.cos(t) * (1j if x.is_complex() else 1), y)


def grown(y0, t):
    "The exact solution of `growth` from t = 0 at the times t, in double precision."
    w = 1j if y0.is_complex() else 1
    factor = torch.exp(w * torch.sin(t.double().cpu())).reshape(-1, *[1] * y0.ndim)
    return factor * y0.to("cpu", torch.complex128 if y0.is_complex() else torch.float64)


def start(*shape, dtype=torch.float64, device="cpu"):
    "Numbers of size about one; the same each time."
    n = math.prod(shape)
    x = (torch.arange(n, dtype=torch.float64) % 7 + 1).reshape(shape) / 4
    return (x * (1 + .5j) if dtype.is_complex else x).to(device, dtype)


def steps_for(method):
    "Arguments that make every method accurate enough to be compared."
    return dict(rtol=1e-5, atol=1e-7) if method in ADAPTIVE else dict(step_size=1 / 64)


def deviation(y, exact):
    "Largest relative deviation."
    wide = y.detach().cpu().to(exact.dtype)
    return ((wide - exact).abs().max() / exact.abs().max()).item() if exact.numel() else 0.


# ------------------------------------------------------------------------------------- dtype x device x method


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_method
def test_each_method_solves_in_each_dtype(method, dtype, device):
    y0, t = start(3, 2, dtype=dtype, device=device), torch.linspace(0, 2, 5, device=device)
    tolerance = max(1e-5, ROUNDING[dtype] / 10)
    solution = solve(growth, y0, t, method, **(steps_for(method) | dict(rtol=tolerance, atol=tolerance)))
    assert solution.y.dtype == dtype and solution.y.device == y0.device and solution.y.shape == (5, 3, 2)
    assert torch.equal(solution.y[0], y0)
    order = find_tableau(method).order
    allowed = 2 / 64 ** order if method in FIXED else 10 * tolerance if method != "fehlberg2" else 2e-3   # first order
    assert deviation(solution.y, grown(y0, t)) <= allowed + 10 * ROUNDING[dtype]


@pytest.mark.parametrize("time", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f_sees_the_state_in_its_own_dtype_and_time_in_the_solvers_precision(dtype, time):
    seen = set()
    def f(t, y):
        seen.add((t.dtype, t.ndim, y.dtype, y.shape))
        return growth(t, y)
    y = solve(f, start(2, dtype=dtype), torch.tensor([0, .5, 1], dtype=time)).y
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    assert seen == {(real, 0, dtype, (2,))} and y.dtype == dtype


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("batch", ["joint", "sample"])
def test_a_state_may_lie_in_any_order_in_memory(batch, gradient):
    if (batch, gradient) == ("sample", "adjoint"): pytest.skip("samples have no adjoint equation")
    torch.manual_seed(0)
    conv, t = torch.nn.Conv2d(3, 3, 3, padding=1).double(), torch.linspace(0, 8, 9, dtype=torch.float64)
    def found(layout):
        y0 = torch.ones(2, 3, 4, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
        s = solve(lambda t, y: conv(y).tanh() - y, y0, t, "dopri5", gradient=gradient, batch=batch)
        assert s.stats.accepted.max() > 10 if batch == "sample" else s.stats.accepted > 10
        return s.y.detach(), *torch.autograd.grad((s.y * torch.cos(s.y)).sum(), [y0, *conv.parameters()])
    for a, b in zip(found(torch.channels_last), found(torch.contiguous_format)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_the_default_dtype_plays_no_part(method, default):
    before = torch.get_default_dtype()
    t, y0 = torch.linspace(0, 1, 5, dtype=torch.float64), start(3, dtype=torch.float64)
    try:
        torch.set_default_dtype(default)
        y = solve(growth, y0, t, method, **steps_for(method)).y
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, solve(growth, y0, t, method, **steps_for(method)).y)


def test_a_derivative_from_autocast_is_taken_in_the_states_precision():
    net = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = solve(lambda t, y: torch.tanh(net(y)), start(2, 4, dtype=torch.float32), [0., 1.], rtol=1e-2, atol=1e-2).y
    assert y.dtype == torch.float32
    y.sum().backward()
    assert net.weight.grad.dtype == torch.float32 and net.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------- states and times

STATES = {
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "one number": start(1),
    "image": start(2, 3, 4, 5),
    "transposed": start(3, 4).t(),
    "expanded": start(1, 3).expand(2, 3),
    "tuple": (start(2), start(3, 2)),
    "list": [start(2), torch.tensor(2., dtype=torch.float64)],
    "dict": {"position": start(3), "momentum": start(3)},
    "nested": {"a": (start(2), [start(1, 2)]), "b": start()},
    "tuple with an empty tensor": (start(2), start(0)),
    "tuple of one": (start(2),),
    "complex tuple": (start(2, dtype=torch.complex128), start(3, dtype=torch.complex128)),
}


@pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["tsit5", "dopri8", "rk4"])
@pytest.mark.parametrize("name", STATES)
def test_a_state_of_any_structure_comes_back_with_a_time_axis(name, method, way):
    y0, t = STATES[name], way * torch.tensor([0, .3, .5, 1.], dtype=torch.float64)
    y = solve(growth, y0, t, method, **steps_for(method)).y
    (leaves, spec), (before, same) = tree_flatten(y), tree_flatten(y0)
    assert spec == same
    for leaf, first in zip(leaves, before):
        assert leaf.shape == (4, *first.shape)
        assert torch.equal(leaf[0], first) or not first.numel()
        assert deviation(leaf, grown(first, t)) < 1e-3


@pytest.mark.parametrize("structure", [lambda x: x, lambda x: {"a": x, "b": (x, x)}], ids=["tensor", "dict"])
@each_method
def test_an_empty_state_is_solved_without_complaint(method, structure):
    y = solve(growth, structure(start(0, 2)), [0., .5, 1.], method, **steps_for(method)).y
    assert all(leaf.shape == (3, 0, 2) for leaf in tree_leaves(y))


@each_method
def test_backward_in_time_undoes_forward(method):
    y0, t = start(3), torch.tensor([0., 1.], dtype=torch.float64)
    there = solve(growth, y0, t, method, **steps_for(method)).y[-1]
    back = solve(growth, there, t.flip(0), method, **steps_for(method)).y[-1]
    assert deviation(back, y0) < (5e-2 if method == "euler" else 1e-3)


@pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["tsit5", "rk4", "euler"])
def test_repeated_times_repeat_the_state(method, way):
    t = way * torch.tensor([0, 0, .25, .25, .25, 1, 1], dtype=torch.float64)
    y = solve(growth, start(2), t, method).y
    once = solve(growth, start(2), t.unique() if way > 0 else t.unique().flip(0), method).y
    assert torch.allclose(y, once[[0, 0, 1, 1, 1, 2, 2]], rtol=1e-14)


@pytest.mark.parametrize("t", [[1.], [1., 1.], [2., 2., 2.]], ids=str)
@each_method
def test_a_solve_of_no_length_returns_the_start_and_calls_nothing(method, t):
    solution = solve(lambda t, y: pytest.fail("f was called"), start(2), t, method, step_size=.1)
    assert solution.status is Status.success and solution.stats.accepted == 0
    assert torch.equal(solution.y, start(2).expand(len(t), 2))


@pytest.mark.parametrize("t", [[0, 1], (0, .5, 1), range(3), torch.linspace(0, 1, 3)], ids=lambda t: type(t).__name__)
def test_times_may_be_any_sequence_of_numbers(t):
    solution = solve(growth, start(2), t)
    assert solution.t.tolist() == [float(x) for x in t] and len(solution.y) == len(t)


def test_the_intermediate_times_do_not_change_the_steps():
    few, many = (solve(growth, start(2), torch.linspace(0, 5, n, dtype=torch.float64)) for n in (2, 500))
    assert few.stats.f_evals == many.stats.f_evals
    assert torch.equal(few.y[-1], many.y[-1])


def test_the_input_is_left_as_it_was():
    y0, t = start(3, dtype=torch.float32), torch.linspace(0, 1, 3)
    kept = y0.clone(), t.clone()
    y = solve(growth, y0, t).y
    y.add_(1)
    assert torch.equal(y0, kept[0]) and torch.equal(t, kept[1]) and not y0.requires_grad


def test_a_field_that_writes_into_its_own_output_buffer_is_no_trouble():
    buffer = torch.empty(3, dtype=torch.float64)
    def f(t, y): return torch.mul(y, torch.cos(t), out=buffer)
    t = torch.linspace(0, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(solve(f, start(3), t).y, solve(growth, start(3), t).y)


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_a_field_that_hands_its_state_through_is_no_trouble(method):
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    for f in (lambda t, y: y, lambda t, y: y.detach(), lambda t, y: y.view_as(y)):
        y = solve(f, start(3), t, method, **steps_for(method)).y
        assert deviation(y, torch.exp(t)[:, None] * start(3)) < 1e-6


def test_memory_that_was_used_before_does_not_leak_into_a_solve():
    "A buffer that is never written must not be read: zero times an old NaN is NaN."
    for method in EXPLICIT:
        junk = [torch.full((14, 200), torch.nan, dtype=torch.float64) for _ in range(20)]
        del junk
        with torch.no_grad(): y = solve(growth, start(100, 2), [0., .4, 1.], method, **steps_for(method)).y
        assert y.isfinite().all(), method


# ----------------------------------------------------------------------------------------------- large and small t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("t0", [0., 1e4, -1e6])
def test_the_origin_of_time_does_not_matter_to_an_autonomous_field(t0, dtype):
    t = t0 + torch.linspace(0, 1, 5, dtype=torch.float64)
    y = solve(lambda t, y: -y, start(2, dtype=dtype), t).y
    assert deviation(y, torch.exp(t0 - t)[:, None] * start(2)) < 1e-5


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e6])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_unit_of_time_does_not_matter(method, scale):
    t = torch.linspace(0, 1, 3, dtype=torch.float64) * scale
    y = solve(lambda t, y: -1.3 * y / scale, start(2), t, method, rtol=1e-6, atol=1e-8).y
    assert deviation(y, torch.exp(-1.3 * t / scale)[:, None] * start(2)) < 1e-3


# ----------------------------------------------------------------------------------------------------- step control


@pytest.mark.parametrize("controller", [None, "i", "pi", "pid", "PID", PID(integral=.7, proportional=.4)], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_controller_keeps_the_tolerance(method, controller):
    t = torch.linspace(0, 5, 6, dtype=torch.float64)
    solution = solve(growth, start(2), t, method, rtol=1e-5, atol=1e-7, controller=controller)
    assert deviation(solution.y, grown(start(2), t)) < 1e-3
    assert solution.stats.rejected <= solution.stats.accepted


def test_a_controller_of_the_users_own_is_asked():
    class Halve:
        def init(self): return 0
        def next(self, state, ratio, order): return ratio <= 1, .5 if ratio > 1 else 1.5, state + 1
    solution = solve(growth, start(2), [0., 2.], controller=Halve())
    assert deviation(solution.y[-1:], grown(start(2), torch.tensor([2.]))) < 1e-4


def steps_of(method="tsit5", t=(0., 2.), **options):
    "Start and end of every accepted step."
    class Field(torch.nn.Module):
        def forward(self, t, y): return growth(t, y)
        def callback_accept_step(self, t, y, h): times.append((t.item(), h.item()))
    times = []
    odeint(Field(), start(2), torch.tensor(t, dtype=torch.float64), method=method, options=options)
    return times


@pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_first_step_and_max_step_are_kept(method, way):
    times = steps_of(method, (0., 2. * way), first_step=1e-4, max_step=.0479)
    assert times[0] == (0., 1e-4)
    assert max(h for _, h in times) <= .0479 * (1 + 1e-12)


@pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["step_t", "jump_t"])
def test_steps_land_on_the_times_they_are_told_to(name, way):
    stops = way * torch.tensor([.3, .7, 1.1, 5., 0., -1.])
    starts = [t for t, _ in steps_of(t=(0., 2. * way), **{name: stops})]
    assert {round(way * t, 6) for t in starts} >= {0., .3, .7, 1.1}
    assert all(0 <= way * t < 2 for t in starts)


def test_a_jump_that_is_named_saves_work_and_keeps_accuracy():
    def f(t, y): return torch.where(t < .5, 1., -1.) * y
    t = torch.tensor([0., 1.], dtype=torch.float64)
    plain = solve(f, start(2), t, rtol=1e-8)
    named = solve(f, start(2), t, rtol=1e-8, jump_t=[.5])
    assert named.stats.f_evals < plain.stats.f_evals / 2 and named.stats.rejected == 0
    assert deviation(named.y[-1], start(2)) < 1e-7


def test_f_is_evaluated_on_either_side_of_a_jump_and_never_on_it():
    times = []
    def f(t, y): times.append(t.item()); return y
    solve(f, start(1), [0., .5, 1.], jump_t=[.5])
    assert .5 not in times
    assert any(.5 - 1e-9 < t < .5 for t in times) and any(.5 < t < .5 + 1e-9 for t in times)


@pytest.mark.parametrize("rtol, atol", [
    (1e-6, 1e-8), (torch.tensor(1e-6), torch.tensor(1e-8)), (1e-6, torch.tensor([1e-8, 1e-6])),
    (torch.full((2,), 1e-6), 1e-8), (0., 1e-8), (1e-6, 0.)], ids=str)
def test_tolerances_may_be_numbers_or_tensors(rtol, atol):
    t = torch.linspace(0, 2, 3, dtype=torch.float64)
    assert deviation(solve(growth, start(2), t, rtol=rtol, atol=atol).y, grown(start(2), t)) < 1e-5


def test_a_component_with_a_loose_tolerance_does_not_hold_the_others_back():
    def f(t, y): return torch.stack([-y[0], 50 * torch.cos(50 * t)])
    y0, t = torch.tensor([1., 0.], dtype=torch.float64), [0., 5.]
    strict, loose = (solve(f, y0, t, rtol=0., atol=torch.tensor([1e-6, x])).stats.accepted for x in (1e-6, 1e3))
    assert loose < strict / 4


def test_tolerances_may_have_the_structure_of_the_state():
    y0, t = {"a": start(2), "b": start(3)}, [0., 1.]
    rtol = {"a": 1e-3, "b": torch.tensor([1e-3] * 3, dtype=torch.float64)}
    loose = solve(growth, y0, t, rtol=rtol, atol={"a": 1e-3, "b": 1e-3})
    same = solve(growth, y0, t, rtol=1e-3, atol=1e-3)
    assert torch.equal(loose.y["a"], same.y["a"]) and loose.stats == same.stats


def test_a_norm_of_the_users_own_sees_the_structure_of_the_state():
    shapes = set()
    def norm(y):
        shapes.add((tuple(y["a"].shape), tuple(y["b"].shape)))
        return y["a"].abs().max()
    solve(growth, {"a": start(2), "b": start(3, 1)}, [0., 1.], norm=norm)
    assert shapes == {((2,), (3, 1))}


def test_the_default_norm_of_a_tuple_is_the_largest_of_its_parts():
    "A large part that is easy must not drown a small part that is hard."
    t = torch.tensor([0., 3.], dtype=torch.float64)
    def f(t, y): return torch.cos(9 * t) * y[0], torch.zeros_like(y[1])
    alone = solve(lambda t, y: torch.cos(9 * t) * y, start(2), t)
    beside = solve(f, (start(2), start(10_000)), t)
    assert alone.stats.accepted == beside.stats.accepted


# ---------------------------------------------------------------------------------------------- fixed steps and grids


@pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_step_size_gives_equal_steps_with_any_method(method, way):
    solution = solve(growth, start(2), [0., 1. * way], method, step_size=.125)
    assert solution.stats.accepted == 8 and solution.stats.rejected == 0
    assert solution.stats.smallest_step == solution.stats.largest_step == .125


def test_a_last_step_is_cut_to_the_end_and_a_sliver_is_no_step():
    assert solve(growth, start(2), [0., 1.], "rk4", step_size=.3).stats.accepted == 4
    assert solve(growth, start(2), [0., 1.], "rk4", step_size=.1).stats.accepted == 10
    assert solve(growth, start(2), [0., 1.], "rk4", step_size=5.).stats.accepted == 1


@pytest.mark.parametrize("method", FIXED)
def test_outputs_between_fixed_steps_lie_on_the_steps_polynomial(method):
    t = torch.linspace(0, 1, 17, dtype=torch.float64)
    ends = solve(growth, start(2), t[::8], method, step_size=.5).y
    all_ = solve(growth, start(2), t, method, step_size=.5).y
    assert torch.equal(all_[::8], ends)
    assert deviation(all_, grown(start(2), t)) < max(2 * deviation(ends, grown(start(2), t[::8])), 1e-2)


# ------------------------------------------------------------------------------------------------- dense output


@pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
@each_method
def test_dense_output_agrees_with_the_outputs_of_the_solve(method, way):
    t = way * torch.linspace(0, 2, 33, dtype=torch.float64)
    solution = solve(growth, start(3, 2), t, method, dense=True, **steps_for(method))
    assert torch.allclose(solution(t), solution.y, rtol=1e-13, atol=1e-13)
    assert solution(.7 * way).shape == (3, 2) and solution(t[:6].reshape(2, 3)).shape == (2, 3, 3, 2)


def test_dense_output_has_the_structure_and_dtype_of_the_state():
    y0 = {"a": start(2, dtype=torch.float32), "b": start(3, 1, dtype=torch.float32)}
    y = solve(growth, y0, [0., 1.], dense=True)(torch.linspace(0, 1, 4))
    assert y["a"].shape == (4, 2) and y["b"].shape == (4, 3, 1) and y["a"].dtype == torch.float32


def test_odeint_dense_is_a_function_of_time_for_every_method_and_state():
    for method in ADAPTIVE:
        y = odeint_dense(growth, (start(2), start(1)), torch.tensor(0.), torch.tensor(2.), method=method, rtol=1e-6)
        assert deviation(y(1.)[0][None], grown(start(2), torch.tensor([1.]))) < 1e-4


# ------------------------------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["tsit5", "dopri8", "bosh3", "fehlberg45", "rk4", "euler"])
def test_the_count_of_evaluations_is_the_number_of_calls(method, gradient):
    calls, w = [0], torch.ones((), dtype=torch.float64, requires_grad=True)
    def f(t, y): calls[0] += 1; return w * growth(t, y)
    solution = solve(f, start(2), [0., .3, 2.], method, gradient=gradient, **steps_for(method))
    assert solution.stats.f_evals == calls[0]
    solution.y.sum().backward()
    assert solution.stats.f_evals + solution.stats.backward_f_evals == calls[0]


def test_the_statistics_describe_the_steps():
    stats = solve(growth, start(2), [0., 5.]).stats
    assert stats.accepted > 5 and 0 < stats.smallest_step <= stats.largest_step <= 5


@pytest.mark.parametrize("rate, words", [(2000., "a method for stiff problems"), (20., "no sign of stiffness")])
def test_explain_says_whether_the_problem_is_stiff(rate, words):
    text = solve(lambda t, y: -rate * (y - torch.cos(t)), start(2), [0., 4.], rtol=1e-6, atol=1e-6).explain()
    assert words in text and "steps accepted" in text


def test_explain_counts_the_backward_pass():
    y0 = start(2).requires_grad_()
    solution = solve(growth, y0, [0., 1.])
    solution.y.sum().backward()
    assert f"{solution.stats.backward_f_evals} more in the backward pass" in solution.explain()


# ------------------------------------------------------------------------------------------------- own tableaus


def test_a_tableau_of_the_users_own_is_a_method():
    ralston = Tableau("ralston", [[], ["2/3"]], ["1/4", "3/4"])
    t = torch.linspace(0, 1, 65, dtype=torch.float64)
    assert deviation(solve(growth, start(2), t, ralston).y, grown(start(2), t)) < 1e-3


def test_an_embedded_pair_of_the_users_own_is_adaptive():
    pair = Tableau("ralston pair", [[], ["2/3"]], ["1/4", "3/4"], b_embedded=[1, 0])
    solution = solve(growth, start(2), [0., 1.], pair, rtol=1e-5, atol=1e-5)
    assert solution.method == "ralston pair"
    assert deviation(solution.y[-1:], grown(start(2), torch.tensor([1.]))) < 1e-3


def test_args_of_any_structure_reach_f():
    args = {"rate": torch.tensor(2., dtype=torch.float64), "name": "decay", "more": (torch.ones(2), 3)}
    def f(t, y, args):
        assert args["name"] == "decay" and args["more"][1] == 3
        return -args["rate"] * y
    assert deviation(solve(f, start(2), [0., 1.], args=args).y[-1], math.exp(-2) * start(2)) < 1e-6


def test_solving_is_deterministic():
    y = [solve(growth, start(3, 3), torch.linspace(0, 3, 7)).y for _ in range(3)]
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], y[2])


def test_solves_within_solves_do_not_disturb_each_other():
    def outer(t, y): return solve(growth, y, [0., .5]).y[-1] * 0 + growth(t, y)
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    assert torch.equal(solve(outer, start(2), t).y, solve(growth, start(2), t).y)


def test_throw_false_keeps_what_was_reached_and_says_why_it_stopped():
    t = torch.tensor([0, .2, .4, 2.], dtype=torch.float64)
    solution = solve(lambda t, y: y * y, torch.ones(1, dtype=torch.float64), t, throw=False)     # y = 1 / (1 - t)
    assert solution.status is Status.blow_up and not solution.status.ok
    assert deviation(solution.y[:3, 0], 1 / (1 - t[:3])) < 1e-5
    assert abs(solution.failure.time - 1) < 1e-3
    with pytest.raises(SolveError) as error: solve(lambda t, y: y * y, torch.ones(1, dtype=torch.float64), t)
    assert torch.equal(error.value.solution.y, solution.y)


class HostReads(TorchDispatchMode):
    "Counts what makes a host wait for its accelerator: numbers read from tensors, results whose shape depends on numbers."
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_the_host_waits_once_in_an_adaptive_step_and_never_in_a_fixed_one(method, gradient):
    adaptive = method in ADAPTIVE
    w = (torch.tensor([[0., 1., -1.], [-1., 0., 1.], [1., -1., 0.]]) * 2).requires_grad_()
    def reads(end):
        options = {} if adaptive else {"step_size": .1}
        with HostReads() as found:
            s = solve(lambda t, y: torch.tanh(y @ w), start(4, 3).float(), [0., end], method, gradient=gradient, **options)
            forward = found.count
            s.y[-1].sum().backward()
        return forward, found.count - forward, s.stats.accepted + s.stats.rejected
    (few, few_back, short), (many, many_back, long) = reads(1.), reads(4.)
    assert long > short + 3
    assert many - few == (long - short if adaptive else 0)
    if not adaptive or gradient != "adjoint": assert many_back == few_back
