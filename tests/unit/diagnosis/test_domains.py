"""Several utility domains: what they share, how their maps become one, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import castune
from castune import CastuneError, ConflictMap, DiagnoseConfig
from castune.core.journal import Journal
from castune.data.example import Example
from castune.diagnosis import grams
from castune.diagnosis.domains import utility_hash, utility_sets
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.reliability import spearman
from castune.errors import ArtifactError, MapUnfinished
from castune.stats.ranking import bucket_numbers

MARGIN = DiagnoseConfig(measure="margin", max_new_tokens=4, gradient_chunks=3)
DECISION = DiagnoseConfig(measure="decision", max_new_tokens=4, gradient_chunks=3)
WORST = {"domains": "worst"}
OF_UTILITY = ("optimization_conflict", "utility_shift", "utility_rank", "functional_sensitivity", "conflict_score")
OF_SAFETY = ("safety_shift", "safety_shift_se", "safety_rank")

Diagnosed = Callable[..., ConflictMap]


@pytest.fixture
def diagnosed(tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]) -> Diagnosed:
    """The map of the same model and harmful prompts with the utility given."""
    model = tiny_model("llama", seed=5)

    def diagnose(utility: Any, config: DiagnoseConfig = MARGIN, **more: Any) -> ConflictMap:
        return castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=utility, config=config, **more)

    return diagnose


@pytest.fixture
def domains(questions: list[Example]) -> dict[str, list[Example]]:
    """Three domains of different sizes, not in the order of their names."""
    animals = [
        Example(id=f"a{i}", prompt=f"{n}?", choices=("four legs", "wings"), answer=i % 2, scoring="likelihood")
        for i, n in enumerate(("A dog", "A crow", "A cat"))
    ]
    return {"words": questions[:4], "animals": animals, "Words-2": questions[2:]}


# -- what the maps are


@pytest.mark.parametrize(
    ("how", "config"),
    [
        ("mean", DECISION),
        ("worst", MARGIN),
        pytest.param("mean", MARGIN, marks=pytest.mark.slow),
        pytest.param("worst", DECISION, marks=pytest.mark.slow),
    ],
    ids=["mean-decision", "worst-margin", "mean-margin", "worst-decision"],
)
def test_the_same_domain_twice_is_that_domain(
    diagnosed: Diagnosed, questions: list[Example], config: DiagnoseConfig, how: Any
) -> None:
    one = diagnosed(questions, config)
    two = diagnosed({"one": questions, "other": questions}, config.model_copy(update={"domains": how}))
    for name in (*OF_UTILITY, *OF_SAFETY, "bucket"):
        np.testing.assert_array_equal(two.column(name), one.column(name), err_msg=name)
    # Taken for independent, as two domains are, they halve the variance of a mean.
    less = np.sqrt(2) if how == "mean" else 1
    np.testing.assert_allclose(two.column("utility_shift_se"), one.column("utility_shift_se") / less, rtol=1e-12)
    assert (two.column("optimization_conflict_se") <= one.column("optimization_conflict_se") + 1e-15).all()


@pytest.mark.parametrize("config", [MARGIN, DECISION], ids=["margin", "decision"])
def test_the_map_of_a_domain_is_that_of_a_diagnosis_with_it_alone(
    diagnosed: Diagnosed, domains: dict[str, list[Example]], config: DiagnoseConfig
) -> None:
    together = diagnosed(domains, config)
    assert list(together.domains) == sorted(domains)
    for name, examples in domains.items():
        alone = diagnosed(examples, config)
        assert together.domains[name].table.equals(alone.table)
        for key in ("data", "baseline", "ties", "reliability"):
            assert together.domains[name].metadata[key] == alone.metadata[key]


def test_the_combined_map_is_made_of_the_columns_of_the_domains(
    diagnosed: Diagnosed, domains: dict[str, list[Example]]
) -> None:
    mean, worst = diagnosed(domains), diagnosed(domains, MARGIN.model_copy(update=WORST))
    maps = list(mean.domains.values())
    assert [one.table for one in maps] == [one.table for one in worst.domains.values()]
    scores = np.array([one.column("conflict_score") for one in maps])
    chosen = [max(range(len(maps)), key=lambda d: scores[d][head]) for head in range(len(mean))]
    assert len(set(chosen)) == 3, "every domain is the worst one somewhere"
    for name in (*OF_UTILITY, "conflict_magnitude"):
        columns = [one.column(name) for one in maps]
        np.testing.assert_allclose(mean.column(name), sum(columns) / 3, rtol=1e-12, err_msg=name)
        np.testing.assert_array_equal(worst.column(name), [columns[d][h] for h, d in enumerate(chosen)], err_msg=name)
    for name in ("optimization_conflict_se", "utility_shift_se"):
        columns = [one.column(name) for one in maps]
        np.testing.assert_array_equal(worst.column(name), [columns[d][h] for h, d in enumerate(chosen)], err_msg=name)
    variances = [one.column("utility_shift_se") ** 2 for one in maps]
    np.testing.assert_allclose(mean.column("utility_shift_se"), np.sqrt(sum(variances)) / 3, rtol=1e-12)
    for cmap in (mean, worst):
        for name in OF_SAFETY:
            np.testing.assert_array_equal(cmap.column(name), maps[0].column(name), err_msg=name)
        np.testing.assert_array_equal(cmap.column("bucket"), bucket_numbers(cmap.column("conflict_score")))
    assert (worst.column("conflict_score") >= mean.column("conflict_score")).all()
    assert (mean.column("conflict_score") >= scores.min(0)).all()
    assert np.abs(mean.column("conflict_score") - mean.column("optimization_conflict") * mean.column(
        "functional_sensitivity")).max() > 1e-3, "a mean of products is no product of means"  # fmt: skip


@pytest.mark.parametrize("how", ["worst", pytest.param("mean", marks=pytest.mark.slow)])
def test_the_order_of_domains_does_not_matter(
    diagnosed: Diagnosed, domains: dict[str, list[Example]], how: Any
) -> None:
    config = DiagnoseConfig(measure="margin", max_new_tokens=4, ablation="mean", domains=how)
    one, other = diagnosed(domains, config, seed=1), diagnosed(dict(reversed(domains.items())), config, seed=1)
    assert other.table.equals(one.table)
    assert other.metadata["data"] == one.metadata["data"]
    assert other.metadata["domains"] == one.metadata["domains"]


def test_a_mapping_of_one_is_a_sequence(
    diagnosed: Diagnosed, questions: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = diagnosed(questions, out=tmp_path / "plain", seed=2)
    named = diagnosed({"words": questions}, out=tmp_path / "named", seed=2)
    assert named.table.equals(plain.table)
    assert {**named.metadata, "seconds": 0, "provenance": 0} == {**plain.metadata, "seconds": 0, "provenance": 0}
    assert "domains" not in named.metadata
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == [
        "ablation.parquet",
        "conflict_map.parquet",
        "gradients.parquet",
    ]
    assert "has no effect" not in caplog.text
    diagnosed({"words": questions}, MARGIN.model_copy(update=WORST))
    assert "diagnose.domains = 'worst' has no effect" in caplog.text


class _Turned(torch.autograd.Function):
    """Identity with the gradient of some columns turned round."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, columns: slice) -> torch.Tensor:
        ctx.columns = columns
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        turned = grad.clone()
        turned[..., ctx.columns] *= -1
        return turned, None


@pytest.mark.parametrize("planted", [1, 3])
@pytest.mark.parametrize("how", ["mean", "worst"])
def test_a_conflict_planted_in_one_domain(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, planted: int, how: Any
) -> None:
    """Two domains with the objective of safety; for one head the gradients of the second point the other way."""
    model = tiny_model("llama", seed=5)
    safety = [Example(id=f"s{i}", prompt=f"Say {i}.", reply=f"It is {i}.") for i in range(6)]
    same = [
        Example(id=f"u{i}", prompt=e.prompt, choices=(str(e.reply), "No."), answer=0, scoring="likelihood")
        for i, e in enumerate(safety)
    ]
    n_backwards = 0

    def turn(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        nonlocal n_backwards
        if not torch.is_grad_enabled():
            return out
        n_backwards += 1
        # Two chunks each of safety, calm and tense.
        return _Turned.apply(out, slice(planted * 8, (planted + 1) * 8)) if n_backwards > 4 else out

    model.model.layers[0].self_attn.q_proj.register_forward_hook(turn)
    config = DiagnoseConfig(measure="margin", max_new_tokens=4, gradient_chunks=2, domains=how)
    utility = {"tense": same, "calm": same}
    cmap = castune.diagnose(model, tiny_tokenizer, safety=safety, utility=utility, config=config)
    assert n_backwards == 6, "the gradients of safety are measured once"
    at = cmap.heads.index((0, planted))
    expected = np.zeros(len(cmap))
    expected[at] = 1 if how == "worst" else 0.5
    np.testing.assert_allclose(cmap.column("optimization_conflict"), expected, atol=1e-6)
    assert cmap.column("conflict_score").argmax() == at
    assert cmap.column("bucket")[at] == 1
    assert cmap.domains["calm"].column("optimization_conflict").max() < 1e-6


# -- what is shared, journal and files


def test_safety_is_measured_once(
    diagnosed: Diagnosed, domains: dict[str, list[Example]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, Any]] = []
    measured: list[int] = []
    plain = grams.partial_gradients

    def counted(model: Any, paths: Any, rows: Sequence[Any], **options: Any) -> Any:
        measured.append(len(rows))
        return plain(model, paths, rows, **options)

    monkeypatch.setattr(grams, "partial_gradients", counted)
    monkeypatch.setattr(Journal, "append", lambda _self, record: written.append(record))
    diagnosed(domains["words"])
    n_safety = sum(record.get("set") == "safety" for record in written)
    assert n_safety > 0
    written.clear()
    measured.clear()
    diagnosed(domains)
    assert measured == [6, 4, 3, 4]
    assert sum(record.get("set") == "safety" for record in written) == n_safety
    names = {"safety", "utility:Words-2", "utility:animals", "utility:words"}
    assert {record["set"] for record in written if "set" in record} == names


@pytest.mark.parametrize("config", [MARGIN, DECISION], ids=["margin", "decision"])
def test_an_interrupted_diagnosis_continues_to_the_same_map(
    diagnosed: Diagnosed,
    domains: dict[str, list[Example]],
    config: DiagnoseConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after every fifth record, and each time continued in another order and with another combination."""
    expected = diagnosed(domains, config, out=tmp_path / "whole")
    plain, written = Journal.append, 0

    def stop(self: Journal, record: dict[str, Any]) -> None:
        nonlocal written
        plain(self, record)
        written += 1
        if written % 5 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stop)
    found, n_stops = None, 0
    while found is None:
        order = dict(reversed(domains.items())) if n_stops % 2 else domains
        try:
            found = diagnosed(order, config.model_copy(update=WORST if n_stops % 3 else {}), out=tmp_path / "parts")
        except KeyboardInterrupt:
            n_stops += 1
    monkeypatch.undo()
    assert n_stops > 3
    if found.metadata["combined"] == "worst":
        expected = diagnosed(domains, config.model_copy(update=WORST))
    assert found.table.equals(expected.table)
    assert {name: one.table for name, one in found.domains.items()} == {
        name: one.table for name, one in expected.domains.items()
    }
    one, other = (pq.read_table(tmp_path / part / "ablation.parquet") for part in ("whole", "parts"))
    assert one.equals(other)
    assert not (tmp_path / "parts" / "journal").exists()


def test_two_shares_make_the_map_of_one_process(
    diagnosed: Diagnosed, domains: dict[str, list[Example]], tmp_path: Path
) -> None:
    with pytest.raises(MapUnfinished):
        diagnosed(domains, out=tmp_path, shard="2/2")
    shared = diagnosed(domains, out=tmp_path, shard="1/2")
    assert shared.table.equals(diagnosed(domains).table)
    assert ConflictMap.load(tmp_path) == shared


def test_what_is_saved_is_what_is_loaded(
    diagnosed: Diagnosed, domains: dict[str, list[Example]], tmp_path: Path
) -> None:
    cmap = diagnosed(domains, out=tmp_path, sources={"utility:words": "mine", "safety": "theirs"})
    assert ConflictMap.load(tmp_path) == cmap
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet"))
    assert files == [
        "ablation.parquet", "conflict_map.parquet", "domains/Words-2.parquet", "domains/animals.parquet",
        "domains/words.parquet", "gradients.parquet",
    ]  # fmt: skip
    alone = ConflictMap.load(tmp_path / "domains" / "words.parquet")
    assert alone == cmap.domains["words"]
    assert alone.metadata["data"]["utility"]["source"] == "mine"
    outcomes = pq.read_table(tmp_path / "ablation.parquet").to_pandas()
    counts = outcomes.groupby("objective")["example"].nunique().to_dict()
    assert counts == {"safety": 6, "utility:Words-2": 4, "utility:animals": 3, "utility:words": 4}

    metadata = cmap.metadata
    assert metadata["combined"] == "mean"
    assert metadata["data"]["utility"] == {
        "source": "mine", "n": 11, "cut": 0, "replies_cut": 0, "hash": utility_hash(utility_sets(domains)),
    }  # fmt: skip
    assert metadata["data"]["safety"]["source"] == "theirs"
    accuracies = []
    for name, record in metadata["domains"].items():
        one = cmap.domains[name]
        assert record["data"] == one.metadata["data"]["utility"]
        assert record["reliability"] == one.metadata["reliability"]["reliability"]
        assert record["spearman"] == spearman(one.column("conflict_score"), cmap.column("conflict_score"))
        accuracies.append(record["utility_accuracy"])
    total = metadata["baseline"]["utility_accuracy"]
    assert total["value"] == pytest.approx(np.mean([one["value"] for one in accuracies]))
    assert total["n"] == 11
    assert metadata["reliability"]["n_utility"] == 11
    assert metadata["reliability"]["chunks_utility"] == 9


def test_a_map_beside_the_domains_of_another_one_is_refused(
    diagnosed: Diagnosed, domains: dict[str, list[Example]], tmp_path: Path
) -> None:
    diagnosed(domains, out=tmp_path)
    file = tmp_path / "domains" / "words.parquet"
    other = file.read_bytes()
    file.write_bytes((tmp_path / "domains" / "animals.parquet").read_bytes())
    with pytest.raises(
        ArtifactError, match=r"conflict_map\.parquet: the map of utility domain 'words' is [0-9a-f]{16}"
    ):
        ConflictMap.load(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"'words' is missing.*keep the folder domains"):
        ConflictMap.load(tmp_path)
    file.write_bytes(other)
    assert len(ConflictMap.load(tmp_path).domains) == 3


def test_the_hash_is_of_every_domain_and_of_what_it_is_called(questions: list[Example]) -> None:
    halves = {"a": questions[:3], "b": questions[3:]}
    others = [questions, {"a": questions[3:], "b": questions[:3]}, {"a": questions[:2], "b": questions[2:]}]
    others += [{"a": questions[:3], "c": questions[3:]}, {**halves, "c": questions}]
    hashes = [utility_hash(utility_sets(one)) for one in (halves, *others)]
    assert len(set(hashes)) == len(hashes)
    assert utility_hash(utility_sets({"any": questions})) == utility_hash(utility_sets(questions))


# -- refusals


BAD: dict[str, tuple[Any, str]] = {
    "none at all": (lambda _q, _h: {}, "utility: no domains"),
    "an empty domain": (lambda q, _h: {"a": q, "b": []}, "utility: domain 'b': 0 examples, a diagnosis needs at least 2"),
    "a domain of one": (lambda q, _h: {"a": q, "b": q[:1]}, "utility: domain 'b': 1 examples"),
    "no questions": (lambda q, h: {"a": q, "b": h}, "utility: domain 'b': example 'h0' is no multiple-choice question"),
    "no questions, alone": (lambda _q, h: {"b": h}, "utility: domain 'b': example 'h0' is no multiple-choice question"),
    "a path": (lambda q, _h: {"a": q, "../b": q}, "utility: domain '../b': accepted: 1 to 100 letters"),
    "a space": (lambda q, _h: {"a b": q}, "utility: domain 'a b'"),
    "too long a name": (lambda q, _h: {"a" * 101: q, "b": q}, "accepted: 1 to 100 letters"),
    "no name": (lambda q, _h: {"": q, "a": q}, "utility: domain ''"),
    "a newline": (lambda q, _h: {"a\n": q, "b": q}, r"utility: domain 'a\n'"),
    "other letters": (lambda q, _h: {"ä": q, "b": q}, "utility: domain 'ä'"),
    "no text": (lambda q, _h: {1: q, "b": q}, "utility: domain 1"),
    "a key of a source": (lambda q, _h: {"limit": q, "b": q}, "utility: domain 'limit': this is a key of a data source"),
    "capitals": (lambda q, _h: {"Maths": q, "maths": q}, "domains 'Maths' and 'maths' differ in capitals only"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_domains_are_told_by_name(
    case: str, diagnosed: Diagnosed, questions: list[Example], harmful: list[Example], tmp_path: Path
) -> None:
    change, message = BAD[case]
    with pytest.raises(CastuneError) as error:
        diagnosed(change(questions, harmful), out=tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_domain_that_cannot_be_measured_is_named(
    diagnosed: Diagnosed, questions: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that are not finite in one domain."""
    broken = [replace(example, id=f"broken-{example.id}") for example in questions]
    plain = Objectives.utility_measure

    def measure(self: Any, examples: Sequence[Example]) -> Any:
        found = plain(self, examples)
        if examples[0].id.startswith("broken"):
            object.__setattr__(found, "outcome", lambda _n, _values: np.nan)
        return found

    monkeypatch.setattr(Objectives, "utility_measure", measure)
    with pytest.raises(CastuneError, match="the utility:b shift of 12 heads could not be measured"):
        diagnosed({"a": questions, "b": broken})


def test_only_the_combined_map_warns(
    diagnosed: Diagnosed, domains: dict[str, list[Example]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        cmap = diagnosed(domains, DECISION)
    said = [record.message for record in caplog.records if "reliability" in record.message]
    assert said == cmap.metadata["reliability"]["warnings"]
