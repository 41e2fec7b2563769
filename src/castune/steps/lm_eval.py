"""lm-eval's tasks on the base model and the arms of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from castune.artifacts.files import locked
from castune.artifacts.fingerprints import same_model_identity
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.config import Recipe
from castune.core.loading import load_model
from castune.core.provenance import model_record
from castune.errors import ArtifactError
from castune.evaluation.backend import TransformersHost
from castune.evaluation.lm_eval import lm_eval_results, require_lm_eval
from castune.steps.directory import RunDirectory
from castune.steps.evaluate import models_of

logger = logging.getLogger(__name__)


def lm_eval_step(
    folder: RunDirectory, recipe: Recipe, tasks: Sequence[str], *, overwrite: bool = False, **options: Any
) -> dict[str, LmEvalResult]:
    """lm-eval's tasks on the base model and every arm with an adapter; tasks that are there and up to date stay.

    Args:
        folder: the run.
        recipe: its recipe.
        tasks: names of lm-eval's tasks.
        overwrite: forget what was measured with other options.
        options: further arguments of `lm_eval_results`.

    Raises:
        ArtifactError: what is there was measured with other options; the message names one.
    """
    require_lm_eval()
    model, tokenizer = load_model(recipe)
    adapters, records = models_of(folder, model_record(model, tokenizer))
    stored = {
        n: r for n, r in folder.load_lm_eval().items() if n in records and same_model_identity(r.model, records[n])
    }
    for name, result in {} if overwrite else stored.items():
        key = next((key for key, value in options.items() if result.settings.get(key) != value), None)
        if key is not None:
            raise ArtifactError(
                f"lm-eval of {name} in {folder.path} was made with {key} = {result.settings.get(key)!r}, but now it is "
                f"{options[key]!r}; use the same options, or --overwrite"
            )
    host = TransformersHost(model, tokenizer)
    for name, adapter in adapters.items():
        known = None if overwrite else stored.get(name)
        missing = [task for task in tasks if known is None or task not in known.settings["tasks"]]
        if not missing:
            logger.info("lm-eval of %s: already done", name)
            continue
        logger.info("lm-eval of %s: %s", name, ", ".join(missing))
        with host.backend(name, adapter) as backend:
            result = lm_eval_results(
                backend.model, tokenizer, tasks=missing, name=name, model_info=records[name], **options
            )
        folder.evaluation(name).mkdir(parents=True, exist_ok=True)
        with locked(folder.evaluation(name)):
            # Another command may have measured other tasks meanwhile.
            known = None if overwrite else folder.load_lm_eval().get(name)
            alike = known is not None and all(known.settings.get(key) == value for key, value in options.items())
            if known is not None and alike and same_model_identity(known.model, records[name]):
                result = known.joined(result)
            result.save(folder.evaluation(name))
        folder.record_step(f"lm-eval {name}", result.provenance)
    return {name: result for name, result in folder.load_lm_eval().items() if name in records}
