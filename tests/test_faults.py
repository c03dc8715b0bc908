"""What is wrong is said, by name, with a remedy; what can go on goes on; nothing hangs."""
import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from neuralode_nb import PID, Adjoint, SolveError, Status, Tableau, odeint, solve
from neuralode_nb.ode.methods import TABLEAUS, find_tableau

EXPLICIT = tuple(TABLEAUS)
ADAPTIVE = [m for m in EXPLICIT if find_tableau(m).adaptive]
FIXED = [m for m in EXPLICIT if m not in ADAPTIVE]
ONE = torch.ones(1, dtype=torch.float64)
decay = lambda t, y: -y
each_method = pytest.mark.parametrize("method", EXPLICIT)
each_adaptive = pytest.mark.parametrize("method", ADAPTIVE)
each_way = pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
each_gradient = pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])


def failure(*args, **options):
    "The failure of a solve that must fail, and its message."
    with pytest.raises(SolveError) as error: solve(*args, **options)
    return error.value.failure, str(error.value)


# ------------------------------------------------------------------------------------------------------------ misuse

MISUSE = {  # what: (arguments that differ from a good solve, error, words of the message)
    "unknown method": (dict(method="dopri6"), ValueError, ["dopri6", "did you mean 'dopri"]),
    "method of the wrong type": (dict(method=5), TypeError, ["method=5", "Tableau"]),
    "implicit tableau without steps": (dict(method=Tableau("ie", [[1]], [1])), ValueError, ["'ie'", "pass step_size"]),
    "no function": (dict(f=3), TypeError, ["f=3", "callable"]),
    "function of one argument": (dict(f=lambda y: y), TypeError, ["f takes (y)", "lambda t, y: net(y)"]),
    "module of one argument": (dict(f=nn.Linear(1, 1)), TypeError, ["f(t, y)", "lambda t, y: net(y)"]),
    "function without args": (dict(args=1), TypeError, ["f(t, y, args)"]),
    "state is a number": (dict(y0=1.), TypeError, ["y0", "float", "torch.tensor"]),
    "state holds a number": (dict(y0=(ONE, 1.)), TypeError, ["y0", "float", "torch.tensor"]),
    "state of whole numbers": (dict(y0=torch.ones(2, dtype=torch.int64)), TypeError, ["y0", "int64", "float32"]),
    "state of truth values": (dict(y0=torch.ones(2, dtype=torch.bool)), TypeError, ["y0", "bool"]),
    "empty tuple": (dict(y0=()), ValueError, ["y0 is empty"]),
    "mixed dtypes": (dict(y0=(ONE, ONE.float())), ValueError, ["y0 mixes dtypes", "float32", "float64"]),
    "mixed devices": (dict(y0=(ONE, ONE.to("meta"))), ValueError, ["y0 mixes devices", "cpu", "meta"]),
    "time is a number": (dict(t=1.), TypeError, ["t=1.0", "sequence"]),
    "no times": (dict(t=torch.tensor([])), ValueError, ["t has shape (0,)"]),
    "an empty list of times": (dict(t=[]), (ValueError, TypeError), ["t"]),
    "times in two dimensions": (dict(t=torch.zeros(2, 2)), ValueError, ["t has shape (2, 2)", "batch='sample'"]),
    "times of whole numbers": (dict(t=torch.tensor([0, 1])), TypeError, ["t has dtype torch.int64", "t.double()"]),
    "complex times": (dict(t=torch.tensor([0j, 1])), TypeError, ["t has dtype torch.complex64"]),
    "time is NaN": (dict(t=[0., math.nan]), ValueError, ["t holds nan", "finite"]),
    "time is infinite": (dict(t=[0., math.inf]), ValueError, ["t holds inf", "finite"]),
    "times not sorted": (dict(t=[0., 2., 1., 3.]), ValueError, ["not monotone", "t[2]=1", "sort t"]),
    "times back and forth": (dict(t=[0., 1., 0.]), ValueError, ["t"]),
    "negative rtol": (dict(rtol=-1e-3), ValueError, ["rtol=-0.001", "positive"]),
    "rtol is NaN": (dict(rtol=math.nan), ValueError, ["rtol=nan"]),
    "infinite atol": (dict(atol=math.inf), ValueError, ["atol=inf", "finite"]),
    "rtol is text": (dict(rtol="small"), TypeError, ["rtol"]),
    "both tolerances zero": (dict(rtol=0., atol=0.), ValueError, ["rtol", "atol", "zero"]),
    "tolerance of the wrong shape": (dict(atol=torch.ones(3)), ValueError, ["atol has shape (3,)", "(1,)"]),
    "tolerance of the wrong structure": (dict(atol=(1e-3, 1e-3)), ValueError, ["atol has structure", "match"]),
    "tolerance that requires grad": (dict(rtol=torch.ones(1, requires_grad=True)), ValueError, ["rtol", "detach()"]),
    "unknown gradient": (dict(gradient="backprop"), ValueError, ["gradient='backprop'", "checkpoint"]),
    "gradient of a later version": (dict(gradient="reversible"), ValueError, ["gradient='reversible'"]),
    "unknown batch": (dict(batch="each"), ValueError, ["batch='each'", "joint", "sample"]),
    "unknown controller": (dict(controller="pie"), ValueError, ["controller='pie'", "'pi'"]),
    "controller that is none": (dict(controller=3), TypeError, ["controller=3", "init()"]),
    "step_size zero": (dict(step_size=0.), ValueError, ["step_size=0", "positive"]),
    "step_size is NaN": (dict(step_size=math.nan), ValueError, ["step_size=nan"]),
    "step_size too small": (dict(step_size=1e-9), ValueError, ["step_size=1e-09", "max_steps"]),
    "fixed steps, two times": (dict(method="rk4"), ValueError, ["rk4", "step_size", "tsit5"]),
    "negative first_step": (dict(first_step=-.1), ValueError, ["first_step=-0.1"]),
    "negative max_step": (dict(max_step=-1), ValueError, ["max_step=-1"]),
    "negative min_step": (dict(min_step=-1), ValueError, ["min_step=-1"]),
    "min_step above max_step": (dict(min_step=1., max_step=.1), ValueError, ["min_step", "max_step"]),
    "no steps allowed": (dict(max_steps=0), ValueError, ["max_steps=0", "positive"]),
    "max_steps is text": (dict(max_steps="many"), TypeError, ["max_steps='many'"]),
    "step_t is text": (dict(step_t="abc"), TypeError, ["step_t"]),
    "jump_t is NaN": (dict(jump_t=[math.nan]), ValueError, ["jump_t", "finite"]),
    "norm is no function": (dict(norm="max"), TypeError, ["norm='max'", "callable"]),
    "adjoint norm": (dict(gradient=Adjoint(norm="max")), ValueError, ["norm='max'", "seminorm"]),
    "adjoint tolerance": (dict(gradient=Adjoint(rtol=-1.)), ValueError, ["adjoint rtol=-1"]),
    "adjoint method": (dict(gradient=Adjoint(method="dopri6")), ValueError, ["dopri6"]),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_named_with_its_value_and_a_remedy_before_any_work(name):
    changes, error, words = MISUSE[name]
    calls = []
    def f(t, y): calls.append(t); return -y
    given = {"f": f, "y0": ONE, "t": [0., 1.], **changes}
    with pytest.raises(error) as raised: solve(given.pop("f"), given.pop("y0"), given.pop("t"), **given)
    for word in words: assert word in str(raised.value), str(raised.value)
    assert not calls and len(str(raised.value)) < 500


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="rtoll"): solve(decay, ONE, [0., 1.], rtoll=1e-3)


@pytest.mark.parametrize("options, words", [
    ({"stepsize": .1}, "stepsize.*step_size"), ({"step_size": .1, "grid_constructor": lambda f, y, t: t}, "exclude"),
    ({"interp": "spline"}, "spline.*cubic"), ({"max_order": 4}, "max_order"), ([("step_size", .1)], "dict")],
    ids=["misspelt", "two at once", "unknown value", "of another method", "no dict"])
def test_an_unknown_option_is_an_error_not_a_warning(options, words):
    with pytest.raises((ValueError, TypeError), match=f"(?s){words}"):
        odeint(decay, ONE, torch.tensor([0., 1.]), method="rk4", options=options)


def test_an_option_of_the_other_kind_of_method_is_an_error():
    with pytest.raises(ValueError, match="first_step.*rk4"):
        odeint(decay, ONE, torch.tensor([0., 1.]), method="rk4", options={"first_step": .1})
    with pytest.raises(ValueError, match="step_size.*dopri5"):
        odeint(decay, ONE, torch.tensor([0., 1.]), method="dopri5", options={"step_size": .1})


def test_dense_output_that_was_not_kept_and_times_outside_say_so():
    with pytest.raises(ValueError, match="dense=True"): solve(decay, ONE, [0., 1.])(.5)
    with pytest.raises(ValueError, match=r"(?s)t=.*2.*\[0, 1\]"): solve(decay, ONE, [0., 1.], dense=True)(2.)
    with pytest.raises(ValueError, match="dense=True.*direct"):
        solve(decay, ONE.clone().requires_grad_(), [0., 1.], dense=True)


# ---------------------------------------------------------------------------------------------- what f may hand back

RETURNS = {
    "nothing": (None, TypeError, "f returned NoneType"),
    "a number": (1., TypeError, "f returned float"),
    "a list": ([1., 2.], TypeError, "f returned list"),
    "a tuple": ((torch.ones(2),), TypeError, "f returned tuple"),
    "a shape that would broadcast": (torch.ones(1), ValueError, r"f returned shape \(1,\) .* \(2,\)"),
    "a scalar": (torch.tensor(1.), ValueError, r"f returned shape \(\)"),
    "an extra axis": (torch.ones(2, 1), ValueError, r"\(2, 1\)"),
    "a complex tensor": (torch.ones(2, dtype=torch.complex64), TypeError, "complex64.*make y0 complex"),
    "a tensor elsewhere": (torch.ones(2, device="meta"), ValueError, "meta.*cpu"),
}


@each_gradient
@pytest.mark.parametrize("name", RETURNS)
def test_a_wrong_return_is_named(name, gradient):
    value, error, words = RETURNS[name]
    with pytest.raises(error, match=words): solve(lambda t, y: value, torch.ones(2), [0., 1.], gradient=gradient)


@pytest.mark.parametrize("value, words", [
    ({"a": ONE}, "structure"), ((ONE, ONE, ONE), "structure"), ((ONE, torch.ones(2)), r"shape \(2,\)"),
    (ONE, "structure"), ((ONE, 1.), "float")], ids=["dict", "three", "shape", "tensor", "number"])
def test_a_wrong_structure_is_named(value, words):
    with pytest.raises((ValueError, TypeError), match=f"f returned.*{words}"):
        solve(lambda t, y: value, (ONE, ONE), [0., 1.])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_a_derivative_of_lower_precision_is_taken(dtype):
    y = solve(lambda t, y: torch.ones(1, dtype=dtype), ONE, [0., 1.]).y
    assert y.dtype == torch.float64 and y[-1].item() == pytest.approx(2)


@each_gradient
def test_an_error_inside_f_arrives_as_it_is(gradient):
    class Mine(Exception): pass
    def f(t, y):
        if t > .1: raise Mine("here")
        return -y
    with pytest.raises(Mine, match="here"): solve(f, ONE, [0., 1.], gradient=gradient)


# ------------------------------------------------------------------------------------------------- NaN and infinity


@each_adaptive
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_in_any_one_evaluation_is_overcome_by_a_shorter_step(method, bad):
    """The n-th call of f is spoiled, whichever stage that is; the solve tries again with a smaller step.
    Only f at a state that was accepted before it was evaluated cannot be avoided: methods that do not carry the
    last derivative over are tested in their first step."""
    tableau = find_tableau(method)
    t = torch.linspace(0, 2, 3, dtype=torch.float64)
    clean = solve(lambda t, y: torch.cos(t) * y, ONE, t, method, rtol=1e-4, first_step=.1)
    for n in range(2, (3 if tableau.fsal else 1) * tableau.stages + 1):
        calls = [0]
        def f(t, y):
            calls[0] += 1                                       # noqa: B023
            return torch.cos(t) * y * (bad if calls[0] == n else 1)     # noqa: B023
        with torch.no_grad(): y = solve(f, ONE, t, method, rtol=1e-4, first_step=.1).y
        assert torch.allclose(y, clean.y, rtol=3e-3), n


@each_way
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@each_method
def test_a_field_that_goes_bad_at_a_time_is_named_with_that_time(method, bad, way):
    f = lambda t, y: -way * y if way * t < .7 else torch.full_like(y, bad)
    step = {} if method in ADAPTIVE else {"step_size": .01}
    found, text = failure(f, torch.ones(3, 2, dtype=torch.float64), [0., .5 * way, way], method, **step)
    assert found.status in (Status.non_finite_field, Status.non_finite_state)
    assert way * found.time == pytest.approx(.7, abs=.02 if method in ADAPTIVE else .31)
    assert found.status.name in text and "Remedy" in text


@pytest.mark.parametrize("structure", [lambda x: x, lambda x: (torch.ones(5, 1), x)], ids=["tensor", "tuple"])
@pytest.mark.parametrize("sample", [0, 3, 4])
@pytest.mark.parametrize("method, step", [("tsit5", {}), ("rk4", {"step_size": .05})])
def test_the_sample_that_fails_is_named(method, step, sample, structure):
    def f(t, y):
        *rest, x = [y] if isinstance(y, torch.Tensor) else y
        bad = torch.zeros_like(x)
        bad[sample] = math.nan if t > .5 else 0
        return x * 0 + bad if not rest else (-rest[0], x * 0 + bad)
    found, text = failure(f, structure(torch.ones(5, 2)), [0., .2, .4, .6, 1.], method, **step)
    assert found.sample == sample and f"sample {sample}" in text


@each_gradient
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_is_named(gradient, bad):
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad(): net[2].bias[1] = bad
    class Field(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, t, y): return self.net(y)
    found, text = failure(Field(), torch.ones(1, 2), [0., 1.], gradient=gradient)
    assert found.status is Status.non_finite_parameter and found.parameter == "net.2.bias"
    assert "net.2.bias" in text and "learning rate" in text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_that_is_not_finite_is_named(bad):
    y0 = torch.ones(4, 2)
    y0[2, 1] = bad
    for method, step in (("tsit5", {}), ("rk4", {"step_size": .1})):
        found, _ = failure(decay, y0, [0., 1.], method, **step)
        assert found.status is Status.non_finite_state and found.sample == 2 and found.time == 0


def test_arguments_that_are_not_finite_are_named():
    args = {"rate": torch.tensor([1., math.nan])}
    found, text = failure(lambda t, y, args: -args["rate"] * y, torch.ones(2), [0., 1.], args=args)
    assert found.status is Status.non_finite_parameter and "rate" in text


def test_the_message_does_not_print_the_state():
    "torchdiffeq prints the whole tensor."
    _, text = failure(lambda t, y: y * math.nan, torch.ones(1000, 1000), [0., 1.])
    assert len(text) < 500


def test_training_that_diverges_names_the_parameter_not_stiffness():
    "torchdiffeq issue 58: 'underflow in dt nan' when the optimizer had diverged."
    net = nn.Linear(2, 2)
    for _ in range(30):
        try: loss = solve(lambda t, y: net(y), torch.ones(3, 2), [0., 1.], max_steps=300).y[-1].pow(2).mean()
        except SolveError as error: last = error; break
        loss.backward()
        with torch.no_grad():
            for p in net.parameters(): p -= 1e30 * p.grad
        net.zero_grad()
    assert not last.status.ok
    with torch.no_grad(): net.weight.fill_(math.nan)
    assert failure(lambda t, y: net(y), torch.ones(3, 2), [0., 1.])[0].status is Status.non_finite_parameter


# --------------------------------------------------------------------------------------------------- hard problems


@each_way
@each_adaptive
def test_a_blow_up_ends_where_it_happens(method, way):
    found, text = failure(lambda t, y: way * y * y, ONE, [0., 2. * way], method, rtol=1e-4, atol=1e-4)
    assert way * found.time == pytest.approx(1, abs=2e-2)
    assert found.status in (Status.step_underflow, Status.non_finite_state, Status.non_finite_field) and "Remedy" in text


@pytest.mark.parametrize("method", FIXED)
def test_a_blow_up_with_fixed_steps_is_an_error_not_a_result(method):
    with pytest.raises(SolveError): solve(lambda t, y: y**3, ONE, torch.linspace(0, 5, 101), method)


@each_adaptive
def test_a_jump_that_is_not_named_is_found_and_crossed(method):
    f = lambda t, y: torch.where(t < .5, 1., -3.) * torch.ones_like(y)
    y = solve(f, ONE, [0., 1.], method, rtol=1e-5, atol=1e-5).y
    assert y[-1].item() == pytest.approx(0, abs=1e-2)


@each_adaptive
def test_a_sliding_mode_comes_to_an_end(method):
    "y' = -sign(y) chatters about zero: no accurate solution exists, but the solve must stop."
    f = lambda t, y: -torch.sign(y)
    solution = solve(f, ONE, [0., 3.], method, rtol=1e-3, atol=1e-3, max_steps=500, throw=False)
    assert solution.status in (Status.success, Status.max_steps, Status.step_underflow)
    assert solution.y.isfinite().all()
    assert method == "fehlberg2" or solution.y.abs().max() <= 1.1     # its two-point estimate cannot see this


def test_a_noisy_field_comes_to_an_end():
    noisy = solve(lambda t, y: torch.randn_like(y), torch.zeros(4), [0., 1.], max_steps=500, throw=False)
    assert noisy.status in (Status.max_steps, Status.step_underflow)
    assert noisy.stats.accepted + noisy.stats.rejected <= 500 and "rejected" in noisy.explain()


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_magnitudes_do_not_confuse_the_step(scale):
    solution = solve(lambda t, y: -y, scale * ONE, [0., 1.], atol=0.)
    assert solution.y[-1].item() == pytest.approx(scale * math.exp(-1), rel=1e-4)


@pytest.mark.parametrize("f", [lambda t, y: 0 * y, lambda t, y: torch.ones_like(y), lambda t, y: t + y * 0],
                         ids=["zero", "constant", "linear"])
@each_adaptive
def test_a_field_without_error_takes_few_steps(method, f):
    if find_tableau(method).error_order == 1: f = lambda t, y: 1 + 0 * y       # a line in t is beyond the first order
    stats = solve(f, 0 * ONE, [0., 1e6], method).stats
    assert stats.accepted + stats.rejected < 60


def test_a_stiff_problem_says_stiff_and_which_way_out():
    f = lambda t, y: -1e6 * (y - torch.cos(t))
    found, text = failure(f, ONE, [0., 1.], max_steps=1000)
    assert found.status is Status.max_steps and found.stiffness > 2.5
    assert "max_steps" in text and "stiff" in text


def test_max_steps_counts_the_whole_solve_not_each_output():
    "torchdiffeq's max_num_steps starts anew at every output."
    for n in (2, 100):
        with pytest.raises(SolveError) as error:
            solve(lambda t, y: torch.cos(20 * t) * y, ONE, torch.linspace(0, 10, n), max_steps=30)
        stats = error.value.solution.stats
        assert error.value.status is Status.max_steps and stats.accepted + stats.rejected == 30


def test_a_step_below_min_step_is_a_failure_not_a_silent_error():
    "torchdiffeq accepts the step whatever its error."
    found, _ = failure(lambda t, y: torch.cos(1000 * t) * 1000 + 0 * y, ONE, [0., 1.], min_step=.01)
    assert found.status is Status.step_underflow


def test_a_tolerance_beyond_single_precision_comes_to_an_end():
    solution = solve(lambda t, y: -y, torch.ones(3), [0., 1.], rtol=1e-14, atol=1e-14, max_steps=3000, throw=False)
    assert solution.status in (Status.success, Status.max_steps, Status.step_underflow)


@each_gradient
def test_a_failure_in_the_backward_pass_says_where_it_was(gradient):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.spoiled = nn.Parameter(torch.ones(1)), False
        def forward(self, t, y): return -self.w * y * (math.nan if self.spoiled else 1)
    field = Field()
    y = solve(field, torch.ones(1), [0., 1.], gradient=gradient).y
    field.spoiled = True
    if gradient == "adjoint":
        with pytest.raises(SolveError, match="in the backward pass"): y.sum().backward()
    else:
        y.sum().backward()
        assert field.w.grad.isfinite().all() or gradient == "checkpoint"


# ------------------------------------------------------------------------------------------------- going on regardless


@each_gradient
def test_what_was_reached_is_kept_and_the_rest_repeats_the_last_state(gradient):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    f = lambda t, y: -y if t < .55 else y * math.nan
    solution = solve(f, ONE, t, throw=False, gradient=gradient, rtol=1e-8)
    assert not solution.status.ok and solution.y.isfinite().all() and len(solution.y) == 11
    assert torch.allclose(solution.y[:6, 0], torch.exp(-t[:6]), rtol=1e-6)
    assert torch.allclose(solution.y[6:], torch.exp(-torch.tensor(.55, dtype=torch.float64)), rtol=1e-3)
    assert solution.failure.time == pytest.approx(.55, abs=1e-3) and "not finite" in solution.explain()


def test_a_failed_solve_can_be_evaluated_as_far_as_it_went():
    f = lambda t, y: -y if t < .5 else y * math.nan
    solution = solve(f, ONE, [0., 1.], throw=False, dense=True)
    assert solution(.4).item() == pytest.approx(math.exp(-.4), rel=1e-4)
    with pytest.raises(ValueError, match="outside this solve"): solution(.8)


def test_a_solve_that_failed_at_once_has_its_start():
    solution = solve(lambda t, y: y * math.nan, ONE, [0., .5, 1.], throw=False)
    assert torch.equal(solution.y, ONE.expand(3, 1)) and solution.stats.accepted == 0
    with pytest.raises(ValueError): solve(lambda t, y: y * math.nan, ONE, [0., 1.], throw=False, dense=True)(.5)


@each_gradient
def test_the_part_that_was_reached_can_be_differentiated(gradient):
    w = ONE.clone().requires_grad_()
    f = lambda t, y: -w * y if t < .55 else y * math.nan
    solution = solve(f, ONE, [0., .5, 1.], throw=False, gradient=gradient, rtol=1e-9)
    g, = torch.autograd.grad(solution.y[1].sum(), w)
    assert g.item() == pytest.approx(-.5 * math.exp(-.5), rel=1e-4)


def test_an_error_carries_its_solution_and_survives_pickling():
    with pytest.raises(SolveError) as error: solve(lambda t, y: y * y, ONE, [0., .5, 2.])
    assert error.value.solution.y[1].item() == pytest.approx(2, rel=1e-3)
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.status is error.value.status


# --------------------------------------------------------------------------------------- never outside, never forever


@each_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_method
def test_f_is_never_called_outside_the_span(method, dtype, way):
    for start, span in ((0., 1.), (.1, .7), (1e4, 3.)):
        times = []
        def f(t, y): times.append(t.item()); return y * torch.cos(3 * t)     # noqa: B023
        t = torch.tensor([start, start + .3 * span, start + span], dtype=torch.float64)
        t = t if way > 0 else t.flip(0)
        step = {} if method in ADAPTIVE else {"step_size": span / 7}
        solve(f, torch.ones(2, dtype=dtype), t, method, rtol=1e-3, atol=1e-3, jump_t=[start + span / 2], **step)
        low, high = t.to(torch.float64 if dtype == torch.float64 else torch.float32).aminmax()
        assert low <= min(times) and max(times) <= high


@each_gradient
def test_f_is_never_called_outside_the_span_in_the_backward_pass(gradient):
    times, w = [], torch.ones(1, requires_grad=True)
    def f(t, y): times.append(t.item()); return w * y * torch.cos(9 * t)
    solve(f, torch.ones(2), [.1, .2, .45], gradient=gradient).y.sum().backward()
    low, high = torch.tensor([.1, .45])
    assert low <= min(times) and max(times) <= high


@each_adaptive
def test_a_first_step_longer_than_the_span_stays_inside(method):
    times = []
    def f(t, y): times.append(t.item()); return -y
    solve(f, ONE, [0., 1.], method, first_step=50.)
    assert max(times) <= 1


@each_adaptive
def test_the_number_of_calls_is_bounded_by_max_steps(method):
    calls = [0]
    def f(t, y): calls[0] += 1; return torch.randn_like(y) * 1e3
    solve(f, ONE, [0., 1e3], method, max_steps=50, throw=False)
    assert calls[0] <= 52 * find_tableau(method).stages + 4


# ------------------------------------------------------------------------------------------------------------- fuzz

numbers = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-3, 3),
                    st.sampled_from([None, "x", 1j, [], True]))
sane = st.floats(1e-6, 2.)
options = st.fixed_dictionaries({}, optional={
    "rtol": st.one_of(sane, numbers), "atol": st.one_of(sane, numbers), "step_size": st.one_of(sane, numbers),
    "first_step": st.one_of(sane, numbers), "max_step": st.one_of(sane, numbers), "min_step": numbers,
    "jump_t": st.one_of(numbers, st.lists(numbers, max_size=3)), "step_t": st.one_of(numbers, st.lists(sane, max_size=3)),
    "controller": st.sampled_from([None, "pi", "x", 3, PID(), PID]), "norm": st.sampled_from([None, "x", torch.max, 3]),
    "gradient": st.sampled_from(["direct", "checkpoint", "adjoint", Adjoint(), Adjoint, None, 3]),
    "dense": st.booleans(), "throw": st.booleans(), "batch": st.sampled_from(["joint"] * 8 + ["sample", None])})
methods = st.one_of(st.sampled_from(EXPLICIT), st.sampled_from(["", "DOPRI5", None, 3, Tableau]))
times = st.one_of(
    st.lists(st.floats(-2, 2), min_size=2, max_size=4).map(sorted), st.lists(numbers, max_size=4), numbers,
    st.sampled_from([torch.linspace(0, 1, 3), torch.zeros(2, 2), torch.tensor([0, 1])]))
states = st.sampled_from([
    ONE, torch.ones(2, 3), torch.tensor(1.), torch.zeros(0), torch.ones(2, dtype=torch.int64), (ONE, ONE), {}, {"a": ONE},
    [ONE, (ONE,)], None, 1., "y", torch.full((2,), math.nan), torch.ones(2, dtype=torch.complex64)])
fields = st.sampled_from([
    decay, lambda t, y: y * y, lambda t, y: y * math.nan, lambda t, y: None, lambda t, y: t, lambda y: y,
    lambda t, y: torch.ones(1), lambda t, y: tree_map(lambda x: -x, y), None, 3, nn.Linear(2, 2)])


each_fuzz = settings(max_examples=150, suppress_health_check=list(HealthCheck))


def solution_or_named_error(call, *inputs, **options):
    "A finite solution, or one of the three errors with words in it."
    try: solution = call(*inputs, **options)
    except (ValueError, TypeError, SolveError) as error: assert str(error)
    else: assert isinstance(solution, torch.Tensor) or solution.status.ok or options["throw"] is False


@each_fuzz
@given(fields, states, times, methods, options)
@pytest.mark.filterwarnings("ignore")
def test_any_arguments_give_a_solution_or_a_named_error(f, y0, t, method, options):
    solution_or_named_error(solve, f, y0, t, method, max_steps=40, **options)


@each_fuzz
@given(st.sampled_from([decay, lambda t, y: y**3, lambda t, y: y / t]), times, methods, options)
@pytest.mark.filterwarnings("ignore")
def test_any_options_of_a_sound_problem_give_a_solution_or_a_named_error(f, t, method, options):
    solution_or_named_error(solve, f, ONE.clone().requires_grad_(), t, method, max_steps=40, **options)


@each_fuzz
@given(st.sampled_from(EXPLICIT), st.dictionaries(
    st.sampled_from(["step_size", "grid_constructor", "interp", "perturb", "first_step", "max_step", "min_step", "safety",
                     "ifactor", "dfactor", "jump_t", "step_t", "norm", "dtype", "other"]),
    st.one_of(sane, numbers, st.sampled_from(["linear", "cubic", torch.float64, torch.tensor([.5]), lambda f, y, t: t])),
    max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_any_options_of_odeint_give_a_solution_or_a_named_error(method, options):
    options = options | {"max_num_steps": 40}
    solution_or_named_error(odeint, decay, ONE, torch.tensor([0., .3, 1.]), method=method, options=options)
