"""Several utility domains through recipe, command line and run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import assert_one_error, castune

from castune.artifacts import ConflictMap, TuneResult
from castune.config import Recipe
from castune.core.loading import LoadedModel, load
from castune.errors import ArtifactError, DataError
from castune.evaluation.suites import load_suites
from castune.pipeline import run
from castune.steps.diagnose import diagnose_step, group_step
from castune.steps.directory import RunDirectory
from castune.steps.held_out import check_held_out
from castune.steps.inputs import load_calibration

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A second domain: three questions."""
    path, choices = tmp_path / "sums.jsonl", ["yes", "no", "who knows"]
    rows = [{"id": f"s{i}", "prompt": f"Is {i} a sum?", "choices": choices, "answer": i} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(models: Models, recipe_of: RecipeOf, own_data: dict[str, Path], sums: Path) -> Callable[..., Recipe]:
    """A recipe with two domains."""
    model = models()

    def with_domains(**changes: Any) -> Recipe:
        utility = {"words": str(own_data["utility"]), "sums": {"source": str(sums), "limit": 3}}
        return recipe_of(model, **{"utility": utility, "select__compare": [], **changes})

    return with_domains


def test_the_whole_recipe(recipe: Callable[..., Recipe], own_data: dict[str, Path], sums: Path) -> None:
    folder = run(recipe())
    cmap = folder.load_map()
    assert list(cmap.domains) == ["sums", "words"]
    assert cmap.metadata["data"]["utility"]["source"] == f"{sums}, {own_data['utility']}"
    assert [record["data"]["n"] for record in cmap.metadata["domains"].values()] == [3, 4]
    assert Recipe.load(folder.recipe_file) == recipe()
    page = folder.report_file.read_text(encoding="utf-8")
    assert "Utility domains" in page
    assert "Utility domain" in page

    # Neither again, nor in another order.
    before = folder.map_file.stat().st_mtime_ns
    run(recipe(utility=dict(reversed(list(recipe().model_dump()["utility"].items())))))
    assert folder.map_file.stat().st_mtime_ns == before


@pytest.fixture
def diagnosed(recipe: Callable[..., Recipe]) -> Callable[..., tuple[Recipe, RunDirectory, Any, Any]]:
    def diagnose(**changes: Any) -> tuple[Recipe, RunDirectory, Any, Any]:
        made = recipe(diagnose__measure="margin", **changes)
        folder = RunDirectory(Path(made.out))
        model, tokenizer = load(made.model, dtype="float32", device="cpu")
        diagnose_step(folder, made, LoadedModel(model, tokenizer), load_calibration(made))
        folder.save_recipe(made)
        return made, folder, model, tokenizer

    return diagnose


def test_another_domain_or_other_questions_are_noticed(
    diagnosed: Callable[..., Any], recipe: Callable[..., Recipe], sums: Path
) -> None:
    made, folder, model, tokenizer = diagnosed()
    utility = made.model_dump()["utility"]
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "a domain more": ({**utility, "more": str(sums)}, "utility.more.source = None, but this recipe has"),
        "a domain less": ({"words": utility["words"]}, "utility.sums.* but this recipe has None"),
        "another name": ({"words": utility["words"], "Sums": utility["sums"]}, "utility.Sums"),
        "one set": (utility["words"], "utility.source = None"),
    }
    for name, (change, message) in changes.items():
        with pytest.raises(ArtifactError, match=message):
            folder.check(recipe(diagnose__measure="margin", utility=change))
            pytest.fail(name)
    with pytest.raises(ArtifactError, match=r"diagnose\.domains = 'mean', but this recipe has 'worst'"):
        folder.check(recipe(diagnose__measure="margin", diagnose__domains="worst"))
    sums.write_text(sums.read_text().replace("a sum", "none"))
    with pytest.raises(ArtifactError, match="the conflict map's utility data"):
        diagnose_step(folder, made, LoadedModel(model, tokenizer), load_calibration(made))


@pytest.mark.parametrize("how", ["mean", "worst"])
def test_sums_of_single_heads_are_means_over_domains_as_joint_shifts_are(
    diagnosed: Callable[..., Any], how: str
) -> None:
    made, folder, model, tokenizer = diagnosed(diagnose__domains=how)
    cmap = folder.load_map()
    # Buckets of one head: together is what the sum says, also where the map holds the shift of the worst domain.
    records = group_step(folder, made, LoadedModel(model, tokenizer), load_calibration(made), buckets=len(cmap))
    for record in records:
        for name in ("utility_shift", "safety_shift"):
            assert record[name] == pytest.approx(record[f"{name}_sum"], abs=1e-5)
    total = np.mean([one.column("utility_shift").sum() for one in cmap.domains.values()])
    assert sum(record["utility_shift_sum"] for record in records) == pytest.approx(total)
    assert (cmap.column("utility_shift").sum() == pytest.approx(total)) == (how == "mean")


def test_a_map_from_before_a_setting_existed_is_one_with_its_default(diagnosed: Callable[..., Any]) -> None:
    made, folder, model, tokenizer = diagnosed()
    cmap = folder.load_map()
    cmap.metadata["settings"].pop("domains")
    cmap.save(folder.path)
    assert diagnose_step(folder, made, LoadedModel(model, tokenizer), load_calibration(made)) == folder.load_map()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "utility: domain 'sums': .*sums.jsonl: no examples"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "utility: domain 'sums': .* is no multiple-choice question"),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 0}',
            "utility: domain 'sums': 1 examples, a diagnosis needs at least 2",
        ),
        ("{", "utility: domain 'sums': .*line 1: malformed JSON"),
        (None, "utility: domain 'sums': .*no such file"),
    ],
)
def test_bad_data_of_a_domain_is_told_by_name_before_anything_is_spent(
    recipe: Callable[..., Recipe], sums: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    sums.unlink() if content is None else sums.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        run(recipe())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# -- domains of prompts with replies


@pytest.fixture
def harmless(tmp_path: Path) -> Path:
    """Harmless prompts with the reply to give; the first is in the suite of over-refusal too."""
    path = tmp_path / "harmless.jsonl"
    rows = [
        {"id": f"r{i}", "prompt": f"How do I {what}?", "completion": f"{how}."}
        for i, (what, how) in enumerate(
            [("cook rice", "Boil it"), ("kill a process", "Use kill"), ("beat eggs", "Whisk")]
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("measure", ["decision", "attribution"])
def test_a_whole_recipe_against_over_refusal(
    recipe: Callable[..., Recipe], own_data: dict[str, Path], harmless: Path, measure: str
) -> None:
    """Chosen by a map of questions and harmless prompts, and trained with surgery against both."""
    utility = {"words": str(own_data["utility"]), "overrefusal": str(harmless)}
    changes = {
        "utility": utility, "diagnose__measure": measure, "diagnose__reply_domains": ["overrefusal"],
        "tune__surgery": "pcgrad-symmetric",
    }  # fmt: skip
    # What is trained on is not measured on.
    with pytest.raises(
        DataError, match=r"benign\.jsonl: 1 of 3 prompts are also in the utility \(which is trained on\) data"
    ):
        run(recipe(**changes, evaluate__suites=[f"over-refusal:{own_data['benign']}"]))
    made = recipe(**changes, evaluate__suites=[f"over-refusal:{own_data['benign']}"], evaluate__overlap="drop")
    folder = run(made)
    cmap = folder.load_map()
    assert set(cmap.domains) == {"words", "overrefusal"}
    assert cmap.metadata["measures"]["utility:overrefusal"] == measure
    record = TuneResult.load(folder.path / "adapter").utility
    assert record is not None
    assert record["n"] == 4 + 2
    page = folder.report_file.read_text(encoding="utf-8")
    assert "Utility accuracy or share answered before ablation, mean over domains" in page
    assert f"harmless prompts: {harmless}, n = 3" in page
    assert "share answered 1" in page
    assert Recipe.load(folder.recipe_file) == made

    # Neither again, nor otherwise.
    before = folder.map_file.stat().st_mtime_ns
    run(made)
    assert folder.map_file.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"'overrefusal': example 'r0' is no multiple-choice question"):
        run(recipe(**{**changes, "diagnose__reply_domains": []}, evaluate__overlap="drop"))


def test_held_out_prompts_of_a_reply_domain_are_told(
    recipe: Callable[..., Recipe], own_data: dict[str, Path], harmless: Path, caplog: pytest.LogCaptureFixture
) -> None:
    utility = {"words": str(own_data["utility"]), "overrefusal": str(harmless)}
    suites = [f"over-refusal:{own_data['benign']}"]
    made = recipe(utility=utility, diagnose__reply_domains=["overrefusal"], evaluate__suites=suites)
    check_held_out(made, load_suites(suites))
    assert (
        "benign.jsonl: 1 of 3 prompts are also in the utility:overrefusal data, which heads are chosen by"
        in caplog.text
    )


def test_reply_domains_on_the_command_line(
    models: Models, own_data: dict[str, Path], harmless: Path, tmp_path: Path
) -> None:
    model, out = models(), tmp_path / "run"
    options = [
        "--out", out, "--safety", own_data["safety"], "--utility", own_data["utility"], "--utility", harmless,
        "--measure", "margin", "--max-new-tokens", "4", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    assert_one_error(
        castune("diagnose", model, *options, cwd=tmp_path),
        "utility: domain 'harmless': example 'r0' is no multiple-choice question",
        r'diagnose\.reply_domains = \["harmless"\]',
    )
    assert not out.exists()
    done = castune("diagnose", model, *options, "--reply-domains", "harmless", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 questions and harmless prompts of 2 domains (mean)" in done.stdout
    assert "domain harmless (n = 3): share answered 1" in done.stdout
    assert "domain utility (n = 4): accuracy " in done.stdout
    done = castune("group", out, "--buckets", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# -- command line


def test_the_command_line_takes_several_sources(
    models: Models, own_data: dict[str, Path], sums: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = [
        "--out", out, "--safety", own_data["safety"], "--utility", own_data["utility"], "--utility", sums,
        "--utility-limit", "3", "--domains", "worst", "--measure", "margin", "--max-new-tokens", "4",
        "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    done = castune("diagnose", models(), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 questions of 2 domains (worst)" in done.stdout
    for name in ("sums", "utility"):
        assert f"domain {name} (n = 3): accuracy " in done.stdout
    assert done.stdout.count("Spearman of C with the combined C ") == 2
    cmap = ConflictMap.load(out)
    assert cmap.metadata["combined"] == "worst"
    done = castune("group", out, "--buckets", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "utility: mean over 2 domains" in done.stdout


def test_two_sources_of_one_name(own_data: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "utility.jsonl"
    options = ["--out", tmp_path / "run", "--utility", own_data["utility"], "--utility", other]
    done = castune("diagnose", "default", *options, cwd=tmp_path)
    assert_one_error(
        done, "--utility .*other/utility.jsonl", "there is already a domain 'utility'", r"rename.*\[utility\.NAME\]"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["mmlu=a.jsonl", "csqa=b.jsonl"], "utility: domain 'mmlu': .*a.jsonl: no such file"),
        (["my file.jsonl", "starter-utility"], "utility: domain 'my file': accepted: 1 to 100 letters"),
    ],
)
def test_names_are_those_of_sources_and_files(sources: list[str], said: str, tmp_path: Path) -> None:
    options = [part for source in sources for part in ("--utility", source)]
    assert_one_error(castune("diagnose", "default", "--out", "run", *options, cwd=tmp_path), said)
