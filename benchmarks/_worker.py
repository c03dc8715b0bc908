"""One library of `peers.py` in a process of its own: reads requests as lines of JSON, answers the same way.

python _worker.py LIBRARY. Requests: {"do": "prepare", "task": name, "small": bool}, then any number of {"do": "turn"}.
"""
import ctypes
import gc
import json
import os
import resource
import sys
import time
import traceback

import numpy as np

from _tasks import tasks

TURN = .05     # seconds, or one call


def memory(field):
    "Megabytes of this process: VmRSS, what it has; VmHWM, the most since `reset_peak`. None where Linux does not tell."
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
    except (OSError, StopIteration): return None


def reset_peak():
    "Give free memory back and let the count of the peak begin anew; False where that is not possible."
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file: file.write("5")
        return memory("VmHWM") is not None
    except (OSError, AttributeError): return False


def most(run):
    "Megabytes by which `run` raises the memory of this process at most."
    if reset_peak():
        before = memory("VmRSS")
        run()
        return memory("VmHWM") - before
    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def digest(array):
    "At most 256 numbers of an array, evenly chosen."
    flat = np.asarray(array, np.float64).reshape(-1)
    return flat[np.linspace(0, len(flat) - 1, min(len(flat), 256)).astype(int)].tolist()


def library(name):
    "(task, options -> program, versions, the exception that says a method is missing)"
    if name == "diffrax":
        import _with_jax
        return _with_jax.diffrax_program, _with_jax.versions(name), ()
    import _with_torch
    if name == "compiled": _with_torch.ready_to_compile()
    return getattr(_with_torch, name), _with_torch.versions(name), _with_torch.NotOffered


def prepare(make, request):
    "Build, run once, check that numbers come out, count and weigh."
    task = tasks(request["small"])[request["task"]]
    program = make(task, **request.get("options", {}))
    begun = time.perf_counter()
    found = program.results()
    first = time.perf_counter() - begun
    for name, value in found.items():
        if not np.isfinite(value).all(): raise ArithmeticError(f"{name} is not finite")
    said = {"first": first, "results": {k: digest(v) for k, v in found.items()}, **program.counted(),
            "megabytes": most(program.run)}
    return program, said | {"calls": max(1, int(TURN / turn(program, 1)["seconds"]))}


def turn(program, calls):
    "Seconds of a call on the clock and of the processor, the mean of several."
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(calls): program.run()
    return {"seconds": (time.perf_counter() - clock) / calls, "processor": (time.process_time() - processor) / calls}


def serve(name, requests, answer):
    try: make, versions, missing = library(name)
    except ImportError as error: return answer({"absent": str(error)})
    answer({"versions": versions})
    program, calls = None, 1
    for request in map(json.loads, requests):
        try:
            if request["do"] == "prepare":
                program = None
                gc.enable(), gc.unfreeze(), gc.collect()
                program, said = prepare(make, request)
                gc.collect(), gc.freeze(), gc.disable()
                calls = said["calls"]
                answer(said)
            else: answer(turn(program, calls))
        except missing as error: answer({"missing": str(error)})
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


def main():
    "Answers go where stdout was; whatever a library prints goes to stderr."
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what): print(json.dumps(what), file=out, flush=True)
    serve(sys.argv[1], sys.stdin, answer)


if __name__ == "__main__": main()
