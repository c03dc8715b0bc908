"""Where the time of a solve goes: samples of the running program, once a millisecond of the processor.

python benchmarks/shares.py [TASK ...] [--smoke]. The tasks are those of `peers.py`, solved by our library as it is. A sample
is the time since the one before, and belongs to the innermost of our functions that was running; an operation of
PyTorch belongs to the function that called it. Beside it stands the time of as many bare evaluations of the field.
"""
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from _tasks import tasks
from _turns import SMOKE, save, spread
from _with_torch import floor, ours

from neuralode_nb import show

SECONDS = .3 if SMOKE else 3.
CHOSEN = ("vdp", "mlp_forward", "mlp_outputs", "mlp_training", "mlp_training_adjoint", "ensemble_training", "cnf_training",
          "conv_dopri5", "stiff")
PARTS = {  # part -> (module, function), in the order of the figure; no function: all others of the module
    "evaluations of f": {("_with_torch", "forward"), ("_tasks", None)},
    "sums of stages": {("explicit", None), ("tableau", None)},
    "error norm and host read": {
        ("explicit", "error"), ("steps", "judge"), ("steps", "allow"), ("base", "rms_norm"), ("base", "max_norm"), ("base", "host"),
        ("batch", "<lambda>"), ("sample", "judge")},
    "controller": {("control", None)},
    "output": {("dense", None), ("loop", "take"), ("loop", "flush"), ("loop", "finish"), ("loop", "read_off"), ("loop", "at_end"),
               ("sample", "take"), ("sample", "passed"), ("sample", "store"), ("sample", "wait"), ("sample", "flush"),
               ("sample", "observed"), ("sample", "polynomial")},
    "Jacobians and linear solves": {(name, None) for name in ("linearize", "rosenbrock", "implicit", "root_finders", "roots",
                                                              "stage_roots", "rosenbrock_methods")},
    "loop and bookkeeping": set(),
    "autograd, backward": {("graph", "_engine_run_backward"), ("_tensor", "backward")},
}
PLACES = {place: part for part, places in PARTS.items() for place in places}


def inside(frame, part):
    "Was this called by a function of that part?"
    while frame is not None:
        if PLACES.get((Path(frame.f_code.co_filename).stem, None)) == part: return True
        frame = frame.f_back
    return False


def part_of(frame):
    "The part to which the innermost known frame belongs."
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        place = PLACES.get((path.stem, name)) or PLACES.get((path.stem, None))
        if place == "autograd, backward" and inside(frame, "Jacobians and linear solves"): return "Jacobians and linear solves"
        if place: return place
        if "neuralode_nb" in path.parts[-3:] or path.stem == "autograd": return "loop and bookkeeping"
        frame = frame.f_back
    return "loop and bookkeeping"


class Samples:
    "Seconds of the processor for each part."
    def __init__(self): self.seconds, self.count = Counter(), 0

    def take(self, signum, frame):
        now = time.process_time()
        self.seconds[part_of(frame)] += now - self.last
        self.last, self.count = now, self.count + 1

    def __enter__(self):
        signal.signal(signal.SIGPROF, self.take)
        self.last = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 1e-3, 1e-3)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)


def seconds_of(run, total):
    "Of the processor, of each run, until `total` is used up; two at least."
    found = []
    while sum(found) < total or len(found) < 2:
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return found


def measure(task):
    "Shares of one task."
    program = ours(task)
    program.run()
    counts = program.counted()
    bare = floor(task, counts["evaluations"], counts["backward"])
    bare.run()
    clean, below = (spread(seconds_of(run, SECONDS / 3)) for run in (program.run, bare.run))
    with Samples() as samples: seconds_of(program.run, SECONDS)
    total = sum(samples.seconds.values())
    return {"about": task.about, "milliseconds": clean, "floor": below, "evaluations": counts["evaluations"],
            "samples": samples.count, "shares": {part: samples.seconds[part] / total for part in PARTS}}


def figure(data):
    "One bar for each task, divided into parts, in units of its time."
    fig, ax = show.panel("share of the time", size=(6.4, 1.2 + .3 * len(data)))
    colors = dict(zip(PARTS, (*show.PALETTE, show.FAINT)))
    for row, task in enumerate(data.values()):
        left = 0.
        for part, share in task["shares"].items():
            ax.barh(row, share, .7, left, color=colors[part], label=None if row else part)
            left += share
        ax.plot([task["floor"]["median"] / task["milliseconds"]["median"]] * 2, [row - .42, row + .42], color="black", lw=1.5,
                label=None if row else "floor")
    ax.set_yticks(range(len(data)), list(data), fontsize=8)
    ax.set(xlim=(0, 1), ylim=(len(data) - .4, -.6))
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    return fig


def main():
    named = [word for word in sys.argv[1:] if not word.startswith("-")]
    known, data = tasks(SMOKE), {}
    for name in named or (CHOSEN[:2] if SMOKE else CHOSEN):
        if name not in known: raise SystemExit(f"{name!r} is no task; there are {', '.join(known)}")
        row = data[name] = measure(known[name])
        print(f"{name:22}{row['milliseconds']['median']:9.2f} ms, floor {row['floor']['median']:9.2f} ms  "
              + ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items() if share > .005), flush=True)
    save("shares", {"seconds": SECONDS}, data, [
        "Milliseconds of the processor, median and quartiles; floor: as many bare evaluations of f, with gradients in training.",
        "Shares: time between two samples, given to the innermost of our functions then running; what a signal interrupts in "
        "C++ is told when it returns."], {"torch": sys.modules["torch"].__version__}, show.save,
        command="python benchmarks/shares.py" + " --smoke" * SMOKE, figures={"shares": figure(data)})


if __name__ == "__main__": main()
