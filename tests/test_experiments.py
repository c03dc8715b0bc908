"""Spirals and digits: the data are what the pages say, the judge is right, a run repeats itself, and the records show it."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from neuralode_nb.cli import checkpoint_folder
from neuralode_nb.experiments import digits, spirals, two_spirals
from neuralode_nb.lab.data import load
from neuralode_nb.lab.record import Record, load_record
from neuralode_nb.lab.settings import configure
from neuralode_nb.lab.watch import score
from neuralode_nb.lab.windows import strip
from neuralode_nb.models.blocks import ODEBlock
from neuralode_nb.models.image import ODENet, ResNet
from neuralode_nb.ode.solve import solve

TINY_SPIRALS = two_spirals.Config(("spiral",), ("even", "irregular"), points=60, pieces=4, seen=4, batches=2, epochs=4, whole=2)
TINY_TABLE = spirals.Config(rows=("dopri5, direct", "rk4, adjoint", "tanh, 20 units"), points=60, pieces=4, length=9, seen=4,
                            steps=4, block=2, rounds=1, compile=False)
TINY_DIGITS = digits.Config(("ODE-Net", "ResNet-2"), width=8, epochs=2, samples=64)


def without_time(record):
    "What two identical runs share: everything but the clock."
    def same(row): return {k: v for k, v in row.items() if k not in ("seconds", "s/epoch")}
    return ([r | {"metrics": same(r["metrics"])} for r in record.runs], [same(h) for h in record.history.values()], record.data)


def full(module):
    "The committed record of an experiment, which must be that of its full profile as it is now."
    name = module.__name__.rsplit(".", 1)[1]
    record, now = load_record(name), module.Config.full()
    kept = module.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()})
    assert kept == now and asdict(now).keys() == record.config.keys()
    assert not record.failures and all(np.isfinite(list(r["metrics"].values())).all() for r in record.runs)
    return record


def mean(record, label, metric): return record.summary()[label][metric]["mean"]

# ---------------------------------------------------------------------------------------------------- two spirals


def test_a_figure_sees_fast_and_slow_parts_of_a_path_alike():
    t = torch.linspace(0, 1, 50_000)
    path = torch.stack([torch.sqrt(t), torch.zeros(50_000)], 1)                # fast at first
    steps = path[two_spirals._steady(path, 50)].diff(dim=0).norm(dim=-1)
    assert (steps[1:] < 1.1 / 49).all() and (steps[1:] > 0.9 / 49).all()


@pytest.mark.parametrize("system", ["spiral", "cubic_spiral"])
@pytest.mark.parametrize("spacing", ["even", "irregular"])
def test_a_spiral_is_the_solution_of_its_field_plus_noise(system, spacing):
    series = load(system, points=500, noise=0.1, spacing=spacing, seed=3)
    field = two_spirals._true_field(system, series.scale)
    again = solve(lambda t, u: field(u), series.exact[0], series.t, method="dopri8", rtol=1e-6, atol=1e-6).y
    torch.testing.assert_close(again, series.exact, rtol=0, atol=2e-4)
    noise = series.y - series.exact
    assert abs(noise.std().item() - 0.1) < 0.01 and abs(noise.mean().item()) < 0.01 and abs(series.exact.abs().max() - 1) < 1e-6
    gaps = series.t.diff()
    assert (gaps > 0).all() and (gaps.max() < 1.01 * gaps.min()).item() is (spacing == "even")


@pytest.mark.parametrize("system, dim", [("spiral", 3), ("cubic_spiral", 2)])
def test_the_field_to_be_learned_is_the_one_of_the_page(system, dim):
    block = two_spirals._model(system, two_spirals.Config())
    linear, tanh, last = block.f.layers
    assert (linear.in_features, linear.out_features, last.out_features) == (dim, 50, dim) and isinstance(tanh, nn.Tanh)
    u = torch.randn(5, dim)
    torch.testing.assert_close(block.f(0.0, u), block.f.layers(u**3 if system == "cubic_spiral" else u))
    assert block.options["method"] == "dopri5" and block.options["gradient"] == "direct"


def test_training_sees_pieces_first_and_then_more_and_more_of_the_whole():
    config, series = TINY_SPIRALS, load("spiral", points=60)
    batches = two_spirals._curriculum(series, config)
    for piece in batches(1) + batches(2): assert piece.y.shape == (4, 4, 3) and piece.t[-1] <= config.horizon + 1e-6
    openings = [window for epoch in (3, 4) for window in batches(epoch)]
    lengths = [len(window.t) for window in openings]
    assert lengths == sorted(lengths) and lengths[0] == 6 and lengths[-1] == len(series)
    for window in openings:
        assert torch.equal(window.y0, series.exact[0]) and torch.equal(window.read(window.y), window.y)


def test_the_learning_rate_rises_falls_and_ends_at_nothing():
    config = two_spirals.Config()
    share, steps = two_spirals._rate(config), config.epochs * config.batches
    first = (config.epochs - config.whole) * config.batches
    rates = [share(step) for step in range(steps + 1)]
    assert 0 < rates[0] < 0.02 and 0.9 < max(rates) <= 1 and rates.index(max(rates)) < first / 5
    assert abs(rates[first - 1] - 0.1) < 0.01 and abs(rates[first] - 0.1) < 0.01 and abs(rates[-1]) < 1e-9
    assert all(a >= b for a, b in zip(rates[first // 5:], rates[first // 5 + 1:]))


def test_the_judge_of_spirals_finds_no_fault_in_the_truth_and_a_known_one_in_less():
    series, unseen = load("spiral", noise=0.0), load("spiral", "test", noise=0.0, trajectories=10)
    law = two_spirals._true_field("spiral", series.scale)
    history = {"nfe_whole": [7, 9], "seconds": [1.0, 3.0]}
    class History(dict):
        def __len__(self): return 2
    def judge(factor):
        block = ODEBlock(two_spirals.MLP(3), rtol=1e-6, atol=1e-6)
        block.f.forward = lambda t, u: factor * law(u)
        return two_spirals._measure(block, series, unseen, law, History(history))
    right, wrong = judge(1.0), judge(0.9)
    assert right["mse"] < 1e-8 and right["mse unseen starts"] < 1e-8 and right["field error"] < 1e-6
    assert abs(wrong["field error"] - 0.1) < 1e-5 and wrong["mse"] > 1e-3
    assert (right["NFE first"], right["NFE last"], right["s/epoch"]) == (7, 9, 2.0) and right["parameters"] == 353


def test_spirals_repeat_themselves_and_go_on_from_their_files(tmp_path):
    first = two_spirals.run(TINY_SPIRALS, progress=False)
    once = replace(TINY_SPIRALS, spacings=("even",))
    two_spirals.run(once, checkpoint=tmp_path, progress=False)
    assert len(list(tmp_path.glob("spiral-even-0.pt"))) == 1
    again = two_spirals.run(TINY_SPIRALS, checkpoint=tmp_path, resume=True, progress=False)
    assert without_time(first) == without_time(again)
    assert list(first.figures) == ["trajectories", "fields", "training"] and not first.failures


# -------------------------------------------------------------------------------------------------------- spirals


def test_a_step_of_the_table_is_that_of_the_study():
    config = spirals.Config.full()
    assert (config.pieces, config.length, config.points, config.noise, config.hidden) == (20, 200, 1000, 1e-3, 50)
    assert config.seeds == (0, 1, 2) and config.spacings == ("even", "irregular") and set(config.rows) == set(spirals.ALL)
    assert set(spirals.ROWS) == {f"{m}, {g}" for m in ("euler", "rk4", "bosh3", "dopri5") for g in ("direct", "adjoint")}
    for row, evaluations in {"euler, direct": 199, "rk4, direct": 796}.items():
        model, batch = spirals._model(row, replace(config, compile=False)), strip(load("spiral", points=1000), 3, 200, 10)
        batch.read(model.f, model(batch.y0, batch.t))
        assert abs(model.nfe - evaluations) <= 4                       # rounding of the clock may split a step


@pytest.mark.parametrize("row", list(spirals.ALL))
def test_every_row_trains_the_network_that_it_names(row):
    model = spirals._model(row, spirals.Config(compile=False))
    assert spirals._model(row, spirals.Config()).options["compile"] == (row in spirals.ROWS)
    first, activation, last = model.f.layers
    method, gradient = ("dopri5", "direct") if row in spirals.NETWORKS else row.split(", ")
    assert (model.options["method"], model.options["gradient"]) == (method, gradient)
    hidden = int(row.split(", ")[1].split()[0]) if row in spirals.NETWORKS else 50
    assert first.out_features == last.in_features == hidden and isinstance(activation, nn.Sigmoid if "sigmoid" in row else nn.Tanh)
    series = load("spiral", points=60, spacing="irregular")
    found = []
    for block in model, ODEBlock(model.f, method="dopri8", rtol=1e-6, atol=1e-6, gradient="direct"):
        torch.manual_seed(0)
        loss = spirals._loss(block, strip(series, 3, 9, 4))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert (found[0] - found[1]).norm() < (0.1 if method == "euler" else 2e-2) * found[1].norm()


def test_the_errors_of_the_table_are_of_the_whole_path():
    series = load("spiral", points=200, noise=0.1)
    block = ODEBlock(two_spirals.MLP(3), rtol=1e-6, atol=1e-6)
    block.f.forward = lambda t, u: two_spirals._true_field("spiral", series.scale)(u)
    with torch.no_grad(): found = spirals._errors(block, series)
    assert found["test"] < 1e-8 and abs(found["train"] - 0.01) < 1e-3


def test_the_table_is_done_in_parts_and_gathered(tmp_path):
    whole = spirals.run(TINY_TABLE, progress=False)
    assert [r["label"] for r in whole.runs] == ["dopri5, direct, even", "dopri5, direct, irregular", "rk4, adjoint, even",
                                               "rk4, adjoint, irregular", "tanh, 20 units, even"] and not whole.failures
    assert sorted(whole.figures) == ["evaluations", "fields", "trade"]
    folders = set()
    for spacing in "even", "irregular":
        part = replace(TINY_TABLE, spacings=(spacing,))
        folders.add(checkpoint_folder("spirals", part))
        spirals.run(part, checkpoint=tmp_path, progress=False)
    assert folders == {checkpoint_folder("spirals", TINY_TABLE)} != {checkpoint_folder("spirals", replace(TINY_TABLE, rate=1.0))}
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.pt")}
    gathered = spirals.run(TINY_TABLE, checkpoint=tmp_path, resume=True, progress=False)
    assert len(files) == 5 and files == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.pt")}
    costs = ("s/step", "minutes", "wall minutes")
    def same(record): return [{k: v for k, v in r["metrics"].items() if k not in costs} for r in record.runs]
    assert same(whole) == same(gathered) and whole.data["shown"] == gathered.data["shown"]
    assert whole.data["seconds"].keys() == gathered.data["seconds"].keys() == whole.summary().keys()


# --------------------------------------------------------------------------------------------------------- digits


def test_digits_are_split_by_the_seed_and_no_digit_is_on_both_sides():
    sides = {(split, seed): load("digits", split, seed=seed) for split in ("train", "test") for seed in (0, 1)}
    assert [len(sides[key]) for key in sides] == [1437, 1437, 360, 360]
    whole = torch.cat([sides["train", 0].x, sides["test", 0].x]).flatten(1)
    other = torch.cat([sides["train", 1].x, sides["test", 1].x]).flatten(1)
    assert sorted(whole.tolist()) == sorted(other.tolist()) and not torch.equal(sides["test", 0].x, sides["test", 1].x)
    seen, unseen = ({tuple(x) for x in sides[split, 0].x.flatten(1).tolist()} for split in ("train", "test"))
    assert not seen & unseen
    for _, samples in sides.items(): assert (samples.y.bincount() / len(samples)).sub(0.1).abs().max() < 0.01   # even classes


def test_a_shift_moves_whole_images_by_at_most_one_pixel_each_way():
    x = torch.randn(200, 1, 8, 8)
    moved = digits._shifted(x)
    framed = torch.nn.functional.pad(x, (1, 1, 1, 1), value=x.min().item())
    places = [framed[:, :, i:i + 8, j:j + 8] for i in range(3) for j in range(3)]
    found = torch.stack([(moved == place).flatten(1).all(1) for place in places])
    assert (found.sum(0) == 1).all() and found.any(1).all()                    # each is one of nine, and all nine occur


@pytest.mark.parametrize("name, forward", [("ODE-Net", 6), ("ODE-Net, Euler", 6), ("ResNet-6", 6), ("ResNet-1", 1)])
def test_the_networks_are_those_of_the_table(name, forward):
    model = digits._network(name, digits.Config(width=8)).eval()
    with torch.no_grad(): model(torch.randn(3, 1, 8, 8))
    assert isinstance(model, ODENet if name.startswith("ODE") else ResNet)
    found = digits._evaluations(model)["forward"]
    assert found >= forward if name == "ODE-Net" else found == forward


def test_a_fine_solver_reads_the_same_weights():
    config = digits.Config(width=8)
    model = digits._network("ODE-Net", config)
    nn.init.normal_(model.body.f.convs[1].weight, std=0.5)
    fine, x = digits._fine(model), torch.randn(4, 1, 8, 8)
    assert fine.body.f is model.body.f and fine.stem is model.stem and model.body.options["method"] == "bosh3"
    with torch.no_grad():
        assert 0 < (fine(x) - model(x)).abs().max() < 0.05 and fine.body.nfe > model.body.nfe
    assert digits._fine(digits._network("ResNet-1", config)) is None
    euler = digits._fine(digits._network("ODE-Net, Euler", config))
    assert euler.body.options["method"] == "dopri5" and euler(x).shape == (4, 10)


def test_what_is_kept_of_digits_is_what_the_network_said():
    model, test = digits._network("ResNet-2", digits.Config(width=8)).eval(), load("digits", "test")
    kept = digits._keep(model, test, shown=10, wrong=3)
    right = sum(a == b for a, b in zip(kept["predicted"][:10], kept["label"][:10]))
    with torch.no_grad(): said = model(test[:10][0]).argmax(1)
    assert kept["predicted"][:10] == said.tolist() and right == (said == test.y[:10]).sum()
    assert all(a != b for a, b in zip(kept["predicted"][10:], kept["label"][10:])) and len(kept["predicted"]) <= 13
    assert np.shape(kept["path"]) == (3, 50, 2) and sorted(set(kept["path label"])) == list(range(10))
    assert score(model, test)["accuracy"] < 0.5                                 # nothing was trained


def test_digits_repeat_themselves_and_go_on_from_their_files(tmp_path):
    first = digits.run(TINY_DIGITS, progress=False)
    digits.run(replace(TINY_DIGITS, networks=("ResNet-2",)), checkpoint=tmp_path, progress=False)
    assert len(list(tmp_path.glob("ResNet-2-0.pt"))) == 1
    again = digits.run(TINY_DIGITS, checkpoint=tmp_path, resume=True, progress=False)
    assert without_time(first) == without_time(again)
    assert list(first.figures) == ["training", "predictions", "paths"] and not first.failures


# -------------------------------------------------------------------------------------------- settings and records


@pytest.mark.parametrize("module, changes, wanted", [
    (two_spirals, ["epochs=2", "systems=spiral"], {"epochs": 2, "systems": ("spiral",)}),
    (digits, ["epochs=2", "networks=ResNet-3"], {"epochs": 2, "networks": ("ResNet-3",)})])
def test_settings_reach_the_command(module, changes, wanted):
    assert configure(module.Config, "full", changes, [4]) == replace(module.Config.full(), **wanted, seeds=(4,))
    with pytest.raises(ValueError, match="epoch"): configure(module.Config, "full", ["epoch=2"])
    assert module.Config.demo().epochs <= module.Config.full().epochs and len(module.Config.full().seeds) == 3


def test_an_empty_record_has_no_figures():
    for module in spirals, two_spirals, digits: assert module._figures(Record("none")) == {}


def test_the_record_of_the_table_has_every_row_and_meets_its_bars():
    record = full(spirals)
    assert len(record.runs) == 3 * (2 * (len(spirals.ROWS) + len(spirals.FRUGAL)) + len(spirals.NETWORKS))
    for spacing in "even", "irregular":
        assert all(r["metrics"]["test MSE"] <= 1e-3 for r in record.runs if r["label"] == f"dopri5, direct, {spacing}")
    assert mean(record, "dopri5, direct, even", "s/step") <= 0.367 / 10


def test_the_record_of_two_spirals_shows_what_the_page_says():
    record = full(two_spirals)
    labels = [f"{system}, {spacing} times" for system in ("spiral", "cubic spiral") for spacing in ("even", "irregular")]
    assert list(record.summary()) == labels and len(record.runs) == 12
    for label in labels: assert mean(record, label, "mse") < record.config["noise"]       # closer to the truth than the data
    for r in record.runs: assert r["metrics"]["NFE last"] > 0 and r["metrics"]["parameters"] in (353, 252)


def test_the_record_of_digits_shows_what_the_page_says():
    record = full(digits)
    assert list(record.summary()) == ["ODE-Net", "ODE-Net, Euler", "ResNet-6", "ResNet-1"] and len(record.runs) == 12
    for name in "ODE-Net", "ResNet-6": assert mean(record, name, "accuracy") >= 0.98
    assert mean(record, "ODE-Net", "parameters") < mean(record, "ResNet-6", "parameters") / 3
    for name in "ODE-Net", "ODE-Net, Euler":
        assert abs(mean(record, name, "accuracy") - mean(record, name, "accuracy, fine solver")) < 0.01
