"""What is wrong is said, by name, with a remedy; what can go on goes on; nothing hangs."""
import inspect
import math
import pickle
from time import sleep
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from neuralode_nb import PID, Adjoint, Event, Implicit, SolveError, Status, Tableau, odeint, solve
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


# ------------------------------------------------------------------------------------- every kind of bad input and fault


class Refused(NamedTuple):
    "An error that names what is wrong; `calls` of f at most before it comes."
    changes: object       # of a good solve, y' = -y from 1 over [0, 1], or a function that makes them
    error: type
    words: list
    calls: int = 0


class Fails(NamedTuple):
    "A numerical failure with this status; nothing hangs."
    changes: object
    status: Status
    words: list
    calls: int = 20_000


class Right(NamedTuple):
    "A correct answer: the sum of the last state, or what `find` finds in the solution."
    changes: object
    value: float
    tolerance: float
    calls: int = 20_000
    find: object = lambda sol: sol.y[-1].sum()


def early(**options):
    "A solve of y' = -y that stopped after three steps."
    return solve(decay, options.pop("y0", ONE), [0., .5, 1.], throw=False, **{"max_steps": 3, **options})


def at_half(before, after):
    "A field that changes at t = 0.5."
    return lambda t, y: (before if t < .5 else after) * torch.ones_like(y)


def raises(t, y): raise KeyError("mine")


class Broken(nn.Module):
    "A module whose weight is NaN."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([math.nan], dtype=torch.float64))
    def forward(self, t, y): return self.w * y


class Learned(Broken):
    "A module whose weight is sound."
    def __init__(self):
        super().__init__()
        nn.init.constant_(self.w, -1.)


E1, HALF = math.exp(-1), [0., .5, 1.]
SAMPLES = torch.tensor([[1.], [math.nan], [2.]], dtype=torch.float64)
heavy = lambda t, y: -1e6 * (y - torch.cos(t))
square = lambda t, y: y * y

FAULTS = {
    # arguments of the wrong kind
    "unknown method": Refused(dict(method="dopri6"), ValueError, ["dopri6", "did you mean 'dopri"]),
    "method of the wrong type": Refused(dict(method=5), TypeError, ["method=5", "Tableau"]),
    "implicit tableau without steps": Refused(dict(method=Tableau("ie", [[1]], [1])), ValueError, ["'ie'", "pass step_size"]),
    "no function": Refused(dict(f=3), TypeError, ["f=3", "callable"]),
    "function of one argument": Refused(dict(f=lambda y: y), TypeError, ["f takes (y)", "lambda t, y: net(y)"]),
    "module of one argument": Refused(dict(f=nn.Linear(1, 1)), TypeError, ["f(t, y)", "lambda t, y: net(y)"]),
    "function without args": Refused(dict(args=1), TypeError, ["f(t, y, args)"]),
    "state is a number": Refused(dict(y0=1.), TypeError, ["y0", "float", "torch.tensor"]),
    "state holds a number": Refused(dict(y0=(ONE, 1.)), TypeError, ["y0", "float", "torch.tensor"]),
    "state of whole numbers": Refused(dict(y0=torch.ones(2, dtype=torch.int64)), TypeError, ["y0", "int64", "float32"]),
    "state of truth values": Refused(dict(y0=torch.ones(2, dtype=torch.bool)), TypeError, ["y0", "bool"]),
    "empty tuple": Refused(dict(y0=()), ValueError, ["y0 is empty"]),
    "mixed dtypes": Refused(dict(y0=(ONE, ONE.float())), ValueError, ["y0 mixes dtypes", "float32", "float64"]),
    "mixed devices": Refused(dict(y0=(ONE, ONE.to("meta"))), ValueError, ["y0 mixes devices", "cpu", "meta"]),
    "time is a number": Refused(dict(t=1.), TypeError, ["t=1.0", "sequence"]),
    "no times": Refused(dict(t=torch.tensor([])), ValueError, ["t has shape (0,)"]),
    "an empty list of times": Refused(dict(t=[]), (ValueError, TypeError), ["t"]),
    "times in two dimensions": Refused(dict(t=torch.zeros(2, 2)), ValueError, ["t has shape (2, 2)", "batch='sample'"]),
    "times of whole numbers": Refused(dict(t=torch.tensor([0, 1])), TypeError, ["t has dtype torch.int64", "t.double()"]),
    "complex times": Refused(dict(t=torch.tensor([0j, 1])), TypeError, ["t has dtype torch.complex64"]),
    "time is NaN": Refused(dict(t=[0., math.nan]), ValueError, ["t holds nan", "finite"]),
    "time is infinite": Refused(dict(t=[0., math.inf]), ValueError, ["t holds inf", "finite"]),
    "times not sorted": Refused(dict(t=[0., 2., 1., 3.]), ValueError, ["not monotone", "t[2]=1", "sort t"]),
    "times back and forth": Refused(dict(t=[0., 1., 0.]), ValueError, ["t"]),
    "negative rtol": Refused(dict(rtol=-1e-3), ValueError, ["rtol=-0.001", "positive"]),
    "rtol is NaN": Refused(dict(rtol=math.nan), ValueError, ["rtol=nan"]),
    "infinite atol": Refused(dict(atol=math.inf), ValueError, ["atol=inf", "finite"]),
    "rtol is text": Refused(dict(rtol="small"), TypeError, ["rtol"]),
    "both tolerances zero": Refused(dict(rtol=0., atol=0.), ValueError, ["rtol", "atol", "zero"]),
    "tolerance of the wrong shape": Refused(dict(atol=torch.ones(3)), ValueError, ["atol has shape (3,)", "(1,)"]),
    "tolerance of the wrong structure": Refused(dict(atol=(1e-3, 1e-3)), ValueError, ["atol has structure", "match"]),
    "tolerance that requires grad": Refused(dict(rtol=torch.ones(1, requires_grad=True)), ValueError, ["rtol", "detach()"]),
    "unknown gradient": Refused(dict(gradient="backprop"), ValueError, ["gradient='backprop'", "checkpoint"]),
    "another unknown gradient": Refused(dict(gradient="rollback"), ValueError, ["gradient='rollback'"]),
    "unknown batch": Refused(dict(batch="each"), ValueError, ["batch='each'", "joint", "sample"]),
    "unknown controller": Refused(dict(controller="pie"), ValueError, ["controller='pie'", "'pi'"]),
    "controller that is none": Refused(dict(controller=3), TypeError, ["controller=3", "init()"]),
    "step_size zero": Refused(dict(step_size=0.), ValueError, ["step_size=0", "positive"]),
    "step_size is NaN": Refused(dict(step_size=math.nan), ValueError, ["step_size=nan"]),
    "step_size too small": Refused(dict(step_size=1e-9), ValueError, ["step_size=1e-09", "max_steps"]),
    "fixed steps, two times": Refused(dict(method="rk4"), ValueError, ["rk4", "step_size", "tsit5"]),
    "negative first_step": Refused(dict(first_step=-.1), ValueError, ["first_step=-0.1"]),
    "negative max_step": Refused(dict(max_step=-1), ValueError, ["max_step=-1"]),
    "negative min_step": Refused(dict(min_step=-1), ValueError, ["min_step=-1"]),
    "min_step above max_step": Refused(dict(min_step=1., max_step=.1), ValueError, ["min_step", "max_step"]),
    "no steps allowed": Refused(dict(max_steps=0), ValueError, ["max_steps=0", "positive"]),
    "max_steps is text": Refused(dict(max_steps="many"), TypeError, ["max_steps='many'"]),
    "step_t is text": Refused(dict(step_t="abc"), TypeError, ["step_t"]),
    "jump_t is NaN": Refused(dict(jump_t=[math.nan]), ValueError, ["jump_t", "finite"]),
    "norm is no function": Refused(dict(norm="max"), TypeError, ["norm='max'", "callable"]),
    "adjoint norm": Refused(lambda: dict(gradient=Adjoint(norm="max")), ValueError, ["norm='max'", "seminorm"]),
    "adjoint tolerance": Refused(lambda: dict(gradient=Adjoint(rtol=-1.)), ValueError, ["adjoint rtol=-1"]),
    "adjoint method": Refused(lambda: dict(gradient=Adjoint(method="dopri6")), ValueError, ["dopri6"]),
    # what f hands back
    "f returns nothing": Refused(dict(f=lambda t, y: None), TypeError, ["f returned NoneType"], 2),
    "f returns a number": Refused(dict(f=lambda t, y: 1.), TypeError, ["f returned float"], 2),
    "f returns a wrong shape": Refused(dict(f=lambda t, y: torch.ones(2)), ValueError, ["f returned shape (2,)", "(1,)"], 2),
    "f returns a complex number for a real state": Refused(dict(f=lambda t, y: 1j * y), TypeError, ["make y0 complex"], 2),
    "f returns another structure": Refused(dict(f=lambda t, y: {"a": y}), TypeError, ["f returned dict"], 2),
    "f returns a lower precision": Right(dict(f=lambda t, y: -y.float()), E1, 1e-5),
    "f returns whole numbers": Right(dict(f=lambda t, y: torch.ones(1, dtype=torch.int64)), 2., 1e-12),
    "f raises": Refused(dict(f=raises), KeyError, ["mine"], 1),
    "f returns NaN": Fails(dict(f=lambda t, y: y * math.nan), Status.non_finite_field, ["log, sqrt or division"], 10),
    "f returns infinity": Fails(dict(f=lambda t, y: y * math.inf), Status.non_finite_field, ["not finite"], 10),
    "f is NaN from some time on": Fails(dict(f=at_half(-1., math.nan)), Status.non_finite_field, ["t=0.5"], 2000),
    "f is NaN from some time on, implicit": Fails(
        dict(f=at_half(-1., math.nan), method="kvaerno5"), Status.newton_failed, ["t=0.5"]),
    "f leaves its domain": Fails(dict(f=lambda t, y: -y.sqrt() - .1, t=[0., 3.]), Status.non_finite_field, ["sqrt"]),
    # numbers that are not finite
    "NaN in y0": Fails(dict(y0=ONE * math.nan), Status.non_finite_state, ["check y0"], 5),
    "infinity in y0": Fails(dict(y0=ONE * math.inf), Status.non_finite_state, ["check y0"], 5),
    "NaN in a parameter": Fails(lambda: dict(f=Broken()), Status.non_finite_parameter, ["parameter w", "learning rate"], 5),
    "NaN in args": Fails(
        dict(f=lambda t, y, k: -k * y, args=torch.tensor(math.nan)), Status.non_finite_parameter, ["args[0]"], 5),
    "NaN in one sample of a batch": Fails(dict(y0=SAMPLES), Status.non_finite_state, ["sample 1"], 5),
    "NaN in one sample, each with its own steps": Right(
        dict(y0=SAMPLES, batch="sample", throw=False), 2 * E1, 1e-5, 500, lambda sol: sol.y[-1][2, 0]),
    "NaN in one sample is told apart": Right(
        dict(y0=SAMPLES, batch="sample", throw=False), 1., 0., 500, lambda sol: sol.status[1] is Status.non_finite_state),
    # solutions that have no end, or no steps
    "blow-up": Fails(dict(f=square, t=[0., 2.]), Status.blow_up, ["without bound", "infinite at about t=1", "end t before"]),
    "blow-up with a stiff method": Fails(
        dict(f=square, t=[0., 2.], method="kvaerno5"), Status.blow_up, ["infinite at about t=0.9999"]),
    "blow-up with a Rosenbrock method": Fails(
        dict(f=square, t=[0., 2.], method="rodas5p"), Status.blow_up, ["infinite at about t=1"]),
    "blow-up of exp": Fails(dict(f=lambda t, y: y.exp(), y0=0 * ONE, t=[0., 2.]), Status.blow_up, ["without bound"]),
    "blow-up backward": Fails(dict(f=square, y0=-ONE, t=[0., -2.]), Status.blow_up, ["infinite at about t=-1"]),
    "blow-up of one sample": Fails(
        dict(f=square, y0=torch.tensor([[-1.], [.5], [1.]]).double(), t=[0., 3.]), Status.blow_up, ["sample 2"]),
    "blow-up with fixed steps": Fails(
        dict(f=square, t=torch.linspace(0, 3, 61), method="rk4"), Status.non_finite_field, ["a solution that blows up"]),
    "a pole of f": Fails(dict(f=lambda t, y: 1 / (1 - t) + 0 * y, t=[0., 2.]), Status.blow_up, ["infinite at about t=1"]),
    "quenching is no blow-up": Fails(
        dict(f=lambda t, y: -1 / y, method="dopri8"), Status.step_underflow, ["t=0.5", "singularity"]),
    "overflow is no blow-up": Fails(
        dict(f=lambda t, y: y, t=[0., 2000.], method="dopri8"), Status.non_finite_field, ["t=709"], 40_000),
    "an integrable pole": Right(dict(f=lambda t, y: (1 - t).abs() ** -.5 + 0 * y, y0=0 * ONE, t=[0., 2.]), 4., 1e-3),
    "a jump": Right(dict(f=at_half(1., -3.), rtol=1e-9), 0., 1e-6),
    "a jump that is named": Right(dict(f=at_half(1., -3.), rtol=1e-9, jump_t=.5), 0., 1e-12, 60),
    "a sliding mode": Fails(
        dict(f=lambda t, y: -torch.sign(y), t=[0., 3.], max_steps=400), Status.max_steps, ["max_steps"], 2500),
    "noise": Fails(dict(f=lambda t, y: torch.randn_like(y) * 1e3, max_steps=400), Status.max_steps, ["max_steps"], 2500),
    "stiff with an explicit method": Fails(
        dict(f=heavy, max_steps=400), Status.max_steps, ["stiffness |h λ| about", "stiff problems"], 2500),
    "stiff with a method for it": Right(dict(f=heavy, method="rodas5p"), math.cos(1), 1e-5, 500),
    "stiff, left to auto": Right(dict(f=heavy, method="auto"), math.cos(1), 1e-5, 2000),
    "max_steps": Fails(dict(t=[0., 1e9], max_steps=20), Status.max_steps, ["max_steps", "resume=solution"], 130),
    "max_seconds": Fails(
        dict(f=lambda t, y: (sleep(.01), -y)[1], max_seconds=.03), Status.max_seconds, ["more seconds", "resume"], 30),
    "max_seconds, each sample with its own steps": Fails(
        dict(f=lambda t, y: (sleep(.01), -y)[1], y0=torch.ones(2, 1), max_seconds=.03, batch="sample"), Status.max_seconds,
        ["seconds"], 30),
    "min_step": Fails(
        dict(f=lambda t, y: torch.cos(1e3 * t) * 1e3 + 0 * y, min_step=.01), Status.step_underflow, ["singularity"], 300),
    "a tolerance beyond its precision": Fails(
        dict(y0=torch.ones(3), rtol=1e-14, atol=1e-14, max_steps=300), Status.max_steps, ["loosen rtol/atol"], 2500),
    "Newton's equations without a solution": Fails(
        dict(f=square, t=[0., .9], method="implicit_euler", step_size=.3), Status.newton_failed, ["smaller step_size"], 300),
    "a singular matrix of Newton's method": Fails(
        dict(f=lambda t, y: 10 * y, method="implicit_euler", step_size=.1), Status.newton_failed, ["nonlinear equations"], 300),
    "a singular matrix, adaptive": Right(
        dict(f=lambda t, y: 10 * y, method="kvaerno5", first_step=.5), math.exp(10), 1., 2000),
    "a root finder that cannot": Fails(
        lambda: dict(f=square, method=Implicit("implicit_euler", root="anderson"), step_size=.3), Status.newton_failed,
        ["smaller step_size"], 400),
    # sizes
    "an empty state": Right(dict(y0=torch.zeros(0)), 0., 0., 60),
    "an empty batch": Right(dict(y0=torch.zeros(0, 3), batch="sample"), 0., 0., 60),
    "a scalar state": Right(dict(y0=torch.tensor(1.).double()), E1, 1e-5),
    "one time only": Right(dict(t=[0.]), 1., 0., 2),
    "the same time twice": Right(dict(t=[0., 0., 1., 1.]), E1, 1e-5),
    "huge numbers": Right(dict(y0=1e300 * ONE, atol=0.), 1e300 * E1, 1e295),
    "tiny numbers": Right(dict(y0=1e-300 * ONE, atol=0.), 1e-300 * E1, 1e-305),
    "times of huge size": Right(dict(t=[1e9, 1e9 + 1]), E1, 1e-5),
    "a very short span": Right(dict(t=[0., 1e-300]), 1., 0., 30),
    "a very long span": Right(dict(t=[0., 1e30], max_steps=3000, method="kvaerno5"), 0., 1e-5),
    "a complex state with a real f": Right(
        dict(f=lambda t, y: -y.real, y0=ONE + 0j), E1, 1e-5, 200, lambda sol: sol.y[-1].real.sum()),
    "half precision": Right(dict(y0=ONE.half(), rtol=1e-3, atol=1e-3), E1, 1e-3, 200),
    "bfloat16, implicit": Right(dict(y0=ONE.bfloat16(), rtol=1e-3, atol=1e-3, method="kvaerno5"), E1, 4e-3, 300),
    # batch='sample'
    "samples without an axis": Refused(dict(y0=torch.tensor(1.), batch="sample"), ValueError, ["first axis of samples"]),
    "samples of several lengths": Refused(
        dict(y0=(ONE, torch.ones(2).double()), batch="sample"), ValueError, ["first axis of samples"]),
    "samples with the adjoint": Refused(
        dict(batch="sample", gradient="adjoint", y0=torch.ones(2, 1, dtype=torch.float64, requires_grad=True)), ValueError,
        ["adjoint", "batch='sample'"], calls=1),
    "samples left to auto": Refused(dict(batch="sample", method="auto"), ValueError, ["auto", "per sample"]),
    "samples with a method that cannot": Refused(dict(batch="sample", method="radau5"), ValueError, ["radau5", "per sample"]),
    "samples with too many rows of times": Refused(dict(batch="sample", t=torch.zeros(3, 2)), ValueError, ["t"]),
    "samples in fixed steps, two times": Refused(dict(batch="sample", method="rk4"), ValueError, ["rk4", "step_size"]),
    # events
    "an event that is no function": Refused(dict(events=3), TypeError, ["Event(function=3)", "callable"]),
    "a jump that is no function": Refused(lambda: dict(events=Event(decay, jump=5)), TypeError, ["Event(jump=5)"]),
    "an event in a third direction": Refused(
        lambda: dict(events=Event(decay, direction=2)), ValueError, ["direction=2", "from above"]),
    "an event of two numbers": Refused(
        dict(events=lambda t, y: torch.ones(2)), ValueError, ["events[0] returned shape (2,)", "one number"], 20),
    "events with dense output": Refused(dict(events=lambda t, y: y[0] - .5, dense=True), ValueError, ["dense=True", "events"]),
    # Implicit and Adjoint
    "Implicit of an explicit method": Refused(
        lambda: dict(method=Implicit("tsit5")), ValueError, ["tsit5", "solves no equations"]),
    "Implicit of an unknown method": Refused(lambda: dict(method=Implicit("kvaerno6")), ValueError, ["kvaerno6", "did you mean"]),
    "an unknown Jacobian": Refused(
        lambda: dict(method=Implicit("kvaerno5", "exact")), ValueError, ["jacobian='exact'", "differences"]),
    "a Jacobian of the wrong shape": Refused(
        lambda: dict(method=Implicit("kvaerno5", lambda t, y: torch.ones(2, 2))), ValueError,
        ["jacobian returned shape (2, 2)"], 5),
    "an unknown root finder": Refused(
        lambda: dict(method=Implicit("kvaerno5", root="bisection")), ValueError, ["bisection", "broyden"]),
    "a root finder for linear systems": Refused(
        lambda: dict(method=Implicit("rodas5p", root="broyden")), ValueError, ["linear systems"]),
    "a root finder for a multistep method": Refused(
        lambda: dict(method=Implicit("bdf", root="lbfgs")), ValueError, ["of its own"]),
    "a preconditioner without GMRES": Refused(
        lambda: dict(method=Implicit("kvaerno5", preconditioner=print)), ValueError, ["newton_krylov"]),
    "a preconditioner that is none": Refused(
        lambda: dict(method=Implicit("kvaerno5", root="newton_krylov", preconditioner=3)), TypeError, ["preconditioner=3"]),
    "a Jacobian that is of no use": Refused(
        lambda: dict(method=Implicit("kvaerno5", "differences", root="anderson")), ValueError, ["of no use"]),
    "the adjoint by an implicit method": Refused(
        lambda: dict(y0=ONE.clone().requires_grad_(), method="kvaerno5", gradient="adjoint"), ValueError,
        ["Adjoint(method='tsit5')"], 1),
    "adjoint step": Refused(lambda: dict(gradient=Adjoint(step_size=-1.)), ValueError, ["step_size=-1"]),
    "adjoint limit": Refused(lambda: dict(gradient=Adjoint(max_steps=0)), ValueError, ["adjoint max_steps=0"]),
    # controller, norm, budgets
    "gains that cannot work": Refused(lambda: dict(controller=PID(safety=2.)), ValueError, ["safety=2"]),
    "a controller that never recovers": Refused(lambda: dict(controller=PID(integral=0.)), ValueError, ["integral=0"]),
    "a norm that returns text": Refused(dict(norm=lambda y: "large"), ValueError, ["could not convert"], 5),
    "a norm that is NaN": Refused(dict(norm=lambda y: math.nan), ValueError, ["norm returned nan"], 10),
    "no seconds": Refused(dict(max_seconds=0.), ValueError, ["max_seconds=0", "positive"]),
    "seconds that are NaN": Refused(dict(max_seconds=math.nan), ValueError, ["max_seconds=nan"]),
    # resume
    "resume of a state": Refused(dict(t=HALF, resume=ONE), TypeError, ["must be a Solution"]),
    "resume of what is complete": Refused(lambda: dict(t=HALF, resume=early(max_steps=100)), ValueError, ["complete"]),
    "resume with other times": Refused(lambda: dict(t=[0., 1.], resume=early()), ValueError, ["pass the same t"]),
    "resume from the state that was reached": Refused(
        lambda: dict(t=HALF, y0=.5 * ONE, resume=early()), ValueError, ["pass the same y0"]),
    "resume with another structure": Refused(lambda: dict(t=HALF, y0=(ONE,), resume=early()), ValueError, ["pass the same y0"]),
    "resume in another precision": Refused(
        lambda: dict(t=HALF, y0=ONE.float(), resume=early()), ValueError, ["float32", "float64"]),
    "resume with dense output": Refused(lambda: dict(t=HALF, dense=True, resume=early()), ValueError, ["dense"]),
    "resume of samples": Refused(lambda: dict(t=HALF, batch="sample", resume=early()), ValueError, ["batch='sample'"]),
    "resume with a gradient": Refused(
        lambda: dict(f=Learned(), t=HALF, resume=early()), ValueError, ["torch.no_grad()"], 1),
    "resume from NaN": Refused(
        lambda: dict(t=HALF, y0=ONE * math.nan, resume=early(y0=ONE * math.nan)), ValueError, ["not finite"]),
    "resume as it should be": Right(lambda: dict(t=HALF, resume=early()), E1, 1e-6, 200),
    "resume with a stiff method": Right(lambda: dict(t=HALF, resume=early(), method="rodas5p"), E1, 1e-6, 200),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_or_overcome_and_nothing_hangs(name):
    changes, wanted, *_ = case = FAULTS[name]
    torch.manual_seed(0)
    calls = [0]
    def watched(f):
        if isinstance(f, nn.Module) or not callable(f) or "args" in given: return f
        try: inspect.signature(f).bind(0, 0)
        except TypeError: return f
        def g(t, y): calls[0] += 1; return f(t, y)
        return g
    def run():
        nonlocal given
        given = {"f": decay, "y0": ONE, "t": [0., 1.], **(changes() if callable(changes) else changes)}
        return solve(watched(given.pop("f")), given.pop("y0"), given.pop("t"), **given)
    given = {}
    if isinstance(case, Right):
        sol = run()
        assert abs(float(case.find(sol)) - wanted) <= case.tolerance
    else:
        with pytest.raises(SolveError if isinstance(case, Fails) else wanted) as raised: run()
        text = str(raised.value)
        if isinstance(case, Fails):
            assert raised.value.status is wanted and "Remedy" in text
            assert raised.value.solution.y is not None
        else: assert not isinstance(raised.value, SolveError)
        for word in case.words: assert word in text, text
        assert len(text) < 500
    assert calls[0] <= case.calls, calls


def test_the_table_of_faults_is_long_and_its_good_solve_is_good():
    "What each entry changes is what goes wrong: without a change all is well."
    assert len(FAULTS) >= 70
    sol = solve(decay, ONE, [0., 1.])
    assert sol.status.ok and sol.y[-1].item() == pytest.approx(E1, rel=1e-5)


def test_autocast_is_kept_and_the_state_keeps_its_precision():
    net = nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        sol = solve(lambda t, y: -net(y), torch.ones(1, 3), [0., 1.], rtol=1e-2, atol=1e-2)
    with torch.no_grad(): exact = solve(lambda t, y: -net(y), torch.ones(1, 3), [0., 1.])
    assert sol.y.dtype == torch.float32 and torch.allclose(sol.y, exact.y, atol=3e-2)


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
    assert found.status is Status.blow_up and way * found.blow_up == pytest.approx(1, abs=2e-2) and "Remedy" in text


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
