"""Attacks on the safety of a run's arms: refusals before and after, every arm at equal safety.

An attacked model is in memory alone. What is kept are its replies, as of any evaluation, and the numbers.

attacks/attacks.json           the result of the last command
attacks/ARM/before/            an evaluation of the arm at its strength, where the run has none
attacks/ARM/relearn-100/       the same of the attacked arm; direction/, quantise/, dial-0.5/
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from castune.artifacts import EvalResult
from castune.artifacts.attack_result import Attack, AttackedArm, AttackResult
from castune.artifacts.fingerprints import QUANTISED, at_strength, same_model_identity
from castune.artifacts.records import DataRecord, ModelRecord
from castune.config import AttackConfig, Recipe, TuneConfig
from castune.core.ablation import project_out
from castune.core.directions import last_states, refusal_direction
from castune.core.heads import HeadLayout
from castune.core.loading import LoadedModel, load_model
from castune.core.provenance import model_record, provenance
from castune.core.quantisation import keep_trainable
from castune.data.chat import ChatFormat
from castune.data.example import Example, content_hash
from castune.evaluation.backend import TransformersBackend, TransformersHost
from castune.evaluation.judges import NotJudged, judge
from castune.evaluation.judging import judge_again
from castune.evaluation.run import evaluate_on
from castune.evaluation.verdict import Judge
from castune.names import JudgeName
from castune.steps.arm import Arm
from castune.steps.attack_inputs import AttackInputs, attack_inputs
from castune.steps.attack_outcomes import Measured, comparisons, require_refusals, row_of
from castune.steps.directory import RunDirectory
from castune.steps.evaluate import is_judged_by, stored_evaluation
from castune.steps.readiness import require_ready, suite_tokens, training_tokens
from castune.tuning.relearning import ALPHA, BATCH_SIZE, RANK, relearnt

logger = logging.getLogger(__name__)

# What a training or a direction came to: it says more of a measurement, and not which one it is.
_MADE = "made"


def attack(
    run: str | Path,
    *,
    config: AttackConfig | None = None,
    arms: Sequence[str] = (),
    rows: str | None = None,
    prompts: Sequence[str] = (),
) -> AttackResult:
    """Attack the safety of a run's arms, and count refusals before and after.

    Attacked models are in memory alone; the run directory keeps their replies. What was measured before by the same
    settings is not measured again.

    Args:
        run: a run directory whose arms were evaluated.
        config: which attacks, and how.
        arms: names; all that have an adapter and were evaluated when empty. The first is what the others are compared
            with; without names it is `all`, where the run has it.
        rows: source of benign rows, prompts with replies, to relearn on; the starter data's when absent.
        prompts: suites of harmful prompts; the run's when empty.

    Returns:
        Every attack on every arm, and comparisons of arms; also written to `attacks/attacks.json`.

    Raises:
        CastuneError: no run, arm, suite or rows to attack with, or an attack that cannot be made here.
        NothingScored: not one harmful prompt was scored before and after an attack.
    """
    folder = RunDirectory(Path(run))
    recipe, config = folder.load_recipe(), config or AttackConfig()
    inputs = attack_inputs(folder, recipe, config, arms=arms, rows=rows, prompts=prompts)
    return attack_step(folder, recipe, config, inputs)


def attack_step(folder: RunDirectory, recipe: Recipe, config: AttackConfig, inputs: AttackInputs) -> AttackResult:
    """`attack` with loaded inputs."""
    if inputs.equal.why_full and len(inputs.arms) > 1:
        which = "arms" if inputs.equal.target is None else "some arms"
        logger.warning("%s are compared at full strength, not at equal safety: %s", which, inputs.equal.why_full)
    for kind, reason in inputs.left_out.items():
        logger.warning("%s is left out: %s", kind, reason)
    bench = _Bench(folder, recipe, config, inputs)
    bench.measure()
    result = bench.result()
    result.save(folder.attacks)
    folder.record_step("attack", result.provenance)
    return result


@dataclass(frozen=True)
class _Asked:
    """A model that is measured: an arm at a strength, and what is done to it; None before."""

    arm: Arm
    attack: Attack | None
    strength: float
    model: ModelRecord
    place: Path

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.arm.name}, {'before' if self.attack is None else self.attack.name}"

    @property
    def is_plain(self) -> bool:
        """Whether it is the arm itself at some strength, as any evaluation measures it."""
        return self.attack is None or self.attack.kind == "dial"


class _Bench:
    """The measurements of one command: those that are stored, and those that are made."""

    def __init__(self, folder: RunDirectory, recipe: Recipe, config: AttackConfig, inputs: AttackInputs) -> None:
        self.folder, self.recipe, self.config, self.inputs = folder, recipe, config, inputs
        self.identity: ModelRecord = folder.load_map().model.copy()

    def measure(self) -> None:
        """Make what is missing; the model is loaded for that alone."""
        todo = [one for one in self._asked() if self._stored(one) is None]
        if not todo:
            logger.info("attacks: all done already")
            return
        if any(not _in_4_bits(one) for one in todo):
            loaded = load_model(self.recipe)
            self._require_ready(loaded)
            self.folder.load_map(model_record(*loaded)["fingerprint"])
            # It may be in another precision, or on another device, than when it was mapped.
            self.identity = model_record(*loaded)
            todo = [one for one in self._asked() if self._stored(one) is None]
            self._make(loaded, [one for one in todo if not _in_4_bits(one)], len(todo))
            del loaded
        if in_4_bits := [one for one in todo if _in_4_bits(one)]:
            loaded = load_model(self.recipe, quantization="nf4")
            keep_trainable(loaded.model)
            self._make(loaded, in_4_bits, len(in_4_bits))

    def result(self) -> AttackResult:
        """The numbers, from what is stored."""
        suites = [suite.name for suite in self.inputs.suites]
        measured = {(one.arm.name, one.attack): self._judged(one) for one in self._asked()}
        require_refusals(measured, suites)
        arms = [self._arms[arm.name] for arm in self.inputs.arms]
        rows = [
            row_of(arm.name, attack, measured[arm.name, None], measured[arm.name, attack], suites)
            for attack in self.inputs.attacks
            for arm in arms
        ]
        record = provenance(self.config.seed)
        return AttackResult(
            arms=tuple(arms),
            target=self.inputs.equal.target,
            why_full=self.inputs.equal.why_full,
            rows=tuple(rows),
            comparisons=tuple(comparisons([arm.name for arm in arms], self.inputs.attacks, measured, suites)),
            left_out=dict(self.inputs.left_out),
            suites=tuple(suites),
            judge=self._judge.name,
            max_new_tokens=self.inputs.evaluate.max_new_tokens,
            data=self._data(),
            settings={**self.config.model_dump(mode="json"), "rank": RANK, "alpha": ALPHA, "batch_size": BATCH_SIZE},
            model=self.identity,
            provenance=record,
        )

    # -- what is asked for

    def _asked(self) -> list[_Asked]:
        """Every arm before any attack, then every attack on every arm."""
        attacks = (None, *self.inputs.attacks)
        return [self._ask(arm, attack) for attack in attacks for arm in self.inputs.arms]

    def _ask(self, arm: Arm, attack: Attack | None) -> _Asked:
        strength = self.inputs.equal.strengths[arm.name]
        if attack is not None and attack.kind == "dial":
            assert attack.amount is not None
            strength = float(f"{strength * attack.amount:g}")
        identity: ModelRecord = {**self.identity, "adapter": self._arms[arm.name].adapter_hash}
        model = at_strength(identity, strength)
        if attack is not None and attack.kind == "quantise":
            model = {**model, "fingerprint": model["fingerprint"][:8] + QUANTISED, "quantised": True}
        if attack is not None and attack.kind != "dial":
            model = {**model, "attack": self._record(attack)}
        place = self.folder.attacks / arm.name / ("before" if attack is None else attack.name)
        return _Asked(arm, attack, strength, model, place)

    def _record(self, attack: Attack) -> dict[str, Any]:
        """What an attack is, by its settings and its data."""
        if attack.kind == "relearn":
            config = self.config
            return {
                "kind": attack.kind,
                "rows": content_hash(self._rows(attack)),
                "steps": config.steps,
                "learning_rate": config.learning_rate,
                "seed": config.seed,
                "rank": RANK,
                "alpha": ALPHA,
                "batch_size": BATCH_SIZE,
            }
        if attack.kind == "direction":
            sides = {"harmful": self.inputs.harmful, "harmless": self.inputs.harmless}
            return {"kind": attack.kind, **{name: content_hash(side) for name, side in sides.items()}}
        return {"kind": attack.kind, "quantization": "nf4"}

    def _rows(self, attack: Attack) -> Sequence[Example]:
        assert attack.amount is not None
        return self.inputs.rows[: int(attack.amount)]

    @cached_property
    def _arms(self) -> dict[str, AttackedArm]:
        return {arm.name: self._arm(arm) for arm in self.inputs.arms}

    def _arm(self, arm: Arm) -> AttackedArm:
        selection = self.folder.load_selection(arm, self.folder.load_map())
        made = self.folder.load_adapter(arm, selection)
        assert made is not None
        return AttackedArm(
            name=arm.name,
            units=len(made.certificate.units),
            of_units=selection.n_total,
            noun="heads" if selection.only_heads else "units",
            strength=self.inputs.equal.strengths[arm.name],
            adapter_hash=made.certificate.adapter_hash,
        )

    # -- what is stored

    def _stored(self, one: _Asked) -> Measured | None:
        """The measurement, if it is there: of an arm as it is also among the run's evaluations."""
        places = [one.place]
        if one.is_plain:
            places = [self.folder.at_strength(one.arm.name, one.strength), one.place]
        for place in places:
            found = self._at(place, one)
            if found is not None:
                made = found.model.get("attack", {}).get(_MADE, {})
                return Measured(found, str(place.relative_to(self.folder.path)), one.strength, self._details(one, made))
        return None

    def _at(self, place: Path, one: _Asked) -> EvalResult | None:
        if place == one.place:
            found = stored_evaluation(place, one.model, self.inputs.evaluate, self.inputs.suites)
            return found if found is not None and _attack_of(found.model) == _attack_of(one.model) else None
        if not self.folder.is_evaluated(one.arm.name, one.strength):
            return None
        return self._part(EvalResult.load(place), one)

    def _part(self, whole: EvalResult, one: _Asked) -> EvalResult | None:
        """The suites of harmful prompts of an evaluation of the run, where they were measured as they are here."""
        names = [suite.name for suite in self.inputs.suites]
        suites = {suite.suite: suite for suite in whole.suites}
        if not set(names) <= suites.keys():
            return None
        part = replace(
            whole,
            suites=tuple(suites[name] for name in names),
            samples=tuple(sample for name in names for sample in whole.samples_of(name)),
        )
        settings = self.inputs.evaluate
        # What of its settings decides on replies to prompts.
        same = all(
            whole.settings.get(key) == getattr(settings, key)
            for key in ("backend", "max_new_tokens", "max_length", "batch_tokens")
        )
        hashes = [content_hash(suite.examples) for suite in self.inputs.suites]
        is_so = (
            same
            and same_model_identity(whole.model, one.model)
            and [suite.data_hash for suite in part.suites] == hashes
            and not any(sample.get("missing") for sample in part.samples)
        )
        return part if is_so else None

    def _details(self, one: _Asked, made: dict[str, Any]) -> dict[str, float]:
        found = {key: float(value) for key, value in made.items() if isinstance(value, int | float)}
        if one.attack is not None and one.attack.kind == "relearn":
            found["seen_rows"] = float(sum(row.id in self.inputs.seen for row in self._rows(one.attack)))
        return found

    @cached_property
    def _judge(self) -> Judge:
        return judge(self.inputs.evaluate.judge)

    def _judged(self, one: _Asked) -> Measured:
        """A measurement with the outcomes of the run's judge; kept where it is this command's own."""
        found = self._stored(one)
        assert found is not None
        by = self._judge
        # Rules cost nothing, and those of another version may have said something else.
        is_rule = all(part.is_rule for part in JudgeName.parse(by.name))
        if not is_rule and is_judged_by(by.name, found.result, by.signature):
            return found
        result = judge_again(found.result, by)
        if result != found.result and found.folder == str(one.place.relative_to(self.folder.path)):
            result.save(one.place)
        return replace(found, result=result)

    # -- making what is missing

    def _require_ready(self, loaded: LoadedModel) -> None:
        inputs, tokenizer = self.inputs, loaded.tokenizer
        require_ready(
            loaded,
            suite_tokens(tokenizer, inputs.evaluate, inputs.suites),
            training_tokens(tokenizer, [TuneConfig()], inputs.rows if _asks(inputs, "relearn") else ()),
        )

    def _make(self, loaded: LoadedModel, todo: Sequence[_Asked], n_left: int) -> None:
        host = TransformersHost(*loaded)
        layout = HeadLayout.of(loaded.model)
        for number, one in enumerate(todo):
            logger.info("attacks: %s (%d left)", one.label, n_left - number)
            with host.backend(one.arm.name, one.arm.adapter, one.strength) as backend:
                assert isinstance(backend, TransformersBackend)
                with self._attacked(one, backend, layout) as made:
                    evaluate_on(
                        backend,
                        suites=self.inputs.suites,
                        config=self.inputs.evaluate,
                        by=NotJudged(),
                        name=one.label,
                        out=one.place,
                        model_info=_with_made(one.model, made),
                    )

    @contextmanager
    def _attacked(self, one: _Asked, backend: TransformersBackend, layout: HeadLayout) -> Iterator[dict[str, Any]]:
        """The arm's model under an attack inside the block, and what the attack came to."""
        kind = None if one.attack is None else one.attack.kind
        # PEFT's wrapper: an adapter is on it.
        peft_model: Any = backend.model
        chat = ChatFormat(backend.tokenizer, max_length=TuneConfig().max_length)
        if kind == "relearn":
            assert one.attack is not None
            rows = [chat.loss_row(example) for example in self._rows(one.attack)]
            config = self.config
            with relearnt(
                peft_model, rows, steps=config.steps, learning_rate=config.learning_rate, seed=config.seed
            ) as trained:
                yield {
                    "weights": trained.digest, "first_loss": trained.first_loss, "last_loss": trained.last_loss
                }  # fmt: skip
        elif kind == "direction":
            sides = [
                last_states(peft_model.get_base_model(), layout, [chat.prompt_ids(example)[0] for example in side])
                for side in (self.inputs.harmful, self.inputs.harmless)
            ]
            found = refusal_direction(*sides)
            with project_out(peft_model.get_base_model(), layout, found.unit_D):
                yield {"layer": found.layer, "separation": found.separation}
        else:
            yield {}

    def _data(self) -> dict[str, DataRecord]:
        inputs, found = self.inputs, {}
        if _asks(inputs, "relearn"):
            rows = inputs.rows[: max(self.config.n_rows)]
            found["rows"] = _record_of(inputs.rows_source, rows)
        if _asks(inputs, "direction"):
            found["harmful"] = _record_of(self.recipe.safety.source, inputs.harmful)
            found["harmless"] = _record_of(inputs.rows_source, inputs.harmless)
        return found


def _asks(inputs: AttackInputs, kind: str) -> bool:
    return any(attack.kind == kind for attack in inputs.attacks)


def _record_of(source: str, examples: Sequence[Example]) -> DataRecord:
    return {"source": source, "n": len(examples), "hash": content_hash(examples)}


def _in_4_bits(one: _Asked) -> bool:
    return one.attack is not None and one.attack.kind == "quantise"


def _attack_of(model: ModelRecord) -> dict[str, Any]:
    """What was done to a model, without what that came to."""
    return {key: value for key, value in model.get("attack", {}).items() if key != _MADE}


def _with_made(model: ModelRecord, made: dict[str, Any]) -> ModelRecord:
    return {**model, "attack": {**model["attack"], _MADE: made}} if made else model
