"""The house stands: floors, sizes, one page = one module, and every word in backticks means something."""
import ast
import base64
import builtins
import configparser
import importlib
import inspect
import keyword
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import readme
import torch
import yaml
from house import LINK, MODULES, NBS, PACKAGE, PAGES, ROOT, Page, vocabulary

TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
each_page = pytest.mark.parametrize("page", PAGES, ids=str)
each_module = pytest.mark.parametrize("module", MODULES, ids=str)

# ---------------------------------------------------------------------------------------------------------- floors

ROOMS = {"ode", "models", "lab", "experiments", "show", "cli"}
ABOVE = {  # what each room may import of ours
    "ode": {"ode"},
    "models": {"models", "ode"},
    "lab": {"lab", "ode"},
    "experiments": {"experiments", "models", "lab", "ode", "show"},
    "show": set(),
    "cli": ROOMS,
}
CORE = {"torch", "jaxtyping", "matplotlib", "numpy", "typer", "rich", "accelerate"}  # installed without extras
GROUND = {"ode": {"torch", "jaxtyping"}, "show": set()}                              # rooms that need even less


def outside(module):
    "The top-level names of other packages that `module` imports at any depth."
    return {name.split(".")[0] for name, _ in module.imports()} - sys.stdlib_module_names - {"neuralode_nb"}


@each_module
def test_a_room_imports_only_from_the_floors_below(module):
    room = module.name.split(".")[0]
    for name, names in module.imports():
        package, *rest = name.split(".")
        if package != "neuralode_nb": continue
        reached = set(rest[:1] or names) - ({"__version__"} if room != "ode" else set())
        assert reached <= ABOVE[room], f"{module} imports {name}: {room} may import {sorted(ABOVE[room]) or 'nothing'}"


@each_module
def test_importing_a_module_needs_no_extra(module):
    top = [node for node in module.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {name.split(".")[0] for name, _ in module.imports(top)} if top else set()
    extra = found - sys.stdlib_module_names - {"neuralode_nb"} - GROUND.get(module.name.split(".")[0], CORE)
    assert not extra, f"{module} imports {extra} when it is imported; do it inside the function"


def test_the_core_uses_torch_and_nothing_else():
    wrong = {m.name: more for m in MODULES if m.name.startswith("ode.") and (more := outside(m) - GROUND["ode"])}
    assert not wrong


def test_no_star_imports():
    sources = {str(p.relative_to(ROOT)): p.read_text() for d in ("neuralode_nb", "tests", "benchmarks")
               for p in sorted((ROOT / d).rglob("*.py"))}
    sources |= {f"{page}, cell {i}": cell.code for page in PAGES for i, cell in enumerate(page.cells)}
    stars = [where for where, text in sources.items() if re.search(r"^\s*from \S+ import \*", text, re.MULTILINE)]
    assert not stars

# ----------------------------------------------------------------------------------------------------- public names


def test_the_public_face_is_small_and_described():
    import neuralode_nb
    assert len(neuralode_nb.__all__) <= 16
    assert len(set(neuralode_nb.__all__)) == len(neuralode_nb.__all__)
    for name in neuralode_nb.__all__:
        assert inspect.getdoc(getattr(neuralode_nb, name)), f"{name} has no docstring"


@each_module
def test_what_a_module_exports_has_a_docstring(module):
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"

# -------------------------------------------------------------------------------------------------- pages and modules


def test_one_page_is_one_module():
    wrong = {str(p): p.exports for p in PAGES if p.exports not in ([], [p.module])}
    assert not wrong, "a page exports exactly the module of its own name"
    written, there = {p.module for p in PAGES if p.exports}, {m.name for m in MODULES}
    assert written == there, f"pages without a module: {written - there}; modules without a page: {there - written}"


def test_modules_lie_where_pages_lie():
    folders = {p.module.split(".")[0] for p in PAGES if p.exports}
    assert folders <= ROOMS, f"{folders - ROOMS} is no room of the house"


@each_page
def test_files_have_numbers_and_folders_do_not(page):
    *folders, file = page.path.relative_to(NBS).parts
    assert not any(re.match(r"\d", folder) for folder in folders)
    assert bool(re.match(r"\d\d_[a-z]", file)) == bool(folders), f"{page}: a page in a folder begins with two digits"


@each_page
def test_a_page_is_small(page):
    assert len(page.cells) <= 45
    assert page.path.stat().st_size <= 250_000
    for i, cell in enumerate(page.cells):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
        assert not cell.exported or len(lines) <= 30, f"{page}, cell {i}: {len(lines)} exported lines"


@each_module
def test_a_module_is_small(module):
    lines = [line for line in module.path.read_text().splitlines() if line.strip() and not line.startswith("# %%")]
    assert len(lines) <= 250, f"{module} has {len(lines)} lines"

# --------------------------------------------------------------------------------------------------- what is stored

FOREIGN = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|private|opt|usr)/\w| at 0x[0-9a-f]{6,}|\x1b\[")


@each_page
def test_a_page_carries_no_trace_of_the_run(page):
    assert set(page.raw["metadata"]) <= {"kernelspec"}
    for i, cell in enumerate(page.cells):
        where = f"cell {i}: its saved output"
        assert cell.raw["metadata"] == {} and cell.raw.get("execution_count") is None, f"cell {i}: run nbdev_clean"
        for output in cell.outputs:
            assert output["output_type"] != "error", f"{where} is an error"
            assert output.get("name") != "stderr", f"{where} went to stderr"
            data = output.get("data", {})
            assert not any("widget" in kind for kind in data), f"{where} is a widget"
            texts = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
            text = "\n".join(map("".join, texts))
            foreign, size = FOREIGN.findall(text), len(base64.b64decode("".join(data.get("image/png", ""))))
            assert not foreign and size <= 40_000, f"{where} holds {foreign or size}"


def test_figures_beside_records_are_small():
    figures = [p for folder in ("results", "nbs") for p in (ROOT / folder).rglob("*.png")]
    large = [str(p.relative_to(ROOT)) for p in figures if p.stat().st_size > 40_000]
    assert not large


def test_no_file_names_a_folder_of_this_machine():
    kinds = {".py", ".md", ".ipynb", ".toml", ".ini", ".yml", ".txt", ".json", ".css"}
    folders = ("neuralode_nb", "nbs", "tests", "benchmarks", "results", ".github", ".ci")
    files = [*ROOT.glob("*"), *(p for folder in folders for p in (ROOT / folder).rglob("*"))]
    machine = re.compile(r"(?<![\w.$}/])/(?:home|root|work|Users)/\w")
    guilty = [str(p.relative_to(ROOT)) for p in files if p.suffix in kinds and machine.search(p.read_text())]
    assert not guilty

# ---------------------------------------------------------------------------------------------------------- reading


@each_page
def test_a_page_opens_with_its_name_and_its_promise(page):
    first, second = page.cells[:2]
    titled = bool(re.fullmatch(r"# [^\n]+\n> [^\n]+", first.source.strip()))
    assert titled, "the first cell holds the title and a one-line subtitle: the site drops whatever else stands there"
    promised = second.kind == "markdown" and not second.source.startswith("#")
    assert promised, "the second cell is the promise, in prose"
    assert [level for level, _ in page.headings].count("#") == 1


@each_page
def test_a_cell_of_a_library_page_that_imports_does_nothing_else(page):
    # the site is made by running imports and exported cells only: whatever else stands in such a cell fails there
    for i, cell in enumerate(page.cells):
        if not page.exports or cell.kind != "code" or cell.exported: continue
        nodes = list(ast.walk(ast.parse(cell.code)))
        if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes):
            alone = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes[0].body)
            assert alone, f"{page}, cell {i}: move the import into the cell of imports at the top"


def test_the_sidebar_names_every_page():
    def walk(items): return [p for i in items for p in ([i] if isinstance(i, str) else walk(i["contents"]))]
    listed = walk(yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"])
    there = set(map(str, PAGES))
    missing, gone = there - set(listed), set(listed) - there
    assert not missing and not gone and len(listed) == len(there)
    for folder in {p.rpartition("/")[0] for p in listed}:
        assert (inside := [p for p in listed if p.rpartition("/")[0] == folder]) == sorted(inside) or not folder


def test_the_site_renders_every_folder():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    folders = {"/" + "/".join([*p.path.relative_to(NBS).parts[:-1], "*.ipynb"]) for p in PAGES}
    assert folders <= set(config["project"]["render"])
    assert (NBS / config["format"]["html"]["css"]).exists()


SITE = """
import os, sys
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
os.environ["IN_TEST"] = "1"
for path in sys.argv[1:]:
    page = read_nb(path)
    try: FilterDefaults()(page)
    except Exception as e: print(path, repr(e)[:200])
    described = [c for c in page.cells if c.cell_type == "code" and "show_doc(" in c.source]
    empty = [c for c in described if not any("text/markdown" in o.get("data", {}) for o in c.outputs)]
    for cell in empty: print(path, "hides", cell.source.split()[-1])
"""


def test_the_site_can_be_made():
    # what nbdev_docs does to every page before Quarto sees it: run imports and exported cells, describe each symbol
    pages = [str(page.path) for page in PAGES if page.exports]
    done = subprocess.run([sys.executable, "-c", SITE, *pages], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = [line for line in done.stdout.splitlines() if line.startswith("/")]
    assert not wrong


def test_the_readme_is_the_index():
    text, images = readme.render(Page(NBS / "index.ipynb"))
    assert (ROOT / "README.md").read_text() == text, "run `make prepare`"
    for name, content in images.items(): assert (NBS / name).read_bytes() == content, "run `make prepare`"

# ------------------------------------------------------------------------------------------------------------ links


def slugs(path):
    "The anchors of the headings of a page or a Markdown file."
    text = Page(path).prose if path.suffix == ".ipynb" else path.read_text()
    titles = re.findall(r"^#{1,6}\s+(.*?)\s*$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", title.lower()).strip()) for title in titles}


def broken_links(path, text):
    for match in LINK.finditer(text):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if re.match(r"[a-z]+:", target): continue
        file = (path.parent / target).resolve() if target else path
        inside = slugs(file) if file.suffix in (".ipynb", ".md") and file.exists() else {anchor}
        if not file.exists(): yield f"{target} does not exist"
        elif anchor and anchor not in inside: yield f"{target} has no #{anchor}"


@each_page
def test_links_of_a_page_resolve(page):
    broken = list(broken_links(page.path, page.prose))
    assert not broken


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_of_a_text_resolve(path):
    broken = list(broken_links(path, path.read_text()))
    assert not broken

# ------------------------------------------------------------------------------------------------- words in backticks

# A word in backticks is a promise that something has this name. It is kept if the name stands in code: ours, that of
# the page, Python's, or that of an installed package when it is written with the package's name (`torch.func.vmap`).
# Anything that is no name, call or dotted path (`h = 0.1`, `results/`, `-3/5`) is left alone.

OURS = ROOMS | {"neuralode_nb"}
PEERS = {"diffrax", "torchode", "torchdyn", "jax", "equinox", "optimistix", "probdiffeq"}  # named, not installed
SUFFIXES = {"py", "ipynb", "md", "ini", "toml", "yml", "json", "txt", "png", "csv", "pt", "html"}
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def known_words():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    words = vocabulary(m.tree for m in MODULES) | set(settings.defaults()) | ROOMS
    words |= {m.name.split(".")[-1] for m in MODULES}
    words |= set(re.findall(r"[A-Za-z_]\w+", (ROOT / "pyproject.toml").read_text()))
    words |= set(dir(builtins)) | set(keyword.kwlist) | set(dir(torch)) | set(dir(torch.nn)) | set(dir(torch.Tensor))
    words |= {script.name for script in entry_points(group="console_scripts")} | sys.stdlib_module_names
    words |= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return words | {"neuralode_nb", "pip", "git", "make", "uv", "quarto", "NaN"}


WORDS = known_words()


def resolves(path):
    "Whether the dotted `path` leads from an importable module to something that exists."
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try: found = importlib.import_module(".".join(parts[:n]))
        except ImportError: continue
        for part in parts[n:]:
            if not hasattr(found, part): return part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


def unknown(name, words):
    "Whether `name`, plain or dotted, means nothing."
    root, *rest = name.split(".")
    if root in PEERS: return False
    if not rest: return len(name) > 2 and name not in words
    if rest[-1] in SUFFIXES: return False
    if root in OURS: return not resolves(name if root == "neuralode_nb" else f"neuralode_nb.{name}")
    return rest[-1] not in words and not resolves(name)


def dotted(node):
    if isinstance(node, ast.Name): return node.id
    return f"{head}.{node.attr}" if isinstance(node, ast.Attribute) and (head := dotted(node.value)) else None


def names_in(text):
    "The names that code in backticks promises: itself if it is one, else what it calls and the keywords it passes."
    try: tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError: return
    if (name := dotted(tree)): yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if (name := dotted(node.func)): yield name
            yield from (k.arg for k in node.keywords if k.arg)


def meaningless(text, words):
    return sorted({name for code in INLINE.findall(text) for name in names_in(code) if unknown(name, words)})


def of_page(page):
    def trees():
        for cell in page.cells:
            if cell.kind == "code": yield ast.parse(cell.code)
    return vocabulary(trees())


@each_page
def test_words_in_backticks_mean_something(page):
    wrong = meaningless(page.prose, WORDS | of_page(page))
    assert not wrong


@pytest.mark.parametrize("path", TEXTS[:2], ids=lambda p: p.name)
def test_words_in_backticks_of_a_text_mean_something(path):
    wrong = meaningless(path.read_text(), WORDS | of_page(Page(NBS / "index.ipynb")))
    assert not wrong


@each_module
def test_words_in_backticks_of_docstrings_mean_something(module):
    documented = [n for n in ast.walk(module.tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    wrong = meaningless("\n".join(ast.get_docstring(n) or "" for n in documented), WORDS)
    assert not wrong


def test_the_rule_for_backticks_has_teeth():
    kept = "`panel(x=1)` `show.panel` `torch.func.vmap` `h = 0.1` `-3/5` `results/` `settings.ini` `torchode.Tsit5`"
    broken = "`panel(xx_label=1)` `show.panels` `NoSuchThing` `torch.func.wmap` `no_such_option`"
    assert meaningless(f"{kept} {broken}", WORDS) == sorted(["xx_label", *INLINE.findall(broken)[1:]])


def test_the_package_is_where_we_look():
    import neuralode_nb
    assert PACKAGE.samefile(neuralode_nb.__path__[0])
