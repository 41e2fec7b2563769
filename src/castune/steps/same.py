"""Refusals of what was made otherwise than is asked for now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from castune.artifacts.records import ModelRecord
from castune.core.provenance import chat_template_digest
from castune.errors import ArtifactError
from castune.steps.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_template(what: str, model: ModelRecord, tokenizer: PreTrainedTokenizerBase, folder: RunDirectory) -> None:
    """Refuse what was made with another chat template; records from before it was noted know of none."""
    digest = chat_template_digest(tokenizer)
    if model.get("chat_template", digest) != digest:
        check_same(what, f"chat template {model['chat_template']}", f"chat template {digest}", folder)


def check_same(what: str, found: object, wanted: object, folder: RunDirectory) -> None:
    """Refuse what was made with something else than `wanted`; of two records, the message names what differs first."""
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        key = next(key for key in [*found, *wanted] if found.get(key) != wanted.get(key))
        found, wanted = f"{key} = {found.get(key)!r}", f"{key} = {wanted.get(key)!r}"
    raise ArtifactError(
        f"{what} in {folder.path} was made with {found}, but now it is {wanted}; "
        "choose another directory with --out, or use --overwrite where the command has it"
    )
