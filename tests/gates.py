"""The two checks of `make test` that may mend what they find.  python tests/gates.py sync|clean

sync   the library is what the notebooks export: nbdev_export changes nothing.
clean  the notebooks carry no metadata of an editor or a run: nbdev_clean changes nothing.

Both compare files before and after, not with git, so they also work outside a checkout and before a commit.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GATES = {"sync": ("nbdev_export", ["neuralode_nb/**/*.py", "pyproject.toml"], "were not what the notebooks export"),
         "clean": ("nbdev_clean", ["nbs/**/*.ipynb"], "carried metadata")}


def contents(patterns):
    return {p.relative_to(ROOT): p.read_bytes() for pattern in patterns for p in ROOT.glob(pattern)
            if ".ipynb_checkpoints" not in p.parts}


def main(name):
    command, patterns, fault = GATES[name]
    before = contents(patterns)
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # under IN_TEST nbdev_export does nothing
    subprocess.run([Path(sys.executable).parent / command], cwd=ROOT, env=environment, check=True)
    after = contents(patterns)
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        sys.exit(f"These files {fault}; {command} has just put that right, so look at them and commit them:\n  "
                 + "\n  ".join(changed))


if __name__ == "__main__":
    main(sys.argv[1])
