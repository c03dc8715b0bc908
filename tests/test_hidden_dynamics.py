"""Hidden dynamics: the observations are exact, the judge is right, a run repeats itself, and the record says what happened."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from neuralode_nb.experiments import hidden_dynamics as hidden
from neuralode_nb.experiments.hidden_dynamics import Config, run
from neuralode_nb.lab.record import Record, load_record
from neuralode_nb.lab.settings import configure
from neuralode_nb.models.blocks import ODEBlock
from neuralode_nb.models.fields import LinearField

TINY = Config(systems=("saddle",), windows=8, epochs=3, batches=3, hopeless=2.0)   # short enough to fail nowhere


def chance(seed=0): return torch.Generator().manual_seed(seed)


def without_time(record): return [{k: v for k, v in h.items() if k != "seconds"} for h in record.history.values()]


@pytest.mark.parametrize("system", hidden._SYSTEMS)
def test_observations_are_the_exact_solution(system):
    window = hidden._observe(hidden._matrix(system), Config(), chance(), 2.0, noise=0.0)
    assert window.y.shape == (9, 64, 2) and window.t[0] == 0 and (window.t.diff() > 0).all() and window.t[-1] <= 2
    for s, w in (0, 0), (4, 17), (8, 63):
        exact = expm(hidden._matrix(system).numpy() * window.t[window.index[s, w]].item()) @ window.y0[w].double().numpy()
        np.testing.assert_allclose(window.y[s, w].numpy(), exact, rtol=1e-5, atol=1e-6)


def test_noise_lies_on_starts_and_on_later_observations():
    config = Config(windows=4000)
    clean, noisy = (hidden._observe(hidden._matrix("circle"), config, chance(), 2.0, n) for n in (0.0, 0.1))
    assert abs((noisy.y0 - clean.y0).std().item() - 0.1) < 0.005
    assert abs((noisy.y - clean.y).std().item() - 0.1) < 0.005


def test_no_trajectory_of_the_first_three_systems_enters_the_ring():
    for system in ("stable focus", "stable node", "circle"):
        window = hidden._observe(hidden._matrix(system), Config(windows=500), chance(), 4.0, noise=0.0)
        assert window.y.norm(dim=-1).max() < hidden._RING[0] + 1e-4
    ring = hidden._within(hidden._RING, 5000, chance()).norm(dim=-1)
    assert ring.min() >= 2 and ring.max() <= 3 and abs((ring < 6.5**0.5).double().mean() - 0.5) < 0.03


def test_the_judge_knows_the_law_and_a_known_error():
    law = hidden._matrix("stable node")
    def measured(factor): return hidden._measure(
        ODEBlock(LinearField(2, factor * law.float()), rtol=1e-6, atol=1e-6), law, Config())
    assert max(measured(1.0).values()) < 1e-4
    assert all(abs(measured(1.1)[name] - 0.1) < 1e-4 for name in ("A", "field", "ring"))


def test_a_run_repeats_itself_and_goes_on_from_its_files(tmp_path):
    first, second = run(TINY, progress=False), run(TINY, progress=False)
    assert first.runs == second.runs and without_time(first) == without_time(second)
    run(replace(TINY, seeds=(0,)), checkpoint=tmp_path, progress=False)
    assert len(list(tmp_path.glob("saddle-*-seed0.pt"))) == 2
    again = run(TINY, checkpoint=tmp_path, resume=True, progress=False)
    assert again.runs == first.runs and again.data == first.data      # portraits too, though nothing was trained


def test_a_hopeless_horizon_says_cause_time_and_remedy():
    record = Record("hidden_dynamics")
    hidden._hopeless(record, Config(windows=8), "cpu")
    assert [f["error"] for f in record.failures] == ["SolveError", "TrainingDiverged"]
    for failure, earliest, latest in zip(record.failures, (80, 40), (90, 46)):
        time = float(failure["message"].split(" at t=")[1].split(",")[0])
        assert earliest < time < latest and "Remedy:" in failure["message"]
    assert "shorter time span" in record.failures[1]["message"]


def test_settings_are_checked_and_reach_the_command():
    with pytest.raises(ValueError, match="systems='node' is not known; choose from stable focus"): Config(systems=("node",))
    with pytest.raises(ValueError, match="fields='cnn' is not known"): Config(fields=("cnn",))
    with pytest.raises(ValueError, match="points=1: a start and at least one later"): Config(points=1)
    assert configure(Config, "full", ["epochs=2"], [4]) == replace(Config.full(), epochs=2, seeds=(4,))


def test_the_committed_record_is_that_of_the_full_profile():
    record = load_record("hidden_dynamics")
    assert Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()}) == Config.full()
    assert asdict(Config.full()).keys() == record.config.keys()
    assert len(record.runs) == 30 and {f["label"] for f in record.failures} == {
        "saddle, hopeless solve", "saddle, hopeless training"}
    assert all(np.isfinite(list(r["metrics"].values())).all() for r in record.runs)
    summary = record.summary()
    for system in hidden._SYSTEMS:      # what the hypothesis says, and what a linear law lets one expect
        assert summary[f"{system}, linear"]["A"]["mean"] < summary[f"{system}, MLP"]["A"]["mean"]
        assert summary[f"{system}, MLP"]["paths"]["mean"] < 0.1
