"""`castune inspect` and `castune repair`: an adapter of another trainer and an arm of a run, from files to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from castune.artifacts import Certificate, ConflictMap, EvalResult, HeadSelection, MaskedAdapter, ProjectedAdapter
from castune.artifacts.adapter_inspection import AdapterInspection
from castune.artifacts.repair_result import RepairResult
from castune.artifacts.tune_result import adapter_hash
from castune.cli import app
from castune.evaluation.judges import Judge, Verdict
from castune.tuning.verify import certify

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def finished(finished_run: Callable[..., Path], own_data: dict[str, Path]) -> Path:
    """A run with all heads trained beside the safe ones, strongly enough that replies change."""
    suites = [f"nll:{own_data['utility']}", f"safety:{own_data['held-out']}", f"over-refusal:{own_data['benign']}"]
    return finished_run(
        evaluate__suites=suites,
        select__compare=["all"],
        tune__learning_rate=0.2,
        tune__max_steps=6,
        evaluate__max_new_tokens=8,
    )


@pytest.fixture
def adapter(tmp_path: Path, models: Callable[..., Path], tiny_model: Callable[..., Any]) -> Path:
    """An adapter of all linear modules, as TRL trains them, of the model in `tmp_path`."""
    models()
    config = LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def command(*arguments: object) -> str:
    """What a command writes to standard output; progress goes elsewhere."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


class OtherWords(Judge):
    """Takes every reply for a refusal that is not what the base model said, which it is asked about first."""

    name = signature = "other-words"

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        pairs = zip(prompts, replies, strict=True)
        return [Verdict(reply != self.said.setdefault(prompt, reply)) for prompt, reply in pairs]


@pytest.fixture
def other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models refuse nothing: let any change of a reply be a refusal."""
    monkeypatch.setattr("castune.steps.bench.judge", lambda name: OtherWords())


def test_an_adapter_of_another_trainer(adapter: Path, tmp_path: Path, own_data: dict[str, Path]) -> None:
    sources = ["--safety", own_data["safety"], "--utility", own_data["utility"], "--over-refusal", own_data["align"]]
    place = ["--base", tmp_path / "model", "--dtype", "float32", "--out", tmp_path / "out"]
    output = command("inspect", adapter, *place, *sources)
    assert max(map(len, output.splitlines())) <= 80
    for said in ("LoRA r = 8, alpha = 4", "4 harmful prompts", "12 of 12 query heads", "no anomalies found"):
        assert said in output
    found = AdapterInspection.load(tmp_path / "out")
    assert found.data["over-refusal"]["n"] == 8
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "inspection.csv",
        "inspection.html",
        "inspection.parquet",
    }
    again = json.loads(command("inspect", adapter, *place, *sources, "--json"))
    assert again == json.loads(json.dumps(found.to_json()))
    page = (tmp_path / "out" / "inspection.html").read_text(encoding="utf-8")
    assert "Costliest units" in page
    assert str(tmp_path / "model") not in page


def test_an_arm_of_a_run_with_its_map(finished: Path) -> None:
    output = command("inspect", finished / "arms" / "all" / "adapter", "--run", finished)
    for said in ("all: LoRA r = 4", "by conflict score", "Spearman of C(h) with size"):
        assert said in output
    found, cmap = AdapterInspection.load(finished / "inspection" / "all"), ConflictMap.load(finished)
    assert found.column("conflict_score").tolist() == cmap.column("conflict_score").tolist()
    assert all(found.table["selected"].to_pylist())
    assert not [one for one in found.metadata["odd"] if one["what"] == "outside"]
    # As an adapter that was to touch the safe heads alone, it touches others.
    output = command("inspect", finished / "arms" / "all" / "adapter", "--run", finished, "--arm", "safe", "--limit", 2)
    assert "9 units outside the selection changed" in " ".join(output.split())


def test_what_inspect_refuses(finished: Path, adapter: Path, tmp_path: Path) -> None:
    assert "no such file" in refused("inspect", tmp_path / "nowhere", "--base", tmp_path / "model")
    assert "add --run RUN" in refused("inspect", adapter, "--arm", "safe")
    assert "not a run directory" in refused("inspect", adapter, "--run", tmp_path)
    assert "no selection named x" in refused("inspect", adapter, "--run", finished, "--arm", "x", "--limit", 2)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "name it with --base" in refused("inspect", adapter)


@pytest.mark.usefixtures("other_words")
def test_an_arm_is_repaired(finished: Path, tmp_path: Path) -> None:
    output = command("repair", finished, "--arm", "all", "--keep-safety", 0.5, "--draws", 2)
    found = RepairResult.load(finished / "repair" / "all-repaired")
    assert [row.kind for row in found.tried][-4:] == ["risky", "random", "random", "weaker"]
    assert (found.cost, found.tried[0].kept, found.arm) == ("nll", 1, "all-repaired")
    assert found.chosen is not None, output
    [taken] = [row for row in found.tried if row.name == found.chosen]
    assert taken.saved is not None
    assert taken.saved[0] == max(row.saved[0] for row in found.tried if row.kind == "effects" and row.saved) > 0
    assert taken.saved[0] == pytest.approx(found.tried[0].costs["nll"][0] - taken.costs["nll"][0])
    assert "note: it was chosen on these suites" in " ".join(output.split())
    assert max(map(len, output.splitlines()[:-2])) <= 80
    arm = finished / "arms" / "all-repaired"
    selection = HeadSelection.load(arm)
    assert len(selection.units) == 12 - len(found.dropped)
    assert not set(selection.units) & {*found.dropped}
    masked = MaskedAdapter.load(arm / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert masked.certificate == Certificate.load(arm / "adapter") == certify(base, arm / "adapter", selection)
    PeftModel.from_pretrained(base, arm / "adapter")
    evaluation = EvalResult.load(finished / "evaluation" / "all-repaired")
    assert evaluation.model["adapter"] == masked.certificate.adapter_hash


@pytest.mark.usefixtures("other_words")
def test_what_was_chosen_by_other_suites_is_confirmed_on_those_of_the_run(
    finished: Path, own_data: dict[str, Path]
) -> None:
    suites = f"safety:{own_data['benign']},nll:{own_data['utility']}"
    output = command("repair", finished, "--arm", "all", "--keep-safety", 0.5, "--draws", 0, "--suites", suites)
    found = RepairResult.load(finished / "repair" / "all-repaired")
    assert found.chosen is not None, output
    assert [Path(name).name for name in found.confirmed_on] == ["held-out.jsonl"]
    assert [row.kind for row in found.confirmed] == ["source", "effects", "risky", "weaker"]
    # Nothing was measured of it on all suites of the run.
    assert not (finished / "evaluation" / "all-repaired").exists()


@pytest.mark.usefixtures("other_words")
def test_a_repair_is_compared_with_the_projection_of_safe_lora(
    finished: Path, models: Callable[..., Path], own_data: dict[str, Path]
) -> None:
    def before_alignment(model: Any) -> None:
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += 0.02 * torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1])

    unaligned = models(name="before", change=before_alignment)
    suites = ["--suites", f"safety:{own_data['held-out']},nll:{own_data['utility']}"]
    options = ["--arm", "all", "--keep-safety", 0.5, "--draws", 0, "--shares", 0.1, *suites]
    place = finished / "repair" / "all-repaired"
    assert "no such directory" in refused("repair", finished, *options, "--unaligned", "./nowhere")
    assert not place.exists()
    output = command("repair", finished, *options, "--unaligned", unaligned)
    found = RepairResult.load(place)
    last = found.tried[-1]
    assert (last.name, last.kind, last.dropped, last.predicted) == ("safe-lora", "safe-lora", 0, {})
    assert last.costs["nll"] != found.tried[0].costs["nll"]
    assert "safe-lora" in output
    projected = ProjectedAdapter.load(place / "candidates" / "safe-lora")
    assert projected.source["hash"] == found.adapter["hash"]
    assert projected.projected
    measured = EvalResult.load(place / "evaluation" / "safe-lora")
    assert measured.model["adapter"] == projected.certificate.adapter_hash


@pytest.mark.usefixtures("other_words")
def test_nothing_is_taken_where_no_candidate_is_worth_it(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castune.steps.candidates.drop_order", lambda inspection: [])
    output = command("repair", finished, "--arm", "all")
    assert "nothing selected: to first order no unit costs anything" in output
    assert RepairResult.load(finished / "repair" / "all-repaired").chosen is None
    assert not (finished / "arms" / "all-repaired").exists()


@pytest.mark.usefixtures("other_words")
def test_what_an_earlier_repair_took_is_said_to_be_that(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repair = ("repair", finished, "--arm", "all", "--keep-safety", 0.5, "--draws", 0)
    arm = finished / "arms" / "all-repaired" / "adapter"
    assert "note: it was chosen" in command(*repair)
    taken = adapter_hash(arm)
    assert "earlier repair" not in command(*repair), "it may be made again"
    monkeypatch.setattr("castune.steps.candidates.drop_order", lambda inspection: [])
    for _ in range(2):
        assert f"note: {arm} was selected by an earlier repair, and is still there" in command(*repair)
    assert adapter_hash(arm) == taken


@pytest.mark.usefixtures("other_words")
def test_an_adapter_without_a_run_is_repaired_and_confirmed(
    adapter: Path, tmp_path: Path, own_data: dict[str, Path]
) -> None:
    sources = ["--safety", own_data["safety"], "--utility", own_data["utility"], "--over-refusal", own_data["align"]]
    suites = ["--suites", f"safety:{own_data['held-out']},nll:{own_data['utility']}"]
    others = ["--confirm", f"safety:{own_data['benign']},{own_data['utility']}"]
    place = ["--base", tmp_path / "model", "--dtype", "float32", "--out", tmp_path / "out"]
    output = command(
        "repair", adapter, *place, *sources, *suites, *others, "--keep-safety", 0.1, "--draws", 1, "--shares", "0.1,0.3"
    )
    found = RepairResult.load(tmp_path / "out")
    assert found.cost == "nll"
    assert [row.kind for row in found.tried] == ["source", "effects", "effects", "random", "weaker"], "no map"
    assert found.chosen is not None, output
    assert found.arm is None
    assert "confirmed on" in output
    assert [row.name for row in found.confirmed][:2] == ["foreign", found.chosen]
    selection = HeadSelection.load(tmp_path / "out" / "adapter")
    assert not selection.only_heads
    assert len(selection.units) == 39 - len(found.dropped)
    # Everything is there: the same command measures nothing again, and says the same.
    before = (tmp_path / "out" / "evaluation" / "base" / "metrics.json").read_bytes()
    again = json.loads(
        command("repair", adapter, *place, *sources, *suites, *others, "--keep-safety", 0.1, "--draws", 1, "--shares", "0.1,0.3", "--json")
    )  # fmt: skip
    assert (tmp_path / "out" / "evaluation" / "base" / "metrics.json").read_bytes() == before
    assert again["tried"] == json.loads(json.dumps(found.to_json()))["tried"]


def test_what_was_chosen_stands_where_nothing_of_the_other_suites_is_scored(
    adapter: Path,
    tmp_path: Path,
    own_data: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = {json.loads(line)["prompt"] for line in own_data["benign"].read_text(encoding="utf-8").splitlines()}

    class Deaf(OtherWords):
        """Can tell nothing of the prompts that are to confirm."""

        def verdicts(self, asked: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
            found = zip(asked, super().verdicts(asked, replies), strict=True)
            return [Verdict(None) if prompt in prompts else verdict for prompt, verdict in found]

    monkeypatch.setattr("castune.steps.bench.judge", lambda name: Deaf())
    sources = ["--safety", own_data["safety"], "--utility", own_data["utility"], "--over-refusal", own_data["align"]]
    suites = ["--suites", f"safety:{own_data['held-out']},nll:{own_data['utility']}"]
    others = ["--confirm", f"safety:{own_data['benign']},{own_data['utility']}"]
    place = ["--base", tmp_path / "model", "--dtype", "float32", "--out", tmp_path / "out"]
    options = ["--keep-safety", 0.1, "--draws", 0, "--shares", "0.1,0.3"]
    output = command("repair", adapter, *place, *sources, *suites, *others, *options)
    found = RepairResult.load(tmp_path / "out")
    assert found.chosen is not None
    assert (found.confirmed, found.confirmed_on) == ((), ())
    assert "nothing is confirmed: no prompt of" in caplog.text
    assert "it was chosen on these suites" in " ".join(output.split())


def test_an_adapter_that_gains_nothing_is_told(adapter: Path, tmp_path: Path, own_data: dict[str, Path]) -> None:
    suites = ["--suites", f"safety:{own_data['held-out']},nll:{own_data['utility']}", "--limit", 2]
    said = refused("repair", adapter, "--base", tmp_path / "model", "--out", tmp_path / "out", *suites)
    assert "gains no refusals over the base model (0.0 % without it, 0.0 % with it)" in said
    assert sorted(path.name for path in (tmp_path / "out" / "evaluation").iterdir()) == ["base", "foreign"]
    assert not (tmp_path / "out" / "adapter").exists()


def test_what_repair_refuses(finished: Path, adapter: Path, tmp_path: Path, own_data: dict[str, Path]) -> None:
    place = ["--base", tmp_path / "model", "--out", tmp_path / "out"]
    assert "which has no arms" in refused("repair", adapter, "--arm", "all")
    assert "with --out DIR" in refused("repair", adapter, "--base", tmp_path / "model")
    assert "--as NAME instead of --out" in refused("repair", finished, "--out", tmp_path / "out")
    assert "no selection named x" in refused("repair", finished, "--arm", "x")
    assert "already has an arm 'safe'" in refused("repair", finished, "--arm", "all", "--as", "safe")
    assert "not a run directory" in refused("repair", tmp_path / "nowhere")
    command("mask", finished / "adapter", "--run", finished, "--as", "mine")
    before = adapter_hash(finished / "arms" / "mine" / "adapter")
    said = refused("repair", finished, "--arm", "all", "--as", "mine")
    assert "an adapter that no repair made is there already; choose another name with --as" in said
    assert adapter_hash(finished / "arms" / "mine" / "adapter") == before
    assert "measure no refusals" in refused("repair", adapter, *place, "--suites", own_data["utility"])
    safety_alone = ["--suites", f"safety:{own_data['held-out']}"]
    assert "measure no cost" in refused("repair", adapter, *place, *safety_alone)
    assert "measured are: nll" in refused(
        "repair", adapter, *place, "--cost", "kl", "--suites", f"{safety_alone[1]},nll:{own_data['utility']}"
    )
    deciding = f"{safety_alone[1]},nll:{own_data['utility']}"
    for others in (safety_alone[1], own_data["utility"]):
        assert "nothing can be confirmed" in refused(
            "repair", adapter, *place, "--suites", deciding, "--confirm", others
        )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert "use_dora is set" in refused("repair", adapter, *place)
    assert not (tmp_path / "out").exists()
