"""diffrax, as its documentation says: everything in one compiled function, arrays in and arrays out."""
from types import SimpleNamespace

import diffrax
import equinox
import jax
import jax.numpy as jnp
import numpy as np


def group_norm(x, w, b):
    groups = min(32, x.shape[1])
    parts = x.reshape(x.shape[0], groups, -1)
    mean, square = parts.mean(-1, keepdims=True), (parts * parts).mean(-1, keepdims=True)
    parts = (parts - mean) * jax.lax.rsqrt(square - mean * mean + 1e-5)
    return parts.reshape(x.shape) * w[:, None, None] + b[:, None, None]


def conv(x, w, b): return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME") + b[:, None, None]


OPS = SimpleNamespace(
    cat=jnp.concatenate, tanh=jnp.tanh, relu=jax.nn.relu, sigmoid=jax.nn.sigmoid, softplus=jax.nn.softplus,
    linear=lambda x, w, b: x @ w.T + b, ones_like=jnp.ones_like, members=jax.vmap, conv=conv, group_norm=group_norm)
LOSSES = {"mean_abs": lambda y: jnp.abs(y).mean(), "sum": lambda y: y.sum(), "mean_square": lambda y: (y[-1]**2).mean(),
          "likelihood": lambda y: (y[-1, :, :2]**2).sum(-1).mean() / 2 + y[-1, :, 2].mean()}


class Kutta(diffrax.AbstractERK):
    "The 3/8 rule, which is torchdiffeq's rk4; diffrax has no method of order four with fixed steps."
    tableau = diffrax.ButcherTableau(
        c=np.array([1/3, 2/3, 1]), b_sol=np.array([1/8, 3/8, 3/8, 1/8]), b_error=np.zeros(4),
        a_lower=(np.array([1/3]), np.array([-1/3, 1]), np.array([1., -1, 1])))
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms): return 4


SOLVERS = {"dopri5": diffrax.Dopri5, "rk4": Kutta, "euler": diffrax.Euler, "stiff": diffrax.Kvaerno5, "kvaerno5": diffrax.Kvaerno5}


class Program:
    "A task as one compiled function."
    def __init__(self, task):
        jax.config.update("jax_enable_x64", task.y0.dtype == np.float64)
        self.task, self.calls = task, 0
        self.w, self.y0, self.t = jax.tree.map(jnp.asarray, (task.w, task.y0, task.t))
        self.work = jax.jit(self.gradient(task.f if not task.each else task.single) if task.gradient else
                            self.forward(task.f if not task.each else task.single))

    def forward(self, f):
        "(w, y0) -> states at t, counts of steps."
        task, t = self.task, self.t
        if task.steps: control = diffrax.StepTo(jnp.linspace(t[0], t[-1], task.steps + 1))
        else: control = diffrax.PIDController(rtol=task.rtol, atol=task.atol)
        kinds = {"direct": {"max_steps": 1024}, "adjoint": {"adjoint": diffrax.BacksolveAdjoint()}, "": {"max_steps": 100_000}}

        def solve(w, y0):
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, w: f(OPS, t, y, w)), SOLVERS[task.method](), t[0], t[-1], None, y0, w,
                saveat=diffrax.SaveAt(ts=t) if len(t) > 2 else diffrax.SaveAt(t1=True), stepsize_controller=control,
                **kinds[task.gradient])
            return found.ys, (found.stats["num_accepted_steps"], found.stats["num_rejected_steps"])
        if not task.each: return solve
        return jax.vmap(solve, in_axes=({k: 0 if v.ndim else None for k, v in self.w.items()}, 0), out_axes=(1, 0))

    def gradient(self, f):
        "(w, y0) -> gradients, states, counts."
        forward, loss = self.forward(f), LOSSES[self.task.loss]

        def total(w, y0):
            ys, counts = forward(w, y0)
            return jax.vmap(loss, 1)(ys).sum() if self.task.each else loss(ys), (ys, counts)
        return lambda w, y0: (lambda g, aux: (aux[0], aux[1], g))(*jax.grad(total, has_aux=True)(w, y0))

    def run(self): return jax.block_until_ready(self.work(self.w, self.y0))

    def results(self):
        ys, self.steps, *gradients = self.run()
        found = {"y": ys[-1]} | (gradients[0] if gradients else {})
        return {k: np.asarray(v) for k, v in found.items()}

    def counted(self):
        "Steps as diffrax counts them; evaluations by a call back to Python from a copy of the program."
        tell, n = lambda: setattr(self, "calls", self.calls + 1), len(self.y0) if self.task.each else 1
        f = self.task.single if self.task.each else self.task.f

        def told(ops, t, y, w):
            jax.debug.callback(lambda *_: tell(), t)
            return f(ops, t, y, w)

        def calls(program):
            self.calls = 0
            jax.block_until_ready(jax.jit(program)(self.w, self.y0))
            jax.effects_barrier()
            return round(self.calls / n)
        evaluations = calls(self.forward(told))
        accepted, rejected = (int(np.max(x)) for x in self.steps)
        return {"evaluations": evaluations, "accepted": accepted, "rejected": rejected}


def diffrax_program(task): return Program(task)


def versions(library):
    "Of what the numbers depend on."
    import jaxlib
    return {"diffrax": diffrax.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__,
            "equinox": equinox.__version__}
