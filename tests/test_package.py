"""What a user meets before the first call: a light import, complete packages, one version."""

import ast
import configparser
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ttr_np

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PACKAGES = ("ttr_np", "cuda_kernels")
LAYOUT = (
    "setup.cfg pyproject.toml README.md LICENSE CHANGELOG.md CITATION.cff .ci/run ttr_np cuda_kernels tests benchmarks "
    "docs ttr_np/py.typed ttr_np/__init__.py ttr_np/__main__.py ttr_np/notation.py ttr_np/framework.py "
    "ttr_np/weights.py ttr_np/regressors.py ttr_np/optimizers.py ttr_np/features.py ttr_np/layers.py "
    "ttr_np/solvers/__init__.py ttr_np/backends.py cuda_kernels/__init__.py"
).split()
HEAVY = ("numba", "cupy", "matplotlib", "sklearn", "scipy", "dask", "torch", "jax", "cuda_kernels")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> list[Path]:
    """Every Python file of the packages."""
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_the_import_loads_numpy_and_nothing_heavier():
    loaded = python("import sys, ttr_np; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert "numpy" in loaded and not set(HEAVY) & set(loaded)


def test_the_experiments_are_there_when_they_are_asked_for():
    code = "import sys, ttr_np; print('ttr_np.experiments' in sys.modules, ttr_np.experiments.drift.__name__)"
    assert python(code).split() == ["False", "drift"]
    with pytest.raises(AttributeError, match="no attribute 'experiment'"):
        ttr_np.experiment  # noqa: B018


def test_an_operator_on_numpy_loads_no_compiler():
    code = "import sys, ttr_np; ttr_np.delta_rule([[1.]], [[1.]], [[1.]], [1.], backend='numpy'); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in python(code).split()}
    assert not {"numba", "cupy", "matplotlib", "sklearn"} & loaded


def test_the_import_is_quick():
    code = "import numpy, time; start = time.process_time(); import ttr_np; print(time.process_time() - start)"
    own = min(float(python(code)) for _ in range(5))  # processor time: other work on the machine does not count
    assert own < 0.25, f"import ttr_np takes {own:.2f} s besides NumPy"


def test_every_package_is_listed():
    listed = SETUP["options"]["packages"].split()
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in sources() if path.name == "__init__.py"}
    assert listed == sorted(listed, key=lambda name: (name.split(".")[0] != "ttr_np", name))
    assert set(listed) == found


def test_every_file_of_a_package_is_shipped():
    data = {package: patterns.split() for package, patterns in SETUP["options.package_data"].items()}
    for package in SETUP["options"]["packages"].split():
        folder = ROOT / package.replace(".", "/")
        shipped = {path for pattern in data.get(package, []) for path in folder.glob(pattern)}
        others = {path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert others == shipped, f"package_data of {package}"


@pytest.mark.parametrize("name", LAYOUT)
def test_the_layout_is_complete(name):
    assert (ROOT / name).exists()


def test_one_version():
    version = ttr_np.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert SETUP["metadata"]["version"] in (version, "attr: ttr_np.__version__")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version
    try:
        assert importlib.metadata.version("ttr_np") == version
    except importlib.metadata.PackageNotFoundError:
        pass  # run from the source tree


def test_what_is_required_is_what_is_declared():
    required = {re.split(r"[<>=]", line)[0] for line in SETUP["options"]["install_requires"].split()}
    assert required == {"numpy", "scipy", "numba"}
    assert SETUP["options"]["python_requires"] == ">=3.10"
    assert set(SETUP["options.extras_require"]) == {"cuda12", "cuda13", "plot", "docs", "dask", "test", "bench"}


def test_the_build_file_holds_the_build_backend_and_nothing_else():
    assert len((ROOT / "pyproject.toml").read_text().splitlines()) == 3


def test_the_command_of_the_table_exists():
    name, target = (word.strip() for word in SETUP["options.entry_points"]["console_scripts"].split("="))
    module, function = target.split(":")
    assert name == "ttr" and callable(getattr(importlib.import_module(module), function))


def test_the_runner_can_be_run():
    runner = ROOT / ".ci" / "run"
    assert runner.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(runner)], check=False).returncode == 0


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_reads_like_one(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    assert path.stem not in ("utils", "helpers", "common", "misc")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            described = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - described <= 45, f"{node.name} is too long"


def test_no_file_speaks_of_the_machine_it_was_written_on():
    private = re.compile("/" + "work/|/" + r"tmp/|before-" + "stop|BRI" + r"EF\.md|DES" + r"IGN\.md|PIT" + r"FALLS\.md")
    kept = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    for name in filter(None, kept.split("\0")):
        path = ROOT / name
        if path.exists() and path.suffix in (".py", ".md", ".cfg", ".toml", ".cu", ".cuh", ".cff", ""):
            found = private.search(path.read_text(errors="ignore"))
            assert not found, f"{name} mentions {found[0]}"
