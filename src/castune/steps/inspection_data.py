"""What effects of an adapter are measured on: harmful prompts, utility data, harmless prompts with helpful replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from castune.config import DataConfig, Recipe
from castune.data.example import Example
from castune.errors import DataError
from castune.steps.inputs import load_data

# Harmless prompts with the reply they should get, where the recipe has no such set (`diagnose.reply_domains`).
HELPFUL = "starter-borderline"
# Examples of a set that has no limit of its own.
USUAL_LIMIT = 64

# What an example of each set must have.
_COLUMNS = {
    "safety": "prompt, target",
    "utility": "prompt, choices, answer; or prompt, completion, answer",
    "over-refusal": "prompt, completion",
}


@dataclass(frozen=True)
class InspectionData:
    """What effects are measured on: examples, and where they came from, by objective (`OBJECTIVES`)."""

    examples: dict[str, list[Example]]
    sources: dict[str, str]

    @classmethod
    def of(cls, recipe: Recipe, given: Mapping[str, str | None], limit: int | None) -> InspectionData:
        """The sets of a recipe, with others in their place where these are given.

        Utility is all domains of the recipe but those of replies, whose prompts are harmless: these are over-refusal.

        Args:
            recipe: the recipe.
            given: sources by objective.
            limit: examples a set; that of the recipe when absent, or `USUAL_LIMIT`.
        """
        utility = {"utility": recipe.utility} if isinstance(recipe.utility, DataConfig) else recipe.utility
        of_replies = [name for name in utility if name in recipe.diagnose.reply_domains]
        configs = {
            "safety": [recipe.safety],
            "utility": [config for name, config in utility.items() if name not in of_replies],
            "over-refusal": [utility[name] for name in of_replies] or [DataConfig(source=HELPFUL)],
        }
        configs |= {name: [DataConfig(source=source)] for name, source in given.items() if source is not None}
        found: dict[str, list[Example]] = {}
        for name, of_set in configs.items():
            sized = [one.model_copy(update={"limit": limit or one.limit or USUAL_LIMIT}) for one in of_set]
            if sized:
                found[name] = [example for one in sized for example in load_data(one, recipe.seed)]
        sources = {name: ", ".join(one.source for one in configs[name]) for name in found}
        for name, drawn in found.items():
            _require_losses(drawn, f"{name} data {sources[name]}", _COLUMNS[name])
        return cls(found, sources)


def _require_losses(examples: Sequence[Example], name: str, columns: str) -> None:
    """Refuse a set in which an example has nothing that a loss could be computed on."""
    for example in examples:
        if not example.is_question and example.right_reply is None:
            raise DataError(
                f"{name}: example {example.id!r} has no reply to compute a loss on; columns needed: {columns}"
            )
