from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import chestxray_covid

PACKAGE = Path(chestxray_covid.__file__).parent
PROJECT = Path(__file__).parents[1] / "pyproject.toml"
MAX_LINES = 400

#: Row by row from the bottom; a module imports only from rows above its own in this list. The
#: package's ``__init__`` loads names lazily, so it imports the version alone.
ROWS = (
    ("_version", "errors", "notebook", "progress", "processor"),
    ("files",),
    ("pixels", "hiding", "metrics", "datasets.report", "datasets.storage", "datasets.web"),
    ("dicom", "encoded", "intervals", "tensors", "compiled", "datasets.origins"),
    ("gate_probe", "lung_maps", "image", "delong", "operating_points", "judged_images"),
    ("gate_lungs", "curves", "comparison"),
    ("gate",),
    ("gate_fit", "prediction", "heatmap", "subgroups", "graph"),
    ("reporting",),
    ("checklists",),
    (
        "checkpoint",
        "int8",
        "export_card",
        "datasets.archives",
        "datasets.transfer",
        "datasets.base",
    ),
    (
        *("datasets.download", "datasets.labels", "datasets.loading", "datasets.phantom"),
        "file_facts",
    ),
    ("datasets.cohen", "datasets.kermany", "datasets.duplicates", "datasets.synthetic"),
    ("datasets.folder",),
    ("datasets",),
    ("hub_cache", "splits", "confounders", "evaluation_report", "audit_report"),
    ("hub", "results"),
    ("audit_verdicts",),
    ("audit_figure",),
    ("card_metadata",),
    ("card",),
    ("publish",),
    # Here begins torch: layer 4 of the design.
    (
        *("transforms", "models", "lung_network", "training_memory", "inputs"),
        *("engine_torch", "engine_openvino", "engine_onnx"),
    ),
    ("augment", "training_speed"),
    ("engines", "training_config", "training_history", "lungs"),
    (
        *("training_feed", "training_loss", "training_order", "training_processes"),
        "training_state",
    ),
    ("training_network",),
    ("training",),
    ("classifier",),
    ("calibration",),
    ("evaluation", "prediction_table", "places", "explain", "export", "quantization"),
    ("shards",),
    ("batch",),
    ("heat_shares", "audit_data"),
    ("generalisation", "audit_baselines"),
    ("audit_items", "audit_occlusion", "audit_generalisation"),
    ("audit",),
    ("plots", "page"),
    ("report",),
    ("command",),
    (
        *("hub_commands", "judging_commands", "audit_commands", "export_commands"),
        "batch_commands",
    ),
    ("cli",),
    ("__main__",),
    ("",),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
FIRST_WITH_TORCH = RANK["models"]
TORCH = {"torch", "torchvision", "accelerate"}
#: Modules that need torch as soon as they are imported; the others import it late or never.
TORCH_AT_IMPORT = {
    *("transforms", "augment", "models", "training", "training_config", "training_network"),
    *("lung_network", "engine_torch", "training_memory", "training_feed", "training_processes"),
    *("training_speed", "training_loss"),
}

#: Distribution → the name that is imported, where they differ.
IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn", "huggingface-hub": "huggingface_hub"}

#: Modules that run what they read, or that the library has no business with.
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("tarfile", "code", "codeop", "imp", "ctypes", "telnetlib", "ftplib"),
}
FORBIDDEN_CALLS = {
    *("print", "eval", "exec", "compile", "__import__", "breakpoint", "input"),
    *("torch.load", "torch.save", "torch.manual_seed", "torch.hub.load", "torch.set_num_threads"),
    *("numpy.random.seed", "random.seed", "numpy.load_pickle", "pandas.read_pickle"),
    *("logging.basicConfig", "warnings.filterwarnings", "warnings.simplefilter"),
    *("os.system", "os.popen", "os.chdir", "os.umask", "os.putenv", "socket.setdefaulttimeout"),
}
FORBIDDEN_METHODS = {
    "extractall",
    "manual_seed_all",
    "to_pickle",
    "addHandler",
    "use_deterministic",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes, of functions too, except what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from [other, *at_run_time(other)]
        else:
            yield node
            yield from at_run_time(node)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that importing a module runs: not the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(node)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the dotted names that import statements among the nodes name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(name: str) -> set[str]:
    """Return the modules of this package that a module imports, now or late."""
    found = set()
    for full in imported(at_run_time(TREES[name])):
        if full.split(".")[0] != "chestxray_covid":
            continue
        inner = full.removeprefix("chestxray_covid").removeprefix(".")
        while inner not in MODULES:  # a name inside a module
            inner = inner.rpartition(".")[0]
        found.add(inner)
    return found


def aliases(tree: ast.AST) -> dict[str, str]:
    """Return the local name → dotted name of everything that a module imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def offences(tree: ast.AST) -> list[str]:
    """Return what a source does that this library never does, with line numbers."""
    found = []
    names = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            tops = {n.split(".")[0] for n in imported(iter([node]))}
            found += [f"{node.lineno}: imports {top}" for top in tops & FORBIDDEN_MODULES]
        elif isinstance(node, ast.Attribute | ast.Name):
            head, _, rest = ast.unparse(node).partition(".")
            full = ".".join(filter(None, [names.get(head, head), rest]))
            if full in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {full}")
            if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_METHODS:
                found.append(f"{node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if given.get("verify") == "False" or given.get("weights_only") == "False":
                found.append(f"{node.lineno}: {given}")
            called = ast.unparse(node.func)
            if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
                found.append(f"{node.lineno}: {called} without allow_pickle=False")
            if given.get("shell") == "True" or given.get("force") == "True":
                found.append(f"{node.lineno}: {given}")
        elif isinstance(node, ast.ExceptHandler):
            caught = "all" if node.type is None else ast.unparse(node.type)
            last = node.body[-1]
            cleans_up = isinstance(last, ast.Raise) and last.exc is None
            if re.search(r"^all$|\b(Base)?Exception\b", caught) and not cleans_up:
                found.append(f"{node.lineno}: catches {caught}")
        elif isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert")
    return found


# ---------------------------------------------------------------- layers


def test_every_module_has_its_place_and_every_place_its_module() -> None:
    assert set(RANK) == set(MODULES), "name a new module in ROWS, on purpose"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_from_its_own_row_or_above(name: str) -> None:
    upward = {other for other in own_imports(name) if RANK[other] >= RANK[name]}
    assert not upward, f"{name} imports {upward}"


def test_there_is_no_cycle() -> None:
    graph = {name: own_imports(name) for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())


def test_the_package_itself_imports_the_version_alone() -> None:
    assert own_imports("") == {"_version"}


@pytest.mark.parametrize("name", [n for n in RANK if RANK[n] < FIRST_WITH_TORCH])
def test_nothing_below_layer_four_imports_torch(name: str) -> None:
    tops = {full.split(".")[0] for full in imported(at_run_time(TREES[name]))}
    assert not tops & TORCH


def test_the_command_line_imports_torch_late() -> None:
    tops = {full.split(".")[0] for full in imported(at_import(TREES["cli"]))}
    assert not tops & TORCH
    direct = {
        full.removeprefix("chestxray_covid.")
        for full in imported(at_import(TREES["cli"]))
        if full.startswith("chestxray_covid.")
    }
    assert not {d for d in direct if d.split(".")[0] in TORCH_AT_IMPORT}


def test_only_modules_that_compute_with_torch_load_it_when_imported() -> None:
    others = [n for n in MODULES if n not in TORCH_AT_IMPORT]
    code = (
        "import importlib, json, sys\n"
        f"for name in {others!r}:\n"
        "    importlib.import_module('.'.join(filter(None, ['chestxray_covid', name])))\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & TORCH


# ---------------------------------------------------------------- packages


def core_packages() -> set[str]:
    """Return the import names of the packages that every installation has."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0] for line in project["dependencies"]]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize("name", MODULES)
def test_import_statements_name_core_packages_only(name: str) -> None:
    allowed = core_packages() | set(sys.stdlib_module_names) | {"chestxray_covid"}
    tops = {full.split(".")[0] for full in imported(ast.walk(TREES[name]))}
    assert not tops - allowed, "optional packages go through errors.require_extra"


def test_every_extra_that_is_asked_for_exists() -> None:
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = [
        ast.literal_eval(node.args[1])
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require_extra")
    ]
    assert asked
    assert set(asked) <= set(extras)


# ---------------------------------------------------------------- what is never done


@pytest.mark.parametrize("name", MODULES)
def test_no_module_does_what_the_library_never_does(name: str) -> None:
    assert not offences(TREES[name])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy, tarfile as t",
        "def f():\n    import dill",
        "import torch\ntorch.load('x')",
        "from torch import load\nload('x')",
        "import torch as t\nread = t.load",
        "import zipfile\nzipfile.ZipFile('x').extractall()",
        "print('x')",
        "f = print",
        "eval('1')",
        "exec('1')",
        "import requests\nrequests.get('x', verify=False)",
        "import numpy as np\nnp.random.seed(1)",
        "from numpy import random\nrandom.seed(1)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch\ntorch.manual_seed(1)",
        "from torch import manual_seed\nmanual_seed(1)",
        "import random\nrandom.seed(1)",
        "import logging\nlogging.basicConfig()",
        "import warnings\nwarnings.filterwarnings('ignore')",
        "from warnings import simplefilter\nsimplefilter('ignore')",
        "import os\nos.system('x')",
        "try:\n    x\nexcept:\n    pass",
        "try:\n    x\nexcept (ValueError, Exception):\n    pass",
        "assert x",
    ],
)
def test_the_search_for_offences_finds_them(source: str) -> None:
    assert len(offences(ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import numpy as np\nnp.random.default_rng(1)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import json\njson.load(file)",
        "import re\nre.compile('x')",
        "try:\n    x\nexcept (OSError, ValueError):\n    pass",
        "try:\n    x\nexcept BaseException:\n    y\n    raise",
    ],
)
def test_the_search_for_offences_finds_nothing_else(source: str) -> None:
    assert offences(ast.parse(source)) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_longer_than_four_hundred_lines(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
