"""compile=True: the same answers and gradients as the eager loop, one program for each kind of solve.

Most tests trace the loop and run it without a compiler (backend 'eager'): what is tested there is ours. A few compile."""
import math
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from neuralode_nb import PID, Adjoint, SolveError, Status, odeint, odeint_adjoint, solve
from neuralode_nb.models.blocks import ODEBlock
from neuralode_nb.ode import compiled

D = dict(dtype=torch.float64)
EXPLICIT = ['euler', 'midpoint', 'heun3', 'rk4', 'adaptive_heun', 'bosh3', 'fehlberg45', 'dopri5', 'tsit5', 'dopri8']


@pytest.fixture(autouse=True)
def traced(monkeypatch, request):
    "Programs that are traced but not compiled, unless a test asks for more."
    torch._dynamo.reset()
    compiled.PROGRAMS.clear()
    if 'real' not in request.keywords: monkeypatch.setattr(compiled, 'backend', 'eager')
    compiled.can_compile.cache_clear()
    yield
    compiled.can_compile.cache_clear()
    compiled.PROGRAMS.clear()


class Field(nn.Module):
    "A small field with two parameters that depends on time."
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(3, 3, generator=g, **D))
        self.b = nn.Parameter(torch.randn(3, generator=g, **D))

    def forward(self, t, y): return torch.tanh(y @ self.w.t() + self.b) * torch.cos(t) - .3 * y


def start(n=4): return torch.randn(n, 3, generator=torch.Generator().manual_seed(1), **D)


def both(f, y0, t, method='tsit5', **options):
    "The solution by a program and by the eager loop."
    return [solve(f, y0, t, method, compile=c, **options) for c in (True, False)]


def close(a, b, tol=1e-9):
    "The same up to rounding, which may accept a step that lies on the border."
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize('inner', [False, True], ids=['ends', 'between'])
@pytest.mark.parametrize('method', EXPLICIT)
def test_equals_the_eager_loop_with_its_gradients(method, inner):
    t = torch.linspace(0, 2, 7 if inner else 2, **D)
    options = {} if method in EXPLICIT[4:] else {'step_size': .3}
    found = []
    for c in (True, False):
        f, y0 = Field(), start().requires_grad_()
        s = solve(f, y0, t, method, compile=c, **options)
        weights = torch.linspace(1, 2, s.y.numel(), **D).view_as(s.y)
        grads = torch.autograd.grad((s.y * weights).sum(), [y0, *f.parameters()])
        found.append((s, grads))
    (a, ga), (b, gb) = found
    assert (a.stats.accepted, a.stats.rejected) == (b.stats.accepted, b.stats.rejected)
    close(a.y, b.y)
    for x, y in zip(ga, gb): close(x, y, 1e-8)
    assert a.stats.backward_f_evals > 0 and a.y.requires_grad


def test_statistics_count_what_was_evaluated():
    t = torch.tensor([0., 2.], **D)
    a, b = both(Field(), start(), t)
    assert a.stats.f_evals == b.stats.f_evals
    assert math.isclose(a.stats.smallest_step, b.stats.smallest_step, rel_tol=1e-6)
    assert math.isclose(a.stats.largest_step, b.stats.largest_step, rel_tol=1e-6)


@pytest.mark.parametrize('options', [
    {'step_t': [.7]}, {'jump_t': [.5, 1.1]}, {'max_step': .1}, {'first_step': 1e-3}, {'controller': 'pid'},
    {'controller': PID(safety=.8)}, {'norm': lambda y: y.abs().max()}, {'rtol': torch.tensor([1e-3, 1e-6, 1e-8], **D)},
    {'rtol': 1e-9, 'atol': 1e-9}], ids=lambda o: '-'.join(o))
@pytest.mark.parametrize('t', [[0., 2.], [0., .4, 1.1, 2.], [1., -1.]], ids=str)
def test_options(options, t):
    if 'jump_t' in options: f = lambda t, y: torch.where(t < .5, 1., -2.) * y
    else: f = Field()
    with torch.no_grad(): a, b = both(f, start(), t, **options)
    assert (a.stats.accepted, a.stats.rejected) == (b.stats.accepted, b.stats.rejected)
    close(a.y, b.y)


def test_structured_states_args_and_functions():
    net = nn.Linear(3, 3, **D)
    def f(t, state, args):
        y, z = state['y'], state['z']
        return {'y': torch.tanh(net(y)) * args[0], 'z': -z * args[1]['rate'] + y.sum()}
    found = []
    for c in (True, False):
        args = torch.tensor(.7, requires_grad=True, **D), {'rate': torch.tensor([.1, .2], requires_grad=True, **D)}
        s = solve(f, {'y': start(), 'z': torch.ones(2, **D)}, [0., .5, 1.], args=args, compile=c)
        loss = s.y['y'].square().sum() + s.y['z'].sum()
        found.append((s.y, torch.autograd.grad(loss, [args[0], args[1]['rate'], *net.parameters()])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


class Owner:
    "An object whose method is a field."
    def __init__(self): self.net = nn.Linear(3, 3, **D)
    def rate(self, t, y): return torch.sin(self.net(y))


@pytest.mark.parametrize('kind', ['method', 'lambda', 'partial'])
def test_parameters_within_sight_of_functions_get_gradients(kind):
    from functools import partial
    owner = Owner()
    f = {'method': owner.rate, 'lambda': lambda t, y: owner.net(y), 'partial': partial(lambda net, t, y: net(y), owner.net)}[kind]
    grads = []
    for c in (True, False):
        grads.append(torch.autograd.grad(solve(f, start(), [0., 1.], compile=c).y.sum(), list(owner.net.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('method', ['tsit5', 'bosh3', 'rk4'])
def test_each_sample_its_own_steps(method):
    each = torch.tensor([[0., .3, 1.], [0., 2., math.nan], [1., .5, -1.], [0., 0., 0.]], **D)
    options = {'step_size': .2} if method == 'rk4' else {}
    found = []
    for c in (True, False):
        f, y0 = Field(), start().requires_grad_()
        s = solve(f, y0, each, method, batch='sample', compile=c, **options)
        found.append((s, torch.autograd.grad(s.y.nan_to_num().square().sum(), [y0, *f.parameters()])))
    (a, ga), (b, gb) = found
    torch.testing.assert_close(a.y, b.y, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(ga, gb, rtol=1e-8, atol=1e-9)
    assert a.status == b.status
    for name in ('accepted', 'rejected'): assert getattr(a.stats, name).tolist() == getattr(b.stats, name).tolist(), name
    assert (a.stats.f_evals - b.stats.f_evals).abs().max() <= 2       # the first derivative, once or twice


def test_longer_than_a_record():
    t = torch.tensor([0., 1.3, 60.], **D)
    found = []
    for c in (True, False):
        f, y0 = Field(), start(1).requires_grad_()
        s = solve(f, y0, t, 'bosh3', rtol=1e-7, atol=1e-9, compile=c)
        found.append((s, torch.autograd.grad(s.y.square().sum(), [y0, *f.parameters()])))
    (a, ga), (b, gb) = found
    assert a.stats.accepted == b.stats.accepted > 2 * 256
    close(a.y, b.y)
    torch.testing.assert_close(ga, gb, rtol=1e-7, atol=1e-9)


FAILS = {'blows up': (lambda t, y: y**2, {}), 'nan': (lambda t, y: torch.where(t > .2, math.nan, 1.) * y, {}),
         'too many': (lambda t, y: torch.cos(40 * t) * y, {'max_steps': 5}), 'nan state': (lambda t, y: y, {}),
         'fixed nan': (lambda t, y: torch.where(t > .2, math.nan, 1.) * y, {'method': 'rk4', 'step_size': .1})}


@pytest.mark.parametrize('name', FAILS)
def test_failures_are_diagnosed_as_by_the_eager_loop(name):
    f, options = FAILS[name]
    options = {'method': 'tsit5', **options}
    y0 = torch.tensor([1., math.nan if name == 'nan state' else 2.], **D)
    a, b = (solve(f, y0, [0., 1.], throw=False, compile=c, **options) for c in (True, False))
    assert a.status == b.status != Status.success
    assert (a.failure.time, a.failure.sample) == (b.failure.time, b.failure.sample)
    with pytest.raises(SolveError): solve(f, y0, [0., 1.], compile=True, **options)


def test_a_failed_solve_with_the_adjoint_is_diagnosed_too():
    y0 = torch.ones(2, requires_grad=True, **D)
    a, b = (solve(lambda t, y: y**2, y0, [0., 2.], gradient='adjoint', throw=False, compile=c) for c in (True, False))
    assert a.status == b.status != Status.success and a.failure.time == b.failure.time
    torch.testing.assert_close(a.y, b.y, equal_nan=True)


REFUSED = {
    'method': (dict(method='kvaerno5'), 'kvaerno5.*explicit'), 'gradient': (dict(gradient='gauss'), 'checkpoint'),
    'adjoint per sample': (dict(gradient='adjoint', batch='sample'), "batch='sample'"),
    'adjoint norm': (dict(gradient=Adjoint(norm=lambda z: 1.)), 'norm of Adjoint'),
    'adjoint method': (dict(method='tsit5', gradient=Adjoint(method='explicit_adams', step_size=.1)), 'explicit_adams.*explicit'),
    'events': (dict(events=lambda t, y: y[0, 0]), 'events'), 'dense': (dict(dense=True), 'dense'),
    'seconds': (dict(max_seconds=3), 'time budget'), 'complex': (dict(y0=torch.ones(2, dtype=torch.complex128)), 'view_as_real'),
    'times': (dict(t=torch.tensor([0., 1.], requires_grad=True, **D)), 'detach t')}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_compiled_is_refused_by_name(name):
    options, words = REFUSED[name]
    options = {'y0': start(), 't': [0., 1.], **options}
    with pytest.raises(ValueError, match=words): solve(lambda t, y: -y, compile=True, **options)


def test_a_field_that_cannot_be_traced_is_refused_with_the_reason():
    def f(t, y): return -y if y.sum().item() > 0 else y
    with pytest.raises(ValueError, match='torch.where'): solve(f, start(), [0., 1.], compile=True)


def test_tensors_outside_modules_are_refused():
    w = torch.tensor(2., requires_grad=True, **D)
    with pytest.raises(ValueError, match='pass it in args'): solve(lambda t, y: -w * y, start(), [0., 1.], compile=True)
    with torch.no_grad(): solve(lambda t, y: -w * y, start(), [0., 1.], compile=True)


@pytest.mark.parametrize('kind', ['dict', 'closure'])
def test_a_parameter_that_is_also_held_elsewhere_is_no_silent_zero(kind):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2., **D))
            self.held = {'w': self.w}
        def forward(self, t, y): return -self.held['w'] * y
    module = Twice()
    w = module.w
    f = module if kind == 'dict' else lambda t, y: -w * y + 0 * module(t, y).detach()
    with pytest.raises(ValueError, match='elsewhere'): solve(f, start(), [0., 1.], compile=True)


def test_second_derivatives_and_changes_in_between_are_refused():
    f, y0 = Field(), start().requires_grad_()
    y = solve(f, y0, [0., 1.], compile=True).y
    with pytest.raises(RuntimeError, match='create_graph'): torch.autograd.grad(y.sum(), y0, create_graph=True)
    y = solve(f, y0, [0., 1.], compile=True).y
    with torch.no_grad(): f.w += 1
    with pytest.raises(RuntimeError, match='inplace'): y.sum().backward()


def test_frozen_parameters_get_none():
    f, y0 = Field(), start()
    f.b.requires_grad_(False)
    solve(f, y0, [0., 1.], compile=True).y.sum().backward()
    assert f.b.grad is None and f.w.grad.abs().sum() > 0


def test_other_times_states_tolerances_and_weights_are_no_new_program():
    f = Field()
    def run(t, y0, tol): solve(f, y0, t, rtol=tol, compile=True).y.sum().backward()
    run(torch.linspace(0, 1, 5, **D), start(), 1e-6)
    count = compiled.graphs()
    run(torch.linspace(0, 3, 5, **D), start() + 1, 1e-4)
    run(torch.linspace(2, -1, 9, **D), start() * 2, 1e-8)
    with torch.no_grad(): f.w.mul_(.5)
    run(torch.linspace(0, 1, 5, **D), start(), 1e-6)
    assert compiled.graphs() == count
    run(torch.linspace(0, 1, 5, **D), start(7), 1e-6)
    assert compiled.graphs() > count       # another shape


def test_what_f_reads_is_looked_at_again():
    class Switch(nn.Module):
        rate = 1.
        def forward(self, t, y): return -self.rate * y
    f, y0 = Switch(), start()
    with torch.no_grad():
        first = solve(f, y0, [0., 1.], compile=True).y[-1]
        f.rate = 2.
        second = solve(f, y0, [0., 1.], compile=True).y[-1]
    close(first, y0 * math.exp(-1), 1e-5)
    close(second, y0 * math.exp(-2), 1e-5)


def test_a_program_is_told_by_all_that_its_recipe_says():
    "Of these torch is told not to ask, so that the recipe itself has to find the program."
    f, y0 = Field(), start()
    with torch.no_grad():
        for options in ({}, {'controller': PID(.6, .4)}, {'controller': PID(safety=.5)}, {'norm': lambda x: x.abs().amax()},
                        {'norm': lambda x: 3 * x.abs().amax()}, {'jump_t': [.5]}, {'method': 'dopri5'}, {}):
            a, b = (solve(f, y0, [0., 2.], compile=c, **options) for c in (True, False))
            assert (a.stats.accepted, a.stats.rejected) == (b.stats.accepted, b.stats.rejected), options
            close(a.y, b.y)
        shape = {'a': y0[0], 'b': y0[1]}
        for one in (shape, (y0[0], y0[1]), {'c': y0[0], 'd': y0[1]}):      # all of the same size
            g = lambda t, y: {k: -v for k, v in y.items()} if isinstance(y, dict) else tuple(-v for v in y)
            a, b = (solve(g, one, [0., 1.], compile=c).y for c in (True, False))
            close(a, b)


def test_hooks_set_later_are_seen():
    f, y0 = nn.Linear(3, 3).double(), start()
    field, double = lambda t, y: f(y), lambda module, inputs, y: 2 * y
    def same():
        with torch.no_grad(): close(*(solve(field, y0, [0., 1.], compile=c).y for c in (True, False)))
    same()
    hook = f.register_forward_hook(double)
    same()
    hook.remove()
    same()
    hook = nn.modules.module.register_module_forward_hook(double)
    try:
        with pytest.raises(ValueError, match='hooks of all modules'): solve(field, y0, [0., 1.], compile=True)
    finally: hook.remove()


def test_hooks_of_any_kind_are_seen():
    @dataclass
    class Scale:         # no hash
        by: float
        def __call__(self, module, inputs, y): return self.by * y
    f, y0 = nn.Linear(3, 3).double(), start()
    field = lambda t, y: f(y)
    for by in (2., 3.):
        f.register_forward_hook(Scale(by))
        with torch.no_grad(): close(*(solve(field, y0, [0., 1.], compile=c).y for c in (True, False)))
    def slope(compile): return torch.autograd.grad(solve(field, y0, [0., 1.], compile=compile).y.sum(), f.bias)[0]
    close(slope(True), slope(False))
    f.register_full_backward_hook(lambda module, inner, outer: tuple(3 * x for x in inner))
    with pytest.raises(ValueError, match='cannot be compiled'): slope(True)


@pytest.mark.filterwarnings('ignore:The .grad attribute')
def test_what_torch_itself_keeps_is_looked_at():
    f, y0 = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).double(), start()
    def same():
        with torch.no_grad(): close(*(solve(lambda t, y: f(y), y0, [0., 1.], compile=c).y for c in (True, False)))
    with nn.utils.parametrize.cached(): same()
    same()


def test_scalar_and_empty_states():
    found = []
    for c in (True, False):
        def f(t, y): return torch.cos(t) * y
        y0, each = torch.tensor(.5, **D).requires_grad_(), torch.linspace(0, 1, 3, **D).requires_grad_()
        ys = [solve(f, y0, [0., .3, 1.], compile=c).y,
              solve(f, each, torch.tensor([[0., .2, 1.], [0., 2., 3.], [1., 0., -1.]], **D), batch='sample', compile=c).y]
        found.append([*ys, *(torch.autograd.grad(y.square().sum(), x)[0] for y, x in zip(ys, (y0, each)))])
    for a, b in zip(*found): close(a, b)
    for shape in [(0, 3), (0,)]:
        assert solve(lambda t, y: -y, torch.zeros(shape), [0., .5, 1.], compile=True).y.shape == (3, *shape)


def test_an_observation_far_outside_of_a_record_has_no_gradient_there():
    "Powers of a distance in units of a tiny step overflow in float32; 0 times that is nan."
    def f(t, y): return torch.where(t > 1, -y, y)
    found = []
    for c in (True, False):
        y0 = torch.ones(10_000).requires_grad_()
        y = solve(f, y0, [0., .5, 1.5, 3.], 'dopri8', rtol=1e-5, atol=1e-6, first_step=1e-13, compile=c).y
        found.append(torch.autograd.grad(y.mean(), y0)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize('batch', ['joint', 'sample'])
def test_observations_of_many_records(batch, monkeypatch):
    "Every step of a record, its first and its last time, and times between; a record of eight rows."
    from neuralode_nb.ode import compiled_gradient
    monkeypatch.setattr(compiled_gradient, 'room_for', lambda *_: 8)
    t, found = torch.cat([torch.zeros(1, **D), torch.linspace(.01, 9, 40, **D)]), []
    for c in (True, False):
        f, y0 = Field(), start(2).requires_grad_()
        s = solve(f, y0, t, 'bosh3', batch=batch, compile=c)
        weights = torch.linspace(1, 2, s.y.numel(), **D).view_as(s.y)
        found.append((s.y, torch.autograd.grad((s.y * weights).sum(), [y0, *f.parameters()])))
    close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-9)


def test_without_a_compiler_there_is_a_message_and_the_same_answer(monkeypatch):
    def none(): raise RuntimeError("no compiler")
    monkeypatch.setattr('torch._inductor.cpp_builder.get_cpp_compiler', none)
    compiled.can_compile.cache_clear()
    with pytest.warns(UserWarning, match='install g'): a = solve(Field(), start(), [0., 1.], compile=True)
    torch.testing.assert_close(a.y, solve(Field(), start(), [0., 1.]).y, rtol=0, atol=0)


def test_the_drop_in_takes_it():
    f, y0, t = Field(), start(), torch.linspace(0, 1, 3, **D)
    close(odeint(f, y0, t, compile=True), odeint(f, y0, t))
    y = odeint(f, y0, t, method='rk4', options={'step_size': .3}, compile=True)
    close(y, odeint(f, y0, t, method='rk4', options={'step_size': .3}))
    with pytest.raises(ValueError, match='event_fn'): odeint(f, y0, t, event_fn=lambda t, y: y[0, 0], compile=True)


def test_resume_is_refused():
    s = solve(Field(), start(), [0., 1.], max_steps=2, throw=False)
    with pytest.raises(ValueError, match='resume'): solve(Field(), start(), [0., 1.], resume=s, compile=True)


def test_blocks_take_it():
    block = ODEBlock(Field(), method='bosh3', compile=True)
    y0 = start()
    block(y0).sum().backward()
    plain = ODEBlock(Field(), method='bosh3')
    plain(y0).sum().backward()
    close(block.f.w.grad, plain.f.w.grad, 1e-8)


def adjoint_gradients(how, compile, t=(0., .4, 1.1, 2.), **options):
    "Gradients for the state, args and parameters by the adjoint, and the statistics."
    f, y0, scale = Field(), start().requires_grad_(), torch.tensor(.8, requires_grad=True, **D)
    s = solve(lambda t, y, args: f(t, args * y), y0, list(t), args=scale, gradient=how, compile=compile, **options)
    weights = torch.linspace(1, 2, s.y.numel(), **D).view_as(s.y)
    return torch.autograd.grad((s.y * weights).sum(), [y0, scale, *f.parameters()]), s.stats


SETTINGS = [Adjoint(norm='seminorm'), Adjoint(method='bosh3', rtol=1e-4, atol=1e-5), Adjoint(method='rk4', step_size=.05),
            Adjoint(first_step=.01, max_step=.1)]


@pytest.mark.parametrize('method, t, how', [
    *[('dopri5', (0., .4, 1.1, 2.), how) for how in SETTINGS], ('dopri5', (0., 2.), 'adjoint'),
    ('tsit5', (0., .4, 1.1, 2.), 'adjoint'), ('bosh3', (1., .3, .3, -1.), 'adjoint'),
    ('rk4', (1., .3, .3, -1.), 'adjoint')], ids=str)
def test_adjoint_equals_the_eager_one(method, t, how):
    options = {'method': method, **({'step_size': .1} if method == 'rk4' else {})}
    (a, stats), (b, theirs) = (adjoint_gradients(how, c, t, **options) for c in (True, False))
    for x, y in zip(a, b): close(x, y, 1e-8)
    assert stats.backward_f_evals > 0 and 0 <= stats.f_evals - theirs.f_evals <= (method == 'rk4')    # dy/dt at the end is read


def test_adjoint_of_structured_states_norms_and_jumps():
    net = nn.Linear(3, 3, **D)
    def f(t, state): return torch.where(t < .5, 1., -.5) * torch.tanh(net(state[0])), -state[1] + state[0].sum()
    def norm(y): return torch.stack([x.abs().max() for x in y]).max()
    found = []
    for c in (True, False):
        net.zero_grad()
        y = solve(f, (start(), torch.ones(2, **D)), [0., .7, 1.], 'bosh3', jump_t=[.5], norm=norm, gradient='adjoint',
                  compile=c).y
        (y[0].square().sum() + y[1].sum()).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


def test_adjoint_of_many_observations_is_one_program():
    field = Field()
    def run(n, end): solve(field, start(), torch.linspace(0, end, n), gradient='adjoint', compile=True).y.sum().backward()
    run(40, 2.)
    count = compiled.graphs()
    run(50, 1.)
    assert compiled.graphs() == count


def test_the_drop_ins_adjoint_takes_it():
    f, y0, t = Field(), start(), torch.linspace(0, 1, 3, **D)
    for params in (None, (f.w,)):
        grads = []
        for c in (True, False):
            f.zero_grad()
            odeint_adjoint(f, y0, t, rtol=1e-6, atol=1e-8, adjoint_params=params, compile=c).sum().backward()
            grads.append([None if p.grad is None else p.grad.clone() for p in f.parameters()])
        close(grads[0][0], grads[1][0])
        assert (grads[0][1] is None) == (grads[1][1] is None) == (params is not None)
    with pytest.raises(ValueError, match='norm'):
        odeint_adjoint(f, y0, t, adjoint_options={'norm': lambda z: 1.}, compile=True)


def test_adjoint_that_does_not_lead_back_warns_and_a_failure_is_named():
    y0 = torch.ones(1, requires_grad=True, **D)
    steep = Field()
    def f(t, y): return -20 * y + 0 * steep(t, y.expand(1, 3)).sum()
    y = solve(f, y0, [0., 1., 2.], 'dopri5', gradient='adjoint', rtol=1e-3, atol=1e-3, compile=True).y
    with pytest.warns(RuntimeWarning, match='did not lead back'): y[-1].sum().backward()
    y = solve(f, y0, [0., 1., 2.], 'dopri5', gradient=Adjoint(max_steps=3), compile=True).y
    with pytest.raises(SolveError, match='backward pass'): y[-1].sum().backward()


def test_a_field_that_changed_is_looked_at_again():
    w, net = torch.tensor(2., **D), Field()
    def f(t, y): return net(t, y) - w * y
    def run(): return solve(f, start(), [0., 1.], compile=True).y.sum()
    for _ in range(2): run().backward()
    y = run()
    w.add_(1.)
    with pytest.raises(RuntimeError, match='inplace'): y.backward()
    w.requires_grad_()
    with pytest.raises(ValueError, match='pass it in args'): run()


@pytest.mark.real
@pytest.mark.parametrize('how, batch', [('checkpoint', 'joint'), ('checkpoint', 'sample'), ('adjoint', 'joint')])
def test_compiled_by_the_real_compiler(how, batch):
    f = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    field = lambda t, y: f(y**3)
    y0, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 2, 4)
    found = []
    for c in (True, False):
        s = solve(field, y0, t, 'bosh3', batch=batch, gradient=how, compile=c)
        found.append((s, torch.autograd.grad(s.y.square().sum(), list(f.parameters()))))
    (a, ga), (b, gb) = found
    torch.testing.assert_close(a.y, b.y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ga, gb, rtol=1e-4, atol=1e-5)
    assert a.stats.compile_seconds > 0
    again = solve(field, y0 + 1, t * 2, 'bosh3', batch=batch, gradient=how, compile=True)
    assert again.stats.compile_seconds == 0


SECOND_PROCESS = """
import sys, torch
from neuralode_nb import solve
torch.set_num_threads(1)
for rate in map(float, sys.argv[1:]):
    def f(t, y, rate=rate): return rate * y
    y0, t = torch.ones(2), torch.tensor([0., 1.])
    y, exact = (solve(f, y0, t, 'euler', step_size=.25, compile=c).y[-1] for c in (True, False))
    found = torch._dynamo.utils.counters['aot_autograd']
    print(rate, found['autograd_cache_hit'], torch.allclose(y, exact))
"""


@pytest.mark.real
def test_another_process_finds_what_was_compiled_and_nothing_else():
    "Two fields differ only inside the loop: an entry of one must not be taken for the other."
    one, other = -1 - time.time_ns() % 10**6 / 1e7, -2.        # a number that no earlier run has left on disk
    def run(*rates):
        done = subprocess.run([sys.executable, '-c', SECOND_PROCESS, *map(str, rates)], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return [line.split() for line in done.stdout.splitlines()]
    assert run(one) == [[str(one), '0', 'True']]
    assert run(one, one + other) == [[str(one), '1', 'True'], [str(one + other), '1', 'True']]


def test_what_is_written_out_has_a_place_in_the_keys_on_disk(monkeypatch):
    before = compiled.fingerprint()
    assert pickle.dumps(compiled.decompositions()) == pickle.dumps(compiled.WrittenOut())
    monkeypatch.setattr(compiled, 'SMALL', 1)
    compiled.fingerprint.cache_clear()
    assert compiled.fingerprint() != before
    compiled.fingerprint.cache_clear()
