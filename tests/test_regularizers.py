"""Regularizers: each measures what its formula says, is differentiated right by every gradient, and leaves the steps alone."""
import copy
import math
import pickle

import pytest
import torch
from torch import nn

from neuralode_nb import Adjoint, Event, solve
from neuralode_nb.models.blocks import ODEBlock, sum_penalties
from neuralode_nb.models.fields import MLP, ConvField, LinearField
from neuralode_nb.models.regularizers import (
    INTEGRALS,
    Augmented,
    Regularizers,
    error_sum,
    penalized,
    random_end,
    random_signs,
    slope_and_product,
    squares,
    time_derivative,
)
from neuralode_nb.ode.imex import Split

F64 = torch.float64
TURN = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=F64)                       # |y| and |f| = 2 |y| are constant
ALL = Regularizers(kinetic=1.0, jacobian=1.0, taylor=1.0, order=3)
TIGHT = {"rtol": 1e-10, "atol": 1e-10, "method": "dopri8"}                     # of high order: few steps


def states(n=3): return torch.randn(n, 2, dtype=F64)


class Equal:
    "Accepts every step, and makes none longer or shorter."
    def init(self): return ()
    def next(self, state, ratio, order): return True, 1.0, state

# ---------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("end, batch, gradient", [(1.5, "joint", "checkpoint"), (-1.5, "joint", "adjoint"),
                                                  (1.5, "sample", "checkpoint"), (-1.5, "sample", "direct")])
def test_the_integrals_of_a_rotation(end, batch, gradient):
    y0 = states()
    _, found = penalized(LinearField(2, TURN), y0, [0.0, end], ALL, batch=batch, gradient=gradient, **TIGHT)
    size = squares(y0).mean().item() * 1.5
    assert abs(found["kinetic"].item() - 4 * size) < 1e-7 * size
    assert abs(found["taylor"].item() - 64 * size) < 1e-6 * size                # d³y/dt³ = A³ y
    assert abs(found["jacobian"].item() - 4 * 2 * 1.5) < 1e-8                   # |εᵀA|² is 8 for all signs


def test_the_estimate_of_the_jacobian_is_the_frobenius_norm_on_average():
    torch.manual_seed(0)
    f, y = MLP(3, 8), torch.randn(1, 3)
    exact = torch.func.jacrev(lambda y: f(torch.tensor(0.0), y))(y).square().sum()
    eps = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    found = [squares(slope_and_product(f, torch.tensor(0.0), y, e[None])[1]) for e in eps]
    torch.testing.assert_close(torch.stack(found).mean(), exact)
    assert random_signs({"a": torch.zeros(50, dtype=torch.bfloat16)})["a"].abs().min() == 1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_a_solution_through_time_and_state(order):
    # y = sin(t) e^t solves y' = y + cos(t) e^t; its derivatives are imaginary parts of (1 + i)^K e^((1 + i) t)
    f = lambda t, y: y + t.cos() * t.exp()
    t = torch.tensor(0.4, dtype=F64)
    wanted = (torch.exp((1 + 1j) * t) * (1 + 1j) ** order).imag
    torch.testing.assert_close(time_derivative(f, order)(t, t.sin() * t.exp()), wanted)


def test_derivatives_go_through_convolutions_with_a_graph():
    f, y = ConvField(4), torch.randn(2, 4, 5, 5)
    block = ODEBlock(f, method="midpoint", step_size=0.5, jacobian=0.1, taylor=0.1, order=3)
    block(y)
    block.penalty.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in f.parameters()) and f.convs[0].weight.grad.any()


def test_samples_may_be_in_tuples_and_dicts_or_absent():
    A, y0 = LinearField(2, TURN), states()
    halves = lambda t, s: dict(zip(("q", "p"), A(t, torch.stack([s["q"], s["p"]], -1)).unbind(-1)))
    f = nn.Module()
    f.inner, f.forward = A, halves
    plain, parts = ODEBlock(A, kinetic=1.0, taylor=1.0, **TIGHT), ODEBlock(f, kinetic=1.0, taylor=1.0, **TIGHT)
    end = parts({"q": y0[:, 0], "p": y0[:, 1]})
    torch.testing.assert_close(torch.stack([end["q"], end["p"]], -1), plain(y0))
    for name in ("kinetic", "taylor"): torch.testing.assert_close(parts.penalties[name], plain.penalties[name])
    block = ODEBlock(lambda t, y: -y, kinetic=1.0, **TIGHT)
    block(torch.tensor(2.0, dtype=F64))                                        # no axis: one sample
    assert abs(block.penalty.item() - 2 * (1 - math.exp(-2))) < 1e-8
    assert block(torch.zeros(0, 3)).shape == (0, 3) and block.penalty.item() == 0
    torch.testing.assert_close(squares((torch.ones(4, 2, 3), torch.ones(4, 2)), lead=1), torch.full((4, 2), 4.0))


def test_complex_and_half_states():
    block = ODEBlock(lambda t, y: 2j * y, kinetic=1.0, jacobian=1.0, taylor=1.0, **TIGHT)
    block(torch.tensor([[1 + 1j]], dtype=torch.complex128))
    assert not block.penalty.is_complex()
    for name, wanted in (("kinetic", 8.0), ("jacobian", 4.0), ("taylor", 32.0)):
        assert abs(block.penalties[name].item() - wanted) < 1e-6
    half = ODEBlock(MLP(2).bfloat16(), kinetic=1.0, jacobian=1.0)
    half(torch.ones(3, 2, dtype=torch.bfloat16))
    half.penalty.backward()
    assert half.f.layers[0].weight.grad.isfinite().all()

# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("name", INTEGRALS)
def test_gradients_of_the_integrals_against_central_differences(name, gradient):
    f, y0 = MLP(2, 4, time=True).double(), states().requires_grad_()
    weight = f.layers[0].weight
    block = ODEBlock(f, gradient=gradient, **{name: 1.0}, **TIGHT)
    def value():
        torch.manual_seed(3)                                                   # the same signs
        block(y0)
        return block.penalty
    g_y, g_w = torch.autograd.grad(value(), [y0, weight])
    v_y, v_w, h = torch.randn_like(y0), torch.randn_like(weight), 1e-5
    sides = []
    for s in (h, -h):
        with torch.no_grad():
            y0.add_(s * v_y), weight.add_(s * v_w)
            sides.append(value().item())
            y0.sub_(s * v_y), weight.sub_(s * v_w)
    slope = (g_y * v_y).sum().item() + (g_w * v_w).sum().item()
    assert abs(slope) > 1e-3 and abs(slope - (sides[0] - sides[1]) / (2 * h)) < 1e-6 * abs(slope)


def test_all_gradients_agree():
    f, y0, found = MLP(2, 6).double(), states(), {}
    for gradient in ("direct", "checkpoint", "adjoint", Adjoint(norm="seminorm"), Adjoint(rtol=1e-9, atol=1e-9)):
        block = ODEBlock(f, gradient=gradient, kinetic=1.0, jacobian=1.0, taylor=1.0, **TIGHT)
        torch.manual_seed(0)
        found[str(gradient)] = torch.autograd.grad(block(y0).sum() + block.penalty, list(f.parameters()))
    first = found.pop("direct")
    for name, other in found.items():
        for a, b in zip(first, other): torch.testing.assert_close(a, b, rtol=1e-10 if name == "checkpoint" else 1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3", "adaptive_heun", "dopri8"])
@pytest.mark.parametrize("more", [{}, {"kinetic": 1.0}], ids=["alone", "with an integral"])
def test_the_error_penalty_against_central_differences_with_frozen_steps(method, more):
    f, y0 = MLP(2, 4, time=True).double(), states()
    for p in f.parameters(): p.data.mul_(3)                                    # else the estimates are near rounding
    weight, regularizers = f.layers[0].weight, Regularizers(error=1.0, **more)
    def value(): return penalized(f, y0, [0.0, 1.0], regularizers, method=method, gradient="direct", controller=Equal(),
                                  first_step=0.5)[1]["error"]
    slope, = torch.autograd.grad(value(), weight)
    v, h = torch.randn_like(weight), 1e-5
    with torch.no_grad():
        weight.add_(h * v)
        up = value().item()
        weight.sub_(2 * h * v)
        down = value().item()
    assert abs((slope * v).sum().item() - (up - down) / (2 * h)) < 1e-6 * abs((up - down) / (2 * h))


def test_the_error_penalty_is_that_of_the_steps():
    # y' = -y by Heun with Euler: e = h² y / 2, and y shrinks by 1 - h + h²/2
    y0, h = torch.tensor([[1.0], [3.0]], dtype=F64), 0.1
    for t in ([0.0, 1.0], [0.0, -1.0]):
        f = (lambda t, y: -y) if t[1] > 0 else (lambda t, y: y)
        done = solve(f, y0, t, "adaptive_heun", gradient="direct", dense=True, controller=Equal(), first_step=h)
        wanted = sum(2 * h * h * h / 2 * (1 - h + h * h / 2) ** n for n in range(10))
        assert abs(error_sum(done.dense, "adaptive_heun").item() - wanted) < 1e-12


def test_a_zero_error_has_a_finite_gradient():
    f = LinearField(1, [[0.0]])
    block = ODEBlock(f, gradient="direct", error=1.0, kinetic=1.0)
    block(torch.ones(2, 1))
    assert block.penalty.item() == 0
    block.penalty.backward()
    assert f.matrix.grad.isfinite().all()

# --------------------------------------------------------------------------------------------------- the steps are plain


@pytest.mark.parametrize("method", ["tsit5", "dopri8", "bosh3", "kvaerno3", "rodas5p", "rk4"])
@pytest.mark.parametrize("batch", ["joint", "sample"])
def test_the_steps_are_those_of_the_plain_problem(method, batch):
    torch.manual_seed(1)
    f, y0 = MLP(2, 16, time=True).double(), 3 * states(4)
    for p in f.parameters(): p.data.mul_(2)
    size = {"step_size": 0.1} if method == "rk4" else {}
    options = {"method": method, "rtol": 1e-5, "atol": 1e-6, "batch": batch, "gradient": "direct", **size}
    with torch.no_grad():
        plain = solve(f, y0, [0.0, 1.0], **options)
        with_all, _ = penalized(f, y0, [0.0, 1.0], Regularizers(1e3, 1e3, 1e3, 2), **options)
    iterates = method == "kvaerno3"             # and its iterations, whose norm is over all of the state, may end a round earlier
    torch.testing.assert_close(with_all.y, plain.y, rtol=1e-6 if iterates else 1e-9, atol=1e-9)
    for count in ("accepted", "rejected") + ("f_evals",) * (not iterates):
        assert torch.equal(torch.as_tensor(getattr(with_all.stats, count)), torch.as_tensor(getattr(plain.stats, count)))


@pytest.mark.parametrize("tolerances", [
    {"rtol": torch.tensor([1e-4, 1e-7]), "atol": torch.tensor([1e-4, 1e-7])}, {"rtol": 1e-7, "atol": 0.0},
    {"norm": lambda y: y.abs().max()}])
def test_tolerances_and_norms_speak_of_the_state_alone(tolerances):
    f, y0 = MLP(2, 16).double(), 3 * states(4)
    plain, more = ODEBlock(f, **tolerances), ODEBlock(f, kinetic=1.0, jacobian=1.0, **tolerances)
    plain(y0), more(y0)
    assert (more.nfe, more.stats.rejected) == (plain.nfe, plain.stats.rejected)


@pytest.mark.parametrize("atol", [{"a": 1e-3, "b": 1e-9}, torch.tensor([1e-3] * 4 + [1e-9] * 2)])
def test_structured_tolerances(atol):
    f = lambda t, s: {"a": -3 * s["b"].sum() * s["a"], "b": s["a"].sum(1).sin()}
    y0 = {"a": torch.ones(2, 2), "b": torch.ones(2)}
    plain, more = ODEBlock(f, rtol=1e-6, atol=atol), ODEBlock(f, rtol=1e-6, atol=atol, kinetic=1.0)
    plain(y0), more(y0)
    assert more.nfe == plain.nfe and more.penalty > 0


def test_in_evaluation_nothing_is_measured_and_nothing_is_paid():
    class Counted(MLP):
        calls = 0
        def forward(self, t, y):
            self.calls += 1
            return super().forward(t, y)
    f, y0 = Counted(2, 8), torch.randn(3, 2)
    block = ODEBlock(f, kinetic=1.0, jacobian=1.0, taylor=1.0, error=1.0, steer=0.5, gradient="direct").eval()
    with torch.no_grad(): end = block(y0)
    assert f.calls == block.nfe and block.penalty.item() == 0 and block.penalties == {} and sum_penalties(block).item() == 0
    with torch.no_grad(): wanted = solve(f, y0, [0.0, 1.0], rtol=1e-3, atol=1e-3, gradient="direct")
    assert torch.equal(end, wanted.y[-1]) and block.nfe == wanted.stats.f_evals
    f.calls = 0
    block.train()(y0)
    assert f.calls > block.nfe and set(block.penalties) == {*INTEGRALS, "error"}

# ------------------------------------------------------------------------------------------------------------- the block


def test_a_random_end_is_uniform_in_training_and_absent_in_evaluation():
    block, one = ODEBlock(lambda t, y: torch.ones_like(y), (0.0, 2.0), steer=0.5), torch.zeros(1, dtype=F64)
    ends = torch.cat([block(one) for _ in range(100)])
    assert 1.5 <= ends.min() < 1.55 and 2.45 < ends.max() <= 2.5 and abs(ends.mean() - 2) < 0.1
    assert abs(ends.var() - 1 / 12) < 0.03
    path = block(one, torch.linspace(0, 2, 3))
    assert abs(path[-1].item() - 2) < 1e-12                                     # times of one's own are kept
    assert abs(block.eval()(one).item() - 2) < 1e-12
    assert abs(random_end((1.0, 0.0), 0.25)[-1]) <= 0.25


def test_penalties_are_weighted_and_added_over_blocks():
    y0 = states()
    net = nn.Sequential(ODEBlock(LinearField(2, TURN), kinetic=0.5, jacobian=0.25, gradient="direct", error=2.0),
                        nn.Linear(2, 2).double(), ODEBlock(MLP(2).double(), taylor=3.0), ODEBlock(MLP(2).double()))
    assert sum_penalties(net).item() == 0                                       # not used yet
    net(y0)
    a, b = net[0].penalties, net[2].penalties
    wanted = 0.5 * a["kinetic"] + 0.25 * a["jacobian"] + 2 * a["error"] + 3 * b["taylor"]
    torch.testing.assert_close(sum_penalties(net), wanted)
    assert net[3].penalties == {}
    sum_penalties(net).backward()
    assert net[2].f.layers[0].weight.grad.any()


def test_a_block_with_penalties_can_be_kept_and_read_otherwise():
    block, y0 = ODEBlock(MLP(2), kinetic=0.1, taylor=0.2, order=3), torch.randn(3, 2)
    block(y0)
    for same in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert same.regularizers == block.regularizers and torch.equal(same(y0), block(y0))
        assert not copy.deepcopy(block).penalty.requires_grad and block.penalty.requires_grad
    other = block.using(kinetic=0.0, method="bosh3")
    assert other.f is block.f and other.regularizers == Regularizers(taylor=0.2, order=3)
    assert "kinetic=0.1, taylor=0.2, order=3" in repr(block) and "order" not in repr(ODEBlock(MLP(2)))
    assert list(block.state_dict()) == [f"f.{n}" for n in block.f.state_dict()]


def test_events_and_arguments_and_dense_output_speak_of_the_state_alone():
    fall = lambda t, y, g: torch.stack([y[1], g])
    bounce = Event(lambda t, y, g: y[0], direction=-1, terminal=True)
    start, g = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor(-2.0, dtype=F64, requires_grad=True)
    done, found = penalized(fall, start, [0.0, 5.0], Regularizers(kinetic=1.0), args=g, events=bounce, **TIGHT)
    assert abs(done.events[0].t.item() - 1) < 1e-7 and done.y.shape == (2, 2) and done.events[0].y.shape == (1, 2)
    assert abs(found["kinetic"].item() - (4 / 3 + 4) / 2) < 1e-6                # ∫ (2t)² + 4 over [0, 1]; two numbers, two samples
    again = Event(lambda t, y: y[0], direction=-1, jump=lambda t, y: -y)
    down = lambda t, y: fall(t, y, -2.0 + 0 * y[0])
    jumped, _ = penalized(down, start, [0.0, 1.5], Regularizers(kinetic=1.0), events=again, **TIGHT)
    assert jumped.y[-1, 0] > 0
    curve, _ = penalized(lambda t, y: -y, start, [0.0, 1.0], Regularizers(kinetic=1.0), gradient="direct", dense=True, **TIGHT)
    assert abs(curve(0.5)[0].item() - math.exp(-0.5)) < 1e-8


def test_integrals_ride_along_with_a_field_in_two_parts():
    f, y0 = Split(LinearField(2, TURN), LinearField(2, -3 * torch.eye(2, dtype=F64))), states()
    _, found = penalized(f, y0, [0.0, 1.0], Regularizers(kinetic=1.0, taylor=1.0), method="kencarp4", rtol=1e-9, atol=1e-9)
    size = squares(y0).mean().item() * (1 - math.exp(-6)) / 6
    assert abs(found["kinetic"].item() / (13 * size) - 1) < 1e-5 and abs(found["taylor"].item() / (169 * size) - 1) < 1e-5


def test_the_augmented_field_stands_alone():
    f, y0 = LinearField(2, TURN), states()
    field = Augmented(f, Regularizers(kinetic=1.0), y0, each=True)
    r = solve(field, field.start, [0.0, 1.0], **TIGHT).y[1][-1]
    torch.testing.assert_close(r[:, 0], 4 * squares(y0))

# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("options, error, message", [
    ({"kinetic": -1.0}, ValueError, "kinetic=-1.0 must be finite, and positive; 0 turns it off"),
    ({"taylor": math.nan}, ValueError, "taylor=nan must be finite"),
    ({"jacobian": math.inf}, ValueError, "jacobian=inf must be finite"),
    ({"error": True}, TypeError, "error=True must be a number, such as error=0.01"),
    ({"taylor": 1.0, "order": 1}, ValueError, "order=1 must be at least 2; for the first derivative use kinetic"),
    ({"taylor": 1.0, "order": 2.0}, TypeError, "order=2.0 must be an integer"),
    ({"steer": 1.0}, ValueError, "steer=1.0 must be below 1, the distance of the end t=1 from the time before it: lower it"),
    ({"steer": 0.6, "t": (0.0, 0.5, 1.0)}, ValueError, "steer=0.6 must be below 0.5"),
    ({"error": 1.0}, ValueError, "error=1.0 is not available with gradient='checkpoint', .* use gradient='direct'"),
    ({"error": 1.0, "gradient": Adjoint()}, ValueError, "not available with gradient=Adjoint"),
    ({"error": 1.0, "gradient": "direct", "method": "rodas5p"}, ValueError, "method='rodas5p': use an explicit method"),
    ({"error": 1.0, "gradient": "direct", "method": "rk4", "step_size": 0.1}, ValueError, "method='rk4': use an explicit method"),
    ({"error": 1.0, "gradient": "direct", "step_size": 0.1}, ValueError, "step_size=0.1: leave one of them out"),
    ({"error": 1.0, "gradient": "direct", "batch": "sample"}, ValueError, "batch='sample': use batch='joint'"),
])
def test_what_cannot_be_is_refused_when_the_block_is_built(options, error, message):
    with pytest.raises(error, match=message): ODEBlock(MLP(2), **options)


def test_what_cannot_ride_along_is_refused_when_solved():
    f, y = (lambda t, y: (y[1], -y[0])), torch.ones(2)
    with pytest.raises(ValueError, match="kinetic=1.0 cannot ride along with method='leapfrog'"):
        penalized(f, (y, y), [0.0, 1.0], Regularizers(kinetic=1.0), method="leapfrog", step_size=0.1)
    with pytest.raises(ValueError, match="events=.*leave one of them out"):
        penalized(f, (y, y), [0.0, 1.0], Regularizers(error=1.0), gradient="direct", events=lambda t, y: y[0][0])
