"""What is installed is what the repository says, and importing it costs little."""
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution

import pytest
import yaml
from house import MODULES, ROOT

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib  # Python 3.10

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS = configparser.ConfigParser(interpolation=None)
SETTINGS.read(ROOT / "settings.ini")
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]

HEAVY = {"matplotlib", "typer", "rich", "accelerate", "torchvision", "torchmetrics", "sklearn", "scipy", "pandas",
         "IPython", "fastcore", "nbdev"}


def normal(requirement): return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def python(*arguments):
    "What a fresh interpreter writes to stdout and to stderr."
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr

# ----------------------------------------------------------------------------------------------- one version, one name


def test_settings_package_and_installation_agree():
    import neuralode_nb
    settings, installed = SETTINGS["DEFAULT"], distribution("neuralode_nb")
    assert settings["version"] == neuralode_nb.__version__ == installed.version
    assert settings["lib_name"] == PROJECT["name"] == installed.metadata["Name"]
    assert PROJECT["requires-python"] == f">={settings['min_python']}"
    assert settings["description"] == PROJECT["description"]


def test_entry_points_lead_somewhere():
    points = {(p.group, p.name): p for p in distribution("neuralode_nb").entry_points}
    assert points["console_scripts", "neuralode"].value == "neuralode_nb.cli:app"
    assert callable(points["console_scripts", "neuralode"].load())
    index = points["nbdev", "neuralode_nb"].load()
    assert {m.name for m in MODULES} == {name.removeprefix("neuralode_nb.") for name in index["syms"]}


def test_the_changelog_begins_with_what_is_not_released():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"

# ------------------------------------------------------------------------------------------------------ dependencies


def test_constraints_are_exact_and_name_no_address():
    wrong = [line for line in CONSTRAINTS if not re.fullmatch(r"[a-z0-9-]+==[\w.!+]+( ; [^:/]+)?", line)]
    assert not wrong


def test_every_dependency_is_pinned():
    asked = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    missing = set(map(normal, asked)) - set(map(normal, CONSTRAINTS))
    assert not missing


def test_nbdev_stays_on_the_line_that_has_settings_and_tests():
    assert {"nbdev>=2.4.14,<3", "fastcore<2", "execnb<0.2", "ghapi<2"} <= set(PROJECT["optional-dependencies"]["dev"])

# ------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy by the installed setuptools: no network, nothing left in the checkout."
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "neuralode_nb", copy / "neuralode_nb", ignore=shutil.ignore_patterns("__pycache__"))
    script = f"import os; os.chdir({str(copy)!r}); from setuptools import build_meta as b; print(b.build_wheel('.'))"
    name = python("-W", "ignore", "-c", script)[0].split()[-1]
    with zipfile.ZipFile(copy / name) as file: return {n: file.read(n).decode() for n in file.namelist()}


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    package = {name for name in wheel if ".dist-info/" not in name}
    assert package == {p.relative_to(ROOT).as_posix() for p in (ROOT / "neuralode_nb").rglob("*.py")}


def test_the_wheel_says_what_it_needs(wheel):
    metadata = next(text for name, text in wheel.items() if name.endswith("METADATA"))
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    core = {normal(r) for r in needed if "extra ==" not in r}
    assert core == {"torch", "jaxtyping", "matplotlib", "typer", "rich", "accelerate"}
    assert re.search(r"^License-Expression: Apache-2.0$", metadata, re.MULTILINE)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)

# ------------------------------------------------------------------------------------------------------ a light import


def imported(statement):
    "The modules that `statement` imports in a fresh interpreter, and the seconds spent in each of them alone."
    report = python("-X", "importtime", "-c", statement)[1]
    rows = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \| +(\S+)$", report, re.MULTILINE)
    return {name: int(microseconds) / 1e6 for microseconds, name in rows}


def test_importing_the_package_is_importing_torch_and_little_more():
    torch = imported("import torch")
    runs = [imported("import neuralode_nb") for _ in range(3)]
    heavy = HEAVY & {name.split(".")[0] for name in runs[0].keys() - torch.keys()}
    assert not heavy
    quietest = {name: min(run.get(name, 0) for run in runs) for name in runs[0]}
    theirs, ours = (sum(s for name, s in quietest.items() if (name in torch) is known) for known in (True, False))
    assert ours < max(0.2, theirs / 10), "0.2 s, or a tenth of torch where the machine is so busy that this is more"


def test_the_command_starts_without_what_only_some_of_its_work_needs():
    out, _ = python("-c", "import sys; from neuralode_nb.cli import app; print(*sys.modules)")
    loaded = {"matplotlib", "torchvision", "torchmetrics", "sklearn", "scipy", "nbdev"} & set(out.split())
    assert not loaded

# ------------------------------------------------------------------------------------------------------------ workflows


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_only_call_targets_that_exist(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        called = {m for step in job["steps"] for m in re.findall(r"\bmake ([a-z]+)", step.get("run", ""))}
        assert called <= targets
