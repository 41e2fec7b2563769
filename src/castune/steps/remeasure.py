"""The map of a run again, of the model with an adapter: for conflict drift, and to select again while training.

An adapter is merged into the weights while it is diagnosed, so that O(h) is the gradient on W_q of the model as it is
then, and H(h) what this model loses without a head. Data and settings are those of the run's own map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from castune.artifacts import ConflictMap, HeadSelection
from castune.artifacts.records import AdapterRecord
from castune.artifacts.tune_result import adapter_hash
from castune.artifacts.unit import only_heads
from castune.config import DiagnoseConfig, Recipe
from castune.core.loading import LoadedModel
from castune.diagnosis.run import diagnose
from castune.errors import CastuneError
from castune.selection import choose_again
from castune.steps.inputs import Calibration
from castune.tuning.merge import merged_into


@dataclass(frozen=True)
class Remeasure:
    """Measures the map of one arm again.

    Attributes:
        loaded: the base model and its tokenizer; it is left as it was, in every bit.
        calibration: D_safe and D_util of the run.
        recipe: of the run.
        first: the run's own map.
        arm: name of the arm.
    """

    loaded: LoadedModel
    calibration: Calibration
    recipe: Recipe
    first: ConflictMap
    arm: str

    @property
    def config(self) -> DiagnoseConfig:
        """Settings of the run's own map, as it was measured."""
        return self.recipe.diagnose.model_copy(update={"batch_tokens": self.first.metadata["batch_tokens"]})

    def about(self, adapter: Path, step: int) -> AdapterRecord:
        """What the metadata of a map say about the adapter."""
        return {"arm": self.arm, "step": step, "hash": adapter_hash(adapter), "base": self.first.fingerprint}

    def __call__(
        self, adapter: Path, selection: HeadSelection, step: int, out: Path, *, shard: str | None = None
    ) -> ConflictMap:
        """The map of the model with an adapter, also written to `out`; continues where it was stopped there.

        Args:
            adapter: directory of an adapter that changes nothing outside `selection`.
            selection: the heads it was trained on.
            step: optimiser step it is of.
            out: directory for the map and what it was made from.
            shard: this process's share of the measuring.
        """
        with merged_into(self.loaded.model, adapter, selection):
            return diagnose(
                *self.loaded,
                safety=self.calibration.safety,
                utility=self.calibration.utility,
                config=self.config,
                out=out,
                shard=shard,
                sources=self._sources(),
                seed=self.recipe.seed,
                adapter=self.about(adapter, step),
            )

    def select(
        self, first: HeadSelection, adapter: Path, selection: HeadSelection, step: int, out: Path
    ) -> HeadSelection:
        """The heads that the rule of the arm's first selection takes from the map of the model with an adapter."""
        found = choose_again(first, self(adapter, selection, step, out))
        # The map is that of a model with changed weights; what is trained is the base, with adapters.
        return replace(found, model_fingerprint=first.model_fingerprint)

    def _sources(self) -> dict[str, str | None]:
        utility = {f"utility:{name}": one.data["utility"]["source"] for name, one in self.first.domains.items()}
        return {name: record["source"] for name, record in self.first.data.items()} | utility


def require_query_heads(cmap: ConflictMap, what: str) -> None:
    """Refuse a map of other units than query heads.

    Raises:
        CastuneError: the message begins with `what`.
    """
    if not only_heads(cmap.units):
        kinds = " and ".join(cmap.kind_words.values())
        raise CastuneError(f"{what} only on maps of query heads; this one has {kinds}")
