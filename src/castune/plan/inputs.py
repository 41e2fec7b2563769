"""What a plan is made from: the config of a model, and a tokenizer to count tokens with."""

from __future__ import annotations

from typing import Any

from castune.config import Recipe
from castune.core.loading import find_default_gguf, load_config
from castune.errors import CastuneError


def config_and_tokenizer(recipe: Recipe) -> tuple[Any, Any, list[str]]:
    """The config of a recipe's model, a tokenizer to count tokens with, and what the user should know about it.

    Raises:
        CastuneError: no config, or no tokenizer at all.
    """
    config, tokenizer = load_config(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        template_date=recipe.template_date,
    )
    if tokenizer is not None:
        return config, tokenizer, []
    if find_default_gguf() is None:
        raise CastuneError(f"{recipe.model} has no tokenizer, which a plan needs to count tokens")
    note = "no tokenizer there: tokens are counted with the default model's, which makes more of them"
    return config, load_config("default")[1], [note]
