"""Conflict drift in the report: what the chart holds, and words that follow from the intervals."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_drift import make_column, make_drift, make_step
from fake_run import Run

from castune.artifacts.drift_result import ColumnDrift
from castune.report import figures
from castune.report.drift import drift_chart, drift_verdict
from castune.report.page import write_figures

N = {"heads": 270, "utility": 80, "safety": 64}


def records(column: ColumnDrift) -> list[dict[str, object]]:
    chart = drift_chart(make_drift([make_step(25, column), make_step(50, column)]))
    assert chart is not None
    (found,) = chart.to_dict()["datasets"].values()
    return list(found)


def test_the_chart_has_the_ceiling_and_the_interval_of_every_step() -> None:
    found = records(make_column(0.9))
    measured = {row["step"]: row for row in found if "low" in row}
    ceiling = {row["step"]: row["value"] for row in found if "low" not in row}
    # Before the first step there is no drift: both lines start where maps on other examples agree.
    assert ceiling == {0: 0.64, 25: 0.56, 50: 0.56}
    assert [measured[0][key] for key in ("value", "low", "high")] == [0.64] * 3
    for step in (25, 50):
        ends = [measured[step][key] for key in ("value", "low", "high")]
        assert ends == [pytest.approx(0.56 * x) for x in (0.9, 0.839, 0.943)]


def test_what_is_not_known_is_not_drawn() -> None:
    column = make_column(None, ceiling=None, reliability_now=None)
    assert [row["step"] for row in records(column)] == [0, 0]
    nothing = make_column(None, ceiling=None, reliability_first=None, reliability_now=None)
    assert drift_chart(make_drift([make_step(25, nothing)])) is None


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (make_column(0.8), "has changed beyond measurement noise (n = 80 utility examples and 64 harmful prompts): 0.80 (0.74 to 0.84)"),
        (make_column(0.97), "no drift seen beyond measurement noise at n = 80 utility examples and 64 harmful prompts: 0.97 (0.91 to 1.01)"),
        (make_column(0.957), "no drift seen"),  # the interval ends at 1
        (make_column(None), "cannot be told"),
        (make_column(0.5, corrected_low=None, corrected_high=None), "cannot be told"),
    ],
)  # fmt: skip
def test_words_follow_from_the_interval(column: ColumnDrift, said: str) -> None:
    assert said in drift_verdict(make_step(25, column), N)


def test_the_page_has_the_numbers_and_a_bounded_list_of_heads(tmp_path: Path, run: Run) -> None:
    assert 'id="drift"' not in run.write(tmp_path / "report.html")
    run.drifts = {"safe": make_drift([make_step(25, make_column(), 0), make_step(1050, make_column(), 57)])}
    html = run.write(tmp_path / "report.html")
    for said in (
        "After 1,050 steps the order of the heads has changed", "51 of 67 (16.6 by chance)", "52 of 68 (17.1 by chance)",
        "57 heads are in another zone", "1 of them went from one end", "37 more are in drift.json", "layer 2, head 1",
        "0.91 (0.85 to 0.96)", "270 heads, seed 21", "13.5 min", 'data-chart="drift_safe"', "0.39 (Jaccard)",
    ):  # fmt: skip
        assert said in html, said
    assert "layer 2, head 2<" not in html
    run.drifts = {"safe": make_drift([make_step(25, make_column(None, spearman=None), 0)])}
    html = run.write(tmp_path / "report.html")
    assert "No head is in another zone" in html
    assert "undefined" in html


def test_arms_of_any_name_have_a_figure_of_their_own(tmp_path: Path, run: Run) -> None:
    drifts = {arm: make_drift([make_step(25, make_column())], arm) for arm in ("safe", "safe+pcgrad")}
    made = figures.charts(run.cmap, {}, {}, {}, drifts)
    assert set(made) == {"conflict_map", "score_distribution", "drift_safe", "drift_safe+pcgrad"}
    files = write_figures(tmp_path, cmap=run.cmap, selections={}, tunings={}, evaluations={}, drifts=drifts)
    found = {path.name for path in files if path.name.startswith("drift")}
    assert found == {f"{name}.{suffix}" for name in ("drift_safe", "drift_safe+pcgrad") for suffix in ("svg", "png")}
    svg = (tmp_path / "drift_safe.svg").read_text()
    assert "Noise ceiling" in svg
    assert "Optimiser step" in svg


def test_names_of_arms_stay_text(tmp_path: Path, run: Run) -> None:
    attack = "<script>alert(1)</script>"
    run.drifts = {attack: make_drift([make_step(25, make_column())], attack)}
    assert attack not in run.write(tmp_path / "report.html")
