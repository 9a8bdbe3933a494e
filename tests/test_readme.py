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
    node = ast.parse(definition("sdekit/solvers/steppers/drift.py", "euler_maruyama")).body[0]
    assert node.end_lineno - node.lineno + 1 <= 10
    process = ast.parse(definition("examples/extend.py", "CosineVP")).body[0]
    methods = [n for n in process.body if isinstance(n, ast.FunctionDef)]
    assert [m.name for m in methods] == ["alpha", "sigma"]
    assert all(len(m.body) == 1 for m in methods)


def shown(name):
    """The rows of a table of the README, as lists of cells, and its header's."""
    lines = re.search(rf"<!-- table:{name} -->\n\n((?:\|.*\n)+)", README)
    assert lines is not None, "no table follows the marker"
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines[1].splitlines())
    return header, rows


def results(name):
    return list(csv.DictReader((ROOT / "benchmarks" / "results" / f"{name}.csv").open(encoding="utf-8")))


def test_the_table_of_distances_is_the_results():
    """Every number of a table in the README stands in the CSV that the benchmark wrote, here and below."""
    rows = results("nfe_vs_fid_digits")
    _, table = shown("nfe_vs_fid_digits")
    assert len(table) >= 8  # of the many rows of the CSV the table may leave some out
    for label, *values in table:
        means = {}
        for row in rows:
            if row["sampler"] == ("real" if label.startswith("real") else label):
                means.setdefault(int(row["budget"]), []).append(float(row["distance"]))
        expected = [f"{statistics.mean(v):.3g} ± {statistics.stdev(v):.2g}" for _, v in sorted(means.items())]
        assert [v for v in values if v] == expected, label


def test_what_is_said_of_twelve_seeds_is_the_results():
    by_row = {}
    for row in results("nfe_vs_fid_digits_12_seeds"):
        if row["budget"] == "5":
            by_row.setdefault(row["sampler"], []).append(float(row["distance"]))
    fixed = min((by_row["flow_3m"], by_row["v_3m"]), key=statistics.mean)
    assert len(fixed) == 12
    times = statistics.mean(by_row["calibrated"]) / statistics.mean(fixed)
    common = statistics.correlation(by_row["calibrated"], fixed)
    assert f"{times:.2f} times the distance of the best fixed row, with a correlation of {common:.2f}. " in README


def test_what_is_said_of_a_model_trained_anew_is_the_results():
    found = []
    for name in ("nfe_vs_fid_digits_trained", "nfe_vs_fid_digits"):
        means = {}
        for row in results(name):
            if row["sampler"] == "unipc_2":
                means.setdefault(int(row["budget"]), []).append(float(row["distance"]))
        assert sorted(means) == [5, 6, 10, 20]
        found.append(" / ".join(f"{statistics.mean(v):.3g}" for _, v in sorted(means.items())))
    assert f"{found[0]}, the bundled one's are {found[1]}" in README


def test_the_table_of_overheads_is_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from peers_figure import overhead_table

    lines = re.search(r"<!-- table:peers_overhead -->\n\n((?:\|.*\n)+)", README)
    printed = overhead_table(results("peers_overhead")).splitlines()
    assert lines[1].splitlines() == printed
    assert len(printed) >= 20


def test_the_table_of_peers_is_the_results():
    rows = [row for row in results("peers") if row["problem"] == "digits64" and row["budget"] != "0"]
    header, table = shown("peers")
    sides = {
        "best of the peers": ("peers",),
        "best of the peers, on our grids too": ("peers", "peers on our grids"),
        "sdekit, best on fixed grids": ("ours",),
        "sdekit, calibrated": ("calibrated",),
    }
    assert set(sides) <= {label for label, *_ in table}
    for label, *values in table:
        sampler, _, grid = label.removeprefix("sdekit ").partition(", ")
        for budget, value in zip(header[1:], values, strict=True):
            mine = [r for r in rows if r["budget"] == budget]
            if label in sides:
                mine = [r for r in mine if r["side"] in sides[label]]
            else:
                mine = [r for r in mine if (r["sampler"], r["grid"]) == (sampler, grid)]
            errors = [float(r["error"]) for r in mine if r["error"] != "nan"]
            assert value == (f"{min(errors):.3g}" if errors else ""), (label, budget)
    least = {label: [float(value) for value in values if value] for label, *values in table}
    best = least["sdekit flow_unipc_3, vp_quadratic"]  # of all fixed rows, and of the peers' whoever has the grid
    assert best == least["sdekit, best on fixed grids"]
    assert all(a < b for a, b in zip(best, least["best of the peers, on our grids too"], strict=True))
    distances = {label: values for label, *values in shown("nfe_vs_fid_digits")[1]}
    harmed, plain = ([float(v.split()[0]) for v in distances[name][:2]] for name in ("flow_unipc_3", "flow_3m"))
    assert all(a > 1.5 * b for a, b in zip(harmed, plain, strict=True))  # at five and six evaluations


def test_the_table_of_adaptive_methods_is_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import adaptive
    from peers_figure import Entry

    numbers = {"budget": int, "nfe": int, "nfe_per_sample": float, "error": float}
    entries = [Entry(**{k: numbers.get(k, str)(v) for k, v in row.items()}) for row in results("adaptive")]
    printed = adaptive.table(adaptive.curves(entries)).splitlines()
    lines = re.search(r"<!-- table:adaptive -->\n\n((?:\|.*\n)+)", README)
    assert lines[1].splitlines() == printed


def test_the_table_of_likelihoods_is_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import likelihood

    numbers = ("tolerance", "evaluations", "mean", "max")
    rows = [{k: float(v) if k in numbers else v for k, v in row.items()} for row in results("likelihood")]
    lines = re.search(r"<!-- table:likelihood -->\n\n((?:\|.*\n)+)", README)
    assert lines[1].splitlines() == likelihood.table(rows).splitlines()


def test_the_table_of_bits_is_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bits_per_dim

    lines = re.search(r"<!-- table:bits_per_dim -->\n\n((?:\|.*\n)+)", README)
    assert lines[1].splitlines() == bits_per_dim.table(results("bits_per_dim")).splitlines()
    by_bound = {(row["process"], row["bound"]): float(row["held out"]) for row in results("bits_per_dim")}
    for process in ("VP", "sub-VP"):
        flow, continuous, chain = (by_bound[process, b] for b in ("flow", "continuous bound", "chain of 100"))
        assert flow < continuous < chain < 4.09  # what the README says of them


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


# What each example prints of a quantity with a known value, and how near it must be.
PRINTS = {
    "interpolate.py": [(r"moons: round-trip error ([\d.e-]+)", 0.0, 1e-3),
                       (r"digits: round-trip error ([\d.e-]+)", 0.0, 0.02)],
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
