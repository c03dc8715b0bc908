"""Members in one solve are what they are alone; anchored members sample what their theory says."""
import copy
import math
import pickle

import pytest
import torch
from torch import nn

from neuralode_nb import solve
from neuralode_nb.models.anchors import AnchoredEnsemble, by_fan_in, set_weights
from neuralode_nb.models.blocks import ODEBlock
from neuralode_nb.models.ensemble import Ensemble, MembersBlock, disagreement, members_of_rank
from neuralode_nb.models.fields import MLP, Autonomous, ConvField

DOUBLE = dict(dtype=torch.float64)
TIGHT = dict(rtol=1e-9, atol=1e-9)


class Scale(nn.Module):
    "A field of elementwise operations: the same bits in any company."
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.rand(2, **DOUBLE) * 3)

    def forward(self, t, y): return -self.rate * y + torch.cos(t)


class Twice(nn.Module):
    "A network with a block that is used twice, and a buffer."
    def __init__(self):
        super().__init__()
        self.block = ODEBlock(MLP(3, 8, time=True).double(), **TIGHT)
        self.read = nn.Linear(3, 2, **DOUBLE)
        self.register_buffer("shift", torch.rand(3, **DOUBLE))

    def forward(self, x): return self.read(self.block(self.block(x + self.shift).tanh()))


FIELDS = {
    "mlp": lambda: MLP(2, [8, 8], time=True), "features": lambda: MLP(2, 8, features=torch.sin), "relu": lambda: MLP(2, 8, "relu"),
    "autonomous": lambda: Autonomous(nn.Sequential(nn.Linear(2, 8, bias=False), nn.Tanh(), nn.Linear(8, 2))),
    "mean of the batch": lambda: MLP(2, 8, features=lambda y: y - y.mean(0)),
    "normed": lambda: Autonomous(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2)))}


def block_of(field, **options):
    def make(seed): return ODEBlock(field().double(), t=(0., .7), **TIGHT | options)
    return make


def step(model, loss, n=3):
    optimizer = torch.optim.Adam(model.parameters(), lr=.02)
    for _ in range(n):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model

# ------------------------------------------------------------------------------------------------------ as if alone


@pytest.mark.parametrize("batch", ["sample", "joint"])
@pytest.mark.parametrize("field", FIELDS)
def test_members_in_one_solve_are_what_they_are_alone(field, batch):
    ensemble, x = Ensemble(block_of(FIELDS[field]), 3, batch=batch), torch.randn(4, 2, **DOUBLE)
    y = ensemble(x, [0., .3, .7])
    for i in range(3): assert torch.allclose(ensemble.member(i)(x, [0., .3, .7]), y[i], rtol=0, atol=1e-7)
    assert any(ensemble.stacked.direct.values()) == (field not in ("mean of the batch", "normed"))


@pytest.mark.parametrize("shape", [(2,), (4, 2), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("batch", ["sample", "joint"])
def test_states_of_any_shape(shape, batch):
    ensemble, x = Ensemble(block_of(FIELDS["mlp"]), 3, batch=batch), torch.randn(shape, **DOUBLE)
    y = ensemble(x)
    assert y.shape == (3, *shape)
    for i in range(3): assert torch.allclose(ensemble.member(i)(x), y[i], rtol=0, atol=1e-7)


def test_images_pass_through_blocks():
    ensemble = Ensemble(lambda seed: ODEBlock(ConvField(4).double(), method="rk4", step_size=.5), 2)
    x = torch.randn(3, 4, 5, 5, **DOUBLE)
    assert torch.allclose(ensemble(x)[1], ensemble.member(1)(x), atol=1e-10)


def test_a_state_of_several_tensors():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3, **DOUBLE)

        def forward(self, t, y): return {"v": y["v"] - 1., "w": self.a(y["v"]) * torch.sin(t)}
    ensemble = Ensemble(lambda seed: ODEBlock(Pair(), **TIGHT), 3)
    start = {"v": torch.randn(4, 2, **DOUBLE), "w": torch.zeros(4, 3, **DOUBLE)}
    y = ensemble(start)
    for name, x in ensemble.member(2)(start).items(): assert torch.allclose(y[name][2], x, atol=1e-7)


def test_inputs_of_each_member():
    ensemble, x = Ensemble(lambda seed: Twice(), 3), torch.randn(3, 4, 3, **DOUBLE)
    y = ensemble.each(x)
    for i in range(3): assert torch.allclose(ensemble.member(i)(x[i]), y[i], atol=1e-7)
    assert torch.equal(ensemble.each(x[:1].expand(3, 4, 3)), ensemble(x[0]))


def test_times_of_each_member():
    ensemble, x = Ensemble(block_of(FIELDS["mlp"]), 3), torch.randn(3, 4, 2, **DOUBLE)
    t = torch.tensor([[0., .2], [0., .5], [.1, 1.]], **DOUBLE)
    y = ensemble.each(x, t)
    for i in range(3): assert torch.allclose(ensemble.member(i)(x[i], t[i]), y[i], atol=1e-7)


def test_the_same_bits_alone_and_in_the_ensemble():
    ensemble, x = Ensemble(lambda seed: ODEBlock(Scale(), t=(0., 2.)), 7), torch.randn(5, 2, **DOUBLE)
    y = ensemble(x)
    for i in range(7):
        alone = Ensemble([ensemble.member(i)])
        assert torch.equal(alone(x)[0], y[i])
        assert alone.stacked.stats.f_evals.item() == ensemble.stacked.stats.f_evals[i].item()


def test_every_member_takes_its_own_steps():
    ensemble, x = Ensemble(lambda seed: ODEBlock(Scale(), t=(0., 4.), **TIGHT), 4), torch.ones(3, 2, **DOUBLE)
    with torch.no_grad(): ensemble.stacked.f.rate.copy_(torch.tensor([.1, 1., 5., 25.], **DOUBLE)[:, None].expand(4, 2))
    ensemble(x)
    steps = ensemble.stacked.stats.accepted.tolist()
    assert steps == sorted(steps) and steps[3] > 4 * steps[0]
    for i, n in enumerate(steps):
        one = ensemble.member(i)
        one(x)
        assert abs(one.stats.accepted - n) <= 1
    joint = Ensemble([ensemble.member(i) for i in range(4)], batch="joint")
    joint(x)
    assert 5 * steps[0] < joint.stacked.stats.accepted < steps[3]      # all pay for the last, whose error the mean waters down


def test_a_member_that_fails_is_named():
    ensemble = Ensemble(lambda seed: ODEBlock(Scale(), max_steps=30), 3)
    with torch.no_grad(): ensemble.stacked.f.rate[1] = 1e6
    with pytest.raises(Exception, match="sample 1"): ensemble(torch.ones(2, 2, **DOUBLE))

# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"gradient": "direct"}, {"method": "rk4", "step_size": .1}], ids=str)
@pytest.mark.parametrize("field", ["mlp", "normed"])
def test_gradients_are_those_of_each_member(field, options):
    ensemble, x = Ensemble(block_of(FIELDS[field], **options), 3), torch.randn(4, 2, **DOUBLE, requires_grad=True)
    target = torch.randn(4, 2, **DOUBLE)
    found = torch.autograd.grad(ensemble.loss(ensemble(x), target), [x, *ensemble.parameters()])
    to_x = 0.
    for i in range(3):
        one = ensemble.member(i)
        expected = torch.autograd.grad((one(x) - target).square().mean(), [x, *one.parameters()])
        to_x = to_x + expected[0]
        for g, e in zip(found[1:], expected[1:]): assert torch.allclose(g[i], e, rtol=1e-6, atol=1e-8)
    assert torch.allclose(found[0], to_x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch", ["sample", "joint"])
def test_one_optimizer_trains_every_member_as_if_alone(batch):
    ensemble, x, target = Ensemble(lambda seed: Twice(), 3, batch=batch), torch.randn(6, 3, **DOUBLE), torch.randn(6, 2, **DOUBLE)
    alone = [step(ensemble.member(i), lambda m: (m(x) - target).square().mean()) for i in range(3)]
    step(ensemble, lambda m: m.loss(m(x), target))
    for i in range(3):
        for p, q in zip(ensemble.member(i).parameters(), alone[i].parameters()): assert torch.allclose(p, q, rtol=0, atol=1e-6)


def test_a_member_does_not_feel_the_others():
    few, many = (Ensemble(lambda seed: ODEBlock(Scale()), n) for n in (2, 6))
    x, target = torch.randn(4, 2, **DOUBLE), torch.randn(4, 2, **DOUBLE)
    for e in (few, many): step(e, lambda m: m.loss(m(x), target))
    assert torch.equal(few.stacked.f.rate, many.stacked.f.rate[:2])


def test_gradcheck():
    ensemble = Ensemble(lambda seed: ODEBlock(MLP(2, 3).double(), method="rk4", step_size=.5), 2)
    names = [name for name, _ in ensemble.named_parameters()]
    def run(x, *weights): return torch.func.functional_call(ensemble, dict(zip(names, weights)), (x,))
    x = torch.randn(2, 2, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in ensemble.parameters())))


@pytest.mark.parametrize("diversity", [0., .5, 1.])
def test_the_loss_is_that_of_the_mean_and_of_the_disagreement(diversity):
    prediction, target = torch.randn(5, 7, 2, **DOUBLE), torch.randn(7, 2, **DOUBLE)
    of_mean = (prediction.mean(0) - target).square().mean()
    expected = 5 * of_mean + (1 - diversity) * disagreement(prediction).sum()
    assert torch.allclose(Ensemble([MLP(2)]).loss(prediction, target, diversity), expected)

# ------------------------------------------------------------------------------------------------- a module like others


def test_copies_files_and_modes():
    ensemble, other = Ensemble(lambda seed: Twice(), 3), Ensemble(lambda seed: Twice(), 3, seed=5)
    x = torch.randn(4, 3, **DOUBLE)
    y = ensemble(x)
    y.sum().backward()
    assert [n for n, _ in ensemble.stacked.named_parameters()] == [n for n, _ in Twice().named_parameters()]
    other.load_state_dict(ensemble.state_dict())
    for same in (other, pickle.loads(pickle.dumps(ensemble)), copy.deepcopy(ensemble)): assert torch.equal(same(x), y)
    one = ensemble.member(1)
    assert type(one.block) is ODEBlock and type(ensemble.stacked.block) is MembersBlock and one.read.weight.grad is None
    assert torch.equal(one.shift, ensemble.stacked.shift[1]) and "batch" not in vars(one.block)
    with torch.no_grad(): one.read.weight.zero_()
    assert torch.equal(ensemble(x), y)                                   # a member is a copy
    assert ensemble.eval().stacked.block.training is False
    assert ensemble.float()(x.float()).dtype == torch.float32


def test_tied_weights_stay_tied():
    def make(seed):
        net = nn.Sequential(nn.Linear(2, 2, **DOUBLE), nn.Tanh(), nn.Linear(2, 2, **DOUBLE))
        net[2].weight = net[0].weight
        return net
    ensemble, x = Ensemble(make, 3), torch.randn(4, 2, **DOUBLE)
    assert ensemble.stacked[0].weight is ensemble.stacked[2].weight and len(list(ensemble.parameters())) == 3
    one = ensemble.member(2)
    assert one[0].weight is one[2].weight and torch.allclose(one(x), ensemble(x)[2])


def test_batch_norm_writes_each_members_statistics():
    ensemble, x = Ensemble(lambda seed: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 3), torch.randn(8, 2)
    alone = [ensemble.member(i) for i in range(3)]
    ensemble(x)
    for i, one in enumerate(alone):
        one(x)
        for a, b in zip(one.buffers(), ensemble.member(i).buffers()): assert torch.allclose(a, b, atol=1e-6)


def test_dropout_differs_between_members_and_prediction_has_none():
    net = nn.Linear(2, 50)
    ensemble = Ensemble([nn.Sequential(copy.deepcopy(net), nn.Dropout(.5)) for _ in range(3)])
    x = torch.randn(4, 2)
    assert not torch.equal(*ensemble(x)[:2])
    prediction = ensemble.predict(x)
    assert (prediction.std < 1e-6).all() and ensemble.training and not prediction.mean.requires_grad


def test_a_member_depends_on_its_number_alone():
    template, before = Twice(), torch.get_rng_state()
    whole, part, redrawn = Ensemble(lambda seed: Twice(), 6), Ensemble(lambda seed: Twice(), [4, 1]), Ensemble(template, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(whole.stacked.read.weight[[4, 1]], part.stacked.read.weight)
    assert not torch.equal(*redrawn.stacked.read.weight)


@pytest.mark.parametrize("members, processes", [(20, 3), (5, 5), (7, 2), (1, 1)])
def test_shares_are_all_members_once(members, processes, monkeypatch):
    monkeypatch.setattr("neuralode_nb.models.ensemble.ranks", lambda: (0, processes))
    shares = [members_of_rank(members, rank) for rank in range(processes)]
    assert [i for share in shares for i in share] == list(range(members))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ValueError, match="cannot be shared"): members_of_rank(processes - 1)


@pytest.mark.parametrize("option, text", [({"kinetic": .1}, "kinetic"), ({"events": lambda t, y: y[0]}, "events"),
                                          ({"batch": "sample"}, "batch='sample'")])
def test_blocks_that_cannot_be_members(option, text):
    with pytest.raises(ValueError, match=text): Ensemble(lambda seed: ODEBlock(MLP(2), **option), 2)


def test_a_transform_of_an_ensemble_with_own_steps_is_refused():
    ensemble, x = Ensemble(block_of(FIELDS["mlp"]), 2), torch.randn(2, 2, **DOUBLE)
    with pytest.raises(ValueError, match="torch.func"): torch.func.grad(lambda x: ensemble(x).sum())(x)

# ------------------------------------------------------------------------------------------- torch.func over a solve


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_vmap_over_stacked_parameters(method):
    fields = [MLP(2, 8, time=True).double() for _ in range(3)]
    weights, _ = torch.func.stack_module_state(fields)
    y0, size = torch.randn(4, 2, **DOUBLE), .1 if method == "rk4" else None
    def end(weights):
        f = lambda t, y: torch.func.functional_call(fields[0], weights, (t, y))
        return solve(f, y0, [0., 1.], method, step_size=size, **TIGHT).y[-1]
    found = torch.func.vmap(end)(weights)
    slopes = torch.func.vmap(torch.func.grad(lambda w: end(w).square().sum()))(weights)
    through = torch.autograd.grad(found.square().sum(), list(weights.values()))
    for i, field in enumerate(fields):
        y = solve(field, y0, [0., 1.], method, step_size=size, **TIGHT).y[-1]
        assert torch.allclose(found[i], y, rtol=0, atol=1e-8)
        for name, g, e in zip(weights, through, torch.autograd.grad(y.square().sum(), list(field.parameters()))):
            assert torch.allclose(slopes[name][i], e, rtol=1e-6, atol=1e-7) and torch.allclose(g[i], e, rtol=1e-6, atol=1e-7)


def test_jacobian_over_stacked_parameters():
    fields = [nn.Linear(2, 2, **DOUBLE) for _ in range(3)]
    weights, y0 = torch.stack([f.weight.detach() for f in fields]), torch.randn(2, **DOUBLE)
    end = lambda w: solve(lambda t, y: torch.tanh(y @ w.T), y0, [0., 1.], **TIGHT).y[-1]
    found = torch.func.vmap(torch.func.jacrev(end))(weights)
    for i in range(3):
        assert torch.allclose(found[i], torch.autograd.functional.jacobian(end, weights[i]), rtol=1e-6, atol=1e-7)

# ------------------------------------------------------------------------------------------------------ the posterior

N, NOISE = 40, .5


class Features(nn.Linear):
    def __init__(self): super().__init__(5, 1, bias=False, **DOUBLE)


def linear_gaussian():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(N, 5, generator=generator, **DOUBLE) * torch.tensor([3., 1., .3, .1, 0.], **DOUBLE)
    return x, x @ torch.randn(5, 1, generator=generator, **DOUBLE) + NOISE * torch.randn(N, 1, generator=generator, **DOUBLE)


def settle(ensemble, x, target):
    "The minimum of a quadratic loss, by Newton's step and repeated for rounding."
    weight, pull = ensemble.stacked.weight, ensemble.pull
    for _ in range(3):
        gradient, = torch.autograd.grad(ensemble.loss(ensemble(x), target), weight)
        hessian = 2 * (x.T @ x / N + torch.diag(pull))
        with torch.no_grad(): weight -= torch.linalg.solve(hessian, gradient[:, 0].T).T[:, None]
    assert torch.autograd.grad(ensemble.loss(ensemble(x), target), weight)[0].abs().max() < 1e-10
    return weight.detach()[:, 0]


def unequal(name, parameter): return torch.tensor([[4., 1., 2., .5, 3.]], **DOUBLE)


@pytest.mark.parametrize("prior", [1., unequal], ids=["one number", "each its own"])
@pytest.mark.parametrize("perturbed", [False, True], ids=["", "perturbed targets"])
def test_members_sample_what_the_theory_says(perturbed, prior):
    members, (x, y) = 3000, linear_gaussian()
    ensemble = AnchoredEnsemble(lambda seed: Features(), members, observations=N, noise=NOISE, prior=prior, mean=.3, start="model")
    variance = prior("", None)[0] if callable(prior) else torch.ones(5, **DOUBLE)
    information = torch.diag(1 / variance)
    S = torch.linalg.inv(x.T @ x / NOISE**2 + information)
    mean = S @ (x.T @ y[:, 0] / NOISE**2 + information @ torch.full((5,), .3, **DOUBLE))
    expected = S if perturbed else S @ information @ S
    noise = NOISE * torch.randn(members, N, 1, generator=torch.Generator().manual_seed(8), **DOUBLE)
    theta = settle(ensemble, x, y + noise if perturbed else y)
    root = torch.linalg.cholesky(expected)
    white = torch.linalg.solve_triangular(root, (theta - mean).T, upper=False)                # should be N(0, 1)
    off, covariance = white.mean(1), white @ white.T / members
    assert off.abs().max() < 4 / math.sqrt(members)
    assert (covariance - torch.eye(5, **DOUBLE)).abs().max() < 4.5 * math.sqrt(2 / members)
    if not perturbed:
        ratio = theta.var(0) / S.diagonal()
        assert (ratio < 1.1).all() and ratio[0] < .05 and abs(ratio[4] - 1) < 4 * math.sqrt(2 / members)


def test_weight_decay_leaves_one_answer():
    x, y = linear_gaussian()
    same = AnchoredEnsemble(lambda seed: Features(), 20, observations=N, noise=NOISE, start="model")
    same.anchors.zero_()
    anchored = AnchoredEnsemble(lambda seed: Features(), 20, observations=N, noise=NOISE)
    assert settle(same, x, y).std(0).max() < 1e-10 < .5 < settle(anchored, x, y).std(0).max()


def test_the_loss_is_the_papers():
    make = lambda seed: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    ensemble = AnchoredEnsemble(make, 3, observations=12, noise=.2, prior=by_fan_in(2.), start="model", seed=3)
    x, y = torch.randn(6, 2, **DOUBLE), torch.randn(6, 1, **DOUBLE)
    total = 0.
    for i in range(3):
        one, at = ensemble.member(i), 0
        total = total + (one(x) - y).square().mean()
        for p in one.parameters():
            gamma = .2**2 / (2. / (p.shape[1] if p.ndim == 2 else 1))
            anchor = ensemble.anchors[i, at:at + p.numel()].view_as(p)
            total, at = total + gamma * (p - anchor).square().sum() / 12, at + p.numel()
    assert torch.allclose(ensemble.loss(ensemble(x), y), total)
    assert not torch.allclose(ensemble.stacked[0].weight.flatten(1), ensemble.anchors[:, :6], atol=1e-2)


def test_anchors_belong_to_numbers_and_travel_with_the_weights():
    options = dict(observations=10, noise=.1)
    whole, part = (AnchoredEnsemble(lambda seed: MLP(2), m, **options) for m in (5, [3]))
    biases = [e.stacked.layers[0].bias for e in (whole, part)]
    assert torch.equal(whole.anchors[3], part.anchors[0]) and torch.equal(biases[0][3], biases[1][0])
    other = AnchoredEnsemble(lambda seed: MLP(2), 5, **options, seed=9)
    assert not torch.equal(other.anchors, whole.anchors)
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other.anchors, whole.anchors) and other.anchor_loss().sum() == 0
    set_weights(other.stacked, other.anchors + 1.)
    assert torch.allclose(other.anchor_loss(), torch.full((5,), .1**2 / 10 * other.anchors.shape[1]), rtol=1e-4)
    assert not other.anchors.requires_grad and whole.double().anchor_loss().dtype == torch.float64


def test_frozen_parameters_have_no_anchor():
    def make(seed):
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        net[0].requires_grad_(False)
        return net
    ensemble = AnchoredEnsemble(make, 3, observations=10, noise=.1)
    assert ensemble.anchors.shape == (3, 4) and not ensemble.stacked[0].weight.requires_grad
