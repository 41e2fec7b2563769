"""What a study costs: the sum of its units, each as often as it is done; the paper's studies need no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from castune.config import Recipe
from castune.core.numbers import gigabytes
from castune.errors import CastuneError, SourceUnreachable
from castune.plan import calibrate
from castune.study.cost import StudyCost, paper_seconds, study_cost
from castune.study.graph import Graph
from castune.study.run import study_graph

RECIPES = Path(__file__).parents[3] / "recipes"
STUDY = {"arms": ["risky", "safe"], "seeds": [21, 42], "buckets": [], "shares": []}


@pytest.fixture
def graph_of(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Graph]:
    tiny_model("llama").config.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")

    def make(**changes: Any) -> Graph:
        values: dict[str, Any] = {
            "model": str(tmp_path / "model"),
            "out": "unused",
            "dtype": "float32",
            "safety": {"source": "starter-safety", "limit": 3},
            "utility": {"source": "starter-utility", "limit": 3},
            "align": {"source": "starter-align", "limit": 12},
            "diagnose": {"measure": "margin", "max_new_tokens": 4, "gradient_chunks": 2},
            "tune": {"max_steps": 4},
            "evaluate": {"suites": ["starter-utility-eval", "starter-safety-eval"], "limit": 4},
            "study": STUDY,
        }
        return study_graph(Recipe.of(**{**values, **changes}), data=False)

    return make


def seconds_of(found: StudyCost) -> dict[str, float]:
    return {unit.name: unit.seconds for unit in found.units}


def test_a_study_costs_the_sum_of_its_units(graph_of: Callable[..., Graph]) -> None:
    graph = graph_of()
    found = study_cost(graph, accelerator="h100")
    seconds = seconds_of(found)
    assert seconds.keys() == {unit.name for unit in graph.units if unit.stage != "judge"}
    # Arms that differ in their heads cost the same, those with surgery more.
    assert seconds["tune main/21/risky"] == seconds["tune main/42/safe"] > 0
    assert seconds["tune main/21/safe+pcgrad"] > seconds["tune main/21/safe"]
    assert seconds["evaluate base"] == seconds["evaluate main/21/safe"] > 0
    assert found.seconds(1) == pytest.approx(sum(seconds.values()))
    assert sum(cost.seconds for cost in found.costs.values()) == pytest.approx(sum(seconds.values()))
    assert found.seconds(8) < found.seconds(1)
    assert found.notes == []
    rows = {row["stage"]: row for row in found.rows()}
    assert {name: row["units"] for name, row in rows.items()} == {"diagnose": 1, "tune": 8, "evaluate": 9}
    longer = study_cost(graph_of(tune={"max_steps": 8}), accelerator="h100")
    assert longer.costs["tune"].work.forwards == 2 * found.costs["tune"].work.forwards


def test_continuous_suites_and_strengths_are_planned(graph_of: Callable[..., Graph]) -> None:
    suites = ["nll:starter-utility-eval", "kl:starter-overrefusal-eval", "margin:starter-safety-eval"]
    once, thrice = (
        study_cost(graph_of(evaluate={"suites": suites, "limit": 4, "strengths": strengths}), accelerator="h100")
        for strengths in ([1], [0.25, 0.5, 1])
    )
    seconds, longer = seconds_of(once), seconds_of(thrice)
    assert longer["evaluate base"] == seconds["evaluate base"] > 0
    assert longer["evaluate main/21/safe"] == pytest.approx(3 * seconds["evaluate main/21/safe"])
    assert thrice.rows()[-1]["decoded"] == "0"


def test_memory_of_trainings_is_shown(graph_of: Callable[..., Graph]) -> None:
    found = study_cost(graph_of(), accelerator="h100")
    rows = {row["stage"]: row["peak memory"] for row in found.rows()}
    assert found.peak_memory["tune"] > found.shape.weight_bytes
    assert rows["tune"] == gigabytes(found.peak_memory["tune"])
    assert rows["diagnose"] is rows["evaluate"] is None
    larger = study_cost(graph_of(tune={"max_steps": 4, "batch_size": 8}), accelerator="h100")
    assert larger.peak_memory["tune"] > found.peak_memory["tune"]


def test_a_map_that_ranks_the_outcomes_of_another_measures_nothing(graph_of: Callable[..., Graph]) -> None:
    maps = {"ranked": {"sensitivity_rank": "of-difference"}, "decisions": {"measure": "decision"}}
    seconds = seconds_of(study_cost(graph_of(study={**STUDY, "calibrations": maps}), accelerator="h100"))
    assert seconds["diagnose ranked"] == 0
    assert seconds["diagnose decisions"] > seconds["diagnose main"] > 0


def test_drift_is_a_map_a_step(graph_of: Callable[..., Graph]) -> None:
    tune = {"max_steps": 4, "snapshot_steps": 1}
    seconds = seconds_of(study_cost(graph_of(study={**STUDY, "drift": ["safe"]}, tune=tune), accelerator="h100"))
    # Of the steps 1, 2 and 3, and of the finished adapter.
    assert seconds["drift main/21/safe"] == pytest.approx(4 * seconds["diagnose main"])


def test_a_study_is_timed_here(graph_of: Callable[..., Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_SECONDS_A_TIMING", 0.02)
    found = study_cost(graph_of())
    assert all(seconds > 0 for seconds in seconds_of(found).values())
    assert found.peak_memory["diagnose"] > found.shape.weight_bytes


def test_the_papers_study_is_told_from_a_config_alone(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_arguments: Any) -> Any:
        raise SourceUnreachable("no network")

    monkeypatch.setattr("castune.data.sources._read_hub", unreachable)
    tiny_model("mistral", vocab_size=50_000, max_position_embeddings=4096).config.save_pretrained(tmp_path)
    changes = [
        f"model={tmp_path}",
        'evaluate.suites=["csqa", "gsm8k#50", "wildguard"]',
        "safety.limit=20",
        "utility.limit=20",
        "align.limit=400",
        'study.arms=["risky", "safe"]',
        "study.arm_seeds={}",
        'study.methods=["sft"]',
        "study.buckets=[]",
        "study.shares=[]",
        "study.seeds=[21]",
        "study.calibrations={}",
    ]
    found = study_cost(study_graph(Recipe.load(RECIPES / "mistral-7b.toml", changes), data=False), accelerator="h100")
    assert found.shape.n_units == 12
    assert found.costs["tune"].work.forwards == 200  # two arms, 400 / 4 each
    assert 0 < found.seconds(8) < found.seconds(1)
    assert any(note.startswith("wildjailbreak-train: not available here") for note in found.notes)


def test_the_papers_diagnosis_takes_what_it_says() -> None:
    assert paper_seconds(1024) == pytest.approx(19.1 * 3600, rel=0.003)


def test_an_unknown_accelerator_is_refused(graph_of: Callable[..., Graph]) -> None:
    with pytest.raises(CastuneError, match="accepted: a100"):
        study_cost(graph_of(), accelerator="abacus")
