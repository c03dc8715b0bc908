"""Roots: Jacobians of anything PyTorch differentiates, every method on every dtype, samples apart, gradients of two orders."""
import math

import pytest
import torch

from neuralode_nb.ode.root_finders import METHODS, RootError, find_root, gmres, relative
from neuralode_nb.ode.roots import Factor, Newton, SimplifiedNewton, differentiable_root, iterate, jacobian

SETTINGS = {"anderson": {"mixing": 0.5}, "lbfgs": {}, "broyden": {}}
each_method = pytest.mark.parametrize("method", METHODS)


def gentle(z, shift=None):
    "Five coupled equations, well conditioned; holomorphic."
    shift = 1 if shift is None else shift
    return 2*z + 0.3*z.roll(1, -1).sin() - 0.2*z.roll(-1, -1)**2 - shift


def largest(d, z): return d.abs().amax(-1)


def start(samples=3, n=5, dtype=torch.float64): return torch.linspace(0, 0.5, samples*n).to(dtype).view(samples, n)


class Cubed(torch.autograd.Function):
    "A function whose backward reads numbers on the host, which no batch of cotangents survives."
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, v):
        if v.abs().max().item() < 0: raise AssertionError
        return 3*ctx.saved_tensors[0]**2*v


def in_place(z):
    r = z.clone()
    r[:, 0] = z[:, 0]*z[:, 1].exp()
    return r.mul_(2).add_(z**2)


@pytest.mark.parametrize("g", [gentle, in_place, Cubed.apply, torch.ones_like, lambda z: z.detach()*0 + 1, lambda z: z.flip(-1)])
@pytest.mark.parametrize("grad", [True, False])
def test_jacobian_of_anything_agrees_with_differences(g, grad):
    z = start() + 0.1
    with torch.set_grad_enabled(grad): J = jacobian(g, z)
    assert J.shape == (3, 5, 5) and not J.requires_grad
    assert torch.allclose(J, jacobian(g, z, "differences"), atol=1e-6)


@pytest.mark.parametrize("how", ["autograd", "func", "differences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_every_jacobian_for_every_dtype(how, dtype):
    A = torch.randn(4, 4, dtype=dtype)
    z = torch.randn(3, 4, dtype=dtype)
    exact = A + torch.diag_embed(2*z)
    tight = torch.finfo(dtype).eps**(0.4 if how == "differences" else 0.8)
    assert torch.allclose(jacobian(lambda z: z @ A.T + z**2, z, how), exact, rtol=10*tight, atol=20*tight)


@torch.inference_mode()
def test_inference_mode_is_no_obstacle():
    assert torch.allclose(jacobian(gentle, start()), jacobian(gentle, start(), "differences"), atol=1e-6)
    assert find_root(gentle, start()).success


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_factors_solve_both_ways_and_mark_what_is_singular(dtype):
    A, r = torch.randn(4, 3, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    A[1], A[2, 0, 0] = 1, math.nan
    factor = Factor(A)
    assert factor.good.tolist() == [True, False, False, True]
    for matrices, x in ((A, factor.solve(r)), (A.mH, factor.solve(r, transpose=True))):
        assert torch.allclose((matrices @ x[..., None])[[0, 3], :, 0], r[[0, 3]])
    mixed = factor.replaced(torch.tensor([False, True, True, False]), Factor(torch.eye(3, dtype=dtype).expand(4, 3, 3)))
    assert mixed.good.all() and torch.equal(mixed.solve(r)[1:3], r[1:3]) and torch.equal(mixed.solve(r)[0], factor.solve(r)[0])


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_every_method_finds_the_root(method, dtype):
    z0 = start(dtype=dtype) + (0.1j if dtype.is_complex else 0)
    shift = 1 + (0.5j if dtype.is_complex else 0)
    root = find_root(lambda z: gentle(z, shift), z0, method, **SETTINGS.get(method, {}))
    assert root.success and root.converged.all() and root.z.dtype == dtype and root.rate.shape == (3,)
    assert gentle(root.z, shift).abs().max() < 50*torch.finfo(dtype).eps**0.7


@each_method
@pytest.mark.parametrize("how", ["autograd", "func", "differences", lambda z: jacobian(gentle, z)])
def test_evaluations_are_counted(method, how):
    calls = []
    def g(z):
        calls.append(1)
        return gentle(z)
    root = find_root(g, start(1), method, jacobian=how, **SETTINGS.get(method, {}))
    hidden = {"autograd": 1, "func": 1}.get(how, 0)*root.jacobians if isinstance(how, str) else 0
    assert root.evaluations == len(calls) - hidden


@pytest.mark.parametrize("method", ["newton", "simplified_newton", "broyden", "anderson"])
def test_a_sample_does_not_see_its_neighbours(method):
    shifts = torch.tensor([[1.], [-3.], [0.], [math.nan], [0.5]]).double()
    options = SETTINGS.get(method, {})
    both = find_root(lambda z: gentle(z, shifts), start(5), method, throw=False, **options)
    assert both.converged.tolist() == [True, True, True, False, True]
    for s in (0, 1, 2, 4):
        alone = find_root(lambda z, s=s: gentle(z, shifts[s]), start(5)[s:s + 1], method, **options)
        assert torch.allclose(alone.z, both.z[s:s + 1], rtol=0, atol=1e-15)


def test_one_sample_and_many_follow_the_same_rule():
    factor = Factor(jacobian(gentle, start(1) - 0.4))
    for tolerance, limit in ((1e-10, 40), (1e-10, 3), (1e-3, 2)):
        way = lambda z, r, *_: factor.solve(r[:1]).expand_as(r)
        one, two = (iterate(gentle, start(1).repeat(k, 1), way, largest, tolerance, limit) for k in (1, 2))
        assert one.iterations == two.iterations and one.converged[0] == two.converged[0] and torch.equal(one.z[0], two.z[0])
        assert one.rate.item() == two.rate[0].item()


def test_a_lent_rate_saves_an_iteration():
    factor = Factor(jacobian(gentle, start(2)))
    way = lambda z, r, *_: factor.solve(r)
    root = iterate(gentle, start(2), way, largest, 1e-10, 40)
    near = root.z + 1e-9
    for samples in (1, 2):
        way = lambda z, r, *_: factor.solve(r.expand(2, -1))[:len(r)]
        again = [iterate(gentle, near[:samples], way, largest, 1e-9, 9, rate=x)
                 for x in (math.nan, 0.1, root.rate[:samples])]
        assert [a.success for a in again] == [True]*3 and [a.iterations for a in again] == [2, 1, 1]


def test_the_rate_gives_up_early_and_names_who():
    signs = torch.tensor([[1.], [-1.]]).double()
    with_newton = Newton(gentle)
    root = iterate(gentle, start(2), lambda z, r, *a: signs*with_newton(z, r, *a), largest, 1e-10, 50)
    assert root.converged.tolist() == [True, False] and not root.success and root.z.isfinite().all()


def test_simplified_newton_renews_only_what_is_slow():
    steep = torch.tensor([[0.], [3.]]).double()
    g = lambda z: z + steep*z**3 - 1
    way = SimplifiedNewton(g)
    root = iterate(g, torch.zeros(2, 1).double(), way, largest, 1e-12, 50, strict=False)
    assert root.success and way.jacobians > 1 and way.factor.lu[0] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("kind", ["general", "rotation", "singular", "zero"])
def test_gmres_solves_what_can_be_solved(dtype, kind):
    A, r = torch.randn(3, 6, 6, dtype=dtype) + 3*torch.eye(6), torch.randn(3, 6, dtype=dtype)
    if kind == "rotation": A = torch.eye(6, dtype=dtype).roll(1, 0).expand(3, 6, 6)
    if kind == "singular": A, r = torch.diag(torch.tensor([1., 2, 3, 0, 0, 0])).to(dtype).expand(3, 6, 6), r*(torch.arange(6) < 3)
    if kind == "zero": r = r*torch.tensor([[0.], [1], [0]])
    x, count = gmres(lambda v: (A @ v[..., None])[..., 0], r, torch.full((3,), 1e-12).double(), 6)
    assert x.isfinite().all() and count <= 6 and torch.allclose((A @ x[..., None])[..., 0], r, atol=1e-9)


def test_a_preconditioner_saves_products():
    scale = torch.logspace(0, 4, 40).double()
    g = lambda z: scale*z + 0.1*z.roll(1, -1).sin() - 1
    z0 = torch.zeros(2, 40).double()
    plain, better = (find_root(g, z0, "newton_krylov", krylov=40, preconditioner=p) for p in (None, lambda v: v/scale))
    assert better.evaluations < plain.evaluations/3 and torch.allclose(plain.z, better.z, atol=1e-9)


def test_broyden_without_a_matrix_and_with_little_memory():
    contracting = lambda z: z - 0.5*z.roll(1, -1).cos()
    for options in (dict(scale=1.), dict(scale=1., memory=3), dict(memory=1)):
        root = find_root(contracting, start(), "broyden", **options)
        assert root.jacobians == (0 if "scale" in options else 1) and contracting(root.z).abs().max() < 1e-9


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_two_derivatives_of_a_root(dtype):
    W, x = torch.rand(2, 2, dtype=dtype, requires_grad=True), torch.rand(2, 2, dtype=dtype, requires_grad=True)
    solved = lambda W, x: find_root(lambda z: z + 0.3*(z @ W).sin()*z - x, x, tolerance=1e-13).z
    assert torch.autograd.gradcheck(solved, (W, x)) and torch.autograd.gradgradcheck(solved, (W, x))


def test_a_third_derivative_if_asked():
    theta = torch.tensor(2., dtype=torch.float64, requires_grad=True)
    value = differentiable_root(lambda z: z**3 - theta, torch.full((1, 1), 2.).double()**(1/3), derivatives=3).sum()
    for _ in range(3): value, = torch.autograd.grad(value, theta, create_graph=True)
    assert math.isclose(value.item(), 10/27*2**(1/3 - 3), rel_tol=1e-12)


def test_one_derivative_refuses_to_be_two():
    theta = torch.tensor(2., dtype=torch.float64, requires_grad=True)
    root = differentiable_root(lambda z: z**2 - theta, torch.full((1, 1), 2.).double().sqrt(), derivatives=1).sum()
    with pytest.raises(RuntimeError, match="use derivatives=2"): torch.autograd.grad(root, theta, create_graph=True)


def test_the_value_is_untouched_and_a_solver_can_be_lent():
    theta = torch.tensor(2., dtype=torch.float64, requires_grad=True)
    z, calls = torch.full((1, 1), 1.4142, dtype=torch.float64), []
    def lent(r, transpose):
        calls.append(transpose)
        return r/(2*z)
    root = differentiable_root(lambda z: z**2 - theta, z, solve=lent)
    assert torch.equal(root, z)
    root.sum().backward()
    assert calls == [True] and math.isclose(theta.grad.item(), 1/(2*1.4142))


def test_no_graph_where_none_is_asked():
    theta = torch.tensor(2., dtype=torch.float64, requires_grad=True)
    g = lambda z: z**2 - theta
    with torch.no_grad(): assert not find_root(g, torch.ones(1, 1).double()).z.requires_grad
    assert not find_root(lambda z: z**2 - 2, torch.ones(1, 1).double().requires_grad_()).z.requires_grad
    assert find_root(g, torch.ones(1, 1).double()).z.requires_grad


def test_a_failed_sample_does_not_spoil_the_gradient_of_others():
    theta = torch.tensor([[4.], [0.]], dtype=torch.float64, requires_grad=True)
    root = find_root(lambda z: z**2 - theta, torch.tensor([[1.], [0.]]).double(), throw=False)
    root.z[0].sum().backward()
    assert torch.allclose(theta.grad, torch.tensor([[0.25], [0.]]).double())


# ----------------------------------------------------------------------------------------------------------- failures


@each_method
@pytest.mark.parametrize("g, words", [(lambda z: z**2 + 1, "no root for 2 of 2 samples"),
                                      (lambda z: z*math.nan, "g is not finite"), (lambda z: z*0 + 1, "singular")])
def test_failures_are_named_and_marked(method, g, words):
    z0 = torch.full((2, 1), 0.7).double()
    with pytest.raises(RootError, match=words) as caught: find_root(g, z0, method)
    assert repr(method) in str(caught.value) and "Remedy" in str(caught.value) and "sample 0" in str(caught.value)
    assert not caught.value.root.converged.any() and not find_root(g, z0, method, throw=False).success


BAD = {
    "z0 must be a tensor": (TypeError, lambda: find_root(gentle, [1.])),
    "dtype torch.float16": (TypeError, lambda: find_root(gentle, start().half())),
    r"shape \(5,\)": (ValueError, lambda: find_root(gentle, start()[0])),
    r"shape \(3, 0\)": (ValueError, lambda: find_root(gentle, start()[:, :0])),
    "method='secant'": (ValueError, lambda: find_root(gentle, start(), "secant")),
    "option krylov=3 is unknown": (ValueError, lambda: find_root(gentle, start(), krylov=3)),
    "krylov=0 must": (ValueError, lambda: find_root(gentle, start(), "newton_krylov", krylov=0)),
    "preconditioner=3 must": (TypeError, lambda: find_root(gentle, start(), "newton_krylov", preconditioner=3)),
    "mixing=0 must": (ValueError, lambda: find_root(gentle, start(), "anderson", mixing=0)),
    "tolerance=nan": (ValueError, lambda: find_root(gentle, start(), tolerance=math.nan)),
    "tolerance='small'": (ValueError, lambda: find_root(gentle, start(), tolerance="small")),
    "max_iterations=0": (ValueError, lambda: find_root(gentle, start(), max_iterations=0)),
    "norm=3": (TypeError, lambda: find_root(gentle, start(), norm=3)),
    "one number per sample": (ValueError, lambda: find_root(gentle, start(), norm=lambda d, z: relative(d, z).sum())),
    "jacobian='exact'": (ValueError, lambda: find_root(gentle, start(), "anderson", jacobian="exact")),
    "jacobian returned shape": (ValueError, lambda: find_root(gentle, start(), jacobian=lambda z: z)),
    "g returned list": (TypeError, lambda: find_root(lambda z: [z], start())),
    "g returned .* they must agree": (ValueError, lambda: find_root(lambda z: z.float(), start())),
}


@pytest.mark.parametrize("words", BAD)
def test_misuse_is_refused(words):
    kind, call = BAD[words]
    with pytest.raises(kind, match=words): call()


def test_no_samples_are_no_problem():
    root = find_root(gentle, torch.zeros(0, 5))
    assert root.success and root.z.shape == (0, 5) and root.converged.shape == (0,)
