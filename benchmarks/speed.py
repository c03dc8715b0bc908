"""Time and evaluations of f beside torchdiffeq: the same solves, taking turns in one process.

python benchmarks/speed.py [--smoke]. The floor is the time of as many evaluations of f as the solve takes, and
nothing else; a solver cannot be faster.
"""
import torch
import torchdiffeq
from _turns import SMOKE, compare, save, spread, take_turns
from torch import nn

import neuralode_nb

ROUNDS = 3 if SMOKE else 25


class Spiral(nn.Module):
    "The field of torchdiffeq's demo: 2-50-2 on y cubed."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for layer in self.net[::2]: nn.init.normal_(layer.weight, std=.1); nn.init.zeros_(layer.bias)

    def forward(self, t, y): return self.net(y**3)


class Convolution(nn.Module):
    "The block of torchdiffeq's MNIST example, narrower: time as a channel, group norm."
    def __init__(self, n=16):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, n) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(n + 1, n, 3, padding=1) for _ in range(2))

    def forward(self, t, y):
        for norm, conv in zip(self.norms, self.convs):
            y = torch.relu(norm(y))
            y = conv(torch.cat([torch.ones_like(y[:, :1]) * t, y], 1))
        return self.norms[2](y)


def solve_only(odeint, f, y0, t, options):
    "The states at t, without a graph."
    with torch.no_grad(): return odeint(f, y0, t, **options)


def training_step(odeint, f, y0, t, options):
    "A solve, a loss and its gradient."
    for p in f.parameters(): p.grad = None
    odeint(f, y0, t, **options).abs().mean().backward()


def checkpoint(f, y0, t, rtol=1e-7, atol=1e-9, method="dopri5"):
    "Our default gradient, with torchdiffeq's default tolerances."
    return neuralode_nb.solve(f, y0, t, method, rtol=rtol, atol=atol, gradient="checkpoint").y


def tasks():
    "name -> (what to do, our function, theirs, field, start, times, options)"
    torch.manual_seed(0)
    spiral, y0, t = Spiral(), torch.randn(20, 2), torch.linspace(0, 25, 1000)
    block, image = Convolution(), torch.randn(8, 16, 14, 14)
    dopri5, rk4 = {"method": "dopri5"}, {"method": "rk4", "options": {"step_size": .25}}
    loose, unit = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}, torch.tensor([0., 1.])
    direct, adjoint = ((getattr(neuralode_nb, n), getattr(torchdiffeq, n)) for n in ("odeint", "odeint_adjoint"))
    against = checkpoint, torchdiffeq.odeint
    return {
        "spiral, solve": (solve_only, *direct, spiral, y0, t, dopri5),
        "spiral, training step, direct": (training_step, *direct, spiral, y0, t[:10], dopri5),
        "spiral, training step, adjoint": (training_step, *adjoint, spiral, y0, t[:10], dopri5),
        "spiral, training step, checkpoint against direct": (training_step, *against, spiral, y0, t[:10], dopri5),
        "spiral, solve, rk4": (solve_only, *direct, spiral, y0, t[::999], rk4),
        "convolution, solve": (solve_only, *direct, block, image, unit, loose),
        "convolution, training step, direct": (training_step, *direct, block, image, unit, loose),
        "convolution, training step, adjoint": (training_step, *adjoint, block, image, unit, loose),
    }


def evaluations(task, odeint, f, y0, t, options):
    "How often f is called; f(t0, y0) that only a gradient needs is part of it."
    counted = Spy(f)
    task(odeint, counted, y0, t, options)
    return counted.n


class Spy(nn.Module):
    "A field that counts its evaluations."
    def __init__(self, f): super().__init__(); self.f, self.n = f, 0
    def forward(self, t, y): self.n += 1; return self.f(t, y)


def measure(task, ours, theirs, f, y0, t, options):
    "One row of the table."
    nfe = {"ours": evaluations(task, ours, f, y0, t, options), "theirs": evaluations(task, theirs, f, y0, t, options)}
    def bare():
        with torch.no_grad():
            for _ in range(nfe["ours"]): f(t[0], y0)
    programs = {"ours": lambda: task(ours, f, y0, t, options), "theirs": lambda: task(theirs, f, y0, t, options)}
    seconds = take_turns(programs | ({"floor": bare} if task is solve_only else {}), ROUNDS)
    row = {"evaluations": nfe, "milliseconds": {name: spread(s) for name, s in seconds.items()},
           "faster": compare(seconds["ours"], seconds["theirs"])}
    if "floor" in seconds: row["above the floor"] = {
        "ours": compare(seconds["floor"], seconds["ours"]), "theirs": compare(seconds["floor"], seconds["theirs"])}
    return row


def main():
    found = {}
    print(f"{'':50}{'ours':>18}{'torchdiffeq':>18}{'faster':>18}{'f calls':>12}{'floor':>14}")
    for name, task in tasks().items():
        row = found[name] = measure(*task)
        ms, nfe, x = row["milliseconds"], row["evaluations"], row["faster"]
        cells = [f"{ms[k]['median']:.1f} ({ms[k]['low']:.1f}-{ms[k]['high']:.1f})" for k in ("ours", "theirs")]
        floor = row.get("above the floor")
        print(f"{name:50}{cells[0]:>18}{cells[1]:>18}{x['median']:>7.2f} ({x['low']:.2f}-{x['high']:.2f})"
              f"{nfe['ours']:>6}/{nfe['theirs']:<5}"
              + (f"{floor['ours']['median']:>6.2f}/{floor['theirs']['median']:.2f}" if floor else ""), flush=True)
    save("speed", {"rounds": ROUNDS}, found, ["Milliseconds: median (quartiles). Faster: median of the rounds' ratios.",
         "Floor: time of the solve over the time of as many evaluations of f and nothing else, ours/theirs."])


if __name__ == "__main__": main()
