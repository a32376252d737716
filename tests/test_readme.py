"""What the README says is so: its table, its commands, its names."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import ttr_np
from ttr_np.backends import BACKENDS, ON_GPU, operators_of
from ttr_np.cli.experiment import NAMES
from ttr_np.cli.layers import markdown
from ttr_np.cli.outputs import WIDTH
from ttr_np.notation import OPERATORS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    """The text between two marks."""
    (text,) = re.findall(f"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", README, re.DOTALL)
    return text


def command(name: str) -> str:
    """The one line of the fenced block after a mark."""
    (text,) = re.findall(f"<!-- ci: {name} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert text.count("\n") == 1
    return text.strip()


def test_the_table_is_that_of_the_library():
    assert between("layers") == markdown() + "\n", "paste the output of `ttr layers --markdown` between the marks"


def test_the_excerpt_quotes_the_table():
    for row in between("excerpt").splitlines()[2:]:
        name, *choices = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        layer = ttr_np.layers[name]
        assert choices == [str(layer.weights), str(layer.regressor), str(layer.optimizer)]


@pytest.mark.parametrize(
    ("name", "last"), [("recall", "ttr recall --plot recall.png"), ("test", "python -m pytest -n 2 --dist worksteal")]
)
def test_a_command_creates_its_environment_installs_and_runs(name, last):
    create, install, run = command(name).split(" && ")
    assert create == "python3 -m venv .venv"
    (extra,) = re.findall(r"pip install --quiet '\.\[(\w+)\]'$", install)
    assert extra in extras()
    assert run == f".venv/bin/{last}"


def extras() -> set[str]:
    """Names of the extras in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(setup["options.extras_require"])


def test_every_extra_and_every_backend_is_explained():
    assert {name for group in re.findall(r"'\.\[(.*?)\]'", README) for name in group.split(",")} == extras()
    assert all(f"| `{name}` |" in README for name in BACKENDS)


def test_the_operators_of_numpy_alone_are_named():
    every, flat = {*OPERATORS}, " ".join(README.split())
    text = flat.split("Six run on `numpy` alone:")[1].split("All kernels")[0]
    but = flat.split("Fourteen operators have kernels on `numba`, twelve of them (all but")[1].split(")")[0]
    compiled = {*operators_of("numba")}
    assert every - compiled == {*re.findall(r"`(\w+)`", text)} and (len(compiled), len(every)) == (14, 20)
    for backend in ON_GPU:
        assert compiled - {*operators_of(backend)} == {*re.findall(r"`(\w+)`", but)}
        assert len(operators_of(backend)) == 12


def test_the_quoted_result_names_layers_that_exist_and_fits():
    lines = between("recall").splitlines()
    table = [line for line in lines if re.match(r"\w+ .*\d$", line)]
    assert len(table) >= 10
    assert all(line.split()[0] in ttr_np.layers for line in table if not line.startswith("layer "))
    assert all(len(line) <= WIDTH for line in lines if not line.startswith("!"))


def test_every_experiment_is_listed():
    section = README.split("## What `ttr experiment` shows")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == ["NAME", *NAMES]


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
