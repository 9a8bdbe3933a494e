"""The pages' tables and numbers are the results', and what their prose says of them is so."""

import csv
import math
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bits_per_dim
import choosing
import networks
import nfe_vs_error
import nfe_vs_fid
import page_data
import pages
import peers
from page_data import ROOT, distances, entries, errors, rows
from peers_figure import best_of

TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES}


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_block_is_written_from_the_results(page):
    found = pages.BLOCK.findall(TEXT[page])
    assert found
    assert len(found) == len(re.findall(r"<!-- (?:table|numbers):", TEXT[page]))
    for marker, name, text in found:
        made = pages.block(f"{'table' if 'table:' in marker else 'numbers'}:{name}")
        assert text == made, f"{page}, {name}: run python benchmarks/pages.py"
        assert len(made.splitlines()) >= (4 if "table:" in marker else 1)


def test_every_block_is_on_a_page():
    shown = {name for text in TEXT.values() for name in re.findall(r"<!-- ((?:table|numbers):\w+) -->", text)}
    assert shown == set(pages.BLOCKS)


def test_pages_are_rewritten_in_place_and_checked(monkeypatch, tmp_path, capsys):
    for page in pages.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    pages.main(["--check"])
    assert capsys.readouterr().out == ""
    page = tmp_path / "benchmarks/CHOOSING.md"
    page.write_text(re.sub(r"\| 5 \|.*", "| 5 | by hand |", page.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        pages.main(["--check"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "benchmarks/CHOOSING.md differs from the results\n"
    assert "by hand" in page.read_text(encoding="utf-8")
    pages.main([])
    assert page.read_text(encoding="utf-8") == TEXT["benchmarks/CHOOSING.md"]
    page.write_text("<!-- table:nothing -->\n\nx\n", encoding="utf-8")
    with pytest.raises(KeyError, match="nothing"):
        pages.main([])


def rewrite(path, change):
    """Every row of a CSV, changed in place."""
    with path.open(newline="", encoding="utf-8") as file:
        found = [change(row) or row for row in csv.DictReader(file)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


def test_what_is_recommended_follows_the_results(monkeypatch, tmp_path):
    """No sampler is the best by name: other results, another page; a breakdown is never recommended."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    monkeypatch.setattr(page_data, "RESULTS", tmp_path / "results")

    def network(row):
        if row["sampler"] == "ddim" and row["budget"] == "5":
            row["distance"] = "0.001"
        if row["sampler"] == "flow_3m" and row["budget"] == "6":
            row["distance"] = "nan"

    def exact(row):
        if (row["sampler"], row["grid"], row["budget"]) == ("euler", "karras", "10"):
            row["error"] = "1e-9"

    rewrite(tmp_path / "results" / "nfe_vs_fid_digits.csv", network)
    rewrite(tmp_path / "results" / "peers.csv", exact)
    line = {int(cells[1]): cells for cells in (r.split("|") for r in choosing.samples().splitlines()[2:])}
    assert line[5][3] == " `ddim`, inner_quadratic: 0.001 "
    assert line[6][3].split("`")[1] not in ("ddim", "flow_3m")
    assert line[10][6] == " `euler`, karras: 1e-09 / 1e-09 "


def shown(name):
    """The header's cells and the rows of a table of the benchmarks' page."""
    lines = re.search(rf"<!-- table:{name} -->\n\n((?:\|.*\n)+)", TEXT["benchmarks/README.md"])
    header, _, *found = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines[1].splitlines())
    return header, found


def test_the_table_of_distances_is_the_results():
    """Reckoned again, not by the benchmark's own functions."""
    _, table = shown("nfe_vs_fid_digits")
    assert len(table) >= 8  # of the many rows of the CSV the table may leave some out
    for label, *values in table:
        means = {}
        for row in rows("nfe_vs_fid_digits"):
            if row["sampler"] == ("real" if label.startswith("real") else label):
                means.setdefault(row["budget"], []).append(row["distance"])
        expected = [f"{statistics.mean(v):.3g} ± {statistics.stdev(v):.2g}" for _, v in sorted(means.items())]
        assert [v for v in values if v] == expected, label


def test_the_table_of_peers_is_the_results():
    found = [row for row in rows("peers") if row["problem"] == "digits64" and row["budget"]]
    header, table = shown("peers")
    assert set(pages.SIDES) <= {label for label, *_ in table}
    for label, *values in table:
        sampler, _, grid = label.removeprefix("sdekit ").partition(", ")
        for budget, value in zip(header[1:], values, strict=True):
            mine = [r for r in found if r["budget"] == int(budget)]
            if label in pages.SIDES:
                mine = [r for r in mine if r["side"] in pages.SIDES[label]]
            else:
                mine = [r for r in mine if (r["sampler"], r["grid"]) == (sampler, grid)]
            values_here = [r["error"] for r in mine if not math.isnan(r["error"])]
            assert value == (f"{min(values_here):.3g}" if values_here else ""), (label, budget)


def test_the_table_of_choices_is_the_results():
    """Reckoned again: the last column has the least product of errors, and the network's is near the least distance."""
    found, table = [errors(problem) for problem in peers.SIZES], distances()
    lines = re.search(r"<!-- table:choosing_samples -->\n\n((?:\|.*\n)+)", TEXT["benchmarks/CHOOSING.md"])
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[1].splitlines()[2:]]
    for budget, fitted, network, safe, _, exact in cells:
        n = int(budget)
        sampler, grid, *values = re.match(r"`(\w+)`, (\w+): (\S+) / (\S+)", exact).groups()
        least = min(math.prod(f[row][n] for f in found) for row in found[0] if all(n in f.get(row, {}) for f in found))
        assert math.prod(f[sampler, grid][n] for f in found) == least
        assert values == [f"{f[sampler, grid][n]:.3g}" for f in found]
        if fitted:
            assert fitted == f"{table['calibrated'][n].mean:.3g}"
        if network:
            sampler, value = re.match(r"`(\w+)`, \w+: (\S+)", network).groups()
            plain = [table[name][n].mean for name in choosing.of_kind(table, noise=False) if n in table[name]]
            assert value == f"{table[sampler][n].mean:.3g}"
            assert table[sampler][n].mean <= choosing.NEAR * min(plain)
            assert safe == f"{table[choosing.SAFE][n].mean:.3g}"


# What the pages say in words. A claim that fails after a new run is to be struck from its page, not from here alone.


def test_noise_helps_the_network_and_the_corrector_of_order_4_does_not():
    table = distances()
    quiet = choosing.of_kind(table, noise=False)
    loud = [entry.mean for name in choosing.of_kind(table, noise=True) for entry in table[name].values()]
    assert min(loud) < min(entry.mean for name in quiet for entry in table[name].values())
    for n in sorted(table["flow_3m"])[:2]:
        assert table["flow_unipc_3"][n].mean > 1.15 * table["flow_3m"][n].mean


def test_calibrations_help_formulas_more_than_the_network():
    for problem in peers.SIZES:
        found = entries("peers", problem)
        fitted, fixed = (best_of(found, side) for side in ("calibrated", "ours"))
        assert all(fitted[n].error < 0.9 * fixed[n].error for n in fitted)
    table = distances()
    assert all(table["calibrated"][n].mean < table["flow_3m"][n].mean * 1.2 for n in (5, 6, 10))


def test_networks_are_told_of_as_measured():
    """The README's span of the default to the best of diffusers."""
    found, ratios = rows("nfe_vs_error"), []
    for problem in networks.BENCH:
        here = [row for row in found if row["problem"] == problem]
        theirs = nfe_vs_error.best_of(here, "diffusers")
        mine = {row["nfe"]: row["error"] for row in here if (row["side"], row["sampler"]) == ("sdekit", choosing.SAFE)}
        ratios += [mine[n] / theirs[n][0] for n in theirs]
    span = f"the default errs {min(ratios):.2f} to {max(ratios):.2f} times".replace("0.", ".")
    assert span in TEXT["README.md"].replace("\n", " ")


def test_the_grid_helps_everybody_and_one_row_is_the_best():
    found = entries("peers", "digits64")
    plain, ours = best_of(found, "peers"), best_of(found, "peers", "peers on our grids")
    assert all(ours[n].error < plain[n].error for n in plain)
    fixed = best_of(found, "ours", "peers", "peers on our grids")
    assert {e.sampler for e in fixed.values()} == {"flow_unipc_3"}
    bold = {line.split()[1] for line in pages.same_name().splitlines() if "**" in line}
    assert bold <= {"dpmpp_3m", "unipc_3", "ipndm"}
    assert choosing.best_adaptive() == "adams"


def test_bits_are_in_the_order_of_theory():
    by_bound = {(row["process"], row["bound"]): row["held out"] for row in rows("bits_per_dim")}
    for process in bits_per_dim.PROCESSES:
        flow, continuous, chain = (by_bound[process, b] for b in ("flow", "continuous bound", "chain of 100"))
        assert flow < continuous < chain < math.log2(bits_per_dim.LEVELS)


def test_protocols_are_as_said():
    text = TEXT["benchmarks/README.md"].replace("\n", " ")
    for said in (
        f"All take {peers.SIZES['digits64']} samples",
        f"{bits_per_dim.HELD_OUT} of the digits held out",
        f"log2({bits_per_dim.LEVELS}) = {math.log2(bits_per_dim.LEVELS):.2f} bits",
    ):
        assert said in text, said
    assert nfe_vs_fid.parse(["--full"]).seeds == 3
    assert {row["samples"] for row in rows("nfe_vs_fid_digits")} == {nfe_vs_fid.parse(["--full"]).samples}
