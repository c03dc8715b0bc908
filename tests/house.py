"""Reading the house: its pages, their cells, its modules. Shared by the tests that hold it together."""
import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "neuralode_nb"
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1\s*?$", re.MULTILINE | re.DOTALL)  # a fenced block inside Markdown
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()]*\))?)\)|(?:href|src)=\"([^\"]+)\"")


@dataclass
class Cell:
    kind: str
    source: str
    outputs: list
    raw: dict

    @property
    def directives(self):
        "The words after `#|` in a code cell: {'export': '', 'default_exp': 'ode.solve'}."
        found = re.finditer(r"^#\|\s*(\S+)[ \t]*(.*)$", self.source, re.MULTILINE)
        return {m[1].rstrip(":"): m[2].strip() for m in found}

    @property
    def exported(self): return self.kind == "code" and bool({"export", "exports", "exporti"} & self.directives.keys())

    @property
    def code(self): return re.sub(r"^\s*[%!].*$", "", self.source, flags=re.MULTILINE)  # without magics

    @property
    def prose(self): return FENCE.sub("", self.source) if self.kind == "markdown" else ""


@dataclass
class Page:
    path: Path

    def __str__(self): return str(self.path.relative_to(NBS))

    @cached_property
    def raw(self): return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def cells(self):
        def joined(source): return source if isinstance(source, str) else "".join(source)
        return [Cell(c["cell_type"], joined(c["source"]), c.get("outputs", []), c) for c in self.raw["cells"]]

    @property
    def module(self):
        "The name that the place of the page gives its module: nbs/ode/02_tableau.ipynb -> ode.tableau."
        return ".".join([*self.path.relative_to(NBS).parts[:-1], re.sub(r"^\d+_", "", self.path.stem)])

    @property
    def exports(self): return [c.directives["default_exp"] for c in self.cells if "default_exp" in c.directives]

    @property
    def prose(self): return "\n\n".join(c.prose for c in self.cells)

    @property
    def headings(self): return re.findall(r"^(#{1,6})\s+(.*?)\s*$", self.prose, re.MULTILINE)


@dataclass
class Module:
    path: Path

    def __str__(self): return self.name

    @property
    def name(self):
        "Without the package: ode.tableau; the public face is the empty name."
        parts = self.path.relative_to(PACKAGE).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def tree(self): return ast.parse(self.path.read_text(encoding="utf-8"))

    def imports(self, body=None):
        "(module, names) of every import at any depth of `body`; nbdev makes imports of ours relative, this undoes it."
        package = ["neuralode_nb", *self.name.split(".")[:-1]]
        for node in (n for part in body or [self.tree] for n in ast.walk(part)):
            if isinstance(node, ast.Import): yield from ((alias.name, []) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[:len(package) + 1 - node.level] if node.level else []
                yield ".".join([*above, *filter(None, [node.module])]), [alias.name for alias in node.names]


def visible(path): return not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts[:-1])


PAGES = [Page(p) for p in sorted(NBS.rglob("*.ipynb")) if visible(p)]
MODULES = [Module(p) for p in sorted(PACKAGE.rglob("*.py")) if visible(p) and not p.name.startswith("_")]


def vocabulary(trees):
    "Every name that stands anywhere in the code: defined, used, passed, imported, or a string that is a name."
    words = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str): words.update(value.split("."))
        if isinstance(node, ast.Constant) and str(node.value).isidentifier(): words.add(str(node.value))
        if isinstance(node, (ast.Global, ast.Nonlocal)): words.update(node.names)
        if isinstance(node, ast.ImportFrom) and node.module: words.update(node.module.split("."))
    return words
