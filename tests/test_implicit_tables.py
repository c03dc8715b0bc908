"""Implicit, Rosenbrock and additive tables: what the papers claim is derived, and no wrong table can be built."""
import copy
import pickle
from fractions import Fraction

import pytest
import torch

from neuralode_nb.ode.imex_methods import IMEX, AdditiveTableau
from neuralode_nb.ode.implicit_methods import (
    IMPLICIT, collocation, predictor, radau_data, stability, stability_polynomials)
from neuralode_nb.ode.rosenbrock_methods import ROSENBROCK, Rosenbrock
from neuralode_nb.ode.tableau import Tableau
from neuralode_nb.ode.trees import order_conditions

# order, embedded order, dense order, stages, ends in y1, |R(infinity)|
CLAIMS = {
    "implicit_euler": (1, None, 1, 1, True, 0), "implicit_midpoint": (2, None, 1, 1, False, 1),
    "trapezoid": (2, None, 2, 2, True, 1), "sdirk2": (2, None, 2, 2, True, 0), "trbdf2": (2, 3, 2, 3, True, 0),
    "gl2": (2, None, 1, 1, False, 1), "gl4": (4, None, 2, 2, False, 1), "gl6": (6, None, 3, 3, False, 1),
    "radauIIA3": (3, None, 2, 2, True, 0), "radauIIA5": (5, None, 3, 3, True, 0), "radau5": (5, None, 3, 3, True, 0),
    "kvaerno3": (3, 2, 3, 4, True, 0), "kvaerno4": (4, 3, 3, 5, True, 0), "kvaerno5": (5, 4, 4, 7, True, 0)}
ADDITIVE = {"kencarp3": (3, 2, 2, 4), "kencarp4": (4, 3, 3, 6), "kencarp5": (5, 4, 3, 8)}
LINEAR = {"rosenbrock23": (2, 3, 2, 3), "rodas4": (4, 3, 3, 6), "rodas5p": (5, 4, 4, 8)}
ESDIRK = ["trbdf2", "kvaerno3", "kvaerno4", "kvaerno5"]
AXIS = 1j*torch.cat([torch.zeros(1), torch.logspace(-3, 6, 2001)]).double()


def floats(rows): return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def test_the_claims_cover_all_methods():
    assert set(IMPLICIT) == set(CLAIMS) and set(IMEX) == set(ADDITIVE) and set(ROSENBROCK) == set(LINEAR)


@pytest.mark.parametrize("name", CLAIMS)
def test_derived_properties_are_those_of_the_paper(name):
    tab = IMPLICIT[name]()
    assert (tab.order, tab.embedded_order, tab.dense_order, tab.stages, tab.fsal) == CLAIMS[name][:5]
    assert tab is IMPLICIT[name]() and not tab.explicit and tab.name == name


@pytest.mark.parametrize("name", CLAIMS)
def test_residuals_are_far_below_float64_and_the_order_is_not_higher(name):
    tab = IMPLICIT[name]()
    for weights, order in ((tab.b, tab.order), (tab.b_embedded, tab.embedded_order)):
        if weights is None: continue
        assert max(map(abs, order_conditions(tab.a, weights, tab.c, order).values())) < 1e-36
        assert max(map(abs, order_conditions(tab.a, weights, tab.c, order + 1).values())) > 1e-5
    assert all(abs(sum(row) - c) < 1e-38 for row, c in zip(tab.a, tab.c))
    assert all(abs(sum(row) - b) < 1e-38 for row, b in zip(tab.dense, tab.b))


@pytest.mark.parametrize("name", CLAIMS)
def test_a_and_l_stability(name):
    tab = IMPLICIT[name]()
    assert stability(tab, AXIS).abs().max() <= 1 + 1e-12
    bottom = [float(x) for x in stability_polynomials(tab.a, tab.b)[1]]    # and no pole on the left
    companion = torch.zeros(len(bottom) - 1, len(bottom) - 1, dtype=torch.float64)
    companion[1:, :-1] = torch.eye(len(bottom) - 2)
    companion[:, -1] = -torch.tensor(bottom[:-1])/bottom[-1]
    assert torch.linalg.eigvals(companion).real.min() > 0
    assert stability(tab, float("inf")).abs().item() == pytest.approx(CLAIMS[name][5], abs=1e-14)
    if CLAIMS[name][5] == 0: assert tab.fsal                               # L-stable: and stiffly accurate


@pytest.mark.parametrize("name", CLAIMS)
def test_the_stability_function_agrees_with_a_step(name):
    tab = IMPLICIT[name]()
    a, b = floats(tab.a).to(torch.complex128), floats([tab.b])[0].to(torch.complex128)
    for z in (-0.3 + 0.2j, -5 + 3j, 2j, -40.):
        k = torch.linalg.solve(torch.eye(tab.stages) - z*a, torch.ones(tab.stages, dtype=a.dtype))
        assert abs(stability(tab, z).item() - (1 + z*(b @ k)).item()) < 1e-12


def test_stability_of_an_explicit_method_is_a_polynomial():
    heun = Tableau("heun", [[], [1]], ["1/2", "1/2"])
    assert stability_polynomials(heun.a, heun.b)[0] == (1, 1, Fraction(1, 2))
    assert stability(heun, [-1., 3.]).tolist() == pytest.approx([0.5, 8.5])
    assert stability(heun, float("inf")).real == float("inf")


@pytest.mark.parametrize("name", ESDIRK)
def test_esdirk_methods_begin_and_end_with_the_slopes_of_the_step(name):
    tab = IMPLICIT[name]()
    assert not any(tab.a[0]) and tab.a[-1] == tab.b and tab.c[0] == 0 and tab.c[-1] == 1
    assert len({tab.a[i][i] for i in range(1, tab.stages)}) == 1
    for i, row in enumerate(tab.dense):                                    # C1: slope k_1, then k_s
        assert row[0] == (i == 0)
        assert abs(sum(p*x for p, x in enumerate(row, 1)) - (i == tab.stages - 1)) < 1e-38


@pytest.mark.parametrize("name", [*ESDIRK, "sdirk2", *ADDITIVE])
def test_predictors_are_exact_for_linear_slopes(name):
    tab = IMPLICIT[name]() if name in IMPLICIT else IMEX[name]().implicit
    rows = predictor(tab)
    assert [len(row) for row in rows] == list(range(tab.stages))
    for i, row in enumerate(rows[1:], 1):
        assert abs(sum(row) - 1) < 1e-30
        if i > 1: assert abs(sum(x*c for x, c in zip(row, tab.c)) - tab.c[i]) < 1e-30
        if i > 2: assert abs(sum(x*c*c for x, c in zip(row, tab.c)) - tab.c[i]**2) < 1e-30


def test_a_predictor_of_degree_zero_is_a_mean():
    assert predictor(IMPLICIT["kvaerno3"](), degree=0)[2] == (Fraction(1, 2), Fraction(1, 2))


def test_collocation_polynomials_pass_through_the_stages():
    tab = IMPLICIT["radau5"]()
    for row, node in zip(tab.a, tab.c):
        assert all(abs(sum(x*node**p for p, x in enumerate(d, 1)) - x_ij) < 1e-38 for d, x_ij in zip(tab.dense, row))


def test_radau_data_diagonalises_the_inverse():
    data, tab = radau_data(), IMPLICIT["radau5"]()
    A, inverse, T, back = map(floats, (tab.a, data.A_inverse, data.T, data.T_inverse))
    real, (alpha, beta) = float(data.real), map(float, data.pair)
    wanted = torch.tensor([[real, 0, 0], [0, alpha, -beta], [0, beta, alpha]], dtype=torch.float64)
    assert (back @ inverse @ T - wanted).abs().max() < 1e-14
    assert (A @ inverse - torch.eye(3)).abs().max() < 1e-14 and (T @ back - torch.eye(3)).abs().max() < 1e-14
    assert real == pytest.approx(3.6378342527444957, abs=1e-15)           # Hairer & Wanner II, section IV.8
    assert (alpha, beta) == pytest.approx((2.6810828736277521, 3.0504301992474105), abs=1e-15)


def test_the_radau_estimate_has_order_three():
    """On y' = t^n the filter is 1 and the estimate must be the error of a quadrature of order three: 0 up to n = 2."""
    data, tab = radau_data(), IMPLICIT["radau5"]()
    for n in range(4):
        z = [sum(x*c**n for x, c in zip(row, tab.c)) for row in tab.a]
        estimate = data.gamma0*(n == 0) + sum(e*x for e, x in zip(data.error, z))
        assert (abs(estimate) < 1e-36) == (n < 3)


@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_pairs(name):
    pair = IMEX[name]()
    assert (pair.order, pair.embedded_order, pair.dense_order, pair.stages) == ADDITIVE[name]
    assert pair.explicit.order == pair.implicit.order == pair.order and pair.implicit.fsal
    assert stability(pair.implicit, AXIS).abs().max() <= 1 + 1e-12 and stability(pair.implicit, float("inf")) == 0
    assert pair is IMEX[name]()


def parts(name):
    pair = IMEX[name]()
    return [dict(name=name, a=[list(row) for row in t.a], b=list(t.b), c=list(t.c)) for t in (pair.explicit, pair.implicit)]


def test_a_wrong_coupling_is_refused():
    weights = dict(b=["1/6", "1/3", "1/3", "1/6"], order=4)
    classic = Tableau("classic", [[], ["1/2"], [0, "1/2"], [0, 0, 1]], **weights)
    partner = Tableau("partner", [[0]*4, ["1/4", "1/4", 0, 0], ["1/4", 0, "1/4", 0], [0, 0, 1, 0]], **weights)
    with pytest.raises(ValueError, match="coupling condition of tree"): AdditiveTableau("pair", classic, partner)


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_wrong_digit_in_a_pair_is_refused(name):
    explicit, implicit = parts(name)
    implicit["a"][-2][-3] += Fraction(2, 10**12)
    row = len(implicit["a"]) - 1
    with pytest.raises(ValueError, match=f"row {row}: sum"): Tableau(**implicit)
    explicit["b"][0] += Fraction(1, 10**9)
    explicit["b"][-1] -= Fraction(1, 10**9)
    with pytest.raises(ValueError, match="both tables need the same b; they differ in row 1"):
        AdditiveTableau(name, Tableau(**explicit), Tableau(**parts(name)[1]))


@pytest.mark.parametrize("name", LINEAR)
def test_rosenbrock_methods(name):
    method = ROSENBROCK[name]()
    assert (method.order, method.embedded_order, method.dense_order, method.stages) == LINEAR[name]
    assert method.stiffly_accurate == (name != "rosenbrock23")
    assert stability(method, AXIS).abs().max() <= 1 + 1e-12 and stability(method, float("inf")).abs() < 1e-13
    assert method is ROSENBROCK[name]() is copy.deepcopy(method)
    again = pickle.loads(pickle.dumps(method))
    assert again.transformed == method.transformed and again.order == method.order


@pytest.mark.parametrize("name", ["rodas4", "rodas5p"])
def test_the_transformed_form_is_the_published_one(name):
    k = ROSENBROCK[name]().transformed
    assert k.error == (0.,)*(len(k.m) - 1) + (1.,) and k.m[:-1] == (*k.a[-1],) and k.m[-1] == 1.
    assert k.a[-1][-1] == 1.
    published = {"rodas4": (1.544, -5.6688), "rodas5p": (3.0, -14.155112264123755)}[name]
    assert (k.a[1][0], k.c[1][0]) == published
    assert sum(k.slopes[-2:]) == pytest.approx(0, abs=1e-14) and k.nodes[-1] == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("name", LINEAR)
def test_perturbing_a_rosenbrock_method_is_refused(name):
    method, order = ROSENBROCK[name](), LINEAR[name][0]
    rows = lambda m: [list(row[:i]) for i, row in enumerate(m)]
    for field in (0, 1):
        given = [rows(method.alpha), rows(method.gammas)]
        given[field][1][0] += Fraction(1, 10**6)
        with pytest.raises(ValueError, match=f"claims order {order}"):
            Rosenbrock(name, method.gamma, *given, method.b, order=order)


def test_wrong_tables_are_refused_by_row():
    gauss = IMPLICIT["gl4"]()
    with pytest.raises(ValueError, match="row 2: sum"): Tableau("gl4", gauss.a, gauss.b, [gauss.c[0]]*2)
    with pytest.raises(ValueError, match="must be different"): collocation("c", [0, 0])
    with pytest.raises(ValueError, match="not diagonally implicit"): predictor(gauss)
    with pytest.raises(TypeError, match="must be a Tableau"): predictor(None)
    with pytest.raises(ValueError, match="alpha\\[1\\] has 2 entries"): Rosenbrock("r", 1, [[], [1, 2]], [[], [0]], [1, 0])
    with pytest.raises(ValueError, match="gammas has 1 rows"): Rosenbrock("r", 1, [[], [1]], [[]], [1, 0])
