"""Evaluations of f and errors beside torchdiffeq: the same problems, methods and tolerances.

python benchmarks/work.py [--smoke]. The error is the largest deviation from the known answer in units of
tol (1 + |y|): at the end of the span, and at a hundred times along it where the solution is known as a function.
"""
import torch
import torchdiffeq
from _turns import SMOKE, save

import neuralode_nb
from neuralode_nb.ode.detest import DETEST
from neuralode_nb.ode.problems import PROBLEMS

LIBRARIES = {"ours": neuralode_nb.odeint, "theirs": torchdiffeq.odeint}
LONG = {"arenstorf", "pleiades", "C4", "D4", "D5"}     # minutes with a method of low order at a tight tolerance
GOALS = {"bosh3": [1e-3, 1e-6], "dopri5": [1e-3, 1e-6, 1e-9], "dopri8": [1e-3, 1e-6, 1e-9]}


def solve(odeint, problem, method, tol):
    "Evaluations, error at the end, error along the way (None if the solution is not known there)."
    calls = [0]
    def f(t, y): calls[0] += 1; return problem.f(t, y)
    t = torch.linspace(*problem.span, 100, dtype=torch.float64)
    y = odeint(f, problem.y0, t, method=method, rtol=tol, atol=tol)
    units = lambda y, exact: float(f"{((y - exact).abs() / (tol + tol * exact.abs())).max():.3g}")
    along = None if problem.exact is None else units(y, problem.exact(t).view_as(y))
    return {"evaluations": calls[0], "end": units(y[-1], problem.final), "along": along}


@torch.no_grad()
def main():
    problems = {name: p for name, p in (PROBLEMS | DETEST).items() if name not in LONG}
    if SMOKE: problems = dict(list(problems.items())[:4])
    found = {}
    print(f"{'':16}{'evaluations':>24}{'median error, end':>24}{'median error, along':>24}")
    print(f"{'':16}" + f"{'ours':>12}{'theirs':>12}" * 3)
    for method, goals in GOALS.items():
        for tol in goals:
            rows = found[f"{method}, {tol:g}"] = {
                name: {who: solve(odeint, p, method, tol) for who, odeint in LIBRARIES.items()} for name, p in problems.items()}
            cells = []
            for what in ("evaluations", "end", "along"):
                for who in LIBRARIES:
                    values = sorted(row[who][what] for row in rows.values() if row[who][what] is not None)
                    cells.append(f"{sum(values):>12}" if what == "evaluations" else f"{values[len(values) // 2]:>12.2g}")
            print(f"{method + f', {tol:g}':16}" + "".join(cells), flush=True)
    save("work", {"tolerances": {m: [f"{g:g}" for g in goals] for m, goals in GOALS.items()}}, found,
         ["Errors in units of tol (1 + |y|). Sums of evaluations and medians of errors over the problems."])


if __name__ == "__main__": main()
