"""Ours, torchdiffeq, torchode and diffrax side by side: the same solves, one process per library, taking turns.

    python benchmarks/peers.py [TASK ...] [--smoke] [--rounds N] [--resume] [--python LIBRARY=INTERPRETER]

Every library has one process and one thread. Before anything is timed, all must agree on the states and gradients to
the tolerance of the task; a library that does not is not timed, and the command fails in the end. In a round each
library has one turn, another one first every time: one call, or as many as fit into 50 ms, as a call right after another
process has run is not the one of a training loop. A library stops after --seconds of turns (three turns at least).
The floor is the time of as many bare evaluations of the field as ours takes, forward, and backward in training steps.

A library that is missing is left out. `pip install -e ".[bench]"` brings all of them into one environment. One may also live in
an environment of its own, whose interpreter is given by --python diffrax=..., or by the variable
NEURALODE_BENCH_DIFFRAX_PYTHON:

    uv venv jax && uv pip install --python jax/bin/python diffrax equinox
    python benchmarks/peers.py --python diffrax=jax/bin/python

The record results/peers/full.json is written after each task. --resume goes on: tasks that are there stay, and tasks
that are named are measured again, in the place of what was there. Without --resume, tasks that are named make the record
custom.json.
"""
import argparse
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from _report import LABELS, figure, table
from _tasks import tasks
from _turns import SMOKE, compare, save, spread

from neuralode_nb import show
from neuralode_nb.lab.record import commit, load_record
from neuralode_nb.lab.settings import nearest

INSTALL = {"torchdiffeq": "pip install torchdiffeq", "torchode": "pip install torchode",
           "diffrax": "pip install diffrax, or see the head of benchmarks/peers.py",
           "compiled": "this version has no solve(..., compile=True)"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NPROC": "1", "JAX_PLATFORMS": "cpu",
              "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ("vdp", "mlp_training", "ensemble_training", "conv_euler")       # what --smoke does if no task is named
NOTES = [
    "One process per library, one thread each, turns in rounds. Milliseconds: median and quartiles; ratio: median of the "
    "rounds' ratios to ours, above one is slower than ours. The same of the processor, which tells the truth on a busy machine.",
    "first: seconds of the first run, in which code is traced and compiled; the compiler itself has been loaded before. again: "
    "of ours, compiled, the same in another process, which finds on disk what the first one made. megabytes: by how much one run "
    "raises the memory of its process.",
    "evaluations of f: forward; backward: those that only a gradient needs. Steps and evaluations of solves in which each "
    "sample has steps of its own are those of the sample with the most; of loops over samples, the sum. diffrax counts its "
    "steps; its evaluations are counted in a copy of the forward program that calls back, and backward they are not counted.",
    "floor: as many bare evaluations of the field as ours takes, with their gradients in training steps, and nothing else. "
    "Jacobians and linear solves of stiff methods are above it.",
    "torchode takes the same steps for all samples where the others do: its batch has one row then. It does not "
    "differentiate through the step size. diffrax has max_steps=1024 for direct gradients, and the 3/8 rule for rk4. Its "
    "convolutions are slow because XLA, on a processor, has no fast convolution inside a loop.",
    "deviation: relative difference of states and gradients from ours, the larger of the two; `agree` is the bound."]


def interpreter(library, given):
    "Of the process of a library: as given, as the environment says, or this one."
    return given.get(library) or os.environ.get(f"NEURALODE_BENCH_{library.upper()}_PYTHON") or sys.executable


class Worker:
    "A library in a process of its own, with torch's compiled code in the folder `cache`."
    def __init__(self, library, python, cache):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("_worker.py")), library], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env=os.environ | ONE_THREAD | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}, text=True)
        self.library, self.python, self.cache = library, python, cache

    def answer(self, seconds=900.):
        "The next line it says. Raises RuntimeError if it does not, with the end of what it wrote to stderr."
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if ready.select(seconds) else ""
        if line: return json.loads(line)
        self.errors.seek(0)
        said = self.errors.read()[-2000:]
        self.close()
        raise RuntimeError(f"{self.library} did not answer within {seconds:g} s or died:\n{said}")

    def ask(self, do, **rest):
        try: print(json.dumps({"do": do, **rest}), file=self.process.stdin, flush=True)
        except BrokenPipeError: pass
        return self.answer()

    def close(self):
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdout, self.process.stdin, self.errors):
            with suppress(OSError): file.close()


def start(libraries, given, cache):
    "library -> Worker, and versions; those that are missing are named."
    started, workers, versions = {k: Worker(k, interpreter(k, given), cache) for k in libraries}, {}, {}
    for library, worker in started.items():
        said = worker.answer()
        if "absent" in said:
            print(f"{library} is left out ({said['absent']}): {INSTALL.get(library, 'install it')}")
            worker.close()
        else: workers[library], versions = worker, versions | said["versions"]
    return workers, versions


def deviation(results, ours):
    "Relative difference from ours: the larger of that of the states and that of all gradients together."
    def apart(names):
        pairs = [pair for name in names for pair in zip(results[name], ours[name])]
        return math.dist(*zip(*pairs)) / max(math.hypot(*(b for _, b in pairs)), 1e-300) if pairs else 0.
    found = {"the states": apart(["y"]), "the gradients": apart([k for k in ours if k != "y"])}
    where = max(found, key=lambda k: math.inf if math.isnan(found[k]) else found[k])
    return found[where], where


def prepare(name, task, workers):
    "(library -> what it found, those left out, failures): all agree with ours, or are not timed."
    found, left, failures, ours = {}, {}, [], None
    for library, worker in workers.items():
        options = {}
        if library == "floor":
            if ours is None: continue
            options = {"evaluations": ours["evaluations"], "backward": ours["backward"]}
        said = worker.ask("prepare", task=name, small=SMOKE, options=options)
        if library == "ours": ours = said if "results" in said else None
        results = said.pop("results", None)
        if results and ours and library not in ("ours", "floor"):
            said["deviation"], where = deviation(results, ours["kept"])
            if not said["deviation"] <= task.agree:
                said = {"error": f"disagrees with ours in {where} by {said['deviation']:.2g}, allowed are {task.agree:g}"}
        elif library == "ours" and results: ours["kept"] = results
        if "missing" in said: left[library] = said["missing"]
        elif "error" in said:
            failures.append({"label": name, "seed": 0, "error": library, "message": said["error"], "epoch": None, "batch": None})
            left[library] = "failed: " + said["error"]
            print(f"FAILED: {name}, {library}: {said['error']}", flush=True)
        else: found[library] = said
    if ours: ours.pop("kept", None)
    return found, left, failures


def again(name, worker):
    "Seconds of the first run in another process that has the same caches."
    twin = Worker(worker.library, worker.python, worker.cache)
    try: return twin.answer() and twin.ask("prepare", task=name, small=SMOKE).get("first")
    finally: twin.close()


def take_turns(workers, names, rounds, seconds):
    "library -> seconds of its turns on the clock, and the same of the processor."
    clock, processor = {name: [] for name in names}, {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            if sum(clock[name]) > seconds and r > 2: continue
            said = workers[name].ask("turn")
            if "error" in said: raise RuntimeError(f"{name}: {said['error']}")
            clock[name].append(said["seconds"])
            processor[name].append(said["processor"])
    return clock, processor


def measure(name, task, workers, settings):
    "One task: a row for each library."
    found, left, failures = prepare(name, task, workers)
    if not found: return None, failures
    clock, processor = take_turns(workers, list(found), settings["rounds"], settings["seconds"])
    if "compiled" in found: found["compiled"]["again"] = again(name, workers["compiled"])
    for library, row in found.items():
        row["milliseconds"], row["turns"] = spread(clock[library]), len(clock[library])
        row["processor"] = sum(processor[library]) / sum(clock[library])
        row["processor milliseconds"] = spread(processor[library])
        if "ours" in clock: row["ratio"] = compare(clock["ours"], clock[library])
    return {"about": task.about, "libraries": found, "left out": left, "settings": settings, "agree": task.agree,
            "code": commit(), "when": datetime.now(timezone.utc).isoformat(timespec="seconds")}, failures


def parsed():
    "The options; raises SystemExit with one line."
    known, parser = tasks(SMOKE), argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(known))
    parser.add_argument("--smoke", action="store_true", help="small sizes, for a test")
    parser.add_argument("--rounds", type=int, default=3 if SMOKE else 25, help="turns of each library")
    parser.add_argument("--seconds", type=float, default=1. if SMOKE else 10., help="of turns, after which a library stops")
    parser.add_argument("--resume", action="store_true", help="keep the tasks of the record, but for those named")
    parser.add_argument("--libraries", help="some of " + ", ".join(LABELS) + ", with commas")
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=INTERPRETER", help="of that library")
    options = parser.parse_args()
    for name in options.tasks:
        if name not in known: parser.error(f"{name!r} is no task{nearest(name, list(known))}")
    chosen = options.libraries.split(",") if options.libraries else [k for k in LABELS if not (SMOKE and k == "compiled")]
    for name in [*chosen, *(p.partition("=")[0] for p in options.python)]:
        if name not in LABELS: parser.error(f"{name!r} is no library{nearest(name, list(LABELS))}")
    if options.rounds < 2: parser.error(f"--rounds {options.rounds}: quartiles need two at least")
    options.libraries = [k for k in LABELS if k in chosen or k == "ours"] + ["floor"]      # ours first: all must agree with it
    options.python = dict(p.split("=", 1) for p in options.python)
    return options, known


def earlier(options, profile, settings):
    "What a record of the same settings has. Raises ValueError if other settings would stand beside these."
    try: record = load_record("peers", profile)
    except FileNotFoundError: return {}, [], {}
    if other := [v["settings"] for k, v in record.data.items() if k not in options.tasks and v["settings"] != settings]:
        raise ValueError(f"--resume: the record was measured with {other[0]}, not {settings}, and would be lost: give the same "
                         "--rounds and --seconds, or leave --resume out to begin anew")
    return record.data, record.failures, record.versions


def main():
    options, known = parsed()
    profile = "smoke" if SMOKE else "full" if options.resume or not options.tasks else "custom"
    settings = {"rounds": options.rounds, "seconds": options.seconds}
    data, failures, old = earlier(options, profile, settings) if options.resume else ({}, [], {})
    command = "python benchmarks/peers.py" + " --smoke" * SMOKE + f" --rounds {options.rounds} --seconds {options.seconds:g}"
    command = " ".join([command, *(options.tasks if profile == "custom" else ()), *(f"--python {k}=..." for k in options.python)])
    wanted, begun = options.tasks or [k for k in (SMALL if SMOKE else known) if k not in data], time.perf_counter()
    cache = tempfile.TemporaryDirectory()
    workers, versions = start(options.libraries, options.python, cache.name)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        for name in wanted:
            row, failed = measure(name, known[name], workers, settings)
            failures = [f for f in failures if f["label"] != name] + failed
            data = {k: v for k in known for v in [row if k == name else data.get(k)] if v}      # in their order
            if row: print(f"\n{known[name].about}\n{table({name: row})}", flush=True)
            if data: save("peers", settings, data, NOTES, old | versions, show.save, profile=profile, command=command,
                          started=started, seconds=time.perf_counter() - begun, failures=failures,
                          figures={"times": figure(data)})
    finally:
        for worker in workers.values(): worker.close()
        cache.cleanup()
    busy = [k for k, v in data.items() if any(row["processor"] < .85 for row in v["libraries"].values())]
    if busy: print(f"The machine was not quiet in {', '.join(busy)}: a process had less than 85 % of a processor.")
    if failures: raise SystemExit(f"{len(failures)} failed: " + "; ".join(f"{f['label']}, {f['error']}" for f in failures))


if __name__ == "__main__": main()
