"""The libraries on PyTorch: ours, ours compiled, torchdiffeq, torchode, and bare evaluations of the field."""
import inspect
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
OPS = SimpleNamespace(
    cat=torch.cat, tanh=torch.tanh, relu=torch.relu, sigmoid=torch.sigmoid, softplus=F.softplus, linear=F.linear,
    ones_like=torch.ones_like, members=torch.func.vmap, conv=lambda x, w, b: F.conv2d(x, w, b, padding=1),
    group_norm=lambda x, w, b: F.group_norm(x, min(32, x.shape[1]), w, b))
LOSSES = {"mean_abs": lambda y: y.abs().mean(), "sum": lambda y: y.sum(), "mean_square": lambda y: y[-1].square().mean(),
          "likelihood": lambda y: y[-1, :, :2].square().sum(-1).mean() / 2 + y[-1, :, 2].mean()}


class NotOffered(Exception):
    "The library has no such method; the text says what is missing."


class Field(nn.Module):
    "A field with its weights as parameters, which can count its evaluations and the steps that torchdiffeq tells."
    def __init__(self, formula, w, trained):
        super().__init__()
        self.formula, self.counts = formula, None
        for name, value in w.items(): self.register_parameter(name, nn.Parameter(torch.tensor(value), requires_grad=trained))

    def forward(self, t, y):
        if self.counts is not None: self.counts["evaluations"] += 1
        return self.formula(OPS, t, y, self._parameters)


class Counting(Field):
    "torchdiffeq's adaptive methods call these; only fields that are counted have them, so that no timed one does."
    def callback_accept_step(self, t, y, h): self.counts["accepted"] += 1
    def callback_reject_step(self, t, y, h): self.counts["rejected"] += 1


class Program:
    "A task in one of the libraries: `run` is what is timed."
    def __init__(self, task, solve, kind=Field):
        self.task, self.solve, self.kind = task, solve, kind
        self.y0, self.t = torch.tensor(task.y0), torch.tensor(task.t)
        self.fields = self.split(kind)

    def split(self, kind):
        "The fields that are to be solved: one."
        return [kind(self.task.f, self.task.w, bool(self.task.gradient))]

    def starts(self): return [self.y0]

    def forward(self, fields):
        "States at t, a list with one entry for each field."
        return [self.solve(f, y0, self.t) for f, y0 in zip(fields, self.starts())]

    def loss(self, ys):
        loss = LOSSES[self.task.loss]
        if len(ys) == 1 and self.task.each: return torch.func.vmap(loss, 1)(ys[0]).sum()
        return sum(map(loss, ys))

    def run(self, fields=None, at_loss=lambda: None):
        fields = fields or self.fields
        with nullcontext() if self.task.gradient else torch.no_grad(): ys = self.forward(fields)
        at_loss()
        if self.task.gradient:
            for f in fields:
                for p in f.parameters(): p.grad = None
            self.loss(ys).backward()
        return ys

    def results(self):
        "name -> array: the last state, and the gradients."
        ys = self.run()
        found = {"y": torch.stack([y[-1] for y in ys]).detach().numpy()}
        if self.task.gradient:
            for name in self.task.w: found[name] = torch.stack([getattr(f, name).grad for f in self.fields]).numpy()
        return found

    def counted(self):
        "Evaluations and steps of one run."
        fields, counts, cut = self.split(Counting), {"evaluations": 0, "accepted": 0, "rejected": 0}, {}
        for f in fields: f.counts = counts
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solver .* does not support callbacks")
            self.run(fields, lambda: cut.update(counts))
        if self.task.steps or self.task.method == "stiff": cut.update(accepted=self.task.steps or None, rejected=None)
        return {**cut, "backward": counts["evaluations"] - cut["evaluations"]}


class OneByOne(Program):
    "A loop over the entries of the first axis, for a library that cannot give them steps of their own."
    def split(self, kind):
        own = lambda i: {k: v[i] if v.ndim else v for k, v in self.task.w.items()}
        return [kind(self.task.single, own(i), bool(self.task.gradient)) for i in range(len(self.task.y0))]

    def starts(self): return self.y0.unbind()


# --------------------------------------------------------------------------------------------------------------- ours


class Ours(Program):
    "`solve`; what it counts itself."
    def counted(self):
        counts = {}
        solve, self.solve = self.solve, lambda f, y0, t: counts.setdefault("found", solve(f, y0, t, whole=True)).y
        try: self.run()
        finally: self.solve = solve
        stats = counts["found"].stats
        number = lambda x: int(torch.as_tensor(x).max())
        return {"evaluations": number(stats.f_evals), "accepted": number(stats.accepted), "rejected": number(stats.rejected),
                "backward": number(stats.backward_f_evals)}


def ours(task, **more):
    "Our library as it is."
    import neuralode_nb
    options = {"rtol": task.rtol, "atol": task.atol, "gradient": task.gradient or "direct", **more}
    if task.steps: options["step_size"] = float(abs(task.t[-1] - task.t[0])) / task.steps
    if task.each: options["batch"] = "sample"
    method = {"stiff": "rodas5p"}.get(task.method, task.method)

    def solve(f, y0, t, whole=False):
        found = neuralode_nb.solve(f, y0, t, method, **options)
        return found if whole else found.y
    return Ours(task, solve)


def compiled(task):
    "Our library, the whole loop compiled."
    if task.method in ("stiff", "kvaerno5"): raise NotOffered("compile=True has explicit methods only")
    return ours(task, compile=True)


def ready_to_compile():
    "Load the compiler and let it prepare its headers, by a program that nobody measures. Raises ImportError without compile=True."
    import neuralode_nb
    if "compile" not in inspect.signature(neuralode_nb.solve).parameters: raise ImportError("solve has no argument compile")
    neuralode_nb.solve(lambda t, y: -y, torch.ones(2), [0., 1.], "euler", step_size=.5, compile=True)

# -------------------------------------------------------------------------------------------------------------- peers


def torchdiffeq(task):
    "Steps for all together; entries with steps of their own one after another, stiff ones by SciPy."
    import torchdiffeq
    odeint = torchdiffeq.odeint_adjoint if task.gradient == "adjoint" else torchdiffeq.odeint
    if task.method == "kvaerno5": raise NotOffered("no such method")
    if task.each and task.single is task.f and task.method == "dopri5": raise NotOffered("one step for all samples only")
    options = {"method": task.method, "rtol": task.rtol, "atol": task.atol}
    if task.method == "stiff": options |= {"method": "scipy_solver", "options": {"solver": "LSODA"}}
    if task.steps: options["options"] = {"step_size": float(abs(task.t[-1] - task.t[0])) / task.steps}
    return (OneByOne if task.each else Program)(task, lambda f, y0, t: odeint(f, y0, t, **options))


class Shaped(nn.Module):
    "torchode's view of a field: rows in, rows out; one row if all are to take the same steps."
    def __init__(self, f, shape, each): super().__init__(); self.f, self.shape, self.each = f, shape, each
    def forward(self, t, y): return self.f(t if self.each else t[0], y.view(self.shape)).reshape(y.shape)


class Torchode(Program):
    "Also counts steps: torchode keeps them with the solution."
    def counted(self):
        counts = super().counted()
        stats = self.latest.stats
        accepted = int(stats["n_accepted"].max())
        return counts | {"accepted": accepted, "rejected": int(stats["n_steps"].max()) - accepted}


def torchode(task):
    "One row of its batch is what has steps of its own."
    import torchode
    methods = {"dopri5": torchode.Dopri5, "euler": torchode.Euler}
    if task.method not in methods: raise NotOffered("no such method")
    rows = len(task.y0) if task.each else 1

    def solve(f, y0, t):
        term = torchode.ODETerm(Shaped(f, y0.shape, task.each))
        method = methods[task.method](term=term)
        if task.steps: controller = torchode.FixedStepController()
        else: controller = torchode.IntegralController(atol=task.atol, rtol=task.rtol, term=term)
        if task.gradient == "adjoint": loop = torchode.JointBacksolveAdjoint(term, method, controller)
        else: loop = torchode.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False)
        times, dt = t.expand(rows, -1), ((t[-1] - t[0]) / task.steps).expand(rows) if task.steps else None
        ends = {"t_eval": times} if len(t) > 2 else {"t_start": times[:, 0], "t_end": times[:, 1]}
        found = program.latest = loop.solve(torchode.InitialValueProblem(y0.reshape(rows, -1), **ends), dt0=dt)
        assert (found.status == 0).all(), found.status
        return found.ys.reshape(rows, -1, y0.numel() // rows).transpose(0, 1).reshape(-1, *y0.shape)
    program = Torchode(task, solve)
    return program

# -------------------------------------------------------------------------------------------------------------- floor


class Floor(Program):
    "As many evaluations of the field as ours takes, with their gradients if there are any, and nothing else."
    def __init__(self, task, evaluations, backward):
        super().__init__(task, None)
        self.n, self.m, self.f = evaluations, backward, self.fields[0]
        self.t = self.t[0].expand(len(self.y0), *[1] * (self.y0.ndim - 1)) if task.each else self.t[0]

    def run(self):
        f, t, n = self.f, self.t, self.n
        with nullcontext() if self.task.gradient == "direct" else torch.no_grad():
            y0 = self.y0.clone().requires_grad_(self.task.gradient == "direct")
            ks = [f(t, y0) for _ in range(n)]
        if self.task.gradient == "direct":
            for p in f.parameters(): p.grad = None
            torch.autograd.backward(ks, [self.y0] * n)
        for _ in range(self.m):
            y0 = self.y0.clone().requires_grad_()
            torch.autograd.grad(f(t, y0), [y0, *f.parameters()], self.y0)

    def results(self): self.run(); return {}
    def counted(self): return {"evaluations": self.n, "backward": self.m}


def floor(task, evaluations, backward): return Floor(task, evaluations, backward)


def versions(library):
    "Of what the numbers of this library depend on. Raises ImportError if it is not there."
    found = {"torch": torch.__version__}
    if library in ("ours", "compiled"):
        import neuralode_nb
        found["neuralode_nb"] = neuralode_nb.__version__
    elif library != "floor":
        found[library] = __import__(library).__version__
    return found
