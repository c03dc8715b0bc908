"""Models: a field is what its formula says, a block is a solve with a bill, and the twins for images differ in nothing else."""
import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from neuralode_nb import SolveError, solve
from neuralode_nb.models.blocks import ODEBlock, count_nfe
from neuralode_nb.models.fields import ACTIVATIONS, MLP, Augment, Autonomous, ConvField, LinearField, find_activation, with_time
from neuralode_nb.models.image import ODENet, ResidualBlock, ResNet, head, stem
from neuralode_nb.ode.implicit_methods import IMPLICIT
from neuralode_nb.ode.methods import TABLEAUS
from neuralode_nb.ode.rosenbrock_methods import ROSENBROCK

NOW, LATER = torch.tensor(0.0), torch.tensor(1.0)
FIELDS = {
    "matrix": (lambda: LinearField(3), (5, 3)),
    "perceptron": (lambda: MLP(3, (8, 4), "silu"), (5, 3)),
    "perceptron in time": (lambda: MLP(3, 8, time=True), (5, 3)),
    "perceptron of sines": (lambda: MLP(3, 8, features=torch.sin), (5, 3)),
    "convolution": (lambda: ConvField(4), (2, 4, 6, 5)),
    "convolution without time": (lambda: ConvField(4, "tanh", time=False, kernel=1), (2, 4, 6, 5)),
    "network of y": (lambda: Autonomous(nn.Linear(3, 3)), (5, 3)),
}
each_field = pytest.mark.parametrize("make, shape", FIELDS.values(), ids=FIELDS)


def size(module): return sum(p.numel() for p in module.parameters())

# --------------------------------------------------------------------------------------------------------- fields


@each_field
def test_a_field_keeps_the_shape_and_treats_samples_alone(make, shape):
    f, y = make(), torch.randn(shape)
    assert f(NOW, y).shape == shape
    torch.testing.assert_close(f(NOW, y)[1:], f(NOW, y[1:]))                   # no sample sees another
    torch.testing.assert_close(f(NOW, y.flip(0)), f(NOW, y).flip(0))


@each_field
def test_a_field_can_be_solved_in_double_precision_with_right_gradients(make, shape):
    f, y = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    def end(gradient): return solve(f, y, [0.0, 0.7], rtol=1e-6, atol=1e-6, gradient=gradient).y[-1].square().sum()
    wanted = torch.autograd.grad(end("direct"), [y, *f.parameters()])
    for a, b in zip(wanted, torch.autograd.grad(end("checkpoint"), [y, *f.parameters()])):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert a.abs().max() > 0


@each_field
@pytest.mark.parametrize("again", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["copy", "pickle"])
def test_a_field_can_be_kept(make, shape, again):
    f, y = make(), torch.randn(shape)
    assert torch.equal(again(f)(NOW, y), f(NOW, y))


@pytest.mark.parametrize("make, timed", [(lambda: MLP(3), False), (lambda: MLP(3, time=True), True),
                                         (lambda: ConvField(3), True), (lambda: ConvField(3, time=False), False)])
def test_time_is_an_input_only_where_it_was_asked_for(make, timed):
    f, y = make(), torch.randn(2, 3, 3, 3)
    assert torch.equal(f(NOW, y), f(LATER, y)) is not timed


@given(st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.booleans())
def test_an_mlp_has_the_parameters_of_its_formula(dim, hidden, time):
    sizes = [dim + time, *hidden, dim]
    assert size(MLP(dim, hidden, time=time)) == sum(a * b + b for a, b in zip(sizes, sizes[1:]))


def test_an_mlp_is_its_formula():
    f, y = MLP(2, 7, "softplus", time=True, features=torch.sin), torch.randn(4, 2)
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in f.layers[::2])
    inner = torch.cat([y.sin(), torch.full((4, 1), 0.3)], 1) @ w1.T + b1
    torch.testing.assert_close(f(torch.tensor(0.3), y), nn.functional.softplus(inner) @ w2.T + b2)


def test_small_first_weights_have_the_deviation_that_was_asked_for():
    f = MLP(50, 200, std=0.03)
    for layer in f.layers[::2]:
        assert abs(layer.weight.std().item() - 0.03) < 0.001 and not layer.bias.any()
    assert not MLP(3, std=0.0)(NOW, torch.randn(4, 3)).any()


@given(st.integers(1, 64))
def test_the_norm_of_a_convolution_takes_the_largest_divisor_up_to_eight(channels):
    groups = ConvField(channels).norms[0].num_groups
    assert channels % groups == 0 and groups <= 8
    assert not any(channels % g == 0 for g in range(groups + 1, 9))


def test_a_still_field_stands_still_and_yet_learns():
    f, y = ConvField(4, still=True), torch.randn(2, 4, 5, 5)
    block = ODEBlock(f, gradient="direct")
    assert torch.equal(block(y), y)
    block(y).sum().backward()
    assert f.convs[1].weight.grad.abs().max() > 0                              # it can leave where it stands
    assert not f.convs[0].weight.grad.any()                                    # through its last convolution first


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_comes_by_name_by_class_or_as_a_module(name):
    x = torch.linspace(-2, 2, 9)
    found = [find_activation(a)(x) for a in (name, ACTIVATIONS[name], ACTIVATIONS[name]())]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_with_time_appends_one_time_or_one_for_each_sample():
    y = torch.zeros(2, 3, 4, 5)
    one, each = with_time(torch.tensor(7.0), y, dim=1), with_time(torch.tensor([7.0, 8.0]), y, dim=1)
    assert one.shape == each.shape == (2, 4, 4, 5) and not one[:, :3].any()
    assert (one[:, 3] == 7).all() and (each[0, 3] == 7).all() and (each[1, 3] == 8).all()
    assert with_time(2, y.bfloat16()).dtype == torch.bfloat16


def test_augmenting_adds_zeros_and_takes_them_away_again():
    y = torch.randn(2, 3, 4, 4)
    widen = Augment(2, dim=1)
    assert widen(y).shape == (2, 5, 4, 4) and not widen(y)[:, 3:].any() and torch.equal(widen.drop(widen(y)), y)
    assert "2, dim=1" in repr(widen)


def test_a_matrix_may_be_complex_and_lists_become_floats():
    assert LinearField(1, [[2]]).matrix.dtype == torch.float32
    f, y = LinearField(1, torch.tensor([[1j]])), torch.ones(1, dtype=torch.complex64)
    turned = solve(f, y, [0.0, torch.pi], rtol=1e-5, atol=1e-5).y[-1]          # half a turn
    torch.testing.assert_close(turned.detach(), -y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make, error, message", [
    (lambda: LinearField(2, torch.eye(3)), ValueError, r"matrix has shape \(3, 3\); a field of dim=2 needs \(2, 2\)"),
    (lambda: LinearField(2.0), TypeError, "dim=2.0 must be an integer"),
    (lambda: MLP(True), TypeError, "dim=True must be an integer"),
    (lambda: MLP(2, 0), ValueError, "hidden=0 must be at least 1"),
    (lambda: MLP(2, (8, 0)), ValueError, "hidden=0 must be at least 1"),
    (lambda: MLP(2, activation="thanh"), ValueError, "activation='thanh' is not known: use one of tanh, sigmoid"),
    (lambda: MLP(2, activation=torch.tanh), TypeError, "must be a name, such as 'tanh', or a class of modules"),
    (lambda: MLP(2, features=3), TypeError, "features=3 must be a function of the state"),
    (lambda: MLP(2, std=-1.0), ValueError, "std=-1.0 must be zero or positive"),
    (lambda: MLP(2, std=float("nan")), ValueError, "std=nan must be zero or positive"),
    (lambda: ConvField(0), ValueError, "channels=0 must be at least 1"),
    (lambda: ConvField(4, kernel=2), ValueError, "kernel=2 must be odd: the field keeps the size of the image"),
    (lambda: ConvField(16, groups=3), ValueError, "groups=3 must divide channels=16"),
    (lambda: ConvField(16, groups=0), ValueError, "groups=0 must divide channels=16"),
    (lambda: Autonomous(torch.sin), TypeError, r"must be a module; a function f\(t, y\) is a field already"),
    (lambda: Augment(0), ValueError, "extra=0 must be at least 1"),
])
def test_a_field_that_cannot_be_says_why(make, error, message):
    with pytest.raises(error, match=message): make()

# --------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("method", [*TABLEAUS, *IMPLICIT, *ROSENBROCK, "auto"])
def test_a_block_is_the_end_of_a_solve(method):
    f, y0 = MLP(2, 8), torch.randn(3, 2)
    options = {"rtol": 1e-4, "atol": 1e-4, "step_size": 0.25}
    block, whole = ODEBlock(f, (0.0, 2.0), method, **options), solve(f, y0, [0.0, 2.0], method=method, **options)
    assert torch.equal(block(y0), whole.y[-1]) and block.nfe == whole.stats.f_evals


def test_a_block_called_with_times_gives_the_path():
    block, y0 = ODEBlock(LinearField(2)), torch.randn(3, 2)
    path = block(y0, torch.linspace(0, 1, 5))
    assert path.shape == (5, 3, 2) and torch.equal(path[0], y0)
    torch.testing.assert_close(path[-1], block(y0))


def test_a_block_takes_tuples_and_dicts():
    def pendulum(t, y): return {"angle": y["speed"], "speed": -y["angle"]}
    start = {"angle": torch.tensor([1.0]), "speed": torch.tensor([0.0])}
    end = ODEBlock(pendulum, (0.0, torch.pi), rtol=1e-6, atol=1e-6)(start)
    assert abs(end["angle"].item() + 1) < 1e-4 and abs(end["speed"].item()) < 1e-4
    assert isinstance(ODEBlock(lambda t, y: y)((torch.ones(1), torch.ones(2))), tuple)


def test_the_bill_of_a_block():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = MLP(2), 0
        def forward(self, t, y):
            self.calls += 1
            return self.inner(t, y)
    for gradient, repeated in (("direct", False), ("checkpoint", True), ("adjoint", True)):
        f, y0 = Counted(), torch.randn(4, 2)
        block = ODEBlock(f, gradient=gradient)
        assert (block.nfe, block.backward_nfe) == (0, 0)
        end = block(y0)
        assert block.nfe > 0 and (gradient != "direct" or block.nfe == f.calls)
        f.calls = 0
        end.sum().backward()
        assert block.backward_nfe == f.calls and (f.calls > 0) is repeated


@pytest.mark.parametrize("method, stages", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_the_bill_of_fixed_steps_can_be_counted_by_hand(method, stages):
    block = ODEBlock(MLP(2), method=method, step_size=0.2)
    twice = nn.Sequential(block, ODEBlock(MLP(2), (0.0, 2.0), method, step_size=0.5))
    with torch.no_grad(): twice(torch.ones(1, 2))
    assert count_nfe(twice) == {"forward": 5 * stages + 4 * stages, "backward": 0}
    assert count_nfe(nn.Linear(1, 1)) == {"forward": 0, "backward": 0}


def test_using_reads_the_same_weights_with_another_solver():
    block, y0 = ODEBlock(MLP(2), (0.0, 2.0), max_steps=500, gradient="adjoint"), torch.randn(4, 2)
    fine = block.using(method="dopri8", rtol=1e-7, atol=1e-7)
    assert fine.f is block.f and fine.t == block.t and fine.options["max_steps"] == 500
    assert fine.options["gradient"] == "adjoint" and block.options["method"] == "tsit5"
    with torch.no_grad():
        before = fine(y0)
        assert 0 < (before - block(y0)).abs().max() < 1e-2
        for p in block.parameters(): p.mul_(2)
        assert 0 < (fine(y0) - block(y0)).abs().max() < (fine(y0) - before).abs().max()     # one field, not two
    assert block.using(t=(0.0, 1.0)).t == (0.0, 1.0)
    with pytest.raises(ValueError, match="did you mean"): block.using(method="dopri")


def test_weights_load_into_a_block_with_another_solver():
    one, other, file = ODEBlock(MLP(2)), ODEBlock(MLP(2), method="rk4", step_size=0.05), io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    y0 = torch.randn(4, 2)
    torch.testing.assert_close(one(y0), other(y0), rtol=1e-2, atol=1e-3)
    for same in copy.deepcopy(one), pickle.loads(pickle.dumps(one)):            # stats of a solve with a graph, too
        assert torch.equal(same(y0), one(y0)) and same.options == one.options
    assert "method='tsit5'" in repr(one) and "step_size" not in repr(one) and "step_size=0.05" in repr(other)


@pytest.mark.parametrize("make, error, message", [
    (lambda f: ODEBlock(f, method="dopri"), ValueError, "did you mean 'dopri"),
    (lambda f: ODEBlock(f, method="euler"), ValueError, "pass step_size"),
    (lambda f: ODEBlock(f, gradient="backprop"), ValueError, "gradient='backprop' is not available"),
    (lambda f: ODEBlock(f, rtol=-1.0), ValueError, "rtol=-1 must be a finite number, zero or positive"),
    (lambda f: ODEBlock(f, max_steps=0), ValueError, "max_steps=0"),
    (lambda f: ODEBlock(f, (1.0, 1.0)), ValueError, r"t=\(1.0, 1.0\) spans no time"),
    (lambda f: ODEBlock(f, (0.0, float("nan"))), ValueError, "t"),
    (lambda f: ODEBlock(f, steps=3), TypeError, "steps=3 is not an option of a block: use method"),
    (lambda f: ODEBlock(f, throw=False), TypeError, "throw=False is not an option of a block"),
    (lambda f: ODEBlock(3), TypeError, r"f=3 must be callable as f\(t, y\)"),
    (lambda f: ODEBlock(nn.Linear(2, 2)), TypeError, r"f=Linear does not take \(t, y\): wrap .* in Autonomous\(net\)"),
    (lambda f: ODEBlock(lambda t, y: f(t, y)), ValueError, "f is no module, but uses f.layers.0.weight, .*make f an nn.Module"),
])
def test_a_block_that_cannot_work_says_so_when_it_is_built(make, error, message):
    with pytest.raises(error, match=message): make(MLP(2))


def test_building_a_block_evaluates_nothing_and_draws_nothing():
    def never(t, y): raise AssertionError("the field was evaluated")
    before = torch.get_rng_state()
    ODEBlock(never, rtol=torch.full((7,), 1e-3), norm=lambda y: y.abs().max())
    assert torch.equal(before, torch.get_rng_state())


def test_a_block_whose_solution_leaves_every_range_says_when():
    with pytest.raises(SolveError, match=r"at t=(0\.9|1\.0)"): ODEBlock(lambda t, y: y**2, (0.0, 2.0))(torch.ones(1))

# --------------------------------------------------------------------------------------------------------- images


def test_a_residual_block_is_one_step_of_euler():
    branch, y = ConvField(4), torch.randn(2, 4, 6, 6)
    step = ODEBlock(branch, method="euler", step_size=1.0)
    torch.testing.assert_close(ResidualBlock(branch)(y), step(y))
    assert step.nfe == 1 and (step(y) - y).abs().max() > 0.1


def test_residual_blocks_with_common_weights_are_euler_steps():
    branch, y = ConvField(4, time=False), torch.randn(2, 4, 6, 6)
    shared = nn.Sequential(*(ResidualBlock(branch) for _ in range(4)))
    torch.testing.assert_close(shared(y), ODEBlock(branch, (0.0, 4.0), "euler", step_size=1.0)(y))


@pytest.mark.parametrize("channels, classes, width, halvings, side", [(1, 10, 16, 1, 8), (3, 2, 12, 0, 5), (3, 100, 8, 2, 32)])
def test_the_twins_share_everything_but_the_body(channels, classes, width, halvings, side):
    x = torch.randn(2, channels, side, side)
    ode = ODENet(channels, classes, width, halvings)
    res = ResNet(channels, classes, width, blocks=3, halvings=halvings)
    for net in ode, res:
        assert net(x).shape == (2, classes) and net.stem(x).shape == (2, width, side >> halvings, side >> halvings)
    assert (size(ode.stem), size(ode.head)) == (size(res.stem), size(res.head))
    assert size(res.body) == 3 * size(ResNet(channels, classes, width, 1, halvings).body)
    assert size(ode.body) - size(res.body) // 3 == 2 * width * 9               # the time channels


def test_the_twins_have_the_sizes_of_the_literature():
    assert 0.15e6 < size(ODENet()) < 0.16e6 and 0.5e6 < size(ResNet()) < 0.6e6


@pytest.mark.parametrize("make", [lambda: ResNet(1, 2, 8, 2, 1), lambda: ODENet(1, 2, 8, 1, method="bosh3")])
def test_a_network_begins_as_the_identity_between_stem_and_head_and_learns(make):
    net, x, y = make(), torch.randn(16, 1, 8, 8), torch.arange(16) % 2
    x[y == 1, :, ::2] *= 5                                                      # stripes are the second class
    assert torch.equal(net(x), net.head(net.stem(x)))
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=0.02), []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(cross_entropy(net(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad.abs().max() > 0 for p in net.parameters())               # every weight takes part
    assert not torch.equal(net(x), net.head(net.stem(x)))


def test_settings_of_the_block_pass_through_an_image_network():
    net = ODENet(width=4, method="rk4", step_size=0.5, gradient="direct")
    assert net.body.options["method"] == "rk4" and net.body.options["gradient"] == "direct"
    with torch.no_grad(): net(torch.zeros(1, 1, 8, 8))
    assert count_nfe(net) == {"forward": 8, "backward": 0}


@pytest.mark.parametrize("make, message", [
    (lambda: ResNet(blocks=0), "blocks=0 must be at least 1"),
    (lambda: stem(0, 8), "channels=0 must be at least 1"),
    (lambda: stem(1, 0), "width=0 must be at least 1"),
    (lambda: ODENet(halvings=-1), "halvings=-1 must be at least 0"),
    (lambda: head(8, 1), "classes=1 must be at least 2"),
    (lambda: ODENet(method="euler"), "pass step_size"),
])
def test_a_network_that_cannot_be_says_why(make, message):
    with pytest.raises(ValueError, match=message): make()
