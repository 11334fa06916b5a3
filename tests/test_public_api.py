from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chestxray_covid

SOURCE = Path(chestxray_covid.__file__)
REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"
NAMES = [name for name in chestxray_covid.__all__ if name != "__version__"]


def typed_imports() -> dict[str, str]:
    """Return name → module as the ``if TYPE_CHECKING`` block of the package tells editors."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    blocks = [
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    assert len(blocks) == 1
    found = {}
    for node in blocks[0].body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "without 'as' the name is not exported to checkers"
            assert node.module is not None
            found[alias.name] = node.module
    return found


def in_new_process(code: str) -> Any:
    """Return what code prints as JSON in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_is_sorted_without_repetition_and_begins_with_the_version() -> None:
    assert chestxray_covid.__all__ == ["__version__", *sorted(set(NAMES))]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", chestxray_covid.__version__)


def test_editors_see_the_names_that_are_loaded_and_their_modules() -> None:
    lazy = {name: f"chestxray_covid.{module}" for name, module in chestxray_covid._HOME.items()}
    assert typed_imports() == lazy
    assert set(lazy) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_loaded_from_the_module_that_defines_it(name: str) -> None:
    value = getattr(chestxray_covid, name)
    home = f"chestxray_covid.{chestxray_covid._HOME[name]}"
    assert value is getattr(importlib.import_module(home), name)
    assert (value.__module__, value.__qualname__) == (home, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_and_its_public_methods_are_documented(name: str) -> None:
    value = getattr(chestxray_covid, name)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}("), "the docstring that dataclasses make up"
    if inspect.isclass(value):
        for method, own in vars(value).items():
            if not method.startswith("_") and (inspect.isroutine(own) or isinstance(own, property)):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_the_reference_page_lists_every_public_name() -> None:
    page = REFERENCE.read_text(encoding="utf-8")
    missing = [n for n in chestxray_covid.__all__ if not re.search(rf"(?<!\w){n}(?!\w)", page)]
    assert not missing


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = in_new_process(
        "import sys; before = set(sys.modules); import chestxray_covid, json\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))"
    )
    foreign = set(loaded) - set(sys.stdlib_module_names) - {"chestxray_covid"}
    assert not foreign
    submodules = in_new_process(
        "import sys, json, chestxray_covid\n"
        "print(json.dumps([n for n in sys.modules if n.startswith('chestxray_covid.')]))"
    )
    assert submodules == ["chestxray_covid._version"]


@pytest.mark.slow
def test_star_import_gives_all_names_and_nothing_connects_or_logs() -> None:
    names = in_new_process(
        "import sys, json, logging, warnings\n"
        "filters, events = list(warnings.filters), []\n"
        "sys.addaudithook(lambda e, a: events.append(e) if e in ('socket.connect', "
        "'socket.getaddrinfo') else None)\n"
        "names = {}\n"
        "exec('from chestxray_covid import *', names)\n"
        "assert not events, events\n"
        "assert not logging.getLogger('chestxray_covid').handlers\n"
        "assert not [f for f in warnings.filters if f not in filters and 'chestxray' in str(f)]\n"
        "optional = ('pydicom', 'kagglehub', 'openvino', 'onnx', 'onnxruntime', 'gradio')\n"
        "assert not [n for n in optional if n in sys.modules]\n"
        "print(json.dumps([n for n in names if n != '__builtins__']))"
    )
    assert sorted(names) == sorted(chestxray_covid.__all__)


@pytest.mark.parametrize("name", ["no_such_name", "Clasifier", "training_config_"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'chestxray_covid' has no attribute '{name}'"):
        getattr(chestxray_covid, name)


@pytest.mark.slow
def test_a_type_checker_takes_a_data_set_for_one_of_torch_and_iterates_over_it(
    tmp_path: Path,
) -> None:
    script = tmp_path / "own.py"
    script.write_text(
        "from torch.utils.data import DataLoader, Subset\n"
        "from chestxray_covid import SyntheticChestXray\n"
        "phantoms = SyntheticChestXray(6)\n"
        "loader = DataLoader(phantoms, batch_size=2)\n"
        "part = Subset(phantoms + phantoms, [0])\n"
        "for image, target in phantoms:\n"
        "    image.size\n"
        "both = list(zip(phantoms, phantoms.samples))\n",
        encoding="utf-8",
    )
    options = ["--strict", "--follow-imports=silent", "--ignore-missing-imports", "--cache-dir"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(tmp_path / "cache"), str(script)],
        env={**os.environ, "MYPYPATH": str(SOURCE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_name_cannot_be_imported() -> None:
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from chestxray_covid import no_such_name")


def test_dir_lists_the_public_names_before_they_are_loaded() -> None:
    listed = in_new_process("import json, chestxray_covid; print(json.dumps(dir(chestxray_covid)))")
    assert set(chestxray_covid.__all__) <= set(listed)
    assert listed == sorted(set(listed))
