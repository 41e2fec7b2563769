"""The run directory: where every artifact lies, and what it was made from.

recipe.toml  provenance.json  conflict_map.parquet  ablation.parquet  gradients.parquet
domains/NAME.parquet                         the map of each utility domain, where there are several
selection.json  adapter/                     the main arm
adapter-logs/1/                              what trackers wrote while it was trained
arms/NAME/selection.json  arms/NAME/adapter/  arms beside it, for comparison: trained, or made of other adapters
evaluation/NAME/  figures/  report.html
evaluation/NAME/strengths/0.5/               the same with the adapter at another strength
dial/NAME.csv                                all strengths of an arm side by side
drift/ARM/drift.json  drift/ARM/STEP/        maps of the model on its way through the training of an arm
attacks/attacks.json  attacks/ARM/ATTACK/    refusals under attacks, and the replies
"""

from __future__ import annotations

import json
import logging
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from castune.artifacts import (
    Certificate,
    ConflictMap,
    EvalResult,
    HeadSelection,
    MaskedAdapter,
    ProjectedAdapter,
    TuneResult,
)
from castune.artifacts.attack_result import ATTACKS_FILE, AttackResult
from castune.artifacts.conflict_map import MAP_FILE
from castune.artifacts.drift_result import DRIFT_FILE, DriftResult
from castune.artifacts.eval_result import METRICS_FILE
from castune.artifacts.files import locked, write_text
from castune.artifacts.fingerprints import same_model
from castune.artifacts.head_selection import SELECTION_FILE
from castune.artifacts.lm_eval_result import LM_EVAL_FILE, LmEvalResult
from castune.artifacts.masked_adapter import MASK_FILE
from castune.artifacts.records import ModelRecord, Provenance
from castune.artifacts.tune_result import adapter_hash
from castune.config import Recipe
from castune.errors import ArtifactError
from castune.steps.arm import Arm, arm_name

logger = logging.getLogger(__name__)

BASE = "base"
Measured = TypeVar("Measured", EvalResult, LmEvalResult)

_NEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class RunDirectory:
    """Paths and records of one run."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def report_file(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def map_file(self) -> Path:
        """The conflict map."""
        return self.path / MAP_FILE

    @property
    def groups_file(self) -> Path:
        """What whole buckets of heads do when they are ablated together."""
        return self.path / "group_ablation.json"

    def evaluation(self, arm: str) -> Path:
        """Evaluation directory of an arm, or of the base model (`base`)."""
        return self.path / "evaluation" / arm

    def at_strength(self, arm: str, strength: float) -> Path:
        """Evaluation directory of an arm whose adapter is at a strength; 1 is the arm itself."""
        return self.evaluation(arm) if strength == 1 else self.evaluation(arm) / "strengths" / f"{strength:g}"

    def is_evaluated(self, arm: str, strength: float = 1.0) -> bool:
        """Whether there is an evaluation of an arm, at a strength of its adapter, or of the base model."""
        return (self.at_strength(arm, strength) / METRICS_FILE).is_file()

    def strengths(self, arm: str) -> list[float]:
        """Strengths other than 1 at which an arm was evaluated, rising; other directories are not castune's."""
        files = (self.evaluation(arm) / "strengths").glob(f"*/{METRICS_FILE}")
        return sorted(one for file in files if (one := _strength(file.parent.name)) is not None)

    def dial(self, arm: str) -> Path:
        """Where what was measured of an arm at all strengths is side by side."""
        return self.path / "dial" / f"{arm}.csv"

    def drift(self, arm: Arm) -> Path:
        """Where the drift of an arm is, and the maps it was made from."""
        return self.path / "drift" / arm.name

    @property
    def attacks(self) -> Path:
        """Where the result of attacks is, and the replies under them."""
        return self.path / "attacks"

    def arms(self) -> list[Arm]:
        """All arms that have a selection, the main one first."""
        main = self.main_selection()
        found = [] if main is None else [self.main_arm(main)]
        others = sorted((self.path / "arms").glob(f"*/{SELECTION_FILE}"))
        return [*found, *(self.side_arm(file.parent.name) for file in others)]

    def main_selection(self) -> HeadSelection | None:
        """The selection of the main arm; None before it is made."""
        return HeadSelection.load(self.path) if (self.path / SELECTION_FILE).is_file() else None

    def has_arm(self, name: str) -> bool:
        """Whether there is a selection of that name."""
        return any(arm.name == name for arm in self.arms())

    def main_arm(self, selection: HeadSelection) -> Arm:
        """The main arm, named after its selection."""
        return Arm(arm_name(selection), self.path)

    def side_arm(self, name: str) -> Arm:
        """An arm beside the main one."""
        return Arm(name, self.path / "arms" / name)

    def new_arm(self, name: str) -> Arm:
        """An arm beside the main one for an adapter made elsewhere, by a name of the user's.

        Raises:
            ArtifactError: no name for a directory, or one that a trained or selected arm has.
        """
        if not _NEW_NAME.fullmatch(name) or name == BASE:
            raise ArtifactError(
                f"{name!r} is not a valid name for an arm; accepted: up to 100 letters, digits, -, _, + and ., "
                f"but not {BASE!r}"
            )
        if self.has_arm(name) and not self.side_arm(name).is_made_of_others:
            raise ArtifactError(f"{self.path} already has an arm {name!r}; choose another name")
        return self.side_arm(name)

    def arm(self, name: str | None) -> Arm:
        """The arm of that name, the main one for None.

        Raises:
            ArtifactError: no such selection; the message lists those there are.
        """
        arms = self.arms()
        if name is None and arms and arms[0].folder == self.path:
            return arms[0]
        for arm in arms:
            if arm.name == name:
                return arm
        raise ArtifactError(
            f"{self.path}: no selection{f' named {name}' if name else ''}; available: "
            f"{', '.join(arm.name for arm in arms) or 'none'}; make one with: castune select {self.path}"
        )

    def load_recipe(self) -> Recipe:
        """The recipe the run was made with."""
        if not self.recipe_file.is_file():
            raise ArtifactError(
                f"{self.path}: not a run directory (no recipe.toml); "
                f"make one with: castune diagnose MODEL --out {self.path}"
            )
        return Recipe.load(self.recipe_file)

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe."""
        write_text(self.recipe_file, recipe.to_toml())

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe under which artifacts that are already here would have come out differently.

        Evaluation settings are free: evaluations are made again where they differ. So is where a training is logged,
        which changes nothing. Settings of a stage that has left
        nothing yet are free too, so that a failed training can be tried again with another learning rate.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ArtifactError(f"{self.path} is a file, but a run needs a directory; choose another with --out")
        if not self.recipe_file.is_file():
            return
        before = _flat(tomllib.loads(self.load_recipe().to_toml()))
        now = _flat(tomllib.loads(recipe.to_toml()))
        has_map = self.map_file.is_file()
        has_adapter = any(arm.is_trained for arm in self.arms())
        different = [
            key
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and key != "tune.report_to"
            and (has_adapter if key.startswith(("select.", "tune.", "align.")) else has_map)
        ]
        if different:
            key = different[0]
            raise ArtifactError(
                f"{self.path} was made with {key} = {before.get(key)!r}, but this recipe has {now.get(key)!r}"
                f"{f' (and {len(different) - 1} more settings differ)' if len(different) > 1 else ''}; "
                "choose another directory with --out, or remove this one"
            )

    def record_step(self, stage: str, provenance: Provenance) -> None:
        """Append a stage to `provenance.json`; several processes may do so at once."""
        path = self.path / "provenance.json"
        with locked(self.path):
            try:
                steps = list(json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.is_file() else []
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ArtifactError(f"{path}: damaged: {error!r}; remove it, results do not depend on it") from None
            write_text(path, json.dumps({"steps": [*steps, {"stage": stage, **provenance}]}, indent=1) + "\n")

    def load_map(self, fingerprint: str | None = None) -> ConflictMap:
        """The conflict map; refused when it belongs to another model than `fingerprint`."""
        cmap = ConflictMap.load(self.map_file)
        if fingerprint is not None and not same_model(cmap.fingerprint, fingerprint):
            raise ArtifactError(
                f"{self.map_file} was made from model {cmap.metadata['model']['name']} ({cmap.fingerprint}), but the "
                f"loaded model is {fingerprint}; choose another directory with --out"
            )
        return cmap

    def load_selection(self, arm: Arm, cmap: ConflictMap) -> HeadSelection:
        """An arm's selection; refused when it was made from another map."""
        selection = HeadSelection.load(arm.folder)
        if selection.conflict_map_hash not in (None, cmap.content_hash):
            raise ArtifactError(
                f"{arm.selection_file} was made from conflict map {selection.conflict_map_hash}, but the map here is "
                f"{cmap.content_hash}; run: castune select {self.path}"
            )
        if not same_model(selection.model_fingerprint, cmap.fingerprint):
            raise ArtifactError(
                f"{arm.selection_file} is for model {selection.model_fingerprint}, but the map here is for "
                f"{cmap.fingerprint}; remove {arm.selection_file if arm.folder == self.path else arm.folder}"
            )
        return selection

    def load_tuning(self, arm: Arm, selection: HeadSelection) -> TuneResult:
        """An arm's tune result; refused when it was trained for other heads or another model."""
        result = TuneResult.load(arm.adapter)
        which = "" if arm.folder == self.path else f" --arm {arm.name}"
        again = f"castune tune {self.path}{which} --overwrite"
        if not result.began_with(selection):
            raise _other_selection(arm, again)
        # Where heads were selected again, the certificate is for all of them.
        self._check_adapter(arm, result.trained(selection), result.certificate, again)
        return result

    def load_adapter(self, arm: Arm, selection: HeadSelection) -> TuneResult | MaskedAdapter | ProjectedAdapter | None:
        """The record of an arm's adapter, however it was made, None without one; refused like a tune result."""
        if arm.is_trained:
            return self.load_tuning(arm, selection)
        if not arm.is_made_of_others:
            return None
        made: MaskedAdapter | ProjectedAdapter
        if (arm.adapter / MASK_FILE).is_file():
            made, again = MaskedAdapter.load(arm.adapter), "mask ADAPTER"
        else:
            made, again = ProjectedAdapter.load(arm.adapter), "project ADAPTER --unaligned MODEL"
        self._check_adapter(arm, selection, made.certificate, f"castune {again} --run {self.path} --as {arm.name}")
        return made

    def _check_adapter(self, arm: Arm, selection: HeadSelection, certificate: Certificate, again: str) -> None:
        try:
            found = adapter_hash(arm.adapter)
        except FileNotFoundError as error:
            raise ArtifactError(f"{error.filename}: missing; run: {again}") from None
        if found != certificate.adapter_hash:
            raise ArtifactError(
                f"{arm.adapter}: the adapter ({found}) is not the one its certificate was made for "
                f"({certificate.adapter_hash}); run: {again}"
            )
        wanted = (selection.units, selection.mlp_groups, selection.model_fingerprint)
        if (certificate.units, certificate.mlp_groups, certificate.model_fingerprint) != wanted:
            raise _other_selection(arm, again)

    def load_evaluations(self) -> dict[str, EvalResult]:
        """All evaluations, the base model first, then in the order of `arms`; not those of adapters that are gone."""
        found = self._measured(METRICS_FILE, EvalResult.load)
        return {
            name: result
            for name, result in found.items()
            if self._is_of_adapter(name, result.model, f"evaluate {self.path}")
        }

    def load_strengths(self) -> dict[str, dict[float, EvalResult]]:
        """Evaluations of every arm at strengths other than 1, by strength; not those of adapters that are gone."""
        found: dict[str, dict[float, EvalResult]] = {}
        for arm in self.arms():
            made = {one: EvalResult.load(self.at_strength(arm.name, one)) for one in self.strengths(arm.name)}
            again = f"dial {self.path} --arm {arm.name} --strengths"
            # Where it was trained again since, some may be of the adapter before.
            here = {
                strength: result
                for strength, result in made.items()
                if self._is_of_adapter(arm.name, result.model, f"{again} {strength:g}", strength)
            }
            if here:
                found[arm.name] = here
        return found

    def load_lm_eval(self) -> dict[str, LmEvalResult]:
        """What lm-eval measured, in the order of `load_evaluations`; not of adapters that are gone."""
        found = self._measured(LM_EVAL_FILE, LmEvalResult.load)
        again = f"lm-eval {self.path}"
        return {name: result for name, result in found.items() if self._is_of_adapter(name, result.model, again)}

    def _measured(self, file: str, load: Callable[[Path], Measured]) -> dict[str, Measured]:
        names = [BASE, *(arm.name for arm in self.arms())]
        return {name: load(self.evaluation(name)) for name in names if (self.evaluation(name) / file).is_file()}

    def _is_of_adapter(self, name: str, model: ModelRecord, again: str, strength: float = 1.0) -> bool:
        """Whether what was measured of an arm is of the adapter that is there; a warning where it is not."""
        if name == BASE or model.get("adapter") in self._adapters(name):
            return True
        logger.warning(
            "%s belongs to an adapter that no longer exists and is skipped; run: castune %s",
            self.at_strength(name, strength),
            again,
        )
        return False

    def _adapters(self, name: str) -> list[str]:
        """The hash of an arm's adapter, in a list; nothing where it has none."""
        try:
            return [adapter_hash(arm.adapter) for arm in self.arms() if arm.name == name and arm.has_adapter]
        except FileNotFoundError:
            return []

    def load_attacks(self) -> AttackResult | None:
        """The result of attacks, without arms whose adapter is another one now; None without one, or without arms."""
        if not (self.attacks / ATTACKS_FILE).is_file():
            return None
        found = AttackResult.load(self.attacks)
        gone = [one.name for one in found.arms if one.adapter_hash not in self._adapters(one.name)]
        if not gone:
            return found
        logger.warning(
            "%s: attacks on %s are of adapters that no longer exist and are skipped; run: castune attack %s",
            self.attacks / ATTACKS_FILE,
            ", ".join(gone),
            self.path,
        )
        return found.without(gone) if len(gone) < len(found.arms) else None

    def load_drifts(self, cmap: ConflictMap) -> dict[str, DriftResult]:
        """The conflict drift of every arm where it was measured, against this map and for the adapter that is there."""
        found = {}
        for arm in self.arms():
            if not (self.drift(arm) / DRIFT_FILE).is_file() or not arm.is_trained:
                continue
            result = DriftResult.load(self.drift(arm))
            if (result.first_map_hash, result.adapter_hash) == (cmap.content_hash, adapter_hash(arm.adapter)):
                found[arm.name] = result
            else:
                logger.warning(
                    "%s belongs to another map or adapter and is skipped; run: castune drift %s --arm %s",
                    self.drift(arm) / DRIFT_FILE,
                    self.path,
                    arm.name,
                )
        return found


def _other_selection(arm: Arm, again: str) -> ArtifactError:
    return ArtifactError(f"{arm.adapter} was made for another selection than {arm.selection_file}; run: {again}")


def _strength(name: str) -> float | None:
    """The strength that a directory is called after; None for a name that castune gives to none, such as 1."""
    try:
        strength = float(name)
    except ValueError:
        return None
    return strength if 0 < strength < math.inf and strength != 1 and f"{strength:g}" == name else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    # Where a run lies and computes is not what it is.
    return {
        key: value
        for key, value in flat.items()
        if key not in ("out", "device") and not key.startswith(("evaluate.", "study."))
    }
