from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from fake_run import (
    Run,
    make_domains,
    make_evaluation,
    make_map,
    make_mixed_map,
    make_run,
    make_selection,
    make_suite,
)

from castune.artifacts import ConflictMap
from castune.report import figures
from castune.report.labels import Coordinate, ScatterPoint, place_labels
from castune.report.page import write_figures
from castune.report.theme import theme
from castune.selection import select

NAMES = {
    "conflict_map",
    "zones",
    "score_distribution",
    "trade_off",
    "trade_off_over_refusal",
    "training_loss",
}


def rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a chart of one data set."""
    (found,) = spec["datasets"].values()
    return list(found)


def test_a_whole_run_gives_every_chart_and_an_empty_one_the_map_alone(run: Run) -> None:
    assert set(figures.charts(run.cmap, run.selections, run.tunings, run.evaluations)) == NAMES
    assert set(figures.charts(run.cmap, {}, {}, {})) == {"conflict_map", "score_distribution"}


@pytest.mark.parametrize("heads_by_layer", [(9,) * 30, (4, 8, 2, 16), (1,), (64,) * 80])
def test_the_map_has_every_head_once_with_its_numbers_and_arms(heads_by_layer: tuple[int, ...]) -> None:
    cmap = make_map(heads_by_layer)
    selections = {"safe": make_selection(cmap, "safe"), "random": make_selection(cmap, "random")}
    found = rows(figures.conflict_heatmap(cmap, selections).to_dict())
    assert [(row["layer"], row["head"]) for row in found] == cmap.heads
    for name in figures.SCORES:
        assert [row[name] for row in found] == cmap.column(name).tolist()
    for arm, selection in selections.items():
        assert {(row["layer"], row["head"]) for row in found if arm in row["arms"]} == set(selection.heads)


def test_a_missing_standard_error_is_null_and_not_zero() -> None:
    cmap = make_map((32,) * 32)
    missing = {pair for pair, error in zip(cmap.heads, cmap.column("utility_shift_se"), strict=True) if error != error}
    found = rows(figures.conflict_heatmap(cmap, {}).to_dict())
    assert missing
    assert {(row["layer"], row["head"]) for row in found if row["utility_shift_se"] is None} == missing


@pytest.mark.parametrize("score", list(figures.SCORES))
def test_the_switch_changes_colours_and_title(run: Run, score: str) -> None:
    spec = figures.conflict_heatmap(run.cmap, run.selections).to_dict()
    first = vl_convert.vegalite_to_svg(spec)
    chosen = next(param for param in spec["params"] if param["name"] == "score")
    assert score in chosen["bind"]["options"]
    chosen["value"] = score
    drawn = vl_convert.vegalite_to_svg(spec)
    assert f">{figures.SCORES[score]}<" in drawn
    assert (_cells(drawn) == _cells(first)) == (score == "conflict_score")


def test_the_map_of_every_domain_can_be_shown() -> None:
    cmap = make_domains((3,) * 4, ["knowledge", "maths"])
    spec = figures.conflict_heatmap(cmap, {"safe": make_selection(cmap, "safe")}).to_dict()
    chosen = next(param for param in spec["params"] if param["name"] == "shown_domain")
    assert chosen["bind"]["options"] == [None, "knowledge", "maths"]
    shown = {}
    for name in chosen["bind"]["options"]:
        chosen["value"] = name
        one = cmap if name is None else cmap.domains[name]
        assert [row["conflict_score"] for row in rows(spec) if row["domain"] == name] == one.column(
            "conflict_score"
        ).tolist()
        shown[name] = _cells(vl_convert.vegalite_to_svg(spec))
        alone = figures.conflict_heatmap(ConflictMap(one.table, {"model": {"fingerprint": ""}}), {}).to_dict()
        assert shown[name] == _cells(vl_convert.vegalite_to_svg(alone)), "a cell a head, coloured by this map's range"
    assert shown[None] != shown["knowledge"] != shown["maths"]


def test_without_domains_there_is_no_switch(run: Run) -> None:
    spec = figures.conflict_heatmap(run.cmap, run.selections).to_dict()
    assert {param["name"] for param in spec["params"]} == {"score", "arm"}
    assert "domain" not in rows(spec)[0]


def test_one_kind_of_unit_is_shown_at_a_time() -> None:
    cmap = make_mixed_map()
    selections = {zone: select(cmap, zone=zone, fraction=0.25) for zone in ("safe", "risky")}
    spec = figures.conflict_heatmap(cmap, selections).to_dict()
    switch = next(param for param in spec["params"] if param["name"] == "shown_unit")
    assert switch["bind"]["options"] == ["q_head", "mlp_group"]
    assert switch["bind"]["labels"] == ["query heads", "groups of MLP neurons"]
    found = rows(spec)
    assert [(row["unit"], row["layer"], row["head"]) for row in found] == cmap.units
    for arm, selection in selections.items():
        chosen = {(row["unit"], row["layer"], row["head"]) for row in found if arm in row["arms"]}
        assert chosen == set(selection.units)
    drawn = {}
    for kind in ("q_head", "mlp_group"):
        switch["value"] = kind
        drawn[kind] = vl_convert.vegalite_to_svg(spec)
    cells = {kind: svg.count("<path") for kind, svg in drawn.items()}
    assert cells["q_head"] - cells["mlp_group"] == 12 * (9 - 4)
    grids = figures.zones(cmap, selections).to_dict()["concat"]
    assert [grid["title"] for grid in grids] == [
        f"{arm}: {n} of {4 * n} {words}"
        for arm in selections
        for words, n in (("query heads", 27), ("groups of MLP neurons", 12))
    ]
    svg = vl_convert.vegalite_to_svg(figures.score_distribution(cmap).to_dict())
    assert svg.index("query heads") < svg.index("groups of MLP neurons")
    # A map of query heads alone has no switch, and its rows no kind.
    alone = figures.conflict_heatmap(make_map((4,) * 3), {}).to_dict()
    assert "shown_unit" not in str(alone)
    assert "unit" not in rows(alone)[0]


def test_all_text_has_the_ink_of_the_page(run: Run) -> None:
    run.cmap, ink = make_mixed_map(), "#12ab9f"
    selections = {zone: select(run.cmap, zone=zone) for zone in ("safe", "risky")}
    for name, chart in figures.charts(run.cmap, selections, run.tunings, run.evaluations).items():
        svg = vl_convert.vegalite_to_svg({**chart.to_dict(), "config": theme(ink, "sans-serif")})
        fills = re.findall(r'<text [^>]*fill="([^"]+)"[^>]*>[^<]', svg)
        assert set(fills) == {ink}, name


def test_high_scores_are_red_and_low_ones_blue() -> None:
    cmap = make_map((3,) * 3)
    cells = _cells(vl_convert.vegalite_to_svg(figures.conflict_heatmap(cmap, {}).to_dict()))
    order = cmap.column("conflict_score").argsort()
    assert len(cells) == len(order)
    (low_red, _, low_blue), (high_red, _, high_blue) = cells[order[0]], cells[order[-1]]
    assert low_blue > low_red
    assert high_red > high_blue


def _cells(svg: str) -> list[tuple[int, ...]]:
    """Colours of the cells, in the order of the rows."""
    marks = svg[svg.index("mark-rect role-mark") :]
    marks = marks[: marks.index("</g>")]
    fills = re.findall(r'fill="rgb\((\d+), (\d+), (\d+)\)"', marks)
    return [tuple(int(part) for part in fill) for fill in fills]


def test_trade_off_points_are_the_means_with_one_standard_error(run: Run) -> None:
    found = {point["arm"]: point for point in rows(figures.trade_off(run.evaluations).to_dict())}
    assert set(found) == set(run.evaluations)
    for arm, point in found.items():
        suite = run.evaluations[arm].suite("starter-safety-eval")
        assert suite.value is not None
        assert suite.standard_error is not None
        assert point["x"] == pytest.approx(suite.value)
        assert point["x_high"] - point["x"] == pytest.approx(suite.standard_error)
        assert point["x"] - point["x_low"] == pytest.approx(suite.standard_error)
        assert point["y"] == pytest.approx(run.evaluations[arm].mean("utility"))


def test_an_arm_without_a_number_is_left_out_and_never_drawn_at_zero(run: Run) -> None:
    unscored = [make_suite("safety", None, None, n=0, unscored=96), make_suite("utility", 0.5, 0.05)]
    run.evaluations["risky"] = make_evaluation("risky", unscored)
    assert {point["arm"] for point in rows(figures.trade_off(run.evaluations).to_dict())} == {
        "base",
        "safe",
        "random",
    }
    with pytest.raises(ValueError, match="no arm was measured"):
        figures.trade_off({"risky": run.evaluations["risky"]})


def test_training_loss_has_the_logged_pairs(run: Run) -> None:
    found = rows(figures.training_loss(run.tunings).to_dict())
    for arm, result in run.tunings.items():
        assert tuple((row["step"], row["loss"]) for row in found if row["arm"] == arm) == result.losses


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.2])
def test_labels_do_not_cover_each_other(spread: float) -> None:
    places = [(0.5 + spread * (i % 2), 0.5 + spread * i / 5) for i in range(5)]
    points = [
        ScatterPoint.of(f"arm-{i}", Coordinate(x, 0, ""), Coordinate(y, 0, "")) for i, (x, y) in enumerate(places)
    ]
    place_labels(points, (0, 1), (0, 1), 380, 300)
    boxes = []
    for point in points:
        assert point.align in ("left", "right")
        text = 6.6 * len(point.arm)
        start = point.x * 380 + point.dx
        left = start if point.align == "left" else start - text
        middle = (1 - point.y) * 300 + point.dy
        boxes.append((left, middle - 7, left + text, middle + 7))
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_arm_names_are_no_code() -> None:
    run = make_run((4, 4))
    name = """it's "quoted" \\ ]; alert(1)//"""
    selections = {name: run.selections["safe"]}
    drawn = vl_convert.vegalite_to_svg(figures.zones(run.cmap, selections).to_dict())
    assert drawn.count(figures.arm_colours([name])[name]) == len(run.selections["safe"].heads)


def test_figure_files_are_svg_and_png(tmp_path: Path, run: Run) -> None:
    written = write_figures(
        tmp_path / "figures",
        cmap=run.cmap,
        selections=run.selections,
        tunings=run.tunings,
        evaluations=run.evaluations,
    )
    assert {path.name for path in written} == {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")}
    assert set(written) == set((tmp_path / "figures").iterdir())  # no temporary file stays behind
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"<svg" if path.suffix == ".svg" else b"\x89PNG\r\n")
        assert len(content) > 2000
        assert b"currentColor" not in content  # a file has no page to take its colour from
