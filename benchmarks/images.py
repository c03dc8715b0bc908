"""One training step of an image network: ODE blocks beside residual blocks, and beside torchdiffeq's.

python benchmarks/images.py [--smoke]. Time, evaluations of the block and memory of a step (forward, backward, SGD) for a
batch of random images of MNIST's size; the networks of a table share stem, head and field, weights and batch. Times are those
of the processor, one thread. Implicit steps are passed forward only. "channels last" is how our experiments lay the images in
memory; torchdiffeq's example does not.
"""
import copy
import math
import sys
import time

import torch
import torchdiffeq
from _turns import SMOKE, compare, save, spread, take_turns
from torch import nn
from torch.nn.functional import cross_entropy

from neuralode_nb import show
from neuralode_nb.lab.threads import keep_memory
from neuralode_nb.models.blocks import ODEBlock
from neuralode_nb.models.image import ODENet, ResNet
from neuralode_nb.ode.catalogue import Implicit
from neuralode_nb.ode.certify import peak_memory
from neuralode_nb.ode.scipy_solver import SciPy

ROUNDS, BATCH, WIDTH = (2, 4, 8) if SMOKE else (15, 128, 64)
STEPS = (2, 4) if SMOKE else (6, 12, 24, 48)
SETUPS = {         # design of the network -> settings of a solve, of ours and of torchdiffeq's
    "small": ({"method": "euler", "step_size": 1 / 6}, {"method": "euler", "options": {"step_size": 1 / 6}}),
    "chen": ({"method": "dopri5"}, {"method": "dopri5"})}
TOLERANCES = {"rtol": 1e-3, "atol": 1e-3}


class Theirs(nn.Module):
    "The ODE block of torchdiffeq's example, around our field."
    def __init__(self, f, odeint, options):
        super().__init__()
        self.f, self.odeint, self.options, self.t = f, odeint, options | TOLERANCES, torch.tensor([0., 1.])

    def forward(self, y): return self.odeint(self.f, y, self.t, **self.options)[1]


class Calls:
    "Counts the evaluations of a field."
    def __init__(self, net):
        self.n, fields = 0, [part.branch for part in net.body] if isinstance(net.body, nn.Sequential) else [net.body.f]
        for f in fields: f.register_forward_hook(self)

    def __call__(self, *_): self.n += 1


def field_with_weights(net):
    "The small design begins at f = 0, with which every solver is exact."
    torch.manual_seed(1)
    for conv in net.body.f.convs: nn.init.normal_(conv.weight, std=.05)
    return net


def measure_keeping():
    "A training step on images of CIFAR-10's size before and after `keep_memory`, which holds for all that follows."
    torch.manual_seed(0)
    net = ResNet(channels=3, blocks=1, width=WIDTH).to(memory_format=torch.channels_last)
    x, y, optimizer = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,)), torch.optim.SGD(net.parameters(), lr=0.)
    def milliseconds(): return spread(take_turns({"": lambda: training_step(net, optimizer, x, y)}, ROUNDS, time.process_time)[""])
    milliseconds()
    return {"given back": milliseconds(), "kept": milliseconds() if keep_memory() else None}


def networks(design):
    "name -> network. All but the ResNet have the same weights."
    torch.manual_seed(0)
    own, theirs = SETUPS[design]
    first = field_with_weights(ODENet(width=WIDTH, design=design, **own, **TOLERANCES))
    def change(body, *rest):
        net = copy.deepcopy(first)
        net.body = body(net.body.f, *rest)
        return net
    def ours(f, gradient): return ODEBlock(f, **own, **TOLERANCES, gradient=gradient)
    by = {"direct": torchdiffeq.odeint, "adjoint": torchdiffeq.odeint_adjoint}
    last = {"ResNet-6": ResNet(width=WIDTH, design=design)} | {
        f"ours, {gradient}": change(ours, gradient) for gradient in ("direct", "checkpoint", "adjoint")} | {
        f"torchdiffeq, {gradient}, channels last": change(Theirs, odeint, theirs) for gradient, odeint in by.items()}
    if "step_size" not in own:      # a black box, there and back
        last["ours, adjoint by SciPy"] = change(lambda f: ODEBlock(f, method=SciPy("RK45"), gradient="adjoint", **TOLERANCES))
    plain = {f"torchdiffeq, {gradient}": change(Theirs, odeint, theirs) for gradient, odeint in by.items()}
    return {name: net.to(memory_format=torch.channels_last) for name, net in last.items()} | plain


def training_step(net, optimizer, x, y):
    "Forward, backward, update."
    optimizer.zero_grad()
    cross_entropy(net(x), y).backward()
    optimizer.step()


def counted(net, x, y):
    "Evaluations of the field, forward and backward, and the gradient of all weights in one vector."
    calls = Calls(net)
    loss, forward = cross_entropy(net(x), y), calls.n
    loss.backward()
    return {"forward": forward, "backward": calls.n - forward}, torch.cat([p.grad.flatten() for p in net.parameters()])


def like(name): return "adjoint" if "adjoint" in name else "direct"


def error(design, net, x, y):
    "Relative error of the gradient: of what the network computes with fixed steps, of the flow where the steps are chosen."
    exact = copy.deepcopy(net).double()
    fine = SETUPS[design][0] | ({} if "step_size" in SETUPS[design][0] else {"rtol": 1e-7, "atol": 1e-7})
    exact.body = ODEBlock(exact.body.f, **fine, gradient="direct")
    (_, found), (_, truth) = counted(copy.deepcopy(net), x, y), counted(exact, x.double(), y)
    return ((found - truth).norm() / truth.norm()).item()


def check(rows):
    "Raise if a gradient of theirs is twice as wrong as ours of its kind, or half."
    for name, row in rows.items():
        if name.startswith("torchdiffeq") and not 1 / 2 <= row["error"] / rows[f"ours, {like(name)}"]["error"] <= 2:
            raise SystemExit(f"{name}: its gradient is off by {row['error']:.2g}, twice as much or half as much as ours")


def measure(design):
    "One table: a row for each network."
    nets, rows, programs = networks(design), {}, {}
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    for name, net in nets.items():
        rows[name] = {"evaluations": counted(copy.deepcopy(net), x, y)[0], "parameters": sum(p.numel() for p in net.parameters())}
        if name != "ResNet-6": rows[name]["error"] = error(design, net, x[:8], y[:8])
        rows[name]["bytes"] = peak_memory(lambda: cross_entropy(net(x), y).backward(), x.device)    # noqa: B023 (called here)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.)      # the work of an update, and always the same weights
        programs[name] = lambda net=net, optimizer=optimizer: training_step(net, optimizer, x, y)
    check(rows)
    seconds = take_turns(programs, ROUNDS, time.process_time)
    for name, row in rows.items():
        row["milliseconds"], row["ratio"] = spread(seconds[name]), compare(seconds["ResNet-6"], seconds[name])
        if name.startswith("ours"): row["faster"] = compare(seconds[name], seconds[f"torchdiffeq, {like(name)}"])
    return rows


def memory_of_depth():
    "Bytes of a training step as the steps grow in number, for each way to differentiate."
    x, y, found = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,)), {}
    ways = {"direct": "euler", "checkpoint": "euler", "reversible": "alf"}
    for gradient, method in ways.items():
        for steps in STEPS:
            net = field_with_weights(ODENet(width=WIDTH, method=method, step_size=1 / steps, gradient=gradient))
            bytes_ = peak_memory(lambda: cross_entropy(net(x), y).backward(), x.device)    # noqa: B023 (called here)
            found.setdefault(f"{gradient}, {method}", {})[str(steps)] = bytes_
    blocks = {str(n): peak_memory(lambda: cross_entropy(net(x), y).backward(), x.device)    # noqa: B023 (called here)
              for n in STEPS for net in [ResNet(width=WIDTH, blocks=n)]}
    return found | {"ResNet": blocks}


def measure_roots():
    "A pass through implicit steps, for each way to solve their equations, and through as many explicit ones."
    x, found = torch.randn(BATCH, 1, 28, 28), {}
    for name in ("implicit_euler", "implicit_midpoint"):
        for root in ("newton_krylov", "lbfgs"):
            net = field_with_weights(ODENet(width=WIDTH, method=Implicit(name, root=root), step_size=1 / 6, rtol=1e-2, atol=1e-2))
            calls, begun = Calls(net), time.process_time()
            with torch.no_grad(): net(x)
            found[f"{name}, {root}"] = {"evaluations": calls.n, "milliseconds": 1e3 * (time.process_time() - begun)}
    return found


def figure(tables, depth):
    "Times as bars, memory as lines."
    fig, axes = show.panel(x=["ms"] * len(tables) + ["steps or blocks"], title=[*tables, "memory of a step, MiB"],
                           columns=3, size=(8.4, 2.9))
    for ax, rows in zip(axes, tables.values()):
        times = [row["milliseconds"]["median"] for row in rows.values()]
        ax.barh(range(len(rows)), times, color=[show.PALETTE[not name.startswith("ours")] for name in rows])
        ax.set_yticks(range(len(rows)), list(rows), fontsize=6)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    for name, values in depth.items():
        axes[-1].loglog([int(n) for n in values], [v / 2**20 for v in values.values()], "o-", ms=3, lw=.9, label=name)
    axes[-1].legend(fontsize="xx-small")
    return fig


def main():
    keeping = measure_keeping()
    tables, depth, roots = {design: measure(design) for design in SETUPS}, memory_of_depth(), measure_roots()
    for design, rows in tables.items():
        print(f"\n{design}: {SETUPS[design][0]}")
        print(f"{'':38}{'ms':>8}{'ResNet-6 = 1':>14}{'torchdiffeq':>13}{'f calls':>12}{'MiB':>8}")
        for name, row in rows.items():
            calls, ms, ratio = row["evaluations"], row["milliseconds"]["median"], row["ratio"]["median"]
            faster = f"{row['faster']['median']:.2f}" if "faster" in row else ""
            print(f"{name:38}{ms:>8.1f}{ratio:>14.2f}{faster:>13}{calls['forward']:>7}+{calls['backward']:<4}"
                  f"{row['bytes'] / 2**20:>8.1f}")
    for name, values in depth.items(): print(f"{name:38}" + "".join(f"{v / 2**20:>9.1f}" for v in values.values()) + " MiB")
    for name, row in keeping.items(): print(f"{'ResNet-1, memory ' + name:38}{row['median'] if row else math.nan:>8.1f} ms")
    for name, row in roots.items(): print(f"{name:38}{row['milliseconds']:>8.1f} ms{row['evaluations']:>7} f calls")
    found = {"steps": tables, "memory": depth, "roots": roots, "keeping": keeping}
    save("images", {"rounds": ROUNDS, "batch": BATCH, "width": WIDTH}, found, [
         "Milliseconds of the processor; ratio: to ResNet-6; faster: than torchdiffeq's example with the same gradient, as its "
         "images lie. Medians and quartiles of the rounds' ratios.", "Bytes: tensors alive at once, beside the weights.",
         "roots: one pass forward through six implicit steps, tolerance 1e-2, with the same weights. keeping: "
         "a step on images of CIFAR-10's size, before and after `keep_memory`; all else is measured after."],
         draw=show.save, figures={"images": figure(tables, depth)})


if __name__ == "__main__": sys.exit(main())
