"""Images: networks of the sources, distortions, a table that repeats itself and survives a kill, and errors that help."""
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample

from neuralode_nb.cli import checkpoint_folder, full_name
from neuralode_nb.experiments import image_odenet as image
from neuralode_nb.lab.checkpoint import CheckpointError, load_weights, read_checkpoint
from neuralode_nb.lab.data import load
from neuralode_nb.lab.distort import Distort
from neuralode_nb.lab.readings import count_both_ways, read_as, read_network, ways_to_read
from neuralode_nb.lab.record import Record, load_record
from neuralode_nb.lab.settings import command, configure, profiles
from neuralode_nb.models.image import ImageMLP, NormedField, ODENet, ResNet

ROOT = Path(__file__).resolve().parent.parent
TINY = replace(image.Config.smoke(), model=("odenet", "resnet-2"), width=8, epochs=3, samples=64, readings=8)
CLOCKS = ("seconds", "processor", "s/epoch", "processor s/epoch", "images/s", "ms/image")


def timeless(value):
    "A nested value without what clocks have written."
    if isinstance(value, dict): return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def same(a, b): return [timeless(getattr(a, k)) == timeless(getattr(b, k)) for k in ("runs", "history", "data")] == [True] * 3


def parameters(net): return sum(p.numel() for p in net.parameters())

# ------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("net, count", [
    (ODENet, 150_794), (ResNet, 520_202), (lambda: ResNet(blocks=1), 149_642), (lambda: ODENet(design="chen"), 208_266),
    (lambda: ResNet(design="chen"), 576_778), (ImageMLP, 238_510), (lambda: ODENet(channels=3), 151_946)])
def test_networks_have_the_sizes_of_their_sources(net, count):
    assert parameters(net()) == count


def test_the_example_of_torchdiffeq_computes_the_same_from_the_same_weights():
    class Conv(nn.Module):                       # examples/odenet_mnist.py: the time is the first channel there
        def __init__(self, n):
            super().__init__()
            self._layer = nn.Conv2d(n + 1, n, 3, padding=1)
        def forward(self, t, x): return self._layer(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))
    n, field = 8, NormedField(8)
    norms, convs = [nn.GroupNorm(n, n) for _ in range(3)], [Conv(n), Conv(n)]
    for mine, theirs in zip(field.convs, convs):
        theirs._layer.weight.data = torch.cat([mine.weight.data[:, -1:], mine.weight.data[:, :-1]], 1)
        theirs._layer.bias.data = mine.bias.data
    x, t = torch.randn(2, n, 6, 6), torch.tensor(0.3)
    out = convs[0](t, norms[0](x).relu())
    torch.testing.assert_close(field(t, x), norms[2](convs[1](t, norms[1](out).relu())))


@pytest.mark.parametrize("net", [ResNet(width=8), ODENet(width=8, design="chen"), ImageMLP(size=28)])
@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (28, 28), (2, 1, 0, 28)])
def test_images_of_another_kind_are_refused_with_their_shape(net, shape):
    with pytest.raises(ValueError, match=re.escape(f"x={shape}: this network takes (batch, 1, ")): net(torch.zeros(shape))


@pytest.mark.parametrize("design", ["small", "chen"])
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (1, 9)])
def test_any_size_of_image_that_leaves_a_pixel_will_do(design, channels, size):
    for make in (ResNet, ODENet): assert make(channels, 7, 8, design=design)(torch.randn(2, channels, size, size)).shape == (2, 7)

# ----------------------------------------------------------------------------------------------------- distortions


def test_every_image_has_its_own_distortion_and_the_generator_decides():
    x = torch.randn(1, 1, 12, 12).expand(64, -1, -1, -1)
    torch.manual_seed(3)
    first = Distort(2, 10., True)(x)
    torch.manual_seed(3)
    assert torch.equal(first, Distort(2, 10., True)(x))
    assert len({tuple(im.flatten().tolist()) for im in first}) == 64 and not torch.equal(first, Distort(2, 10., True)(x))


@pytest.mark.parametrize("edge", ["dark", "mirror"])
def test_what_comes_in_from_outside(edge):
    x = torch.full((50, 2, 6, 6), 5.)
    x[:, 0, 0, 0] = -1.
    moved = Distort(shift=2, edge=edge)(x)[:, 1]
    framed = moved[:, 2:4, 2:4]
    torch.testing.assert_close(framed, torch.full_like(framed, 5.))
    assert moved.min().item() == pytest.approx(-1. if edge == "dark" else 5., abs=1e-5)


def test_a_turn_is_a_turn_in_pixels_also_for_images_that_are_not_square(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n: torch.ones(n))                   # the largest angle
    x = torch.zeros(1, 1, 21, 41)
    x[0, 0, 10, 30] = 1.                                                          # ten pixels to the right of the middle
    turned = Distort(degrees=90.)(x)[0, 0]
    assert turned.argmax().item() in (0 * 41 + 20, 20 * 41 + 20) and turned.max() > 0.99
    half = affine_grid(torch.eye(2, 3)[None], x.shape, align_corners=False)
    torch.testing.assert_close(Distort()(x), grid_sample(x, half, align_corners=False))

# -------------------------------------------------------------------------------------------------------- settings


def test_the_command_of_the_issue_is_understood():
    assert full_name("image") == "image_odenet"
    config = configure(image.Config, "full", ["dataset=cifar10", "model=odenet", "method=euler"])
    assert (config.dataset, config.model, config.method) == ("cifar10", ("odenet",), "euler")
    again = command("image_odenet", config).split()
    assert configure(image.Config, again[4], [w for w in again if "=" in w]) == config


@pytest.mark.parametrize("name", list(profiles(image.Config)))
def test_every_row_of_every_profile_can_be_built(name):
    config = profiles(image.Config)[name]
    for row in config.model:
        row = image._row(row, config)
        model = image._network(row, replace(config, width=8), load("digits"))
        assert image._label(row) and parameters(model) > 0
    assert len({image._row(row, config) for row in config.model}) == len(config.model)


@pytest.mark.parametrize("changes, said", [
    (dict(model=("resnet-x",)), "model has 'resnet-x': use odenet"), (dict(model=("odenet-a-b-c",)), "use odenet"),
    (dict(model=("vgg",)), "model has 'vgg'"), (dict(method="rk5"), "method='rk5' is not known"),
    (dict(root="lbfgs"), "solves no equations"), (dict(design="he"), "design='he'"), (dict(threads=0), "threads=0"),
    (dict(samples=0), "samples=0 must be at least 1"), (dict(batch=0), "batch=0 must"), (dict(steps=0), "steps=0"),
    (dict(epochs=0), "epochs=0"), (dict(gradient="bp"), "gradient='bp'"),
    (dict(batch=10**9), r"batch=1000000000: a training step needs about .* GiB, .* free; use batch=\d+ or less")])
def test_settings_that_cannot_work_are_named_before_any_training(changes, said):
    with pytest.raises(ValueError, match=said): image.run(replace(TINY, **changes), progress=False)

# ------------------------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return image.run(TINY, checkpoint=folder, progress=False), folder


def test_a_run_measures_what_the_page_says(first):
    record, _ = first
    ode, res = (run["metrics"] for run in record.runs)
    assert not record.failures and set(res) == set(ode) - {"change of error % by a fine solver"}
    assert (ode["NFE"], res["NFE"], ode["NFE backward"]) == (6, 2, 0) and 0 <= ode["test error %"] <= 100
    assert ode["MiB of a step"] > res["MiB of a step"] > 0 and min(ode["s/epoch"], ode["processor s/epoch"], ode["images/s"]) > 0
    kept = record.data["ODE-Net, euler"]
    confusion = np.array(kept["confusion"])
    assert confusion.sum() == 360 and 100 * (1 - confusion.trace() / 360) == pytest.approx(ode["test error %"], abs=1e-3)
    assert set(record.figures) == {"training", "predictions", "confusion", "tolerances", "trade"}
    assert image._figures(Record("none")) == {}


def test_a_record_is_small_and_its_figures_can_be_drawn_from_the_file(first, tmp_path):
    record, _ = first
    assert record.save(tmp_path).stat().st_size < 150_000
    again = load_record("image_odenet", record.profile, tmp_path)
    assert set(image._figures(again)) == set(record.figures)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_any_number_of_ode_nets_can_be_drawn(n, first):
    record, name = first[0], "ODE-Net, euler"
    names = [f"ODE-Net, method {i}" for i in range(n)]
    many = Record("image_odenet", runs=[{"label": x, "seed": 0, "metrics": record.runs[0]["metrics"]} for x in names],
                  data=dict.fromkeys(names, record.data[name]),
                  history=dict.fromkeys([f"{x}, seed 0" for x in names], record.history[f"{name}, seed 0"]))
    titles = [ax.get_title() for ax in image._figures(many)["trade"].axes]
    assert titles == names[:4]


def test_rows_and_seeds_can_be_added_later_and_what_is_done_is_not_done_again(first, tmp_path):
    record, folder = first
    assert sorted(p.name for p in folder.glob("*.pt")) == ["odenet-euler-0.pt", "resnet-2-0.pt"]
    for name in ("odenet-euler-0.pt", "resnet-2-0.pt"): (tmp_path / name).write_bytes((folder / name).read_bytes())
    before = (tmp_path / "odenet-euler-0.pt").stat().st_mtime_ns
    more = image.run(replace(TINY, model=(*TINY.model, "mlp")), checkpoint=tmp_path, resume=True, progress=False)
    assert (tmp_path / "odenet-euler-0.pt").stat().st_mtime_ns == before and [r["label"] for r in more.runs][2] == "MLP"
    assert timeless(more.runs[:2]) == timeless(record.runs)


SCRIPT = """
import sys
import time
sys.path.insert(0, {tests!r})
from test_image import TINY
from neuralode_nb.experiments import image_odenet as image

class Slow(image._Watch):
    def __call__(self, model):
        time.sleep(1.)
        return super().__call__(model)
image._Watch = Slow
image.run(TINY, checkpoint={folder!r}, progress=True)
"""


def test_a_run_that_is_killed_goes_on_exactly(first, tmp_path):
    script = SCRIPT.format(tests=str(ROOT / "tests"), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        for line in process.stdout:
            if "epoch 2/3" in line: break
        assert re.search(r"ODE-Net, euler, seed 0: epoch 2/3 .*loss .*nfe_forward 6 .*test error % .*samples/s .*s left", line)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and len(read_checkpoint(tmp_path / "odenet-euler-0.pt")["history"]) == 2
    assert same(image.run(TINY, checkpoint=tmp_path, resume=True, progress=False), first[0])


def test_three_lines_use_what_was_trained_and_another_model_is_refused(first):
    record, folder = first
    model = load_weights(folder / "odenet-euler-0.pt", ODENet(width=8, method="euler", step_size=1 / 6)).eval()
    said = model(load("digits", "test")[:12][0]).argmax(1)
    assert said.tolist() == record.data["ODE-Net, euler"]["predicted"][:12]
    for other in (ODENet(width=16), ResNet(width=8), ODENet(width=8, design="chen")):
        with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
            load_weights(folder / "odenet-euler-0.pt", other)


def test_a_checkpoint_of_other_settings_is_refused(first, tmp_path):
    (tmp_path / "odenet-euler-0.pt").write_bytes((first[1] / "odenet-euler-0.pt").read_bytes())
    with pytest.raises(CheckpointError, match="of another model"):
        image.run(replace(TINY, width=16), checkpoint=tmp_path, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="more than epochs=2"):
        image.run(replace(TINY, epochs=2), checkpoint=tmp_path, resume=True, progress=False)


def test_mixed_precision_trains_too():
    record = image.run(replace(TINY, model=("odenet",), epochs=1, precision="bf16", readings=0), progress=False)
    assert not record.failures and np.isfinite(record.history["ODE-Net, euler, seed 0"]["loss"]).all()


def test_two_processes_share_the_batches_and_finish_the_schedule(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available(): pytest.skip("no gloo here")
    changes = ["width=8", "epochs=2", "samples=28", "batch=4", "readings=0", "model=odenet"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python",
               sys.executable, "-c", "from neuralode_nb.cli import app; app()", "run", "image", "--device", "cpu", "--results",
               str(tmp_path), "--set", *changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path, env=os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    shutil.rmtree(checkpoint_folder("image_odenet", configure(image.Config, changes=changes)), ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = load_record("image_odenet", "custom", tmp_path)
    assert len(record.runs) == 1 and record.history["ODE-Net, euler, seed 0"]["samples"] == [32, 32]    # one again


# -------------------------------------------------------------------------------------------------------- readings


def test_readings_are_what_each_solver_says():
    model, test = ODENet(width=8, halvings=1, method="dopri5", gradient="adjoint"), load("digits", "test").take(40)
    nn.init.normal_(model.body.f.convs[1].weight, std=0.3)
    rows = read_network(model, test, ways_to_read(("rk4",), (2, 8), ("tsit5",), (1e-3,), (1e-3,)), size=16)
    for row in rows:
        block = read_as(model.body, row)
        with torch.no_grad(): said = torch.cat([model.head(block(model.stem(test[i:i + 16][0]))).argmax(1) for i in (0, 16, 32)])
        assert row["test error %"] == pytest.approx(100 * (said != test.y).float().mean().item(), abs=1e-4)
    assert [row["NFE"] for row in rows[:2]] == [8, 32] and rows[1]["state error"] < rows[0]["state error"]


def test_both_ways_are_counted_without_a_trace():
    model, test = ODENet(width=8, halvings=1), load("digits", "test").take(16)
    nn.init.normal_(model.body.f.convs[1].weight, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)          # the way back that drifts is told by the solver
        rows = count_both_ways(model, test, (1e-1, 1e-3))
    assert rows[1]["forward"] >= rows[0]["forward"] > 0 and all(p.grad is None for p in model.parameters())

# ----------------------------------------------------------------------------------------------------------- files


def idx(values):
    values = np.asarray(values, np.uint8)
    return b"\0\0\x08" + bytes([values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


@pytest.mark.parametrize("pixels, labels, said", [
    ((3, 28, 28), [1, 2, 30], "labels from 1 to 30, expected 0 to 9"), ((3, 28, 28), [1, 2], "2 labels, expected 3"),
    ((3, 32, 32), [1, 2, 3], r"an array of shape \(3, 32, 32\), expected images of 28 x 28 pixels"),
    ((3,), [1, 2, 3], r"an array of shape \(3,\), expected images")])
def test_files_of_another_set_are_refused(tmp_path, monkeypatch, pixels, labels, said):
    monkeypatch.setenv("NEURALODE_DATA", str(tmp_path))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros(pixels)))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ValueError, match=f"ubyte is damaged: {said}"): load("mnist", "test")


def test_sheets_that_are_missing_or_cut_are_named(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setenv("NEURALODE_DATA", str(tmp_path))
    folder = tmp_path / "CIFAR10"
    folder.mkdir()
    Image.fromarray(np.zeros((3200, 3200, 3), np.uint8)).save(folder / "test.webp", lossless=True)
    with pytest.raises(FileNotFoundError, match="test_labels.npy is missing: CIFAR-10 needs test.webp and test_labels.npy"):
        load("cifar10", "test")
    with pytest.raises(FileNotFoundError, match="train_1.webp is missing: CIFAR-10 needs train_1.webp, train_2"): load("cifar10")
    (folder / "test_labels.npy").write_bytes(b"no labels")
    with pytest.raises(ValueError, match="test_labels.npy is damaged: .*expected a NumPy file of labels"): load("cifar10", "test")
    np.save(folder / "test_labels.npy", np.zeros(9_999, np.uint8))
    with pytest.raises(ValueError, match="test_labels.npy is damaged: 9999 labels, expected 10000"): load("cifar10", "test")
    whole = (folder / "test.webp").read_bytes()
    (folder / "test.webp").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="test.webp is damaged"): load("cifar10", "test")
