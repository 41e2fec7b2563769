"""One HTML page that needs nothing else, and the same charts as files.

The page carries Vega itself, once for all charts. Its security policy allows the two scripts it was written
with (by hash) and inline styles, and nothing else: no request leaves it, and text of a model could not run
even if it were not escaped. Vega's expressions are therefore interpreted (`ast`), never compiled.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, MaskedAdapter, TuneResult
from castune.artifacts.drift_result import DriftResult
from castune.artifacts.files import replacing, write_text
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.report.diagnosis import conflict_map
from castune.report.drift import drift_section
from castune.report.figures import charts
from castune.report.markup import Markup, join, script_json, tag
from castune.report.samples import provenance, samples
from castune.report.sections import known, opening, results
from castune.report.summary import CostRatios, Differences
from castune.report.theme import theme
from castune.report.training import training

_HERE = Path(__file__).parent
# Figure files are drawn without a page around them.
_INK, _PAPER = "#222222", "#ffffff"
_PAGE_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_FILE_FONT = "Arial, 'Liberation Sans', sans-serif"


def write_report(
    path: str | Path,
    *,
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    evaluations: Mapping[str, EvalResult],
    differences: Differences,
    cost_ratios: CostRatios,
    masked: Mapping[str, MaskedAdapter] | None = None,
    lm_eval: Mapping[str, LmEvalResult] | None = None,
    mmlu_cost_ratios: CostRatios | None = None,
    drifts: Mapping[str, DriftResult] | None = None,
    recipe_text: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of a run, atomically.

    Args:
        path: the HTML file.
        cmap: the conflict map.
        selections: by arm; the base has none.
        tunings: by arm; the base has none.
        evaluations: by arm; `base` is the model before training.
        differences: arm -> suite -> mean of arm minus base paired by example, with the p-value of a paired test.
        cost_ratios: utility cost ratio by arm; a value of None is undefined where both rates are measured.
        masked: by arm, the adapters made of others without training.
        lm_eval: by arm, what lm-eval measured by its own protocol.
        mmlu_cost_ratios: MMLU-CR by arm, where MMLU was measured.
        drifts: by arm, how the map changed while it was trained.
        recipe_text: the resolved recipe.
        notes: sentences below the verdict, for example on what was not done.

    Returns:
        The file.
    """
    drawn = charts(cmap, selections, tunings, evaluations, drifts)
    body = tag(
        "main",
        opening(cmap, evaluations, differences, cost_ratios, notes),
        tag("noscript", tag("p", "Charts need JavaScript; the same charts are in the directory figures.")),
        results(evaluations, differences, cost_ratios, drawn, lm_eval or {}, mmlu_cost_ratios or {}),
        conflict_map(cmap, selections, drawn),
        training(tunings, masked or {}, selections, drawn),
        drift_section(drifts or {}, drawn),
        samples(evaluations),
        provenance(cmap, selections, tunings, masked or {}, evaluations, recipe_text),
    )
    path = Path(path)
    write_text(path, _document(f"castune: {known(cmap.metadata.get('model', {}).get('name'))}", body, drawn))
    return path


def write_figures(
    directory: str | Path,
    *,
    cmap: ConflictMap,
    selections: Mapping[str, HeadSelection],
    tunings: Mapping[str, TuneResult],
    evaluations: Mapping[str, EvalResult],
    drifts: Mapping[str, DriftResult] | None = None,
) -> list[Path]:
    """Write every chart of the report as SVG and PNG, atomically; needs no browser.

    Returns:
        The files: `conflict_map.svg`, `conflict_map.png`, `trade_off.svg`, ...
    """
    directory = Path(directory)
    config = {**theme(_INK, _FILE_FONT), "background": _PAPER, "padding": 12}
    written = []
    for name, chart in charts(cmap, selections, tunings, evaluations, drifts).items():
        spec = chart.to_dict()
        # The theme decides colours and fonts here, not Altair's default configuration.
        spec.pop("config", None)
        svg = vl_convert.vegalite_to_svg(spec, config=config)
        for suffix, content in (("svg", svg.encode()), ("png", vl_convert.svg_to_png(svg, scale=2))):
            path = directory / f"{name}.{suffix}"
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            written.append(path)
    return written


def _document(title: str, body: Markup, drawn: Mapping[str, Any]) -> str:
    specs = {name: _bare(chart) for name, chart in drawn.items()}
    # The stub of vl_convert calls the snippet required; it is not, and only the default one is cached.
    runtime = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    scripts = [runtime, (_HERE / "page.js").read_text(encoding="utf-8")]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = join(
        [
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            tag("title", title),
            tag("style", Markup((_HERE / "style.css").read_text(encoding="utf-8"))),
        ]
    )
    data = tag(
        "script",
        Markup(script_json({"specs": specs, "config": theme("currentColor", _PAGE_FONT)})),
        id="charts",
        type="application/json",
    )
    code = [tag("script", Markup(script)) for script in scripts]
    page = tag("html", tag("head", head), tag("body", body, data, *code), lang="en")
    return f"<!doctype html>\n{page}\n"


def _bare(chart: Any) -> dict[str, Any]:
    """The chart's specification without what the page decides itself."""
    spec: dict[str, Any] = chart.to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
