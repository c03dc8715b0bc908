"""Work and precision: both sides are counted alike, a spent budget stays in the record, a run repeats itself and can be resumed."""
from dataclasses import asdict, replace

import pytest
from matplotlib import pyplot

from neuralode_nb.experiments import work_precision as wp
from neuralode_nb.experiments.work_precision import Config, run
from neuralode_nb.lab.record import load_record
from neuralode_nb.ode.problems import PROBLEMS
from neuralode_nb.ode.stiff_problems import STIFF

TINY = Config(("lotka_volterra",), ("hires",), ("tsit5", "SciPy DOP853"), ("rodas5p", "SciPy Radau"), (3, 6), (3, 6), repeats=2)


def point(name, problem, digits, budget=10_000): return dict(zip(wp.COLUMNS, wp._measure(name, problem, digits, budget)))


def without_time(record):
    at = wp.COLUMNS.index("seconds")
    return {(g, p, m): [row[:at] + row[at + 1:] for row in rows] for g in ("non-stiff", "stiff")
            for p, found in record.data[g].items() for m, rows in found.items()}


@pytest.mark.parametrize("name", ["tsit5", "dopri8", "adams", "SciPy RK45", "SciPy DOP853", "SciPy LSODA"])
def test_the_error_is_in_units_of_the_tolerance_and_every_call_is_work(name):
    coarse, fine = (point(name, PROBLEMS["lotka_volterra"], d) for d in (4, 8))
    assert fine["error"] < 1e-6 < coarse["error"] < 1e-1 and fine["work"] > coarse["work"]
    assert fine["work"] == fine["f"] and fine["jacobians"] == 0 or name == "SciPy LSODA"


@pytest.mark.parametrize("name", ["rodas5p", "kvaerno5", "bdf", "SciPy Radau", "SciPy BDF"])
def test_a_jacobian_is_charged_by_its_columns(name):
    found = point(name, STIFF["hires"], 5)
    assert found["error"] < 1e-3 and found["jacobians"] > 0 and found["lu"] > 0
    columns = (found["work"] - found["f"]) / found["jacobians"]
    assert columns == 8 if not name.startswith("SciPy") else 7 < columns < 11      # a difference may be taken twice


def test_a_spent_budget_stays_in_the_record_and_ends_the_series():
    record = run(replace(TINY, stiff=(), digits=(3, 6, 9), budget=400), progress=False)
    for figure in record.figures.values(): pyplot.close(figure)
    points = record.data["non-stiff"]["lotka_volterra"]
    assert [row[0] for row in points["tsit5"]] == [3] and [row[0] for row in points["SciPy DOP853"]] == [3]
    assert [f["error"] for f in record.failures] == ["Spent", "Spent"]
    assert all("lotka_volterra, tolerance 1e-6: 400 calls of f were spent" in f["message"] for f in record.failures)


def test_a_run_repeats_itself_and_goes_on_from_its_files(tmp_path):
    first = run(TINY, progress=False, checkpoint=tmp_path)
    second, resumed = run(TINY, progress=False), run(TINY, progress=False, checkpoint=tmp_path, resume=True)
    assert without_time(first) == without_time(second) and first.data == resumed.data and not first.failures
    assert set(first.figures) == {"non-stiff", "non-stiff-problems", "stiff", "stiff-problems"}
    summary = {r["label"]: r["metrics"] for r in first.runs}
    assert summary["stiff: rodas5p"]["solves"] == 2 and summary["stiff: rodas5p"].get("work", 1.) == 1.


def test_the_cost_of_a_goal_is_read_between_two_tolerances():
    rows = [[d, 10.0**-d, 1.0, 2.0**d, 0, 0, 0] for d in (3, 5, 7)]
    assert wp._to_reach(1e-6, rows, "work") == pytest.approx(64) and wp._to_reach(1e-2, rows, "work") == 8
    assert wp._to_reach(1e-8, rows, "work") is None and wp._to_reach(1e-6, [], "work") is None


def test_the_record_is_that_of_the_full_profile():
    record, now = load_record("work_precision"), Config.full()
    assert Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()}) == now
    assert asdict(now).keys() == record.config.keys()
    assert {name: len(found) for name, found in record.data["stiff"].items()} == dict.fromkeys(now.stiff, len(now.stiff_methods))
    assert {f["error"] for f in record.failures} <= {"Spent", "Stopped"}
    points = [found for group in ("non-stiff", "stiff") for found in record.data[group].values()]
    errors = [row[1] for found in points for rows in found.values() for row in rows]
    assert len(errors) > 1000 and min(errors) >= 0
