"""What `peers.py` has measured, as a table and as a figure."""
from neuralode_nb import show

LABELS = {"ours": "ours", "compiled": "ours, compiled", "torchdiffeq": "torchdiffeq", "torchode": "torchode",
          "diffrax": "diffrax"}
COLORS = dict(zip(LABELS, (show.PALETTE[0], show.PALETTE[4], show.PALETTE[1], show.PALETTE[5], show.PALETTE[2])))
COLUMNS = ["task", "library", "ms", "quartiles", "times ours", "times floor", "f", "backward", "steps", "MB", "first, s",
           "again, s"]


def rows(data):
    "Rows of the table."
    for name, task in data.items():
        floor = task["libraries"].get("floor", {}).get("milliseconds", {}).get("median")
        for library, found in task["libraries"].items():
            ms, steps = found["milliseconds"], found.get("accepted")
            yield [name, LABELS.get(library, library), ms["median"], f"{ms['low']:.3g}-{ms['high']:.3g}",
                   found["ratio"]["median"] if found.get("ratio") else None, ms["median"] / floor if floor else None,
                   found["evaluations"], found.get("backward"),
                   "–" if steps is None else f"{steps}+{found['rejected']}" if found.get("rejected") else str(steps),
                   found["megabytes"], found["first"], found.get("again")]
        for library, why in task["left out"].items(): yield [name, LABELS.get(library, library), why] + [None] * 9


def table(data): return show.table(rows(data), COLUMNS)


def figure(data):
    "Bars on a logarithmic axis, one for each task and library; the floor is a line across them."
    drawn = [k for k in LABELS if any(k in task["libraries"] for task in data.values())]
    fig, ax = show.panel("milliseconds, median", size=(6.4, .9 + .09 * (len(drawn) + 1) * len(data)), log="x")
    width, marked = .8 / len(drawn), False
    for row, task in enumerate(data.values()):
        found = task["libraries"]
        for k, library in enumerate(drawn):
            if library not in found: continue
            ms = found[library]["milliseconds"]
            ax.barh(row - .4 + (k + .5) * width, ms["median"], width, color=COLORS[library],
                    xerr=[[ms["median"] - ms["low"]], [ms["high"] - ms["median"]]], error_kw={"lw": .6, "ecolor": show.INK})
        if "floor" in found:
            floor = found["floor"]["milliseconds"]["median"]
            ax.plot([floor] * 2, [row - .45, row + .45], color=show.INK, lw=1.2, label=None if marked else "floor")
            marked = True
    for library in drawn: ax.barh(0, 0, 0, color=COLORS[library], label=LABELS[library])
    ax.set_yticks(range(len(data)), list(data), fontsize=7)
    ax.set_ylim(len(data) - .4, -.6)
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper center", ncols=len(drawn) + 1, fontsize=7, frameon=False)
    return fig
