"""The graph of a study: order, names, what is the same, and what gives another directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castune.artifacts import ConflictMap
from castune.artifacts.conflict_map import SCHEMA
from castune.config import Recipe, StudyConfig
from castune.errors import CastuneError
from castune.names import ArmName
from castune.selection import select
from castune.study.graph import Graph, WorkUnit


def recipe_of(**study: Any) -> Recipe:
    return Recipe.of(out="somewhere", study=study)


def conflict_map(n_heads: int, seed: int) -> ConflictMap:
    generator = np.random.default_rng(seed)
    columns = {name: pa.array(generator.random(n_heads)) for name in SCHEMA.names}
    columns |= {
        "unit": pa.array(["q_head"] * n_heads),
        "layer": pa.array(np.arange(n_heads) // 4, pa.int32()),
        "head": pa.array(np.arange(n_heads) % 4, pa.int32()),
        "bucket": pa.array(np.ones(n_heads), pa.int32()),
    }
    return ConflictMap(
        pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA), {"model": {"fingerprint": "f"}}
    )


def heads_of(cmap: ConflictMap, text: str, seed: int) -> tuple[tuple[int, int], ...]:
    name = ArmName.parse(text)
    return select(
        cmap, zone=name.zone or "safe", fraction=name.fraction or 0.25, buckets=name.buckets, bucket=name.bucket,
        score=name.score or "conflict", seed=seed,
    ).heads  # fmt: skip


def test_the_default_study_is_that_of_the_paper() -> None:
    study = StudyConfig()
    assert (study.seeds, study.buckets) == ((21, 42, 84), (4,))
    graph = Graph(recipe_of(), n_heads=1024)
    trained = graph.runs[0].trained
    # Full, random and the two ends by SFT and PCGrad; then the buckets by C, O and S, and half and three quarters.
    assert set(trained) == {
        *(f"{arm}{method}" for arm in ("all", "random", "risky", "safe") for method in ("", "+pcgrad")),
        *(f"bucket-{n}-of-4" for n in (2, 3)),
        *(f"bucket-{n}-of-4-{score}" for n in (1, 2, 3, 4) for score in ("gradient", "sensitivity")),
        *(f"{zone}-{share}" for zone in ("risky", "safe") for share in (50, 75)),
    }
    assert graph.runs[0].same_as["bucket-1-of-4"] == "risky"
    assert graph.runs[0].same_as["bucket-4-of-4"] == "safe"


def test_units_come_behind_what_they_need_and_have_names_of_their_own() -> None:
    calibrations = {
        "small": {"utility": {"source": "starter-utility", "limit": 10}, "arms": ["bucket-1-of-4"]},
        "map": {"measure": "margin"},
    }
    graph = Graph(recipe_of(random_draws=2, calibrations=calibrations), n_heads=270, shards=3)
    seen: set[str] = set()
    for unit in graph.units:
        assert unit.name not in seen
        assert set(unit.needs) <= seen, unit
        seen.add(unit.name)
    # Every arm is trained, evaluated and judged; the base model is evaluated once.
    for run in graph.runs:
        for arm in run.trained:
            assert {f"tune {run.label}/{arm}", f"evaluate {run.label}/{arm}", f"judge {run.label}"} <= seen
    assert sum(unit.stage == "base" for unit in graph.units) == 1
    assert sum(unit.stage == "diagnose" for unit in graph.units) == 3 * (3 + 1)
    # A calibration without arms has a map and no run.
    assert {run.calibration for run in graph.runs} == {"main", "small"}
    assert [run.trained for run in graph.runs if run.is_draw] == [("random",), ("random",)]
    folders = [run.folder for run in graph.runs]
    assert len(set(folders)) == len(folders)


def test_arms_are_evaluated_behind_the_base_model_whose_replies_they_may_be_measured_on() -> None:
    graph = Graph(recipe_of(random_draws=1), n_heads=270, shards=2)
    evaluations = [unit for unit in graph.units if unit.stage == "evaluate"]
    assert all("evaluate base" in unit.needs and unit.base_folder == graph.base_folder for unit in evaluations)
    # Of several jobs the first evaluates it; the others' arms still need it.
    first, second = (graph.share(n, 2) for n in range(2))
    assert [unit.stage for unit in (*first, *second)].count("base") == 1
    of_second = [unit for unit in second if unit.stage == "evaluate"]
    assert of_second
    assert all("evaluate base" in unit.needs for unit in of_second)


def test_a_map_that_ranks_otherwise_is_made_of_what_another_measured() -> None:
    calibrations = {
        "one-rank": {"sensitivity_rank": "of-difference", "arms": ["safe"]},
        "other-data": {"sensitivity_rank": "of-difference", "utility": {"source": "starter-utility", "limit": 10}},
    }
    graph = Graph(recipe_of(calibrations=calibrations), n_heads=270, shards=2)
    diagnoses = {unit.name: unit for unit in graph.units if unit.stage == "diagnose"}
    assert list(diagnoses) == [
        "diagnose main, share 1 of 2",
        "diagnose main, share 2 of 2",
        "diagnose main",
        "diagnose one-rank",
        "diagnose other-data, share 1 of 2",
        "diagnose other-data, share 2 of 2",
        "diagnose other-data",
    ]
    made = diagnoses["diagnose one-rank"]
    assert made.needs == ("diagnose main",)
    assert made.map_folder == diagnoses["diagnose main"].folder != made.folder
    assert made.recipe.diagnose.sensitivity_rank == "of-difference"


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(n_heads=st.integers(4, 60), map_seed=st.integers(0, 5), fraction=st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_arms_said_to_be_the_same_have_the_same_heads_and_no_others(
    n_heads: int, map_seed: int, fraction: float
) -> None:
    arms = ("all", "safe", "risky", "safe-50", "risky-50", "safe-25", "risky-25", "random", "safe-gradient")
    recipe = Recipe.of(
        out="x",
        select={"fraction": fraction},
        study={"arms": arms, "methods": ["sft"], "buckets": [2, 4], "shares": []},
    )
    run = Graph(recipe, n_heads).runs[0]
    cmap = conflict_map(n_heads, map_seed)

    def heads(arm: str) -> tuple[tuple[int, int], ...]:
        name = ArmName.parse(arm)
        text = (
            arm
            if name.fraction is not None or name.zone is None
            else f"{arm.replace(name.zone, f'{name.zone}-{100 * fraction:g}', 1)}"
        )
        return heads_of(cmap, text, run.seed)

    for arm, trained in run.same_as.items():
        # The directory's name leaves the share out where it is a quarter.
        first = next(other for other, found in run.same_as.items() if found == trained)
        assert heads(arm) == heads(first)
    # Where the range of sorted heads differs, so do the heads: scores have no ties here.
    by_score = [a for a in dict.fromkeys(run.same_as.values()) if "random" not in a and a != "all"]
    of_trained = {next(o for o, f in run.same_as.items() if f == a): a for a in by_score}
    conflict = [o for o in of_trained if not o.endswith(("gradient", "sensitivity"))]
    assert len({heads(o) for o in conflict}) == len(conflict)


@pytest.mark.parametrize(
    ("change", "is_another_map", "is_another_run"),
    [
        ({"tune": {"learning_rate": 0.5}}, False, True),
        ({"tune": {"checkpoint_steps": 7}}, False, False),
        ({"tune": {"report_to": "tensorboard"}}, False, False),
        ({"evaluate": {"limit": 3}}, False, False),
        ({"device": "cpu"}, False, False),
        ({"diagnose": {"margin_tokens": 3}}, True, True),
        ({"safety": "starter-safety#x"}, True, True),
        ({"align": {"source": "starter-align", "limit": 3}}, False, True),
        ({"select": {"fraction": 0.5}}, False, True),
        ({"seed": 5}, True, True),
        ({"study": {"seeds": [21]}}, False, False),
        ({"study": {"arm_seeds": {"safe": [21, 1]}, "random_draws": 3}}, False, False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_key_is_of_what_results_depend_on(
    change: dict[str, Any], is_another_map: bool, is_another_run: bool
) -> None:
    before, after = Graph(recipe_of(), 270), Graph(Recipe.of(out="somewhere", **change), 270)
    assert (before.maps["main"].out != after.maps["main"].out) is is_another_map
    assert (before.runs[0].folder != after.runs[0].folder) is is_another_run


@pytest.mark.parametrize(("grouped", "key"), [(True, "06563c9293"), (False, "3b9ec0e2b8")])
def test_directories_of_earlier_versions_keep_their_names(grouped: bool, key: str) -> None:
    """Made by a version in which rows were grouped by length unless a recipe said otherwise; a day of work lies there."""
    recipe = Recipe.of(out="somewhere", tune={"group_by_length": grouped}, study={"seeds": [21]})
    graph = Graph(recipe, 270)
    assert graph.runs[0].folder.name == f"main-21-{key}"
    assert Path(graph.maps["main"].out).name == "main-6a7165bcdd"


def test_other_data_give_other_directories() -> None:
    one, other = (Graph(recipe_of(), 270, {"safety:main": digest}) for digest in ("a", "b"))
    assert one.maps["main"].out != other.maps["main"].out
    assert one.runs[0].folder != other.runs[0].folder
    aligned = Graph(recipe_of(), 270, {"safety:main": "a", "align": "c"})
    assert aligned.maps["main"].out == one.maps["main"].out
    assert aligned.runs[0].folder != one.runs[0].folder


def test_a_unit_survives_json() -> None:
    for unit in Graph(recipe_of(), 270, shards=2).units:
        assert WorkUnit.from_json(unit.to_json()) == unit
        assert unit.folder.parts[0] == "somewhere"


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ({"arms": ["sfae"]}, "sfae"),
        ({"methods": ["sgd"]}, "sgd"),
        ({"arms": ["safe+pcgrad"]}, "twice"),
        ({"seeds": []}, "seed"),
        ({"seeds": [1, 1]}, "twice"),
        ({"buckets": [0]}, "buckets"),
        ({"shares": [100]}, "shares"),
        ({"calibrations": {"main": {}}}, "main"),
        ({"calibrations": {"a b": {}}}, "a b"),
        ({"calibrations": {"x": {"arms": ["nope"]}}}, "nope"),
        ({"colour": 1}, "colour"),
        ({"drift": ["random-50"]}, "random-50"),
        ({"drift": ["safe"]}, "snapshot_steps"),
        ({"arm_seeds": {"sfae": [1]}}, "study.arm_seeds names arms .* sfae; accepted are all, random"),
        ({"arm_seeds": {"safe": []}, "primary": {}}, "study.primary.arms names arms .* not train: safe"),
        ({"arm_seeds": {"risky+pcgrad": [1, 2, 1]}}, r"study.arm_seeds.risky\+pcgrad names one twice: 1, 2, 1"),
        ({"arm_seeds": {"safe": [2]}, "drift": ["safe"]}, "drift .* first seed, 21, .* safe"),
        ({"seeds": [3, 1001], "random_draws": 2}, "1001 is among .* 1000 to 1001"),
        ({"arm_seeds": {"safe": [1000]}, "random_draws": 1}, "arm_seeds: 1000 is among"),
    ],
    ids=str,
)
def test_studies_that_cannot_be(study: dict[str, Any], said: str) -> None:
    with pytest.raises(CastuneError, match=said):
        recipe_of(**study)


def test_drift_is_measured_of_the_arms_that_are_asked_for_with_the_first_seed() -> None:
    recipe = Recipe.of(out="x", tune={"snapshot_steps": 5}, study={"drift": ["safe", "bucket-4-of-4", "risky+pcgrad"]})
    units = [unit for unit in Graph(recipe, 1024).units if unit.stage == "drift"]
    # The safest of four buckets and the safe zone are one arm.
    assert [(unit.name, unit.needs) for unit in units] == [
        (f"drift main/21/{arm}", (f"tune main/21/{arm}",)) for arm in ("safe", "risky+pcgrad")
    ]
    shares = [Graph(recipe, 1024, shards=3).share(n, 3) for n in range(3)]
    of_shares = [unit.name for share in shares for unit in share]
    assert len(set(of_shares)) == len(of_shares)
    everything = {unit.name for unit in Graph(recipe, 1024, shards=3).units if unit.stage != "judge"}
    # The maps themselves are made by the last share of their diagnosis.
    assert everything - set(of_shares) == {"diagnose main"}


def test_random_draws_are_trained_with_the_seeds_of_the_zones_in_turn() -> None:
    graph = Graph(recipe_of(seeds=[3, 5], random_draws=5), 270)
    draws = [run for run in graph.runs if run.is_draw]
    assert [(run.recipe.tune.seed, run.recipe.select.seed) for run in draws] == [
        (3, 1000), (5, 1001), (3, 1002), (5, 1003), (3, 1004)
    ]  # fmt: skip
    assert [(run.seed, run.draw, run.trained) for run in draws] == [
        (seed, 1000 + n, ("random",)) for n, seed in enumerate([3, 5, 3, 5, 3])
    ]
    # But for the selection's seed such a run is that of the zones.
    zones = {run.seed: run for run in graph.runs if not run.is_draw}
    for run in draws:
        assert run.recipe.tune == zones[run.seed].recipe.tune
        assert run.recipe.select == zones[run.seed].recipe.select.model_copy(update={"seed": run.draw})
        assert (run.recipe.align, run.map_recipe) == (zones[run.seed].recipe.align, zones[run.seed].map_recipe)
    assert draws[3].label == "main/5/draw-1003"
    assert draws[3].folder.name.startswith("main-5-draw-1003-")
    assert "tune main/5/draw-1003/random" in [unit.name for unit in graph.units]
    for of_run in ([run.label for run in graph.runs], [run.folder for run in graph.runs]):
        assert len(set(of_run)) == len(of_run)
    # More draws add to those that are there.
    more = Graph(recipe_of(seeds=[3, 5], random_draws=7), 270)
    assert {run.folder for run in graph.runs} < {run.folder for run in more.runs}


def test_an_arm_without_seeds_is_left_out_of_the_graph_and_of_the_family_of_tests() -> None:
    own = {"safe+pcgrad": [21], "risky+pcgrad": [21], "*+pcgrad": []}
    made = recipe_of(seeds=[21, 42], arm_seeds=own, drift=[])
    others = {f"{arm}+pcgrad" for arm in made.study.arms} - own.keys()
    assert others
    assert not others & set(made.study.main_arms)
    trained = {(arm, run.seed) for run in Graph(made, 1024).runs for arm in run.same_as if arm.endswith("+pcgrad")}
    assert trained == {("safe+pcgrad", 21), ("risky+pcgrad", 21)}


def test_arms_may_have_seeds_of_their_own() -> None:
    own = {"safe": [42, 7], "all+pcgrad": [21]}
    graph = Graph(recipe_of(seeds=[21, 42], arm_seeds=own, drift=[]), 1024)
    usual = Graph(recipe_of(seeds=[21, 42]), 1024)
    assert [run.seed for run in graph.runs] == [21, 42, 7]
    arms = {run.seed: set(run.same_as) for run in graph.runs}
    every = set(graph.recipe.study.main_arms)
    assert arms == {21: every - {"safe"}, 42: every - {"all+pcgrad"}, 7: {"safe"}}
    # Nothing else of a run depends on which arms are in it.
    assert [run.folder for run in graph.runs[:2]] == [run.folder for run in usual.runs]
    # The safest of four buckets is trained where the safe zone is or would be, whichever of them has the seed.
    assert graph.runs[0].same_as["bucket-4-of-4"] == "safe"
    trainings = {run.seed: set(run.trained) for run in graph.runs}
    assert trainings == {
        21: set(usual.runs[0].trained),
        42: set(usual.runs[1].trained) - {"all+pcgrad"},
        7: {"safe"},
    }
    names = [unit.name for unit in graph.units]
    assert len(set(names)) == len(names)
    assert [name for name in names if "main/7/" in name] == ["tune main/7/safe", "evaluate main/7/safe"]
    shares = [unit.name for n in range(3) for unit in Graph(graph.recipe, 1024, shards=3).share(n, 3)]
    assert {name for name in names if name.startswith(("tune", "evaluate"))} <= set(shares)


def test_a_seed_that_no_arm_has_makes_no_run() -> None:
    study = {"arms": ["all", "safe"], "methods": ["sft"], "buckets": [], "shares": [], "seeds": [21, 42]}
    own = {"all": [1, 2], "safe": [2, 42]}
    graph = Graph(recipe_of(**study, arm_seeds=own, random_draws=1), 270)
    # Draws are trained with the seeds of the study nonetheless.
    assert [(run.seed, run.is_draw) for run in graph.runs] == [(42, False), (1, False), (2, False), (21, True)]


def test_more_buckets_than_heads() -> None:
    with pytest.raises(CastuneError, match="16 buckets of 12 heads"):
        _ = Graph(recipe_of(buckets=[16]), 12).runs


def test_a_recipe_without_a_study_writes_none(tmp_path: Path) -> None:
    assert "study" not in recipe_of().to_toml()
    changed = recipe_of(seeds=[3], arm_seeds={"safe+pcgrad": [3, 4], "safe-12.5": [1]}, shares=[12.5])
    (tmp_path / "r.toml").write_text(changed.to_toml())
    assert Recipe.load(tmp_path / "r.toml") == changed
