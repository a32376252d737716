"""The documentation: it builds without a warning, its snippets are tests, its figures and tables come from the code."""

from __future__ import annotations

import configparser
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttr_np import experiments
from ttr_np.cli.experiment import NAMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SHOWN = {"pycon", "text", "{toctree}", "{literalinclude}", "{eval-rst}"}
COMMAND = "python -m sphinx -W docs build/docs"


def setup():
    """The settings of the package and its tests."""
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg", encoding="utf-8")
    return found


def blocks(page):
    """Language and text of every fenced block."""
    return re.findall(r"^```(\S*).*?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_code_is_a_snippet_that_runs_as_a_test(page):
    tests = setup()["tool:pytest"]
    assert "docs" in tests["testpaths"].split() and "--doctest-glob=docs/*.md" in tests["addopts"].split()
    for language, text in blocks(page):
        assert language in SHOWN
        assert language != "pycon" or text.startswith(">>> ")


def test_the_tutorial_has_snippets_for_each_of_its_steps():
    headings = [line for line in (DOCS / "tutorial.md").read_text().splitlines() if re.match(r"## \d", line)]
    assert len(headings) == 6
    assert sum(language == "pycon" for language, _ in blocks(DOCS / "tutorial.md")) > len(headings)


def test_every_figure_and_table_is_there_and_is_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    figure, table = r"!\[[^]]+\]\((figures/\w+\.png)\)", r"literalinclude\} (results/\w+\.txt)"
    for folder, pattern in (("figures", figure), ("results", table)):
        kept = sorted(f"{folder}/{path.name}" for path in (DOCS / folder).iterdir())
        assert sorted(re.findall(pattern, text)) == kept


def test_one_command_builds_it_and_an_extra_installs_what_that_needs():
    extras = setup()["options.extras_require"]
    assert set(extras["docs"].split()) <= set(extras["test"].split("\n"))
    assert COMMAND in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, *COMMAND.split()[1:-1], str(tmp_path), "-q", "-d", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    for name in ("delta_rule", "Layer", "recall", "experiments.capacity", "forecasting.forecast"):
        assert f'id="ttr_np.{name}"' in reference
    for page in PAGES:
        assert (tmp_path / f"{page.stem}.html").exists()


def figures():
    """The module ``docs/figures.py``."""
    spec = importlib.util.spec_from_file_location("figures_of_the_docs", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(text):
    """All numbers of a text."""
    return [float(x) for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


@pytest.mark.slow
def test_the_command_makes_every_figure_and_the_tables_that_are_shown(tmp_path, results, monkeypatch):
    for name in NAMES:
        monkeypatch.setattr(experiments, name, lambda name=name: results[name])
    monkeypatch.setenv("TTR_BACKEND", "numpy")
    figures().main([str(tmp_path)])
    for path in sorted((DOCS / "figures").iterdir()):
        made = (tmp_path / "figures" / path.name).read_bytes()
        assert made.startswith(b"\x89PNG") and len(made) > 0.5 * path.stat().st_size
    for path in sorted((DOCS / "results").iterdir()):
        kept, made = path.read_text(encoding="utf-8"), (tmp_path / "results" / path.name).read_text(encoding="utf-8")
        assert re.sub(r"[\d.e+-]+", "", kept).split() == re.sub(r"[\d.e+-]+", "", made).split(), path.name
        old, new = np.array(numbers(kept)), np.array(numbers(made))
        np.testing.assert_allclose(new, old, rtol=0.02, atol=1e-3, err_msg=path.name)
