"""Gradients, measured: the true gradients are true, ways are told by label, a failure stays in the record, a run can be resumed."""
from dataclasses import asdict

import pytest
import torch
from matplotlib import pyplot

from neuralode_nb.experiments import gradients as experiment
from neuralode_nb.experiments.gradients import Config, run
from neuralode_nb.lab.gradient_problems import FIELDS, Lost, Task, apart, find_task, gradients, image_task, memory, parts, settings
from neuralode_nb.lab.record import Record, load_record
from neuralode_nb.ode.base import SolveError


def test_the_smoke_profile_runs_and_goes_on_from_its_files(tmp_path):
    first = run(Config.smoke(), progress=False, checkpoint=tmp_path)
    again = run(Config.smoke(), progress=False, checkpoint=tmp_path, resume=True)
    for record in (first, again):
        for figure in record.figures.values(): pyplot.close(figure)
    assert first.profile == "smoke" and first.data.keys() == again.data.keys() and not first.failures
    assert again.data["steps"] == first.data["steps"] and set(first.figures) == {"steps", "errors", "evaluations"}
    assert max(first.data["exactness"].values()) < 1e-8
    flat, grows = ([row[1] for row in first.data["steps"][way]] for way in ("reversible", "checkpoint"))
    state = 4 * 64 * 32 * 32
    assert flat[1] <= 1.05 * flat[0] and (grows[1] - grows[0]) / 12 == pytest.approx(state, rel=0.1)
    found = first.data["problems"]["linear, T=1"]["rows"]
    assert all(rows[1][1] < rows[0][1] < 1e-2 for rows in found.values())


def test_the_gradient_of_the_linear_system_is_that_of_finite_differences():
    task, h = find_task("linear, T=10"), 1e-6
    def loss(a): return task.loss(torch.stack([task.y0, torch.matrix_exp(a * 10.) @ task.y0])).item()
    for place in ((0, 1), (2, 3)):
        bump = torch.zeros_like(task.theta)
        bump[place] = h
        slope = (loss(task.theta + bump) - loss(task.theta - bump)) / (2 * h)
        assert task.exact[1][place].item() == pytest.approx(slope, rel=1e-6)


def test_stiff_ways_reach_the_true_gradient_and_the_adjoint_says_that_it_drifts():
    f, y0, theta, scale = FIELDS["Van der Pol"]
    task = Task(f, torch.tensor(y0).double(), torch.tensor(theta).double(), [0., 1.], scale)
    exact = gradients(task, "checkpoint", "rodas5p", 1e-8)[0]
    for label in ("gauss with rodas5p", "gauss with radau5"):
        assert apart(gradients(task, *settings(label, "tsit5"), 1e-5)[0], exact) < 1e-3
    found, *_, drifts = gradients(task, "adjoint", "tsit5", 1e-4)
    assert drifts == 1 and apart(found, exact) > 1


def test_what_fails_is_told():
    config = Config.smoke()
    record = Record("gradients")
    with record.attempt(0, "x"): raise Lost("undoing the steps did not lead back")
    assert record.failures[0]["error"] == "Lost" and issubclass(Lost, SolveError)
    for wrong in ({"ways": ("gaus",)}, {"problems": ("linaer, T=1",)}):
        with pytest.raises(ValueError, match="is not known"): Config(**wrong)
    assert parts("gauss with bdf") == ("gauss", "bdf") and config.ways[0] == "direct"


def test_memory_of_the_image_follows_the_way():
    image = image_task(channels=8, size=16)
    direct, flat = ([memory(image, way, "midpoint", step_size=1 / n)[0] for n in (10, 40)] for way in ("direct", "reversible"))
    assert direct[1] > 3 * direct[0] and flat[0] == flat[1]


def test_the_record_is_that_of_the_full_profile():
    record, now = load_record("gradients"), Config.full()
    assert Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()}) == now
    assert asdict(now).keys() == record.config.keys() and set(record.data["problems"]) == set(now.problems)
    assert max(record.data["exactness"].values()) < 1e-8
    for rows in record.data["steps"].values(): assert [row[0] for row in rows] == list(now.steps)[:len(rows)]
    assert experiment.COLUMNS[:3] == ("digits", "error", "apart")
