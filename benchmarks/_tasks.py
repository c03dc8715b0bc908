"""What the libraries of `peers.py` are to solve: mathematics, sizes and numbers, the same for all.

A field is written once, over the few operations `ops` that a library brings, so that every library computes the same
formula. Weights and starts come from NumPy and a seed. Nothing here imports torch or jax.
"""
import zlib
from dataclasses import dataclass, field

import numpy as np

# ------------------------------------------------------------------------------------------------------------- fields


def van_der_pol(ops, t, y, w):
    "x'' = mu (1 - x^2) x' - x, as two equations of first order."
    x, v = y[..., :1], y[..., 1:]
    return ops.cat([v, w["mu"] * (1 - x * x) * v - x], -1)


def mlp(ops, t, y, w):
    "The field of torchdiffeq's demo: tanh network on y cubed."
    return ops.linear(ops.tanh(ops.linear(y**3, w["w1"], w["b1"])), w["w2"], w["b2"])


def softplus_mlp(ops, t, y, w):
    "The field of diffrax's own benchmark."
    return ops.tanh(ops.linear(ops.softplus(ops.linear(y, w["w1"], w["b1"])), w["w2"], w["b2"]))


def members(ops, t, y, w):
    "One network of `mlp` for each entry of the first axis."
    return ops.members(lambda w, y: mlp(ops, t, y, w))(w, y)


def cnf(ops, t, y, w):
    "Continuous normalizing flow in the plane, weights from a network of time; the last number is minus the trace's integral."
    h = ops.tanh(ops.linear(t.reshape(1, 1), w["w1"], w["b1"]))
    p = ops.linear(ops.tanh(ops.linear(h, w["w2"], w["b2"])), w["w3"], w["b3"]).reshape(-1)
    n = p.shape[0] // 7
    inward, outward, gate = (p[2 * n * k:2 * n * (k + 1)].reshape(n, 2) for k in range(3))
    outward = outward * ops.sigmoid(gate) / n
    s = ops.tanh(ops.linear(y[:, :2], inward, p[6 * n:]))
    return ops.cat([s @ outward, (s * s - 1) @ (inward * outward).sum(-1).reshape(n, 1)], -1)


def convolution(ops, t, y, w):
    "The block of torchdiffeq's MNIST example: group norm, relu, convolution with time as a channel, twice, and a norm."
    for k in "12":
        y = ops.relu(ops.group_norm(y, w["n" + k], w["m" + k]))
        y = ops.conv(ops.cat([ops.ones_like(y[:, :1]) * t, y], 1), w["w" + k], w["b" + k])
    return ops.group_norm(y, w["n3"], w["m3"])


def lotka_volterra(ops, t, y, w):
    "Prey and predators."
    a, b = y[..., :1], y[..., 1:]
    return ops.cat([1.5 * a - a * b, a * b - 3 * b], -1)

# -------------------------------------------------------------------------------------------------------------- tasks


@dataclass
class Task:
    "One row of the table."
    about: str                 # in a few words
    f: object                  # field
    y0: np.ndarray
    t: np.ndarray              # start, outputs, end
    w: dict = field(default_factory=dict)
    method: str = "dopri5"     # or rk4, euler, stiff, kvaerno5
    rtol: float = 1e-7
    atol: float = 1e-9
    steps: int = 0             # equal ones, for rk4 and euler
    gradient: str = ""         # direct: of the steps as they were taken; adjoint: by the adjoint equation; "": none
    loss: str = "mean_abs"     # of one solve, by name
    each: bool = False         # every entry of the first axis has steps of its own
    single: object = None      # with each: the field of one entry, whose weights are those of its own
    agree: float = 1e-4        # by how much results may differ, relative to the largest number of each array


def seeded(name): return np.random.default_rng(zlib.crc32(name.encode()))


def dense(rng, *sizes, scale=None):
    "Weights and biases of linear layers: normal of this size with no bias, or uniform as PyTorch's own."
    w = {}
    for k, (n, m) in enumerate(zip(sizes, sizes[1:]), 1):
        bound = n ** -.5
        w[f"w{k}"] = rng.uniform(-bound, bound, (m, n)) if scale is None else scale * rng.standard_normal((m, n))
        w[f"b{k}"] = rng.uniform(-bound, bound, m) if scale is None else np.zeros(m)
    return {k: v.astype(np.float32) for k, v in w.items()}


def vdp_tasks(small):
    n = 8 if small else 256
    y0 = seeded("vdp").standard_normal((n, 2)).astype(np.float32)
    t = np.linspace(0, 2 if small else 10, 20 if small else 200).astype(np.float32)
    common = dict(f=van_der_pol, y0=y0, t=t, w={"mu": np.float32(2)}, rtol=1e-5, atol=1e-5, agree=2e-3)
    return {"vdp": Task(f"Van der Pol, {n} starts, {len(t)} outputs", **common),
            "vdp_each": Task(f"the same, own steps for each of {n}", **common, each=True, single=van_der_pol)}


def mlp_tasks(small):
    rng = seeded("mlp")
    n, hidden, end = (4, 8, 1) if small else (20, 50, 25)
    y0, w = rng.standard_normal((n, 2)).astype(np.float32), dense(rng, 2, hidden, 2, scale=.1)
    t = np.linspace(0, end, 10 * end if small else 1000).astype(np.float32)
    train = dict(f=mlp, y0=y0, t=t[:10], w=w)
    return {"mlp_forward": Task(f"MLP 2-{hidden}-2, batch {n}, to t={end}", mlp, y0, t[[0, -1]], w),
            "mlp_outputs": Task(f"the same, {len(t)} outputs", mlp, y0, t, w),
            "mlp_training": Task("MLP, training step", **train, gradient="direct"),
            "mlp_training_rk4": Task("MLP, training step, rk4", **train, method="rk4", steps=9, gradient="direct"),
            "mlp_training_adjoint": Task("MLP, training step, adjoint", **train, gradient="adjoint")}


def ensemble_tasks(small):
    rng = seeded("ensemble")
    m, n, hidden = (3, 4, 8) if small else (20, 20, 50)
    nets = [dense(rng, 2, hidden, 2, scale=.1) for _ in range(m)]
    w = {k: np.stack([net[k] for net in nets]) for k in nets[0]}
    y0 = np.broadcast_to(rng.standard_normal((n, 2)).astype(np.float32), (m, n, 2)).copy()
    t = np.linspace(0, 25, 1000).astype(np.float32)[:10]
    return {"ensemble_training": Task(f"{m} members, training step, own steps", members, y0, t, w, gradient="direct", each=True,
                                      single=mlp)}


def small_tasks(small):
    rng = seeded("small")
    n, end = (4, 2) if small else (64, 100)
    common = dict(f=softplus_mlp, w=dense(rng, 4, 32, 4), y0=rng.standard_normal((n, 4)).astype(np.float32),
                  t=np.array([0, end], np.float32), rtol=1e-6, atol=1e-6, loss="sum")
    return {"small_forward": Task(f"diffrax's small_neural_ode, batch {n}", **common),
            "small_training": Task("the same, with its gradient", **common, gradient="direct")}


def cnf_tasks(small):
    rng = seeded("cnf")
    n, width = (8, 4) if small else (512, 64)
    angle = rng.uniform(0, 2 * np.pi, n)
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1) + .1 * rng.standard_normal((n, 3)) * [1, 1, 0]
    return {"cnf_training": Task(f"flow, width {width}, batch {n}, training step", cnf, ring.astype(np.float32),
                                 np.array([10, 0], np.float32), dense(rng, 1, 32, 32, 7 * width), rtol=1e-5, atol=1e-5,
                                 gradient="direct", loss="likelihood", agree=1e-2)}


def conv_tasks(small):
    rng = seeded("conv")
    n, channels = (2, 8) if small else (128, 64)
    bound, w = (9 * channels + 9) ** -.5, {}
    for k in "12":
        w["w" + k] = rng.uniform(-bound, bound, (channels, channels + 1, 3, 3))
        w["b" + k] = rng.uniform(-bound, bound, channels)
    for k in "123": w |= {"n" + k: np.ones(channels), "m" + k: np.zeros(channels)}
    common = dict(f=convolution, y0=rng.standard_normal((n, channels, 6, 6)).astype(np.float32),
                  t=np.array([0, 1], np.float32), w={k: v.astype(np.float32) for k, v in w.items()}, loss="mean_square",
                  gradient="direct", rtol=1e-3, atol=1e-3)
    what = f"{channels}x6x6, batch {n}, training step"
    return {"conv_euler": Task(f"{what}, Euler", **common, method="euler", steps=6, agree=1e-3),
            "conv_rk4": Task(f"{what}, rk4", **common, method="rk4", steps=3, agree=1e-3),
            "conv_dopri5": Task(f"{what}, dopri5", **common, agree=2e-2)}


def stiff_tasks(small):
    n, mu, end = (4, (5, 7), 10) if small else (256, (80, 100), 100)      # at the end none is on one of its jumps
    common = dict(f=van_der_pol, y0=np.tile([2., 0.], (n, 1)), t=np.array([0., end]),
                  w={"mu": np.linspace(*mu, n)[:, None]}, rtol=1e-4, atol=1e-4, each=True, single=van_der_pol, agree=5e-2)
    return {"stiff": Task(f"{n} stiff oscillators, mu {mu[0]} to {mu[1]}, the best method of each", **common, method="stiff"),
            "stiff_kvaerno5": Task("the same, Kvaerno 5(4)", **common, method="kvaerno5")}


def long_tasks(small):
    end = 10. if small else 1000.
    return {"long_horizon": Task(f"Lotka-Volterra to t={end:g}", lotka_volterra, np.array([1., 1.]), np.array([0., end]),
                                 rtol=1e-6, atol=1e-6, agree=5e-2)}


def tasks(small=False):
    "name -> Task; small ones for a test."
    return {name: task for make in (vdp_tasks, mlp_tasks, ensemble_tasks, small_tasks, cnf_tasks, conv_tasks, stiff_tasks,
                                    long_tasks) for name, task in make(small).items()}
