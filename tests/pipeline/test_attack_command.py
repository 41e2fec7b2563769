"""`castune attack`: refusals under attacks, what is reused, what is left behind, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command, refused
from conftest import write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from castune.artifacts import EvalResult, HeadSelection
from castune.artifacts.attack_result import Attack, AttackResult
from castune.config import AttackConfig
from castune.core.checksum import checksums
from castune.core.loading import load_model
from castune.errors import NothingScored, TrainingError
from castune.evaluation.run import evaluate
from castune.evaluation.suites import load_suites
from castune.evaluation.verdict import Judge, Verdict
from castune.steps import attack as step
from castune.steps.attack import attack
from castune.steps.directory import RunDirectory
from castune.steps.report import report_step

Finished = Callable[..., Path]
QUICK = ("--n-rows", "2,4", "--steps", "2", "--learning-rate", "0.05")
THINGS = ("rice", "eggs", "soup", "bread", "tea", "jam")
RELEARN, DIRECTION, HALF = Attack("relearn", 4), Attack("direction"), Attack("dial", 0.5)


class ByDigest(Judge):
    """Says of a reply what its digest says: as many are refusals as not, and other replies get other verdicts."""

    name = signature = "opening"

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        return [Verdict(hashlib.sha256(reply.encode()).digest()[0] % 4 > 0) for reply in replies]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "rows.jsonl",
        [{"id": f"r{i}", "prompt": f"Cook {w}.", "completion": f"Boil {w}."} for i, w in enumerate(THINGS)],
    )


@pytest.fixture
def folder(finished_run: Finished, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run of two arms, measured at half strength too; refusals by digest."""
    monkeypatch.setattr(step, "judge", lambda _name: ByDigest())
    return RunDirectory(finished_run(evaluate__strengths=[0.5], tune__learning_rate=0.2))


def attacked(folder: RunDirectory, *options: object) -> tuple[str, AttackResult]:
    said = command("attack", folder.path, *options)
    return " ".join(said.split()), AttackResult.load(folder.attacks)


def files(place: Path) -> dict[str, str]:
    """Digests of all files."""
    return {
        str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in place.rglob("*")
        if file.is_file()
    }


# -- what is measured


def test_all_attacks_on_all_arms(
    folder: RunDirectory, rows: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("castune.steps.attack_inputs.why_not_in_4_bits", lambda _device: "it is not installed")
    before = files(folder.path)
    said, result = attacked(folder, "--rows", rows, *QUICK)
    assert result.attacks == [
        *(Attack("relearn", 2), RELEARN, DIRECTION),
        *(Attack("dial", 0.75), HALF, Attack("dial", 0.25)),
    ]
    assert [arm.name for arm in result.arms] == ["safe", "risky"]
    assert (result.arms[0].units, result.arms[0].of_units, result.arms[0].noun) == (3, 12, "heads")
    assert len(result.rows) == 2 * len(result.attacks)
    assert len(result.comparisons) == len(result.attacks)
    assert result.left_out == {"quantise": "it is not installed"}
    assert "left out: quantise, because it is not installed" in said
    assert result.data["rows"]["n"] == 4
    assert result.data["harmful"]["n"] == 4
    assert result.data["harmless"]["n"] == len(THINGS)
    assert "2 benign rows" in said

    for row in result.rows:
        evaluations = [EvalResult.load(folder.path / rate.folder) for rate in (row.before, row.after)]
        [suite] = result.suites
        outcomes = [ByDigest()([""] * 4, [s["reply"] for s in e.samples_of(suite)]) for e in evaluations]
        assert row.before.n == row.after.n == 4
        assert [row.before.refused, row.after.refused] == [sum(map(bool, one)) for one in outcomes]
        pairs = list(zip(*outcomes, strict=True))
        assert (row.gained, row.lost) == (pairs.count((False, True)), pairs.count((True, False)))
        assert row.kept == (pairs.count((True, True)) / sum(map(bool, outcomes[0])) if any(outcomes[0]) else None)
        assert row.change == pytest.approx((row.gained - row.lost) / 4)
    assert any(row.lost or row.gained for row in result.rows), "attacks change replies"

    # Replies are kept as those of evaluations are: nobody else reads them, and nobody is shown them.
    after = files(folder.path)
    new = set(after) - set(before)
    assert {name for name in new if not name.startswith("attacks/")} == set()
    assert {Path(name).name for name in new} == {"attacks.json", "metrics.json", "samples.jsonl"}
    assert {name for name in before if before[name] != after[name]} == {"provenance.json"}
    for file in folder.attacks.rglob("samples.jsonl"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        for line in file.read_text(encoding="utf-8").splitlines():
            reply = json.loads(line)["reply"]
            if len(reply.strip()) > 3:
                assert reply not in said
                assert reply not in caplog.text
                assert reply not in json.dumps(json.loads((folder.attacks / "attacks.json").read_text()))


def test_the_model_is_what_it_was(folder: RunDirectory, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(folder.load_recipe())
    monkeypatch.setattr(step, "load_model", lambda _recipe: loaded)
    sums, names = checksums(loaded.model), [name for name, _ in loaded.model.named_modules()]
    attacked(folder, "--rows", rows, *QUICK, "--kind", "relearn", "--kind", "direction", "--kind", "dial")
    assert checksums(loaded.model) == sums
    assert [name for name, _ in loaded.model.named_modules()] == names
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules()]
    assert not any(hooks)


def test_an_adapter_turned_down_gives_the_replies_of_the_scaled_adapter(folder: RunDirectory) -> None:
    _, result = attacked(folder, "--kind", "dial", "--strengths", "0.5,0.3", "--arm", "safe")
    half, other = result.rows
    assert half.before.folder == "evaluation/safe"
    # The run has measured it.
    assert half.after.folder == "evaluation/safe/strengths/0.5"
    assert other.after.folder == "attacks/safe/dial-0.3"
    recipe = folder.load_recipe()
    base = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder.path / "adapter")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= 0.3
    by_hand = evaluate(
        model,
        AutoTokenizer.from_pretrained(recipe.model),
        suites=load_suites(recipe.evaluate.suites[1:2]),
        config=recipe.evaluate,
    )
    found = EvalResult.load(folder.path / other.after.folder)
    assert [s["reply"] for s in found.samples] == [s["reply"] for s in by_hand.samples]


def test_the_direction_is_not_made_of_what_is_measured(folder: RunDirectory, own_data: dict[str, Path]) -> None:
    # Half of D_safe is measured: the direction is made of the other half.
    lines = own_data["safety"].read_text(encoding="utf-8").splitlines()
    mixed = own_data["safety"].parent / "mixed.jsonl"
    mixed.write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    _, result = attacked(folder, "--kind", "direction", "--prompts", f"safety:{mixed}")
    assert result.suites == (str(mixed),)
    assert result.data["harmful"]["n"] == 2
    safe = result.rows[0]
    assert safe.details["separation"] > 0
    assert safe.details["layer"] in (1, 2)
    assert safe.before.folder == "attacks/safe/before", "the run has not measured these prompts"
    every = own_data["safety"].parent / "every.jsonl"
    every.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "0 harmful ones are left" in refused(
        "attack", folder.path, "--kind", "direction", "--prompts", f"safety:{every}"
    )


def test_rows_that_arms_were_trained_on_come_last(folder: RunDirectory, tmp_path: Path) -> None:
    align = [json.loads(line) for line in Path(folder.load_recipe().align.source).read_text().splitlines()]
    mine = [{"id": f"m{i}", "prompt": f"Name {i}.", "completion": "Well."} for i in range(3)]
    both = write_rows(tmp_path / "both.jsonl", [*align, *mine])
    said = attacked(folder, "--kind", "relearn", "--rows", both, "--n-rows", "3,5", "--steps", "1", "--arm", "safe")
    assert [row.details["seen_rows"] for row in said[1].rows] == [0, 2]
    page = report_step(folder).read_text(encoding="utf-8")
    assert "trained on 2 of 5 of these rows too" in page


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_base_in_4_bits(folder: RunDirectory) -> None:
    pytest.importorskip("bitsandbytes")
    _, result = attacked(folder, "--kind", "quantise")
    assert result.attacks == [Attack("quantise")]
    found = EvalResult.load(folder.attacks / "safe" / "quantise")
    assert found.model["quantised"]
    assert found.model["fingerprint"].endswith("-quantised")
    assert found.model["adapter"] == result.arms[0].adapter_hash
    # It is not measured again.
    times = found.provenance
    attacked(folder, "--kind", "quantise")
    assert EvalResult.load(folder.attacks / "safe" / "quantise").provenance == times


# -- equal safety


def test_arms_are_compared_at_full_strength_where_nothing_else_is_known(
    finished_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "judge", lambda _name: ByDigest())
    folder = RunDirectory(finished_run())
    said, result = attacked(folder, "--kind", "dial", "--strengths", "0.5")
    assert result.target is None
    assert "not measured at other strengths" in result.why_full
    assert "Arms are compared at full strength, not at equal safety, because" in said
    assert {arm.strength for arm in result.arms} == {1.0}


def test_attacks_begin_at_the_strengths_of_equal_safety(
    folder: RunDirectory, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from castune.steps.equal_safety import EqualStrengths

    monkeypatch.setattr(
        "castune.steps.attack_inputs.strengths_at_equal_safety",
        lambda _folder, _names: EqualStrengths(0.4, {"safe": 0.5, "risky": 0.8}),
    )
    said, result = attacked(folder, "--rows", rows, *QUICK, "--kind", "relearn", "--kind", "dial", "--strengths", "0.5")
    assert "at equal safety: safe at 0.5 and risky at 0.8" in said
    assert [(row.arm, row.strength) for row in result.rows_of(RELEARN)] == [("safe", 0.5), ("risky", 0.8)]
    assert [(row.arm, row.strength) for row in result.rows_of(HALF)] == [("safe", 0.25), ("risky", 0.4)]
    assert result.rows_of(RELEARN)[0].before.folder == "evaluation/safe/strengths/0.5"
    assert result.rows_of(RELEARN)[1].before.folder == "attacks/risky/before"
    found = EvalResult.load(folder.attacks / "risky" / "relearn-4")
    assert found.model["strength"] == 0.8
    assert found.model["attack"]["made"]["weights"]


# -- done once


def test_what_is_done_is_not_done_again(folder: RunDirectory, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--rows", rows, *QUICK, "--kind", "relearn", "--kind", "direction")
    attacked(folder, *options)
    before = files(folder.attacks)
    calls: list[str] = []
    whole = step.evaluate_on
    monkeypatch.setattr(step, "evaluate_on", lambda *a, **s: calls.append(s["name"]) or whole(*a, **s))
    with monkeypatch.context() as without:
        without.setattr(step, "load_model", None)
        attacked(folder, *options)
        after = files(folder.attacks)
        assert {name for name in before if before[name] != after[name]} <= {"attacks.json"}, "its date"
        # One of the attacks alone is there, too.
        _, result = attacked(folder, "--rows", rows, *QUICK, "--kind", "direction")
        assert result.attacks == [DIRECTION]
    # Other settings are other attacks.
    attacked(folder, "--rows", rows, *QUICK, "--kind", "relearn", "--seed", "1")
    assert calls == [f"{arm}, relearn-{n}" for n in (2, 4) for arm in ("safe", "risky")]
    calls.clear()
    attacked(folder, "--rows", rows, "--n-rows", "4", "--steps", "1", "--kind", "relearn", "--arm", "safe")
    assert calls == ["safe, relearn-4"]


def test_attacks_that_were_stopped_go_on(folder: RunDirectory, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--rows", rows, *QUICK, "--kind", "relearn", "--kind", "direction")
    attacked(folder, *options)
    expected = AttackResult.load(folder.attacks)
    folder.attacks.rename(folder.path / "elsewhere")
    whole, calls = step.evaluate_on, []

    def stopped(*arguments: Any, **settings: Any) -> Any:
        calls.append(settings["name"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **settings)

    recipe = folder.load_recipe()
    config = AttackConfig(kinds=("relearn", "direction"), n_rows=(2, 4), steps=2, learning_rate=0.05)
    monkeypatch.setattr(step, "evaluate_on", stopped)
    with pytest.raises(KeyboardInterrupt):
        attack(folder.path, config=config, rows=str(rows))
    assert not (folder.attacks / "attacks.json").exists()
    assert recipe == folder.load_recipe()
    found = attack(folder.path, config=config, rows=str(rows))
    assert calls == [
        *("safe, relearn-2", "risky, relearn-2", "safe, relearn-4"),
        *("safe, relearn-4", "risky, relearn-4", "safe, direction", "risky, direction"),
    ]
    assert found.rows == expected.rows
    assert found.comparisons == expected.comparisons


def test_a_training_that_breaks_is_told_and_the_rest_is_kept(folder: RunDirectory, rows: Path) -> None:
    with pytest.raises(TrainingError, match="learning rate below"):
        command("attack", folder.path, "--rows", rows, "--kind", "relearn", "--n-rows", "2", "--learning-rate", "1e30")
    assert not (folder.attacks / "attacks.json").exists()


def test_where_nothing_was_scored_nothing_is_compared(folder: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(ByDigest):
        def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
            return [Verdict(None)] * len(replies)

    monkeypatch.setattr(step, "judge", lambda _name: Silent())
    with pytest.raises(NothingScored, match="arm safe, before any attack: none of the replies to .*held-out"):
        command("attack", folder.path, "--kind", "dial", "--strengths", "0.5")


# -- the report


def test_the_report_says_it_beside_the_gain(folder: RunDirectory, rows: Path) -> None:
    assert 'id="attacks"' not in report_step(folder).read_text(encoding="utf-8")
    attacked(folder, "--rows", rows, *QUICK, "--kind", "relearn")
    page = report_step(folder).read_text(encoding="utf-8")
    assert 'id="attacks"' in page
    assert page.count("Under 2 attacks no difference is seen") == 2, "at the top and in the section"
    assert 'aria-label="Attacks by arm"' in page
    # An arm that is another one now.
    weights = folder.path / "attacks" / "attacks.json"
    record = json.loads(weights.read_text())
    record.pop("digest")
    record["arms"][0]["adapter_hash"] = "0123456789abcdef"
    weights.write_text(json.dumps(record))
    left = folder.load_attacks()
    assert left is not None
    assert (left.gone, {row.arm for row in left.rows}, left.comparisons) == (("safe",), {"risky"}, ())
    page = report_step(folder).read_text(encoding="utf-8")
    assert page.count("Attacks on safe are of an adapter that no longer exists; run castune attack again") == 2
    record["arms"][1]["adapter_hash"] = "0123456789abcdef"
    weights.write_text(json.dumps(record))
    assert folder.load_attacks() is None


# -- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "bribe"], "--kind bribe: no such attack; accepted: relearn, direction, quantise, dial"),
        (["--kind", "dial", "--kind", "dial"], "kinds = ['dial', 'dial']: one is named twice"),
        (["--arm", "nobody"], "no selection named nobody; available: safe, risky"),
        (["--arm", "safe", "--arm", "safe"], "--arm: safe is named twice"),
        (["--rows", "absent.jsonl"], "absent.jsonl"),
        (["--rows", "ROWS", "--n-rows", "7"], "--n-rows 7: ROWS has 6 rows to relearn on"),
        (["--n-rows", "0"], "n_rows.0"),
        (["--n-rows", "few"], "--n-rows few: expected numbers separated by commas"),
        (["--n-rows", "3,3"], "n_rows = (3, 3): one is named twice"),
        (["--steps", "0"], "steps = 0"),
        (["--learning-rate", "-1"], "learning_rate = -1"),
        (["--strengths", "1"], "strengths.0"),
        (["--limit", "0"], "limit = 0"),
        (["--rows", "PROMPTS", "--n-rows", "1"], "has no reply; columns needed: prompt, completion"),
        (["--rows", "HELD-OUT", "--n-rows", "1"], "prompts are also in suite HELD-OUT"),
        (["--prompts", "over-refusal:PROMPTS"], "measures over-refusal; refusals are counted on harmful prompts"),
        (["--prompts", "starter-utility-eval"], "measures utility"),
        (["--prompts", "PROMPTS"], "say what it measures"),
        (["--prompts", "safety:absent.jsonl"], "absent.jsonl"),
    ],
    ids=str,
)
def test_bad_options_are_told_before_a_model_is_loaded(
    folder: RunDirectory,
    rows: Path,
    own_data: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(step, "load_model", None)
    before = files(folder.path)
    places = {"ROWS": str(rows), "PROMPTS": str(own_data["benign"]), "HELD-OUT": str(own_data["held-out"])}
    for name, place in places.items():
        options, said = [option.replace(name, place) for option in options], said.replace(name, place)
    assert said in refused("attack", folder.path, *options)
    assert files(folder.path) == before


def test_runs_without_what_an_attack_needs(
    folder: RunDirectory,
    finished_run: Finished,
    own_data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "load_model", None)
    assert "not a run directory" in refused("attack", tmp_path / "nothing")
    monkeypatch.setattr("castune.steps.attack_inputs.why_not_in_4_bits", lambda _device: "it is not installed")
    assert refused("attack", folder.path, "--kind", "quantise") == "--kind quantise: it is not installed"
    HeadSelection.load(folder.path).save(folder.path / "arms" / "untrained")
    assert "no adapter yet; run: castune tune" in refused("attack", folder.path, "--arm", "untrained")
    (folder.evaluation("risky") / "metrics.json").unlink()
    assert "arm risky was not evaluated; run: castune evaluate" in refused("attack", folder.path, "--arm", "risky")
    (folder.evaluation("safe") / "metrics.json").unlink()
    assert "no arm has an adapter that was evaluated" in refused("attack", folder.path)
    bare = RunDirectory(finished_run(out="bare", evaluate__suites=[f"nll:{own_data['utility']}"]))
    assert "give one with --prompts" in refused("attack", bare.path)


def test_a_damaged_reply_names_the_command_that_makes_it_again(folder: RunDirectory, rows: Path) -> None:
    attacked(folder, "--kind", "direction", "--rows", rows, "--arm", "safe")
    with (folder.attacks / "safe" / "direction" / "samples.jsonl").open("a") as file:
        file.write("{}\n")
    error = refused("attack", folder.path, "--kind", "direction", "--rows", rows, "--arm", "safe")
    assert f"run: castune attack {folder.path}" in error
