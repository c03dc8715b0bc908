"""The command: experiments by name, errors in one line, exit codes, and a Ctrl-C that loses one epoch at most."""
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import neuralode_nb.cli as cli
from neuralode_nb.lab.record import load_record
from neuralode_nb.lab.settings import configure, convert

ROOT = Path(__file__).resolve().parent.parent

TOY = '''"""Does a line learn a line?"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import mse_loss

from neuralode_nb.lab.record import record_run
from neuralode_nb.lab.train import fit, seed_all


@dataclass
class Config:
    epochs: int = 3
    rate: float = 0.1
    method: Literal["sgd", "adam"] = "sgd"
    pause: float = 0.0
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        if self.rate <= 0: raise ValueError(f"rate={self.rate}: must be positive")

    @classmethod
    def smoke(cls): return cls()

    @classmethod
    def full(cls): return cls(epochs=5, seeds=(0, 1, 2))


def run(config, *, device="cpu", checkpoint=None, resume=False, progress=True):
    "One line per seed."
    x = torch.linspace(-1, 1, 8)[:, None]

    def loss(model, batch):
        time.sleep(config.pause)
        return mse_loss(model(x), 2 * x)

    with record_run("toy", config, device=device) as record:
        for seed in config.seeds:
            with record.attempt(seed):
                seed_all(seed)
                model = nn.Linear(1, 1)
                kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.method]
                optimizer = kind(model.parameters(), lr=config.rate)
                history = fit(model, loss, [0], epochs=config.epochs, optimizer=optimizer,
                              checkpoint=checkpoint and Path(checkpoint) / f"seed{seed}.pt", resume=resume,
                              seed=seed, device=device, progress=progress)
                record.add(seed, {"loss": history.last["loss"]}, history)
        from matplotlib.figure import Figure
        figure = Figure((2, 2))
        figure.subplots().plot(history["loss"] if record.runs else [0])
        record.figures["loss"] = figure
    return record
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "An experiment that is found like the library's own, in a folder of its own."
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    package = types.ModuleType("neuralode_nb.experiments")
    package.__path__ = [str(tmp_path / "more")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.delitem(sys.modules, "neuralode_nb.experiments.toy", raising=False)
    monkeypatch.setattr(cli, "base_folder", lambda: tmp_path)
    monkeypatch.setenv("NEURALODE_RESULTS", str(tmp_path / "results"))
    yield tmp_path
    sys.modules.pop("neuralode_nb.experiments.toy", None)


def neuralode(*words): return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_a_run_leaves_a_record_and_figures(toy):
    done = neuralode("run", "toy")
    assert done.exit_code == 0, done.output
    assert "epoch 3/3" in done.output and "record in" in done.output and "1 figures beside it" in done.output
    record = load_record("toy", "smoke", toy / "results")
    assert record.config["epochs"] == 3 and len(record.history["toy, seed 0"]["loss"]) == 3
    assert (toy / "results" / "toy" / "smoke-loss.png").read_bytes().startswith(b"\x89PNG")


def test_settings_and_seeds_change_a_run_and_its_record(toy):
    changes = ["--set", "epochs=2", "--set", "method=adam", "--seed", 4, "--seed", 5]
    done = neuralode("run", "toy", "--profile", "full", *changes, "--results", toy / "elsewhere", "--quiet")
    assert done.exit_code == 0 and "epoch" not in done.output, done.output
    record = load_record("toy", "custom", toy / "elsewhere")
    assert record.config == {"epochs": 2, "rate": 0.1, "method": "adam", "pause": 0.0, "seeds": [4, 5]}
    assert [run["seed"] for run in record.runs] == [4, 5]
    assert record.command == "neuralode run toy --profile smoke --set epochs=2 --set method=adam --set seeds=4,5"


def test_the_command_of_a_record_repeats_it(toy):
    neuralode("run", "toy", "--set", "rate=0.05", "--quiet")
    first = load_record("toy", "custom", toy / "results")
    assert neuralode(*first.command.split()[1:], "--quiet").exit_code == 0
    second = load_record("toy", "custom", toy / "results")
    assert [r["metrics"] for r in first.runs] == [r["metrics"] for r in second.runs] and first.config == second.config


def test_resume_goes_on_only_with_the_same_settings(toy):
    assert "nothing to go on from" in neuralode("run", "toy", "--resume").output
    again = neuralode("run", "toy", "--resume")
    assert again.exit_code == 0 and "epoch" not in again.output  # already finished
    assert "nothing to go on from" in neuralode("run", "toy", "--resume", "--set", "rate=0.2").output
    assert len(list((toy / "runs" / "toy").iterdir())) == 2


def test_ctrl_c_leaves_a_run_that_goes_on_exactly(toy):
    script = ("import sys, types; from pathlib import Path; import neuralode_nb.cli as cli\n"
              "sys.modules['neuralode_nb.experiments'] = e = types.ModuleType('neuralode_nb.experiments')\n"
              f"e.__path__ = [{str(toy / 'more')!r}]; cli.base_folder = lambda: Path({str(toy)!r})\n"
              "cli.app(sys.argv[1:])")
    words = ["run", "toy", "--profile", "full", "--set", "pause=0.5"]
    with subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/5"): break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To go on: neuralode run toy --profile full --set pause=0.5 --resume" in said and "Traceback" not in said
    resumed = neuralode(*words, "--resume")
    assert resumed.exit_code == 0 and "epoch 3/5" in resumed.output
    assert "epoch 2/5" not in resumed.output.split("epoch 5/5")[0], "the first seed's two epochs are not repeated"
    through = load_record("toy", "custom", toy / "results")
    assert neuralode("run", "toy", "--profile", "full", "--quiet").exit_code == 0
    whole = load_record("toy", "full", toy / "results")
    assert [r["metrics"] for r in whole.runs] == [r["metrics"] for r in through.runs]


def test_failures_are_told_kept_and_change_the_exit_code(toy):
    done = neuralode("run", "toy", "--set", "rate=1e30")
    assert done.exit_code == 1 and "failed: toy, seed 0: epoch" in done.output and "Try:" in done.output
    assert load_record("toy", "custom", toy / "results").failures[0]["error"] == "TrainingDiverged"


@pytest.mark.parametrize("words, message", [
    (["run", "toi"], "'toi' is no experiment (did you mean toy?)"),
    (["run", "toy", "--profile", "ful"], "--profile ful (did you mean full?)"),
    (["run", "toy", "--set", "epochs"], "--set epochs: write key=value"),
    (["run", "toy", "--set", "epoch=3"], "no setting epoch (did you mean epochs?)"),
    (["run", "toy", "--set", "epochs=1.5"], "epochs takes an integer"),
    (["run", "toy", "--set", "method=lbfgs"], "method takes one of sgd, adam"),
    (["run", "toy", "--set", "rate=-1"], "rate=-1.0: must be positive"),
    (["run", "toy", "--device", "tpu"], "device='tpu': choose 'cpu'"),
    (["solve", "decoy"], "'decoy' is no problem (did you mean decay?)"),
    (["solve", "decay", "--method", "rk5"], "rk5"),
    (["solve", "decay", "--rtol", "-1"], "rtol"),
    (["solve", "decay", "--gradient", "none"], "gradient")])
def test_what_a_user_can_mend_is_one_line(toy, words, message):
    done = neuralode(*words)
    assert done.exit_code == 1 and "Traceback" not in done.output
    line = done.output.splitlines()[0]
    assert line.startswith("error: ") and message in line, done.output


def test_the_origin_of_an_error_can_be_seen(toy, monkeypatch):
    monkeypatch.setenv("NEURALODE_TRACEBACK", "1")
    assert isinstance(neuralode("solve", "decoy").exception, ValueError)


def test_the_list_shows_questions_profiles_and_records(toy):
    neuralode("run", "toy", "--quiet")
    shown = neuralode("list").output
    assert "Does a line learn a line?" in shown and "smoke (recorded), full" in shown and "lotka_volterra" in shown


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_a_problem_is_solved_and_compared(gradient):
    tolerances = ["--rtol", "1e-8", "--atol", "1e-10"]
    done = neuralode("solve", "lotka_volterra", "--method", "dopri5", *tolerances, "--gradient", gradient)
    rows = dict(line.rsplit(maxsplit=1) for line in done.output.splitlines() if "   " in line)
    assert done.exit_code == 0 and rows["status"] == "success" and float(rows["error at the end"]) < 1e-5
    assert float(rows["relative deviation from direct"]) < (1e-5 if gradient == "adjoint" else 1e-12)


def test_a_solve_that_fails_says_why():
    done = neuralode("solve", "decay", "--max-steps", 2)
    assert done.exit_code == 1 and "max_steps" in done.output


def test_the_demonstration_is_one_page(toy):
    text = (toy / "more" / "toy.py").read_text()
    for name in "digits", "two_spirals":
        (toy / "more" / f"{name}.py").write_text(text.replace('record_run("toy"', f'record_run("{name}"'))
        sys.modules.pop(f"neuralode_nb.experiments.{name}", None)
    try: done = neuralode("demo", "--device", "cpu")
    finally:
        for name in "digits", "two_spirals": sys.modules.pop(f"neuralode_nb.experiments.{name}", None)
    assert done.exit_code == 0, done.output
    path = toy / "runs" / "demo" / "index.html"
    assert f"report: {path}" in done.output
    page = path.read_text()
    assert page.count("<h2>") == 2 and page.count("data:image/png;base64,") == 2 and "neuralode run" in page
    assert "http://" not in page and "https://" not in page and 'src="data:' in page


def test_benchmarks_run_or_say_where_they_are(tmp_path, monkeypatch):
    package = types.SimpleNamespace(__file__=str(tmp_path / "neuralode_nb" / "__init__.py"))
    monkeypatch.setattr(cli, "neuralode_nb", package)
    done = neuralode("bench")
    assert done.exit_code == 1 and "part of the repository" in done.output
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "nothing.py").write_text("raise SystemExit(3)")
    assert neuralode("bench").exit_code == 3
    assert "did you mean nothing?" in neuralode("bench", "nothin").output


def test_options_go_through_to_the_benchmarks(tmp_path, monkeypatch):
    package = types.SimpleNamespace(__file__=str(tmp_path / "neuralode_nb" / "__init__.py"))
    monkeypatch.setattr(cli, "neuralode_nb", package)
    (tmp_path / "benchmarks").mkdir()
    for name in "one", "two":
        (tmp_path / "benchmarks" / f"{name}.py").write_text(
            f"import sys; open({str(tmp_path / name)!r}, 'w').write(' '.join(sys.argv[1:]))")
    assert neuralode("bench", "one", "--", "--rounds", "3", "vdp").exit_code == 0
    assert (tmp_path / "one").read_text() == "--rounds 3 vdp" and not (tmp_path / "two").exists()
    assert neuralode("bench", "--", "--smoke").exit_code == 0
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text() == "--smoke"


def test_version():
    import neuralode_nb
    assert f"neuralode_nb {neuralode_nb.__version__}, PyTorch" in neuralode("--version").output


@pytest.mark.parametrize("text, kind, value", [
    ("3", int, 3), ("1e3", int, 1000), ("9007199254740993", int, 9007199254740993), ("-2", int, -2),
    ("1e-3", float, 1e-3), ("yes", bool, True), ("false", bool, False), ("a b", str, "a b"),
    ("1,2", tuple[int, ...], (1, 2)), ("(1,)", tuple[int, ...], (1,)), ("1, x", tuple[int, str], (1, "x")),
    ("0.5", float | None, 0.5), ("none", int | None, None), ("1,2", list[float], [1.0, 2.0])])
def test_text_becomes_what_the_annotation_says(text, kind, value):
    found = convert(text, kind)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, kind", [
    ("1.5", int), ("nan", int), ("inf", int), ("ten", float), ("maybe", bool), ("1", tuple[int, int])])
def test_text_that_does_not_fit_is_refused(text, kind):
    with pytest.raises(ValueError, match="takes"): convert(text, kind)


def test_seeds_need_a_place(toy):
    from dataclasses import dataclass

    @dataclass
    class Config:
        @classmethod
        def smoke(cls): return cls()
    with pytest.raises(ValueError, match="no setting seeds"): configure(Config, seeds=[1])
