"""`castune project`: Safe LoRA's projection of an adapter, between models on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castune.artifacts import ProjectedAdapter
from castune.core.loading import load, stored_dtype
from castune.steps.subject import Subject
from castune.tuning.safe_lora import project_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def project_step(
    subject: Subject,
    out: Path,
    *,
    unaligned: str,
    aligned: str | None = None,
    threshold: float | None = None,
    layers: int | None = None,
    exact: bool = False,
    overwrite: bool = False,
) -> ProjectedAdapter:
    """Project an adapter by Safe LoRA; see `project_adapter`.

    Args:
        subject: the adapter and its base model.
        out: the adapter directory to write.
        unaligned: name of the model before its alignment.
        aligned: name of the aligned model; the base model when absent.
        threshold: project updates of a lower cosine.
        layers: instead, project this many, those of the lowest cosine.
        exact: by the exact projector.
        overwrite: replace an adapter that was projected before.

    Raises:
        CastuneError: as `project_adapter`; no model is loaded before `unaligned` is known to be one.
    """
    stored_dtype(unaligned)
    return project_adapter(
        subject.adapter,
        _base_as_stored(subject) if aligned is None else aligned,
        unaligned,
        out,
        threshold=threshold,
        layers=layers,
        exact=exact,
        base=subject.loaded.model,
        overwrite=overwrite,
    )


def _base_as_stored(subject: Subject) -> PreTrainedModel:
    """The base model, loaded again where it is computed with in another dtype: weights must not be rounded twice."""
    recipe, loaded = subject.recipe, subject.loaded.model
    stored = stored_dtype(recipe.model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    if stored in ("auto", loaded.dtype):
        return loaded
    return load(
        recipe.model,
        dtype=stored,
        device="cpu",
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    ).model
