"""Two programs taking turns: medians, spread and ratios from one run on one thread."""
import gc
import statistics
import sys
import time

import torch

import neuralode_nb
from neuralode_nb.lab.record import Record, commit, machine, results_folder, versions

torch.set_num_threads(1)
SMOKE = "--smoke" in sys.argv


def take_turns(programs, rounds, clock=time.perf_counter):
    """Seconds of each program by that clock, one turn per round. A round starts with another program each time, and nothing is
    collected within a turn, so that a slow moment of the machine and a full heap hit all alike."""
    for program in programs.values(): program()
    seconds, names = {name: [] for name in programs}, list(programs)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for r in range(rounds):
            for name in names[r % len(names):] + names[:r % len(names)]:
                begun = clock()
                programs[name]()
                seconds[name].append(clock() - begun)
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return seconds


def spread(seconds):
    "Median and quartiles, in milliseconds."
    low, middle, high = statistics.quantiles([1e3 * s for s in seconds], n=4)
    return {"median": middle, "low": low, "high": high}


def compare(ours, theirs):
    "How many times faster ours is: the median of the rounds' ratios, with its quartiles."
    low, middle, high = statistics.quantiles([b / a for a, b in zip(ours, theirs)], n=4)
    return {"median": middle, "low": low, "high": high}


def save(name, config, data, notes=(), more=(), draw=None, **rest):
    """Write results/NAME/PROFILE.json and say where; `more` are versions of other libraries, `rest` fields of the record.
    With figures among them `draw(figure, path)` writes those."""
    theirs = more or {"torchdiffeq": sys.modules["torchdiffeq"].__version__}
    given = {"profile": "smoke" if SMOKE else "full", "command": f"python benchmarks/{name}.py" + " --smoke" * SMOKE} | rest
    record = Record(name, config=config, data=data, notes=list(notes), machine=machine("cpu"), code=commit(),
                    versions=versions() | theirs, **given)
    path = record.save(results_folder(), draw)
    print(f"\nneuralode_nb {neuralode_nb.__version__}, torch {torch.__version__}, one thread, {record.machine['cpu']}"
          f"\nrecord: {path.parent.parent.name}/{name}/{path.name}")
