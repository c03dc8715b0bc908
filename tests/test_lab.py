"""The laboratory: a training survives a kill bit for bit, says why it fails, and records are what was measured."""
import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from neuralode_nb.lab import checkpoint as ck
from neuralode_nb.lab.data import IMAGES, TABLES, Samples, batches, load
from neuralode_nb.lab.record import Record, load_record, record_run
from neuralode_nb.lab.settings import command, profile_of
from neuralode_nb.lab.train import fit, seed_all
from neuralode_nb.lab.watch import History, TrainingDiverged, score
from neuralode_nb.ode.base import SolveError
from neuralode_nb.ode.solve import solve

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------------------- training

TRAINING = """
import itertools, random, time
import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss
from neuralode_nb.lab.data import Samples, batches
from neuralode_nb.lab.train import fit, seed_all

def training(path, epochs=6, pause=0.0, **options):
    "Everything that may depend on chance: shuffling, augmentation, dropout, Python's and NumPy's generators."
    g = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=g)
    samples = Samples("noise", "train", x, (x[:, 0] > 0).long(), ("no", "yes"))
    seed_all(3)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=6 * 6)
    count = itertools.count()
    def loss(model, batch):
        if next(count) >= 3 * 6: time.sleep(pause)  # from the fourth epoch on
        noise = 1 + 0.1 * random.random() + 0.1 * np.random.rand()
        return nn.functional.cross_entropy(model(batch[0] * noise), batch[1])
    data = batches(samples, 10, seed=2, augment=lambda x: x + 0.1 * torch.randn_like(x))
    history = fit(model, loss, data, epochs=epochs, optimizer=optimizer, scheduler=scheduler, schedule_every="batch",
                  seed=5, evaluate=lambda m: {"noise": torch.rand(1).item()}, device="cpu", checkpoint=path, **options)
    return model, history
"""
exec(TRAINING, namespace := {})
training = namespace["training"]


def same(a, b):
    (model_a, history_a), (model_b, history_b) = a, b
    assert history_a.curve() == history_b.curve()
    for (name, x), y in zip(model_a.state_dict().items(), model_b.state_dict().values()): assert torch.equal(x, y), name


def test_a_training_killed_in_the_middle_of_an_epoch_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "model.pt"
    script = TRAINING + f"\ntraining({str(path)!r}, pause=2.0)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if line.startswith("epoch 3/6"): break
        time.sleep(0.5)  # into epoch 4, which would take 12 s
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    reached = len(ck.read_checkpoint(path)["history"])
    assert reached == 3
    same(training(path, resume=True, progress=False), training(None, progress=False))


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_stopping_after_any_epoch_changes_nothing(tmp_path, stop):
    training(tmp_path / "a.pt", epochs=stop, progress=False)
    same(training(tmp_path / "a.pt", resume=True, progress=False), training(None, progress=False))


def test_a_kill_while_the_checkpoint_is_written_leaves_a_whole_one(tmp_path, monkeypatch):
    path, replace = tmp_path / "a.pt", os.replace
    for epoch in 1, 2: ck.write_checkpoint(path, {"epoch": epoch})
    for survived in 0, 1:  # killed before the first renaming, and between the two
        def killed(*files, calls=iter([replace] * survived)):
            try: next(calls)(*files)
            except StopIteration: raise KeyboardInterrupt from None
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt): ck.write_checkpoint(path, {"epoch": 3})
        assert ck.read_checkpoint(path)["epoch"] == 2


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b[:40], lambda b: b"", lambda b: b[:900] + b"?" + b[901:]])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, damage):
    path = tmp_path / "a.pt"
    training(path, epochs=4, progress=False)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"a\.pt is damaged: .*; going on from .*a\.pt\.previous"):
        again = training(path, resume=True, progress=False)
    same(again, training(None, progress=False))
    for file in path, ck.previous(path): file.write_bytes(b"")
    with pytest.raises(ck.CheckpointError, match="Nothing is left to go on from"):
        training(path, resume=True, progress=False)


def test_a_new_run_does_not_keep_the_checkpoint_of_an_old_one(tmp_path):
    path = tmp_path / "a.pt"
    training(path, epochs=3, progress=False)
    training(path, epochs=1, progress=False)
    assert not ck.previous(path).exists() and len(ck.read_checkpoint(path)["history"]) == 1


X = torch.linspace(-1, 1, 20)[:, None]


def simple(model, path=None, kind=torch.optim.Adam, lr=0.01, optimizer=None, data=((X, X**2),) * 3,
           loss=lambda m, b: mse_loss(m(b[0]), b[1]), **options):
    options = {"epochs": 2, "progress": False, "device": "cpu", "checkpoint": path} | options
    return fit(model, loss, data, optimizer=optimizer or kind(model.parameters(), lr=lr), **options)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    simple(nn.Linear(1, 1), path)
    def resume(model=None, **options): simple(model or nn.Linear(1, 1), path, resume=True, epochs=3, **options)
    with pytest.raises(ck.CheckpointError, match="of another model: weight is .1, 1. there and .4, 1. here"):
        resume(nn.Linear(1, 4))
    with pytest.raises(ck.CheckpointError, match="seed=0 by 1 processes, this run has seed=1"): resume(seed=1)
    model = nn.Linear(1, 1)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ck.CheckpointError, match="lacks scheduler"):
        resume(model, optimizer=adam, scheduler=torch.optim.lr_scheduler.StepLR(adam, 1))
    ck.write_checkpoint(path, {"model": model.state_dict()}, fresh=True)
    with pytest.raises(ck.CheckpointError, match="weights only"): resume()


def test_a_finished_run_is_only_read_back(tmp_path):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    history = simple(first, tmp_path / "a.pt")
    again = simple(second, tmp_path / "a.pt", resume=True, loss=lambda m, b: pytest.fail("nothing is left to train"))
    assert again.rows == history.rows and torch.equal(first.weight, second.weight)


def test_fewer_epochs_than_the_checkpoint_has_are_refused(tmp_path):
    simple(nn.Linear(1, 1), tmp_path / "a.pt", epochs=3)
    with pytest.raises(ck.CheckpointError, match="has 3 epochs, more than epochs=2"):
        simple(nn.Linear(1, 1), tmp_path / "a.pt", resume=True)


def test_resume_without_a_checkpoint_begins_at_the_beginning(tmp_path):
    assert len(simple(nn.Linear(1, 1), tmp_path / "deep" / "a.pt", resume=True)) == 2


@pytest.mark.parametrize("generator", [None, 7])
def test_any_data_loader_goes_on_exactly(tmp_path, generator):
    def run(epochs, path, **options):
        seed_all(0)
        g = generator and torch.Generator().manual_seed(generator)
        loader = DataLoader(TensorDataset(X, X**2), batch_size=4, shuffle=True, generator=g)
        return simple(nn.Linear(1, 1), path, epochs=epochs, data=loader, **options).curve()
    run(2, tmp_path / "a.pt")
    assert run(5, tmp_path / "a.pt", resume=True) == run(5, None)


def test_random_batches_from_a_function_go_on_exactly(tmp_path):
    def data(epoch):
        for _ in range(4):
            x = torch.rand(8, 1)
            yield x, x**2
    def run(epochs, path, **options):
        seed_all(0)
        return simple(nn.Linear(1, 1), path, epochs=epochs, data=data, **options).curve()
    run(2, tmp_path / "a.pt")
    assert run(4, tmp_path / "a.pt", resume=True) == run(4, None)


def test_random_generators_are_all_kept():
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    state = ck.rng_state()
    first = draw()
    ck.set_rng_state(state)
    assert draw() == first


def test_the_loop_is_the_textbook_loop():
    seed_all(0)
    ours = nn.Linear(1, 1)
    simple(ours, epochs=3, clip=0.1)
    seed_all(0)
    theirs = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for _ in range(9):
        optimizer.zero_grad()
        mse_loss(theirs(X), X**2).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_a_scheduler_counts_epochs_or_batches():
    def rates(every):
        model = nn.Linear(1, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
        return simple(model, optimizer=sgd, scheduler=scheduler, schedule_every=every)["lr"]
    assert rates("epoch") == [1.0, 0.5] and rates("batch") == [1.0, 0.125]


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3], 0.1),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e))], ids=["steps", "cosine", "lambda"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimizers_and_schedulers_go_on_exactly(tmp_path, make, kind):
    def run(epochs, path, **options):
        seed_all(0)
        model = nn.Linear(1, 1)
        optimizer = kind(model.parameters(), lr=0.1)
        return simple(model, path, epochs=epochs, optimizer=optimizer, scheduler=make(optimizer), **options).curve()
    run(2, tmp_path / "a.pt")
    assert run(5, tmp_path / "a.pt", resume=True) == run(5, None)


def test_evaluations_are_counted_and_callbacks_called():
    seen = []
    history = simple(nn.Linear(1, 1), nfe=lambda m: {"forward": 14, "backward": 20},
                     on_epoch=lambda row, model: seen.append(row["epoch"]),
                     evaluate=lambda m: {"training": float(m.training), "gradients": float(torch.is_grad_enabled())})
    assert history["nfe_forward"] == [14, 14] and history["nfe_backward"] == [20, 20] and seen == [1, 2]
    assert history["training"] == [0, 0] and history["gradients"] == [0, 0]
    assert simple(nn.Linear(1, 1), nfe=lambda m: 26)["nfe"] == [26, 26]


def test_progress_is_one_line_per_epoch_where_nobody_looks(capsys):
    simple(nn.Linear(1, 1), progress="seed 7", nfe=lambda m: 26)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("seed 7: epoch 2/2  loss 0.") and "  nfe 26  " in lines[1]
    simple(nn.Linear(1, 1))
    assert not capsys.readouterr().out


def test_the_model_is_left_as_it_was_found():
    model = nn.Linear(1, 1).eval()
    simple(model, mixed_precision="bf16")
    assert not model.training and model(torch.zeros(1, 1)).dtype == torch.float32
    assert torch.equal(model(torch.ones(1, 1)), nn.functional.linear(torch.ones(1, 1), model.weight, model.bias))


def test_mixed_precision_computes_in_bfloat16():
    seen = set()
    class Linear(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.add(y.dtype)
            return y
    simple(Linear(1, 1), mixed_precision="bf16")
    assert seen == {torch.bfloat16}

# ------------------------------------------------------------------------------------------------------- divergence


def test_what_diverges_is_named_and_the_last_good_state_is_back():
    model, good = nn.Linear(1, 1), []
    def loss(m, batch):
        value = mse_loss(m(batch[0]), batch[1])
        return value * float("nan") if len(good) == 2 and not m.weight.isnan().any() else value
    with pytest.raises(TrainingDiverged, match="epoch 3, batch 1: the loss is nan") as caught:
        simple(model, loss=loss, epochs=5, on_epoch=lambda row, m: good.append(m.weight.detach().clone()))
    assert torch.equal(model.weight, good[1]) and len(caught.value.history) == 2
    assert (caught.value.epoch, caught.value.batch, caught.value.parameter) == (3, 1, None)


def test_an_overflowing_parameter_is_named():
    model = nn.Linear(1, 1)
    def steep(m, batch): return 1e3 * m(batch[0]).mean()
    with pytest.raises(TrainingDiverged, match="epoch 1, batch 2: parameter weight is not finite since the update"):
        simple(model, loss=steep, kind=torch.optim.SGD, lr=1e38, data=[(torch.ones(2, 1),)] * 3)
    assert torch.isfinite(model.weight).all()
    with pytest.raises(TrainingDiverged, match="epoch 1, batch 1: parameter weight"):  # in the last batch of an epoch
        simple(model, loss=steep, kind=torch.optim.SGD, lr=1e38, data=[(torch.ones(2, 1),)])


def test_a_gradient_that_is_not_finite_is_named():
    with pytest.raises(TrainingDiverged, match="the loss is .*, but the gradient of weight is not finite") as caught:
        simple(nn.Linear(1, 1), loss=lambda m, b: (m(b[0]) - m(b[0])).abs().sqrt().mean())
    assert caught.value.parameter == "weight"


def blow_up(): return solve(lambda t, y: y**2, torch.ones(1), torch.tensor([0.0, 2.0]), max_steps=500).y[-1].item()


class Field(nn.Module):
    "A field that blows up in finite time once its parameter is positive."
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(-1.0))

    def forward(self, y0):
        return solve(lambda t, y: self.a * y**2, y0, torch.tensor([0.0, 2.0]), max_steps=1000).y[-1]


def test_a_failed_solve_stops_the_training_with_its_diagnosis(tmp_path):
    def grow(m, batch): return -m(torch.ones(3, 1)).mean()
    with pytest.raises(TrainingDiverged, match="epoch 2, batch 1: the solver gave up: .* at t=") as caught:
        simple(Field(), tmp_path / "a.pt", loss=grow, data=[0], kind=torch.optim.SGD, lr=10.0, epochs=3)
    assert isinstance(caught.value.__cause__, SolveError) and len(caught.value.history) == 1
    assert len(ck.read_checkpoint(tmp_path / "a.pt")["history"]) == 1


def test_a_solve_that_fails_in_evaluate_is_named():
    def evaluate(m): return {"error": blow_up()}
    with pytest.raises(TrainingDiverged, match="epoch 1, batch all: the solver gave up in evaluate"):
        simple(nn.Linear(1, 1), evaluate=evaluate)


def test_failed_batches_may_be_passed_over_a_few_in_a_row():
    x = torch.ones(2, 1)
    def history(bad, **options):
        return simple(nn.Linear(1, 1), data=[(x / 0 if k in bad else x, x) for k in range(6)], **options)
    assert history({1, 2, 4}, skip_failed=2)["skipped"] == [3, 3]
    with pytest.raises(TrainingDiverged, match=r"epoch 1, batch 4: batch\[0\] has values"):
        history({1, 2, 3}, skip_failed=2)
    with pytest.raises(TrainingDiverged, match="batch 6"): history(set(range(6)), skip_failed=9)  # nothing was learned


def test_a_failed_batch_leaves_no_trace_in_running_statistics():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    simple(model, data=[(X, X), (X / 0, X), (X, X)], skip_failed=1)
    assert all(torch.isfinite(b).all() for b in model.buffers()) and torch.isfinite(model.eval()(X)).all()


@pytest.mark.parametrize("options, message", [
    (dict(epochs=0), "epochs=0"), (dict(clip=-1.0), "clip=-1.0"), (dict(skip_failed=-1), "skip_failed=-1"),
    (dict(schedule_every="step"), "schedule_every='step'"), (dict(device="tpu"), "device='tpu'"),
    (dict(device="cuda:99"), "this machine has"), (dict(mixed_precision="fp8"), "mixed_precision='fp8'"),
    (dict(resume=True), "needs checkpoint=PATH"), (dict(data=[]), "data gave no batch"),
    (dict(loss="mse"), "loss is a str"),
    (dict(loss=lambda m, b: m(b[0])), "must be a scalar tensor"),
    (dict(loss=lambda m, b: torch.zeros(())), "depends on the parameters"),
    (dict(evaluate=lambda m: 0.5), "evaluate returned 0.5"), (dict(data=torch.zeros(3)), "data is a Tensor"),
    (dict(optimizer="adam"), "optimizer is a str"), (dict(kind=torch.optim.LBFGS), "LBFGS needs more"),
    (dict(checkpoint="."), "is a folder: name a file in it"),
    (dict(path="a.pt", data=DataLoader(TensorDataset(X, X), num_workers=1, persistent_workers=True)), "random state"),
    (dict(optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)), "no parameter of this model")])
def test_misuse_is_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message): simple(nn.Linear(1, 1), **options)


def test_a_norm_of_gradients_that_overflows_is_no_other_process():
    model = nn.Linear(1, 1)
    before = model.weight.item()
    with pytest.raises(TrainingDiverged, match="the norm of the gradient overflows: the gradient of .* reaches .*e.24") as caught:
        simple(model, loss=lambda m, b: 1e25 * mse_loss(m(b[0]), b[1]), clip=1.0)
    assert "float64" in caught.value.remedy and caught.value.parameter in ("weight", "bias")
    assert model.weight.item() == before                                       # and nothing was changed by it
    simple(model.double(), loss=lambda m, b: 1e25 * mse_loss(m(b[0].double()), b[1].double()), clip=1.0)


def test_a_model_that_is_broken_from_the_start_is_refused():
    model = nn.Linear(1, 1)
    model.bias.data.fill_(math.inf)
    with pytest.raises(ValueError, match="parameter bias of the model is not finite before"): simple(model)

# ------------------------------------------------------------------------------------------------------- processes

TWO = """
import os, math
import sys
import torch
from torch import nn
from torch.nn.functional import mse_loss
from neuralode_nb.lab.data import Samples, batches
from neuralode_nb.lab.train import fit, seed_all
from neuralode_nb.lab.watch import TrainingDiverged
x = torch.linspace(-1, 1, 32)[:, None]
samples = Samples("line", "train", x, torch.arange(32), tuple(range(32)))
def run(epochs, loss, **options):
    seed_all(0)
    model = nn.Linear(1, 1)
    return model, fit(model, loss, batches(samples, 4), epochs=epochs, device="cpu", progress=False,
                      optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)
def loss(m, b): return mse_loss(m(b[0]), b[0]**2)
whole, history = run(3, loss)
run(1, loss, checkpoint=sys.argv[1])
again, second = run(3, loss, checkpoint=sys.argv[1], resume=True)
assert second.curve() == history.curve() and torch.equal(whole.weight, again.weight)
rank = torch.distributed.get_rank()
both = [torch.empty_like(whole.weight.data) for _ in range(2)]
torch.distributed.all_gather(both, whole.weight.data)
assert torch.equal(*both)
try: run(1, lambda m, b: loss(m, b) * (float("nan") if rank else 1.0))
except TrainingDiverged as error: caught = error.cause
assert caught == ("the loss is nan" if rank else "it failed in another process"), caught
count = iter(range(99))
_, history = run(1, lambda m, b: loss(m, b) * (float("nan") if rank and next(count) == 2 else 1.0), skip_failed=1)
assert history["skipped"] == [1] and math.isfinite(history.last["loss"])
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os.write(1, f"rank {rank} is content\\n".encode())       # one write: lines of two processes do not mix
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_train_one_model_and_fail_together(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "two.py", "a.pt"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    said = sorted(line for line in done.stdout.splitlines() if "content" in line)
    assert said == ["rank 0 is content", "rank 1 is content"]

# ------------------------------------------------------------------------------------------------------------ data


def test_every_embedded_set_is_fixed_by_its_seed():
    for name in "circles", "moons", "spheres", "spiral", "cubic_spiral", "digits":
        options = {} if name == "digits" else {"points": 20} if "spiral" in name else {"n": 20}
        a, b, c = (load(name, "test", seed=s, **options) for s in (1, 1, 2))
        x, y, z = (d.y if "spiral" in name else d.x for d in (a, b, c))
        assert torch.equal(x, y) and not torch.equal(x, z), name


def test_digits_are_split_without_overlap():
    train, test = load("digits"), load("digits", "test")
    assert len(train) + len(test) == 1797
    from sklearn.datasets import load_digits
    known = load_digits().images.reshape(1797, -1)
    both = torch.cat([train.x, test.x]).flatten(1).numpy()
    assert sorted(map(tuple, both)) == sorted(map(tuple, known))


def test_trajectories_agree_with_scipy():
    from scipy.integrate import solve_ivp
    from scipy.linalg import expm
    from neuralode_nb.lab.data import CUBIC, SPIRAL
    spiral = load("spiral", points=30, spacing="irregular")
    exact = np.stack([expm(np.array(SPIRAL) * t) @ [2, 0, 1] for t in spiral.t.double().numpy()]) / spiral.scale
    assert np.abs(spiral.exact[:, 0].numpy() - exact).max() < 2e-6
    cubic = load("cubic_spiral", points=50)
    ivp = solve_ivp(lambda t, y: y**3 @ np.array(CUBIC), (0, 25), [2.0, 0.0], "DOP853", cubic.t.double().numpy(),
                    rtol=1e-11, atol=1e-12)
    assert np.abs(cubic.exact[:, 0].numpy() - ivp.y.T / cubic.scale).max() < 1e-5


def test_a_spiral_has_several_starts_and_one_scale():
    train, test = (load("spiral", split, points=20, trajectories=3, noise=0.0) for split in ("train", "test"))
    assert train.y.shape == test.y.shape == (20, 3, 3) and train.scale == test.scale
    assert not torch.isclose(train.y[0], test.y[0]).any()
    assert torch.equal(train.y, train.exact)


@pytest.mark.parametrize("name, options, message", [
    ("mnits", {}, "not known; choose from digits"), ("digits", {"split": "val"}, "split='val'"),
    ("spiral", {"points": 1}, "points=1"), ("spiral", {"noise": -1}, "noise=-1"),
    ("spiral", {"trajectories": 0}, "trajectories=0"), ("spiral", {"spacing": "x"}, "spacing='x'"),
    ("moons", {"n": 1}, "n=1"), ("moons", {"factor": 1}, "moons takes n, noise, seed")])
def test_wrong_requests_for_data_are_named(name, options, message):
    with pytest.raises(ValueError, match=message): load(name, **options)


def test_missing_files_say_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURALODE_DATA", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in IMAGES:
        with pytest.raises(FileNotFoundError, match="mine or .*cache.* and download=False. Set NEURALODE_DATA"):
            load(name, download=False)
    for name in TABLES:
        with pytest.raises(FileNotFoundError, match="folder that holds series/"): load(name)


def test_a_failed_download_is_told_with_its_reason(tmp_path, monkeypatch):
    import torchvision
    def offline(*args, download=False, **options): raise OSError("no route to host" if download else "not there")
    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    monkeypatch.delenv("NEURALODE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="could not be fetched .OSError: no route to host.. Set NEURALODE_DATA"):
        load("mnist")


def idx(values):
    values = np.asarray(values, np.uint8)
    return b"\0\0\x08" + bytes([values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def test_mnist_files_are_read_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURALODE_DATA", str(tmp_path))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx([7, 1, 2]))
    test = load("mnist", "test")
    assert test.x.shape == (3, 1, 28, 28) and test.y.tolist() == [7, 1, 2] and test.source == "files"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx([7, 1]))
    with pytest.raises(ValueError, match="labels-idx1-ubyte is damaged: 2 labels, expected 3"): load("mnist", "test")
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images))[:200])
    with pytest.raises(ValueError, match="images-idx3-ubyte.gz is damaged"): load("mnist", "test")
    whole = gzip.compress(idx(images))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(whole[:100] + b"????" + whole[104:])
    with pytest.raises(ValueError, match="images-idx3-ubyte.gz is damaged"): load("mnist", "test")
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"<html>not found</html>"))
    with pytest.raises(ValueError, match="an IDX file"): load("mnist", "test")


def test_cifar_sheets_are_read_in_order(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setenv("NEURALODE_DATA", str(tmp_path))
    folder = tmp_path / "CIFAR10"
    folder.mkdir()
    sheet = np.zeros((100, 32, 100, 32, 3), np.uint8)
    sheet[1, :, 2] = [10, 20, 30]      # image 102
    Image.fromarray(sheet.reshape(3200, 3200, 3)).save(folder / "test.webp", lossless=True)
    np.save(folder / "test_labels.npy", (np.arange(10_000) % 10).astype(np.uint8))
    test = load("cifar10", "test")
    assert test.x[102, :, 5, 7].tolist() == [10, 20, 30] and test.x.sum() == 60 * 32 * 32 and test.y[102] == 2
    (folder / "test.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="test.webp is damaged"): load("cifar10", "test")


def test_what_torchvision_has_is_taken_as_it_is(tmp_path, monkeypatch):
    import torchvision
    class Stub:
        def __init__(self, root, train, download):
            if Path(root) != tmp_path / "neuralode_nb": raise RuntimeError("not here")
            self.data, self.targets = np.full((4, 32, 32, 3), [1, 2, 3], np.uint8), [0, 1, 2, 3]
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    monkeypatch.setenv("NEURALODE_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train = load("cifar10", download=False)
    assert train.x.shape == (4, 3, 32, 32) and train.x[0, :, 0, 0].tolist() == [1, 2, 3]
    assert train.y.tolist() == [0, 1, 2, 3] and train.source == "torchvision"


@pytest.mark.skipif(not os.environ.get("NEURALODE_DATA"), reason="NEURALODE_DATA is not set: no real data at hand")
@pytest.mark.parametrize("name, split, n", [
    ("mnist", "train", 60_000), ("mnist", "test", 10_000), ("fashion_mnist", "test", 10_000),
    ("cifar10", "test", 10_000), ("hare_lynx", "train", 21), ("co2", "train", 18_304)])
def test_real_data_sets(name, split, n):
    data = load(name, split, **({"download": False} if name in IMAGES else {}))
    assert len(data) == n
    if name not in IMAGES: return
    x, _ = data[:2000]
    assert x.mean().abs() < 0.05 and abs(x.std() - 1) < 0.05


def test_batches_cover_everything_once_in_an_order_of_seed_and_epoch():
    samples = Samples("count", "train", torch.arange(50.0)[:, None], torch.arange(50), tuple(range(50)))
    def order(seed, epoch, **options):
        loader = batches(samples, 8, seed, **options)
        loader.batch_sampler.sampler.set_epoch(epoch)
        return torch.cat([y for _, y in loader]).tolist()
    assert sorted(order(0, 1)) == list(range(50)) and order(0, 1) == order(0, 1)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    assert order(0, 1, shuffle=False) == list(range(50)) and len(order(0, 1, drop_last=True)) == 48


def test_a_score_counts_every_sample_once():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.eye(10)[3])
        def forward(self, x): return self.bias.expand(len(x), 10)
    test = load("digits", "test")
    for size in 7, 360, 1000:
        accuracy = score(Constant(), test, size=size)["accuracy"]
        assert accuracy == pytest.approx((test.y == 3).double().mean().item(), abs=1e-6)

# ---------------------------------------------------------------------------------------------------------- records


@dataclass
class Config:
    rate: float = 0.1
    widths: tuple = (8, 8)
    seeds: tuple = (0,)

    @classmethod
    def smoke(cls): return cls()

    @classmethod
    def full(cls): return cls(seeds=(0, 1, 2), widths=(64, 64))


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    with record_run("swap", Config(), device="cpu", notes=["on a small machine"]) as record:
        record.add(0, {"error": torch.tensor(0.25), "time": math.inf, "worst": -math.inf, "lost": math.nan},
                   History([dict(epoch=k, loss=1 / k) for k in (1, 2, 3)]), label="plain")
    path = record.save(tmp_path)
    first = path.read_bytes()
    back = load_record("swap", "smoke", tmp_path)
    back.save(tmp_path)
    assert path.read_bytes() == first, "saving what was loaded changes nothing"
    metrics = back.runs[0]["metrics"]
    assert metrics["time"] == math.inf and metrics["worst"] == -math.inf and math.isnan(metrics["lost"])
    assert metrics["error"] == 0.25
    json.loads(first, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert back.config == {"rate": 0.1, "widths": [8, 8], "seeds": [0]} and back.notes == ["on a small machine"]


def test_a_record_names_no_host_and_no_folder(tmp_path):
    import socket
    with record_run("swap", Config()) as record: pass
    text = record.save(tmp_path).read_text()
    assert socket.gethostname() not in text and str(Path.home()) + "/" not in text and str(tmp_path) not in text
    assert record.versions["torch"] == torch.__version__
    assert record.machine["cores"] >= 1 and record.started.endswith("+00:00")


def test_failures_stay_and_mistakes_pass_through():
    record = Record("swap")
    with record.attempt(1): raise TrainingDiverged("the loss is nan", 3, 7, history=History([dict(epoch=1, loss=1.0)]))
    with record.attempt(2): blow_up()
    with pytest.raises(RuntimeError, match="shapes"):
        with record.attempt(3): raise RuntimeError("shapes")
    assert [(f["seed"], f["error"]) for f in record.failures] == [(1, "TrainingDiverged"), (2, "SolveError")]
    assert record.history["swap, seed 1"] == {"epoch": [1], "loss": [1.0]} and record.rows()[0]["failed"] == 2


def test_summary_is_mean_and_sample_deviation():
    record = Record("swap")
    values = [0.9, 0.95, 0.97, 0.98]
    for seed, value in enumerate(values): record.add(seed, {"accuracy": value})
    record.add(9, {"accuracy": math.inf}, label="odd")
    found = record.summary()["swap"]["accuracy"]
    assert found == {"mean": pytest.approx(np.mean(values)), "sd": pytest.approx(np.std(values, ddof=1)), "n": 4}
    assert math.isnan(record.summary()["odd"]["accuracy"]["sd"])


def test_long_histories_are_thinned_and_records_stay_small(tmp_path):
    record = Record("long")
    columns = ["loss", "grad_norm", "nfe", "accuracy", "lr", "skipped", "seconds"]
    for seed in range(5):
        rows = [{"epoch": k} | dict.fromkeys(columns, math.pi / k) for k in range(1, 5001)]
        record.add(seed, {"x": 1.0}, History(rows))
    assert record.history["long, seed 0"]["epoch"][::199] == [1, 5000]
    assert record.save(tmp_path).stat().st_size < 200_000


def test_the_command_of_a_record_names_what_was_changed():
    assert command("swap", Config.full()) == "neuralode run swap --profile full"
    changed = Config(seeds=(0, 1, 2), widths=(64, 32))
    assert command("swap", changed) == "neuralode run swap --profile full --set widths=64,32"
    assert profile_of(Config.smoke()) == "smoke" and profile_of(changed) == "custom"
