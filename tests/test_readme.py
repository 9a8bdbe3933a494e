"""The README shows real code, and the examples run."""

import ast
import csv
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def definition(path, name):
    """The source of a function or class, decorators included."""
    source = (ROOT / path).read_text(encoding="utf-8")
    node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


@pytest.mark.parametrize(("path", "name"), re.findall(r"<!-- code:([^:\s]+)(?::(\w+))? -->", README))
def test_code_shown_is_the_code(path, name):
    shown = re.search(
        rf"<!-- code:{re.escape(path)}{':' + name if name else ''} -->\n```python\n(.*?)\n```", README, re.S
    )
    real = definition(path, name) if name else (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    assert shown is not None, "no code block follows the marker"
    assert shown.group(1) == real


def test_small_things_are_small():
    """A process in two one-line methods, Euler-Maruyama in at most ten lines."""
    node = ast.parse(definition("sdekit/steppers/drift.py", "euler_maruyama")).body[0]
    assert node.end_lineno - node.lineno + 1 <= 10
    process = ast.parse(definition("examples/extend.py", "CosineVP")).body[0]
    methods = [n for n in process.body if isinstance(n, ast.FunctionDef)]
    assert [m.name for m in methods] == ["alpha", "sigma"]
    assert all(len(m.body) == 1 for m in methods)


@pytest.mark.parametrize("name", re.findall(r"<!-- table:(\w+) -->", README))
def test_tables_shown_are_the_results(name):
    """Every number of a table in the README stands in the CSV that the benchmark wrote."""
    lines = re.search(rf"<!-- table:{name} -->\n\n((?:\|.*\n)+)", README)
    assert lines is not None, "no table follows the marker"
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / f"{name}.csv").open(encoding="utf-8")))
    shown = [line.strip("| ").split("|") for line in lines[1].splitlines()[2:]]
    assert len(shown) >= 8  # of the many rows of the CSV the table may leave some out
    for cells in shown:
        label, *values = (cell.strip() for cell in cells)
        kind = "real" if label.startswith("real") else label
        mine = [row for row in rows if row["sampler"] == kind]
        if name == "overhead":
            expected = [f"{float(v):.2f}" for k, v in mine[0].items() if k.startswith("ratio")]
            assert [v for v in values if re.fullmatch(r"[\d.]+", v)][-2:] == expected
        else:
            means = {}
            for row in mine:
                means.setdefault(row["budget"], []).append(float(row["distance"]))
            expected = [f"{statistics.mean(v):.3g} ± {statistics.stdev(v):.2g}" for v in means.values()]
            assert [v for v in values if v] == expected


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


# What each example prints of a quantity with a known value, and how near it must be.
PRINTS = {
    "quickstart.py": [(r"data: (-?[\d.]+) nats", -1.02, 0.1)],
    "extend.py": [(r"rule: std ([\d.]+)", 1.020, 0.03), (r"weight 0.0: mean ([\d.]+)", 1.0, 0.02),
                  (r"weight 0.0: mean [\d.]+, std ([\d.]+)", 0.2, 0.02)],
}  # fmt: skip


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(example, tmp_path):
    env = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "examples" / example], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for pattern, value, slack in PRINTS[example]:
        assert float(re.search(pattern, done.stdout)[1]) == pytest.approx(value, abs=slack), done.stdout


def test_no_file_is_long_and_nothing_asks_for_a_class():
    for file in (ROOT / "sdekit").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, file
        assert not re.search(r"isinstance\([^)]*(SDE|HeatODE)", text), file
        assert not re.search(r"torch\.(manual_seed|rand|randn|randint)\((?![^\n]*generator)", text), file
