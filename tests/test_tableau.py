"""Every table, embedded row and dense row in exact fractions; no wrong table can be built."""
import copy
import pickle
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st

from neuralode_nb.ode.methods import TABLEAUS, find_tableau
from neuralode_nb.ode.tableau import Tableau, nearest
from neuralode_nb.ode.trees import as_fraction, density, order_conditions, stage_weights, tree_size, trees

# order, embedded order, dense order, stages, fsal: what the papers claim
CLAIMS = {
    "euler": (1, None, 1, 1, False), "midpoint": (2, None, 2, 2, False), "heun2": (2, None, 2, 2, False),
    "heun3": (3, None, 3, 3, False), "rk4": (4, None, 3, 4, False), "rk4_classic": (4, None, 3, 4, False),
    "fehlberg4": (4, None, 4, 5, False), "fehlberg5": (5, None, 4, 6, False), "fehlberg45": (5, 4, 4, 6, False),
    "adaptive_heun": (2, 1, 2, 2, False), "fehlberg2": (2, 1, 2, 3, False), "bosh3": (3, 2, 3, 4, True),
    "dopri5": (5, 4, 4, 7, True), "tsit5": (5, 4, 4, 7, True), "dopri8": (8, 7, 5, 13, False)}
ROUNDED = {"tsit5": Fraction(1, 10**37), "dopri8": Fraction(1, 10**17)}    # bound on residuals of printed decimals
NAMES = sorted(CLAIMS)


def test_the_claims_cover_all_methods():
    assert sorted(TABLEAUS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_derived_properties_are_those_of_the_paper(name):
    tab = find_tableau(name)
    assert (tab.order, tab.embedded_order, tab.dense_order, tab.stages, tab.fsal) == CLAIMS[name]
    assert tab.explicit and tab.exact == (name not in ROUNDED)
    assert tab.adaptive == (tab.embedded_order is not None)
    assert tab.error_order == (min(tab.order, tab.embedded_order) if tab.adaptive else None)


def plain_fraction_residuals(tab, weights, order):
    """The conditions again, with plain fractions and none of the integer scaling of the library."""
    g = stage_weights(tab.closed.a, tab.closed.c)
    return [sum(x*y for x, y in zip(weights, g(t))) - Fraction(1, density(t))
            for n in range(1, order + 1) for t in trees(n)]


@pytest.mark.parametrize("name", NAMES)
def test_order_conditions_in_exact_fractions(name):
    tab, bound = find_tableau(name), ROUNDED.get(name, 0)
    plain = min(tab.order, 5)       # beyond order five plain fractions with dopri8's denominators are slow
    assert max(map(abs, plain_fraction_residuals(tab, tab.b, plain))) <= bound
    assert max(map(abs, order_conditions(tab.a, tab.b, tab.c, tab.order).values())) <= bound
    if tab.adaptive:
        assert max(map(abs, order_conditions(tab.a, tab.b_embedded, tab.c, tab.embedded_order).values())) <= bound


@pytest.mark.parametrize("name", NAMES)
def test_order_is_not_higher_than_claimed(name):
    tab = find_tableau(name)
    assert max(map(abs, order_conditions(tab.a, tab.b, tab.c, tab.order + 1).values())) > 1e-7
    if tab.adaptive:
        higher = order_conditions(tab.a, tab.b_embedded, tab.c, tab.embedded_order + 1)
        assert max(map(abs, higher.values())) > 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_dense_rows_in_exact_fractions(name):
    tab, bound = find_tableau(name), 100*ROUNDED.get(name, 0)
    a, c, _, dense = tab.closed
    g = stage_weights(a, c)
    for n in range(1, tab.dense_order + 1):
        for t in trees(n):
            for power, column in enumerate(zip(*dense), 1):
                residual = sum(x*y for x, y in zip(column, g(t))) - (Fraction(1, density(t)) if power == n else 0)
                assert abs(residual) <= bound, (t, power)
    for row, weight in zip(dense, (*tab.b, Fraction(0))):
        assert abs(sum(row) - weight) <= bound                          # ends at the step's result


@pytest.mark.parametrize("name", NAMES)
def test_dense_slopes_join_smoothly(name):
    tab, bound = find_tableau(name), 100*ROUNDED.get(name, 0)
    dense = tab.closed.dense
    S = len(dense)
    for i, row in enumerate(dense):
        assert row[0] == (1 if i == 0 else 0)                           # slope k_1 at theta = 0
        assert abs(sum(p*x for p, x in enumerate(row, 1)) - (1 if i == S - 1 else 0)) <= bound


@pytest.mark.parametrize("name", NAMES)
def test_closed_form_is_fsal(name):
    tab = find_tableau(name)
    a, c, b_error, dense = tab.closed
    S = tab.stages + (not tab.fsal)
    assert len(a) == len(c) == len(dense) == S and all(len(row) == i for i, row in enumerate(a))
    assert (*a[-1], 0)[:tab.stages] == tab.b and c[-1] == 1 and c[0] == 0
    assert (b_error is None) != tab.adaptive
    if tab.adaptive: assert len(b_error) == S and abs(sum(b_error)) < 1e-15


def test_trees_are_counted_right_and_conditions_scale():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert all(tree_size(t) == n for n in range(1, 9) for t in trees(n))
    assert sum(1/density(t) for t in trees(4)) == pytest.approx(1/4 + 1/8 + 1/12 + 1/24)


def parts(name):
    tab = find_tableau(name)
    return {"a": [list(row) for row in tab.a], "b": list(tab.b), "c": list(tab.c),
            "b_embedded": None if tab.b_embedded is None else list(tab.b_embedded),
            "dense": None if tab.dense is None else [list(row) for row in tab.dense]}


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(NAMES), choice=st.randoms(use_true_random=False),
       size=st.sampled_from([Fraction(1, 10**9), Fraction(-1, 10**6), Fraction(1, 7), Fraction(-2)]))
def test_perturbing_any_single_coefficient_is_refused(name, choice, size):
    table = parts(name)
    places = [(table["b"], i) for i in range(len(table["b"]))] + [(table["c"], i) for i in range(len(table["c"]))]
    places += [(row, j) for row in table["a"] for j in range(len(row))]
    places += [(table["b_embedded"], i) for i in range(len(table["b"]))] if table["b_embedded"] else []
    places += [(row, j) for row in table["dense"] for j in range(len(row))] if table["dense"] else []
    Tableau(name, **table, order=CLAIMS[name][0])       # unperturbed it can be built
    values, i = choice.choice(places)
    values[i] += size
    with pytest.raises(ValueError, match=name): Tableau(name, **table, order=CLAIMS[name][0])


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([n for n in NAMES if CLAIMS[n][0] > 1]), choice=st.randoms(use_true_random=False))
def test_moving_weight_between_stages_is_refused(name, choice):
    """Sums stay right; only the order conditions can notice."""
    table, tab = parts(name), find_tableau(name)
    table["dense"] = None
    nodes = sorted(set(tab.c))
    i, j = (choice.choice([k for k, c in enumerate(tab.c) if c == node]) for node in choice.sample(nodes, 2))
    table["b"][i] += Fraction(1, 1000)
    table["b"][j] -= Fraction(1, 1000)
    with pytest.raises(ValueError, match="claims order"): Tableau(name, **table, order=CLAIMS[name][0])


def test_tsit5_with_the_embedded_weights_is_not_of_order_five():
    tab = find_tableau("tsit5")
    with pytest.raises(ValueError, match=r"claims order 5, but its order is 4"):
        Tableau("c_sol", tab.a, tab.b_embedded, tab.c, order=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_rounded_once(name, dtype):
    tab = find_tableau(name)
    k, closed = tab.coefficients(dtype), tab.closed
    assert k is tab.coefficients(dtype) and k.nodes.dtype == dtype
    ulp = torch.finfo(dtype).eps
    for tensor, exact in [(k.nodes, closed.c), *zip(k.rows, closed.a), *zip(k.dense, closed.dense)]:
        assert tensor.shape == (len(exact),)
        for x, y in zip(tensor.double().tolist(), exact): assert abs(Fraction(x) - y) <= abs(y)*Fraction(ulp)/2
    for terms, row in zip(k.row_terms, closed.a):
        assert [j for j, _ in terms] == [j for j, x in enumerate(row) if x]
    if dtype == torch.float64: assert k.nodes.tolist() == [float(x) for x in closed.c]
    assert (k.error is None) != tab.adaptive


def test_coefficients_of_a_complex_dtype_are_real():
    assert find_tableau("dopri5").coefficients(torch.complex64).dense.dtype == torch.float32
    assert find_tableau("dopri5").coefficients(torch.complex128).dense.dtype == torch.float64


def test_coefficients_made_in_inference_mode_serve_autograd():
    tab = Tableau("fresh", [[], [1]], ["1/2", "1/2"])
    with torch.inference_mode(): k = tab.coefficients(torch.float32)
    x = torch.ones(3, requires_grad=True)
    (k.nodes*x).sum().backward()
    assert torch.equal(x.grad, k.nodes)


@settings(deadline=None)
@given(st.fractions(min_value=-1000, max_value=1000))
def test_nearest_agrees_with_python_in_float64(x):
    assert nearest(x, torch.float64) == float(x)


@settings(deadline=None)
@given(st.integers(-2000, 2000), st.integers(1, 2000))
def test_a_float_finds_its_fraction_again(p, q):
    assert as_fraction(p/q) == Fraction(p, q)


def test_floats_strings_and_fractions_give_the_same_table():
    tab = find_tableau("dopri5")
    typed = Tableau("typed", [[float(x) for x in row] for row in tab.a], [float(x) for x in tab.b],
                    b_embedded=[float(x) for x in tab.b_embedded], order=5)
    assert typed.a == tab.a and typed.b == tab.b and typed.exact


def test_tables_are_values():
    tab = find_tableau("bosh3")
    assert find_tableau("bosh3") is tab and find_tableau(tab) is tab and copy.deepcopy([tab])[0] is tab
    assert pickle.loads(pickle.dumps(tab)).closed == tab.closed
    with pytest.raises(AttributeError): tab.b = ()
    with pytest.raises(ValueError, match="did you mean 'tsit5'"): find_tableau("Tsit5")


def test_random_explicit_tables_have_the_order_that_sampling_shows():
    """The tree conditions against a Taylor expansion: one step of y' = y in fractions."""
    rng = random.Random(0)
    for _ in range(20):
        s = rng.randint(2, 4)
        a = [[Fraction(rng.randint(-3, 3), rng.randint(1, 4)) for _ in range(i)] for i in range(s)]
        b = [Fraction(rng.randint(-3, 3), rng.randint(1, 4)) for _ in range(s - 1)]
        tab = Tableau("random", a, [*b, 1 - sum(b)])
        g, tall, coefficients = stage_weights(tab.a, tab.c), (), []
        for _ in range(s):
            coefficients.append(sum(x*y for x, y in zip(tab.b, g(tall))))
            tall = (tall,)
        linear = next((n for n, x in enumerate(coefficients) if x*density(nested(n)) != 1), s)
        assert tab.order <= linear


def nested(n):
    tree = ()
    for _ in range(n): tree = (tree,)
    return tree
