"""The trained U-Net of diffusers: what the page says of it, of the results kept and of the code as it is."""

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import diffusers_rows
import diffusers_unet
from nfe_vs_error import DEFAULT, OURS, SAMPLES, best_of
from page_data import RESULTS, rows

TABLES = ("diffusers_unet", "diffusers_unet_time", "diffusers_unet_adaptive")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The tables of a quick run."""
    out = tmp_path_factory.mktemp("out")
    diffusers_unet.main(["--quick", "--out", str(out)])
    assert (out / "diffusers_unet.png").stat().st_size > 10_000
    tables = {}
    for name in TABLES:
        with open(out / f"{name}.csv", newline="", encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file))
    return tables


def test_the_kept_results_are_of_todays_rows(quick):
    """Of every sampler and budget, in the columns that the code writes."""
    for name in TABLES:
        assert list(rows(name)[0]) == list(quick[name][0]), name
    sides = {"sdekit": OURS, "diffusers": list(diffusers_rows.DISCRETE)}
    kept = {(row["side"], row["sampler"], row["nfe"]) for row in rows("diffusers_unet")}
    assert kept == {
        *((side, name, nfe) for side, names in sides.items() for name in names for nfe in diffusers_unet.COLUMNS),
        *(("calibrated", "calibrated", nfe) for nfe in diffusers_unet.CALIBRATED),
    }
    timed = {"sdekit": diffusers_unet.TIMED_ROWS, "diffusers": sides["diffusers"], "calibrated": ["calibrated"]}
    kept = {(row["side"], row["sampler"], row["batch"]) for row in rows("diffusers_unet_time")}
    assert kept == {(side, name, b) for side, names in timed.items() for name in names for b in (1, SAMPLES)}
    assert (RESULTS / "diffusers_unet.png").exists()


def test_the_kept_results_hold_what_is_promised():
    """The default is before the best of diffusers at every budget, by half up to 10 evaluations, and costs the same.
    A calibration is before every row of ours."""
    found, spent = rows("diffusers_unet"), rows("diffusers_unet_time")
    theirs, ours = best_of(found, "diffusers"), diffusers_unet.errors(found, "sdekit", DEFAULT)
    assert all(ours[nfe] < (0.5 if nfe <= 10 else 0.8) * theirs[nfe][0] for nfe in diffusers_unet.COLUMNS)
    best, fitted = best_of(found, "sdekit"), best_of(found, "calibrated")
    assert all(fitted[nfe][0] < 0.8 * best[nfe][0] for nfe in diffusers_unet.CALIBRATED)
    assert all(row["ratio"] < 1.15 for row in spent if row["side"] != "diffusers")
    assert all(row["evaluations"] <= row["nfe"] for row in found)
    *adams, bits = rows("diffusers_unet_adaptive")
    assert [row["value"] for row in adams] == sorted((row["value"] for row in adams), reverse=True)
    assert 2 < bits["value"] < 4


def test_a_quick_run_says_the_same(quick):
    """Of 8 of the 64 noises, and a flow in fewer steps: near to what is kept."""
    kept = {(row["side"], row["sampler"], row["nfe"]): row["error"] for row in rows("diffusers_unet")}
    assert len(quick["diffusers_unet"]) == 4 * len(diffusers_unet.COLUMNS)
    for row in quick["diffusers_unet"]:
        assert float(row["error"]) == pytest.approx(kept[row["side"], row["sampler"], int(row["nfe"])], rel=0.3)
