"""Crossings: flows keep order and invert, the witness is a witness, a run goes on from its files, the record is that of now."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from neuralode_nb.experiments import crossings
from neuralode_nb.experiments.crossings import Config, run
from neuralode_nb.lab.data import load
from neuralode_nb.lab.record import load_record

TINY = Config(hidden=(8,), epochs=2, samples=32, batch=16, fresh=50)


def without_time(record):
    def same(row): return {k: v for k, v in row.items() if k != "seconds"}
    return [r | {"metrics": same(r["metrics"])} for r in record.runs], [same(h) for h in record.history.values()], record.data


def steep(name, dim, factor=4.0):
    "A network that has not been trained, with a field much steeper than such a one has."
    torch.manual_seed(0)
    model = crossings._Net(name, dim, Config())
    with torch.no_grad():
        for p in model.block.f.parameters(): p.mul_(factor)
    return model.eval()


def test_a_plain_flow_keeps_the_order_of_points_and_two_euler_steps_need_not():
    x = torch.linspace(-2, 2, 401)[:, None]
    with torch.no_grad():
        flow, = (crossings._fine(steep("plain", 1, factor))(x)[:, 0] for factor in (3.0,))
        assert (flow.diff() > 0).all() and crossings._steepest(steep("plain", 1, 3.0), x) > 2
        jump = steep("Euler 2", 1, 8.0)
        assert crossings._steepest(jump, x) / 2 > 1 and (jump(x)[:, 0].diff() < 0).any()


@pytest.mark.parametrize("name, extra", [("plain", 0), ("+3", 3), ("second order", 2), ("Euler 4", 0)])
def test_a_network_is_what_its_name_says(name, extra):
    model, x = steep(name, 2), torch.randn(7, 2)
    start = model.start(x)
    assert start.shape == (7, 2 + extra) and torch.equal(start[:, :2], x) and not start[:, 2:].any()
    logits = model(x)
    torch.testing.assert_close(model.logit(x), logits[:, 1] - logits[:, 0])
    assert model.block.nfe == 4 if name == "Euler 4" else model.block.nfe >= 14


def test_in_an_equation_of_second_order_the_added_half_is_the_velocity():
    model, x = steep("second order", 2), torch.randn(5, 2)
    t = torch.linspace(0, 1, 101)
    with torch.no_grad(): q, v = crossings._fine(model).block(model.start(x), t).chunk(2, -1)
    slope = (q[2:] - q[:-2]) / 0.02
    torch.testing.assert_close(slope, v[1:-1], rtol=0, atol=5e-3 * v.abs().max().item())


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_every_plain_classifier_has_a_point_of_the_shell_that_it_takes_for_the_ball(dim, factor):
    model, fresh = steep("plain", dim, factor), load("spheres", "test", n=200, dim=dim)
    fold = crossings._fold(model, fresh.x[fresh.y == 0])
    x, fine = torch.tensor([fold["ball"], fold["shell"]], dtype=torch.float64), crossings._fine(model.double(), 1e-9)
    with torch.no_grad(): logits = fine.logit(x)
    np.testing.assert_allclose(logits, fold["logits"], rtol=1e-6, atol=1e-8)
    assert logits[1] < logits[0] and x[0].norm() <= 0.5 and abs(x[1].norm() - 1.25) < 1e-3


def test_a_run_repeats_itself_and_goes_on_from_its_files(tmp_path):
    first = run(TINY, progress=False)
    half = replace(TINY, swap=("plain",), plane=("+1",))
    run(half, checkpoint=tmp_path, progress=False)
    again = run(TINY, checkpoint=tmp_path, resume=True, progress=False)
    assert without_time(first) == without_time(again) and not first.failures


def test_the_record_is_that_of_the_full_profile_as_it_is_now():
    record, now = load_record("crossings"), Config.full()
    kept = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()})
    assert kept == now and asdict(now).keys() == record.config.keys() and not record.failures
    assert all(np.isfinite(list(r["metrics"].values())).all() for r in record.runs)
    assert len(record.runs) == len(now.seeds) * (len(now.swap) + len(now.plane) + len(now.space))
