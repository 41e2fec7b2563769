"""An adapter and what surrounds it: its base model, its run, the map of the model, what its training was to touch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from castune.artifacts import Certificate, ConflictMap, HeadSelection, Unit
from castune.artifacts.head_selection import SELECTION_FILE
from castune.artifacts.tune_result import ADAPTER_CONFIG, CERTIFICATE_FILE
from castune.config import Recipe
from castune.core.gguf import display_name
from castune.core.loading import LoadedModel, load_model
from castune.core.provenance import fingerprint
from castune.errors import CastuneError
from castune.steps.directory import RunDirectory
from castune.tuning.adapter_files import any_lora_config


@dataclass(frozen=True)
class Subject:
    """An adapter to look at, with its base model and, where it has one, its run.

    Attributes:
        adapter: its directory.
        recipe: the run's, or one of defaults for the base model.
        folder: the run; None without one.
        arm: name of the arm of the run whose heads the training was to touch; None: as what lies beside the adapter
            says.
    """

    adapter: Path
    recipe: Recipe
    folder: RunDirectory | None = None
    arm: str | None = None

    @classmethod
    def of(
        cls, adapter: Path, *, run: Path | None, arm: str | None, base: str | None, of_model: Mapping[str, Any]
    ) -> Subject:
        """An adapter on the command line, checked before anything is loaded.

        Args:
            adapter: its directory.
            run: the run whose model, data and map are used; None without one.
            arm: an arm of it.
            base: the base model; the run's, or the one that the adapter names, when absent.
            of_model: how the model is computed with; `auto` says nothing.

        Raises:
            CastuneError: no LoRA adapter that can be read, no run, or no base model.
        """
        if run is None and arm is not None:
            raise CastuneError(f"--arm {arm} needs the run it belongs to: add --run RUN")
        config = any_lora_config(adapter)
        changes = {key: value for key, value in of_model.items() if value != "auto"}
        folder = None if run is None else RunDirectory(run)
        if folder is not None:
            recipe = folder.load_recipe()
            changes |= {} if base is None else {"model": base, "revision": None}
        else:
            named = base or config.get("base_model_name_or_path")
            if not named:
                raise CastuneError(
                    f"{adapter / ADAPTER_CONFIG}: the adapter does not name its base model; name it with --base"
                )
            recipe = Recipe.of(model=str(named), out="unused")
        return cls(adapter, recipe.model_copy(update=changes), folder, arm)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The base model and its tokenizer."""
        return load_model(self.recipe)

    @cached_property
    def cmap(self) -> ConflictMap | None:
        """The conflict map of the run; None without one. Refused where it is another model's."""
        if self.folder is None or not self.folder.map_file.is_file():
            return None
        return self.folder.load_map(fingerprint(self.loaded.model))

    @property
    def selected(self) -> tuple[Unit, ...] | None:
        """What the training was to touch, by the arm, or by what lies beside the adapter; None where neither says."""
        if self.folder is not None and self.arm is not None:
            return self.folder.load_selection(self.folder.arm(self.arm), self.folder.load_map()).units
        if (self.adapter / CERTIFICATE_FILE).is_file():
            return Certificate.load(self.adapter).units
        for place in (self.adapter, self.adapter.parent):
            if (place / SELECTION_FILE).is_file():
                return HeadSelection.load(place).units
        return None

    @cached_property
    def name(self) -> str:
        """What to call the adapter: the arm of the run that has it, or its directory.

        Castune's own lie in directories called `adapter`: the one above says more.
        """
        path = self.adapter.absolute()
        if self.folder is not None:
            for arm in self.folder.arms():
                if arm.adapter.resolve() == path.resolve():
                    return arm.name
        return display_name(str(path if path.name != "adapter" else path.parent)) or "adapter"

    @property
    def inspection(self) -> Path:
        """Where its inspection goes unless another place is named."""
        return Path(f"inspection-{self.name}") if self.folder is None else self.folder.path / "inspection" / self.name
