"""The comparison with the other libraries runs, agrees, resumes, and says what is missing."""
import math
import os
import subprocess
import sys
import types

import pytest
from house import ROOT

from neuralode_nb.lab.record import load_record

pytest.importorskip("torchdiffeq")
sys.path.insert(0, str(ROOT / "benchmarks"))


def run(folder, *words):
    "The command in small, without libraries of other environments."
    env = {k: v for k, v in os.environ.items() if not k.startswith("NEURALODE_BENCH")}
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--smoke", "--rounds", "2", *words], text=True,
                          capture_output=True, timeout=240, cwd=ROOT,
                          env=env | {"NEURALODE_RESULTS": str(folder), "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "One run of two tasks beside torchdiffeq."
    folder = tmp_path_factory.mktemp("bench")
    return folder, run(folder, "--libraries", "torchdiffeq", "vdp", "mlp_training")


def test_libraries_agree_and_are_timed(measured):
    folder, done = measured
    assert done.returncode == 0, done.stdout + done.stderr
    record = load_record("peers", "smoke", folder)
    assert list(record.data) == ["mlp_training", "vdp"] and not record.failures
    for task in record.data.values():
        rows = task["libraries"]
        assert set(rows) == {"ours", "torchdiffeq", "floor"}
        assert 0 < rows["torchdiffeq"]["deviation"] < task["agree"] and "deviation" not in rows["floor"]
        for row in rows.values():
            assert row["turns"] == 2 and 0 < row["milliseconds"]["median"] < math.inf and row["first"] > 0
            assert row["evaluations"] > 0 and row["megabytes"] >= 0
        assert rows["floor"]["evaluations"] == rows["ours"]["evaluations"]
        assert rows["ours"]["accepted"] > 1 and rows["torchdiffeq"]["accepted"] > 1
    assert record.versions["torchdiffeq"] and record.machine["cpu"] and str(ROOT) not in record.command
    assert (folder / "peers" / "smoke-times.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_where_it_ended(measured, monkeypatch):
    import peers
    monkeypatch.setenv("NEURALODE_RESULTS", str(measured[0]))
    before = load_record("peers", "smoke", measured[0]).data
    options, settings = types.SimpleNamespace(tasks=["vdp"]), before["vdp"]["settings"]
    kept, _, versions = peers.earlier(options, "smoke", settings)
    assert kept == before and "torchdiffeq" in versions
    with pytest.raises(ValueError, match="begin anew"): peers.earlier(options, "smoke", settings | {"rounds": 9})
    assert peers.earlier(options, "full", settings)[0] == {}


def test_what_is_missing_is_said(tmp_path, capsys):
    from peers import start
    script = tmp_path / "python"        # an interpreter in which the library is not installed
    script.write_text("#!/bin/sh\necho '{\"absent\": \"no module diffrax\"}'\n")
    script.chmod(0o755)
    assert start(["diffrax"], {"diffrax": str(script)}, tmp_path / "cache") == ({}, {})
    assert "diffrax is left out (no module diffrax): pip install diffrax, or see the head" in capsys.readouterr().out
    script.write_text("#!/bin/sh\necho no such library >&2\n")
    with pytest.raises(RuntimeError, match="(?s)diffrax did not answer.*no such library"):
        start(["diffrax"], {"diffrax": str(script)}, tmp_path / "cache")


@pytest.mark.parametrize("words, message", [
    (["vpd"], "'vpd' is no task (did you mean vdp?)"), (["--libraries", "torchode,difrax"], "did you mean diffrax?"),
    (["--rounds", "1"], "--rounds 1: quartiles need two"), (["--python", "difrax=python"], "did you mean diffrax?")])
def test_misuse_is_one_line(words, message, monkeypatch, capsys):
    from peers import parsed
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    with pytest.raises(SystemExit, match="2"): parsed()
    assert message in capsys.readouterr().err


def test_disagreement_is_loud(capsys):
    from peers import deviation, prepare
    ours = {"y": [1., 2.], "w": [3., 4.]}
    assert deviation({"y": [1., 2.], "w": [3., 4.5]}, ours) == (.1, "the gradients")
    assert deviation({"y": [1., math.nan], "w": [3., 4.]}, ours)[1] == "the states"

    class Fake:
        def __init__(self, results): self.results = results
        def ask(self, do, **rest): return {"results": dict(self.results), "evaluations": 1, "backward": 0}
    from _tasks import tasks
    workers = {"ours": Fake(ours), "torchdiffeq": Fake({"y": [1., 2.2], "w": [3., 4.]})}
    found, left, failures = prepare("vdp", tasks(True)["vdp"], workers)
    assert list(found) == ["ours"] and left["torchdiffeq"].startswith("failed: disagrees with ours in the states by")
    assert failures[0]["error"] == "torchdiffeq" and "FAILED: vdp, torchdiffeq" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["vdp", "mlp_training"])
def test_shares_add_up(name, monkeypatch):
    import shares
    monkeypatch.setattr(shares, "SECONDS", .3)
    row = shares.measure(shares.tasks(True)[name])
    assert abs(sum(row["shares"].values()) - 1) < 1e-6 and row["samples"] > 20 and row["shares"]["evaluations of f"] > .1
    assert (row["shares"]["autograd, backward"] > .1) == (name == "mlp_training")


def test_one_command_measures_all():
    script = (ROOT / "Makefile").read_text()
    assert "benchmarks/[a-z]*.py" in script and {p.name for p in (ROOT / "benchmarks").glob("[a-z]*.py")} == {
        "images.py", "peers.py", "shares.py", "speed.py", "work.py"}


@pytest.fixture
def images(monkeypatch):
    "The image benchmark in small."
    import images
    for name, value in dict(ROUNDS=2, BATCH=4, WIDTH=8, STEPS=(2, 4)).items(): monkeypatch.setattr(images, name, value)
    return images


def test_image_steps_are_those_of_one_network(images):
    rows = images.measure("small")
    assert [rows[k]["evaluations"] for k in ("ResNet-6", "ours, direct", "ours, checkpoint", "torchdiffeq, adjoint")] == [
        {"forward": 6, "backward": n} for n in (0, 0, 6, 6)]
    assert len({row["parameters"] for name, row in rows.items() if name != "ResNet-6"}) == 1
    assert rows["ours, direct"]["error"] < 1e-5 < 1e-3 < rows["ours, adjoint"]["error"]      # Euler's adjoint is not exact
    assert all(row["milliseconds"]["median"] > 0 and row["bytes"] > 0 for row in rows.values())
    depth = images.memory_of_depth()
    assert len(set(depth["reversible, alf"].values())) == 1 and depth["direct, euler"]["4"] > depth["direct, euler"]["2"]


def test_an_image_gradient_that_is_off_is_loud(images):
    with pytest.raises(SystemExit, match="torchdiffeq, direct: its gradient is off by 0.5"):
        images.check({"ours, direct": {"error": .1}, "torchdiffeq, direct": {"error": .5}, "ResNet-6": {}})
