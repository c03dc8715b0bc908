"""All test problems: shapes, dtypes, derivatives, flags and answers."""
import pytest
import torch

from neuralode_nb.ode.detest import DETEST
from neuralode_nb.ode.methods import TABLEAUS, find_tableau
from neuralode_nb.ode.problems import PROBLEMS, observed_order
from neuralode_nb.ode.stiff_problems import STIFF

ALL = PROBLEMS | DETEST | STIFF


def test_names_are_unique_and_flags_right():
    assert len(ALL) == len(PROBLEMS) + len(DETEST) + len(STIFF) and len(DETEST) == 25
    assert all(p.stiff for p in STIFF.values()) and not any(p.stiff for p in (PROBLEMS | DETEST).values())
    assert all(p.name == name and p.note for name, p in ALL.items())


@pytest.mark.parametrize("name", ALL)
def test_field_follows_dtype_and_shape(name):
    p = ALL[name]
    t = p.span[0] + 0.3*(p.span[1] - p.span[0])
    full = p.f(t, p.y0)
    assert full.shape == p.y0.shape == p.final.shape and full.dtype == torch.float64
    for time in (t, torch.tensor(t, dtype=torch.float64), torch.tensor(t, dtype=torch.float32)):
        half = p.f(time, p.y0.float())
        assert half.dtype == torch.float32
        assert torch.allclose(half.double(), full, rtol=1e-3, atol=1e-3*(1 + full.abs().max().item()))
    stacked = p.f(t, torch.stack([p.y0, p.y0]))
    assert torch.allclose(stacked[1], full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_field_is_differentiable(name):
    p = ALL[name]
    t, y = p.span[0] + 0.1, p.final.clone()
    direction = torch.linspace(1, 2, len(y), dtype=torch.float64)*y.abs().clamp_min(1e-3)
    _, slope = torch.autograd.functional.jvp(lambda z: p.f(t, z), y, direction)
    h = 1e-6
    central = (p.f(t, y + h*direction) - p.f(t, y - h*direction))/(2*h)
    assert torch.allclose(slope, central, rtol=1e-4, atol=1e-6*(1 + slope.abs().max().item()))


@pytest.mark.parametrize("name", ALL)
def test_autonomous_says_whether_time_matters(name):
    p = ALL[name]
    y = p.final + 0.1
    early, late = p.f(p.span[0] + 0.1, y), p.f(p.span[0] + 0.7, y)
    assert torch.equal(early, late) == p.autonomous


@pytest.mark.parametrize("name", [n for n, p in ALL.items() if p.exact])
def test_exact_solutions_take_many_times_at_once(name):
    p = ALL[name]
    t = torch.linspace(*p.span, 4, dtype=torch.float64)
    assert p.exact(t).shape == (4, len(p.y0)) and p.exact(t).dtype == torch.float64
    assert torch.allclose(p.exact(t)[0], p.y0, atol=1e-13) and torch.allclose(p.exact(t)[-1], p.final, atol=1e-12)


def fixed(name):
    k = find_tableau(name).coefficients()

    def integrate(p, n):
        h, y = (p.span[1] - p.span[0])/n, p.y0
        for m in range(n):
            slopes = []
            for node, row in zip(k.nodes.tolist(), k.row_terms):
                inner = y + h*sum(x*slopes[j] for j, x in row)
                slopes.append(p.f(p.span[0] + (m + node)*h, inner))
            y = inner
        return y
    return integrate


STEPS = {1: (256, 512, 1024), 8: (16, 20, 24, 32)}


@pytest.mark.parametrize("name", sorted(TABLEAUS))
def test_observed_order_is_the_claim(name):
    claim = find_tableau(name).order
    found = observed_order(fixed(name), PROBLEMS["manufactured"], STEPS.get(claim, (32, 64, 128)))
    assert found == pytest.approx(claim, abs=0.15)
