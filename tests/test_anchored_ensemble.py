"""Anchored ensembles of spirals: the fit is the minimum it claims, scores are their closed forms, a run goes on from its files."""
import math
from dataclasses import asdict, replace

import pytest
import torch
from matplotlib import pyplot
from torchmetrics.functional.regression import continuous_ranked_probability_score

from neuralode_nb.experiments import anchored_ensemble as experiment
from neuralode_nb.experiments.anchored_ensemble import Config, run
from neuralode_nb.lab.data import SPIRAL, load
from neuralode_nb.lab.least_squares import least_squares
from neuralode_nb.lab.record import load_record
from neuralode_nb.lab.scores import calibration, conformal, coverage, crps, nll
from neuralode_nb.models.fields import MLP

TINY = replace(Config.smoke(), priors=(1., 20.), attempts=(1, 2, 1, 1, 1), cases=20)


def without_time(record):
    "What a whole and a resumed run share."
    clock = ("seconds", "times one member")
    return [{k: v for k, v in run["metrics"].items() if k not in clock} for run in record.runs], record.data


def test_a_run_has_its_record_and_goes_on_from_its_files(tmp_path):
    first = run(TINY, progress=False)
    run(replace(TINY, priors=(1.,)), checkpoint=tmp_path, progress=False)
    again = run(TINY, checkpoint=tmp_path, resume=True, progress=False)
    for record in (first, again):
        for figure in record.figures.values(): pyplot.close(figure)
    assert without_time(first) == without_time(again) and not first.failures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse-1.pt", "sparse-20.pt"]
    assert [r["label"] for r in first.runs] == [f"sparse, σ² = {p}, {n} members" for p in (1, 20) for n in (2, 3)]
    assert {"train MSE", "test MSE", "in 2σ, u3 (%)", "NLL", "CRPS", "seconds"} <= first.runs[0]["metrics"].keys()
    assert first.data["sparse, σ² = 1"].keys() == {"loss", "budget", "calibration"}
    assert list(first.figures) == ["bands", "budget", "calibration"]


def test_a_fit_stopped_between_stages_goes_on(tmp_path):
    config = replace(TINY, priors=(1.,))
    series = load("spiral", **experiment.LAYOUTS["sparse"], noise=config.noise**0.5)
    def fit(file, resume): return experiment._fit(experiment._ensemble(series, 1., config), series, config, file, resume, False)[1]
    whole = fit(tmp_path / "a.pt", False)
    short = replace(config, attempts=config.attempts[:2])
    stages = experiment._stages(series, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_stages", lambda *_: stages[:2])
        experiment._fit(experiment._ensemble(series, 1., config), series, short, tmp_path / "b.pt", False, False)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["done"] == 2
    assert fit(tmp_path / "b.pt", True) == whole


def test_sensitivities_are_those_of_differences():
    field, t = MLP(3, 4).double(), torch.tensor([0., 1.]).double()
    theta = torch.cat([p.detach().flatten() for p in field.parameters()])[None]
    y0 = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).double()
    def state(theta): return experiment._flow(field, theta, y0, t, rtol=1e-10, atol=1e-10)[0][-1]
    slope = experiment._flow(field, theta, y0, t, rtol=1e-10, atol=1e-10)[1][-1]
    for k in (0, 13, 30):
        bump = torch.zeros_like(theta)
        bump[0, k] = 1e-5
        torch.testing.assert_close(slope[..., k], (state(theta + bump) - state(theta - bump)) / 2e-5, rtol=1e-5, atol=1e-7)


def test_cases_obey_the_law_and_lie_where_they_should():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    exact = experiment._cases(5, 0, t, 2.0, radius=2.0)
    torch.testing.assert_close(exact[0].abs().amax(1), torch.full((5,), 2.0, dtype=torch.float64))
    slope = (exact[2:] - exact[:-2]) / (t[2:] - t[:-2])[:, None, None]
    torch.testing.assert_close(slope, exact[1:-1] @ torch.tensor(SPIRAL, dtype=torch.float64).T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.3), (-1.0, 2.0)])
def test_scores_are_their_closed_forms(mean, std):
    y = torch.tensor([[0.3], [-0.8], [2.0]], dtype=torch.float64)
    mean, std = torch.full((1, 1), mean, dtype=torch.float64), torch.full((1, 1), std, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, std)
    assert nll(mean, std, y) == pytest.approx(-normal.log_prob(y).mean().item(), rel=1e-12)
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)                                  # the integral that defines it
    exact = [torch.trapezoid((normal.cdf(x)[0] - (x >= v).double())**2, x).item() for v in y]
    assert crps(mean, std, y) == pytest.approx(sum(exact) / 3, abs=1e-4)
    points = normal.icdf((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    assert crps(mean, std, y) == pytest.approx(continuous_ranked_probability_score(points.expand(3, -1), y[:, 0]).item(), abs=2e-3)


def test_coverage_and_bands_of_what_is_known():
    y = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    assert coverage(zero, one, y) == pytest.approx([math.erf(math.sqrt(2))] * 2, abs=0.01)
    assert calibration(zero, one, y, [0.2, 0.9]) == pytest.approx([0.2, 0.9], abs=0.01)
    assert conformal(y[:10_000].abs(), 0.95).tolist() == pytest.approx([1.96] * 2, abs=0.06)
    assert conformal(y[:18].abs(), 0.95).isinf().all() and torch.equal(conformal(y[:19].abs(), 0.95), y[:19].abs().amax(0))


def test_the_pull_of_an_anchor_is_that_of_the_anchored_loss():
    config = TINY
    series = load("spiral", **experiment.LAYOUTS["sparse"], noise=config.noise**0.5)
    ensemble = experiment._ensemble(series, 20., config)
    theta = experiment.all_weights(ensemble.stacked).detach() + 0.1
    experiment.set_weights(ensemble.stacked, theta)
    def residuals(theta): return theta.new_zeros(len(theta), 1), theta.new_zeros(len(theta), 1, theta.shape[1])
    *_, (back, cost) = least_squares(residuals, theta, ensemble.anchors, ensemble.pull, 1, 0.)
    torch.testing.assert_close(back, ensemble.anchors)
    assert (cost < 1e-20).all()
    torch.testing.assert_close(ensemble.anchor_loss(), ((theta - ensemble.anchors)**2 * ensemble.pull).sum(1))


def test_misuse_is_told():
    with pytest.raises(ValueError, match="layouts=.*'few' is not known; choose from one, many, sparse"): Config(layouts=("few",))
    with pytest.raises(ValueError, match="a spread needs at least 2 members"): Config(sizes=(1, 3))


def test_the_record_is_that_of_the_full_profile():
    record, now = load_record("anchored_ensemble"), Config.full()
    assert Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()}) == now
    assert asdict(now).keys() == record.config.keys() and not record.failures
    assert len(record.runs) == len(now.layouts) * len(now.priors) * len(now.sizes)
