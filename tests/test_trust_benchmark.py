"""The bench of planted mistakes measures what it says, and its kept results bear out the promise."""

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compare_digits
import trust
from page_data import rows


def is_ok(row):
    return {"True": True, "False": False}[str(row["ok"])]


def test_what_is_promised():
    """Of 40 planted mistakes at least 38 found and named right, none of 20 right models accused."""
    found = rows("trust")
    wrong, right = ([row for row in found if bool(row["mistake"]) == planted] for planted in (True, False))
    assert len(wrong) >= 40
    assert sum(not is_ok(row) and row["named"] == 1 for row in wrong) >= max(38, len(wrong) - 2)
    assert len(right) >= 20
    assert all(is_ok(row) for row in right), [row for row in right if not is_ok(row)]


def test_the_results_are_of_this_bench():
    """Every case of the code has its row; what counts as named is what the code says, reckoned again."""
    found = {(row["model"], row["mistake"]): row for row in rows("trust")}
    planted = {(one.model, one.mistake): one for one in trust.planted()}
    assert set(found) == {*planted, *((name, "") for name in trust.right())}
    for key, one in planted.items():
        assert bool(found[key]["named"]) == any(words in found[key]["found"] for words in one.says)
    assert len(planted) == len(trust.planted())
    said = trust.summary(list(found.values()))
    assert said.startswith(f"Of {len(planted)} planted mistakes ")
    assert said.endswith(f"of {len(found) - len(planted)} right models 0 are accused.")
    assert trust.table(list(found.values())).count("\n") >= len(planted)


def test_a_planted_model_is_wrong_and_a_right_one_is_the_same_without_it():
    """The bench's exact network says what the mixture's score says; a mistake of it says another thing."""
    sde, score, x = trust.closed().case()
    state = sde.perturb(x[:8], 0.3, seed=0)
    torch.testing.assert_close(score(state, 0.3), trust.mixture().score(sde)(state, 0.3), rtol=1e-4, atol=1e-4)
    for one in trust.planted():
        if one.model == "mixture" and "data" not in one.mistake and "latents" not in one.mistake:
            process, wrong, _ = one.make()
            try:
                off = wrong(state, 0.3) - score(state, 0.3)
            except ValueError:  # a clock beyond the network's
                continue
            assert off.abs().max() > 1e-4 or type(process) is not type(sde), one.mistake


def test_a_quick_run_writes_the_same_columns(tmp_path, capsys, monkeypatch):
    """From end to end, of a few of the exact model, which is quick."""
    planted, right = trust.planted(), trust.right()
    few = [one for one in planted if one.model == "mixture"]
    monkeypatch.setattr(trust, "planted", lambda: few)
    monkeypatch.setattr(trust, "right", lambda: {k: v for k, v in right.items() if k.startswith("mixture")})
    trust.main(["--quick", "--out", str(tmp_path)])
    with (tmp_path / "trust.csv").open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 6
    assert list(written[0]) == list(rows("trust")[0])
    assert [row["mistake"] for row in written] == [*(one.mistake for one in few[:3]), "", "", ""]
    assert all(is_ok(row) == (not row["mistake"]) for row in written)
    assert "Of 3 planted mistakes 3 are found and 3 named right" in capsys.readouterr().out


def test_compare_names_rows_that_real_images_would():
    """At each budget, to within the spread over seeds of the best row's Fréchet distance; euler and ddim are not so."""
    found, real = rows("compare"), compare_digits.distances()
    for budget in compare_digits.BUDGETS:
        least, spread = min(real[budget].values())
        assert real[budget][compare_digits.best(found, budget)[0]][0] < least + spread
        assert real[budget]["ddim"][0] > least + spread or budget == 20
