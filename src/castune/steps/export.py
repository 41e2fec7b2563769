"""Export: an adapter, or the base model with it merged in, as a directory to publish, with a model card.

Like `pipeline.py` this sees all stages: the card is made from everything a run has.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from castune.artifacts import Certificate, HeadSelection, MaskedAdapter, ProjectedAdapter, ScaledAdapter, TuneResult
from castune.artifacts.files import check_vacant, new_directory, write_text
from castune.artifacts.fingerprints import same_model
from castune.artifacts.head_selection import SELECTION_FILE
from castune.artifacts.masked_adapter import MASK_FILE
from castune.artifacts.projected_adapter import PROJECTION_FILE
from castune.artifacts.scaled_adapter import SCALE_FILE
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CERTIFICATE_FILE, TUNE_FILE, adapter_hash
from castune.core.devices import torch_dtype_of
from castune.core.gguf import display_name
from castune.core.loading import load, model_source, stored_dtype
from castune.core.provenance import fingerprint
from castune.errors import ArtifactError, CastuneError
from castune.report.card import CardFacts, Merging, model_card
from castune.steps.changes import cost_ratios, differences
from castune.steps.directory import BASE, RunDirectory
from castune.tuning.merge import write_merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What an exported adapter consists of; the model card is written beside. Other files of the directory stay behind.
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CERTIFICATE_FILE)
_RECORDS = (TUNE_FILE, MASK_FILE, PROJECTION_FILE, SCALE_FILE, SELECTION_FILE)


@dataclass(frozen=True)
class Exported:
    """Where an export is, and for a merged model what was compared."""

    path: Path
    certificate: Certificate
    merging: Merging | None


def export(
    source: str | Path,
    out: str | Path,
    *,
    merged: bool = False,
    arm: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
) -> Exported:
    """Write a directory to publish: the adapter, or the base model with the adapter merged in; and a model card.

    Args:
        source: a run directory, or an adapter directory with a certificate.
        out: the directory to write; it must be empty or absent, and is complete or absent afterwards.
        merged: the whole model in transformers format; only the selected rows and columns differ from the base.
        arm: the arm of a run; the main one when absent.
        base: the base model; the run's, or the one the adapter names, when absent.
        dtype: of the merged model; `auto` is the dtype the base is stored in.

    Raises:
        CastuneError: no run or adapter there, an adapter without a certificate or changed since, another base
            model, or `out` holds something.
    """
    source, out = Path(source), Path(out)
    check_vacant(out)
    if (source / ADAPTER_CONFIG).is_file():
        if arm is not None:
            raise ArtifactError(f"{source} is an adapter, which has no arms; use --arm with a run directory")
        adapter, selection, facts = source, *_adapter_facts(source)
        model, revision = base or _named_base(source), None
    else:
        adapter, selection, facts, recipe = _run_facts(source, arm)
        model, revision = base or recipe.model, None if base else recipe.revision
    if not merged:
        with new_directory(out) as aside:
            for name in (*_ADAPTER_FILES, *_RECORDS):
                if (adapter / name).is_file():
                    shutil.copyfile(adapter / name, aside / name)
            write_text(aside / "README.md", model_card(facts))
        return Exported(out, facts.certificate, None)
    if model is None:
        raise ArtifactError(f"{source}: the adapter does not name its base model; give it with --base")
    loaded, tokenizer = load(
        model, dtype=stored_dtype(model, revision) if dtype == "auto" else dtype, device="cpu", revision=revision
    )
    selection = _for_this_copy(selection, facts.model.get("dtype"), loaded, model, revision)
    with new_directory(out) as aside:
        done = write_merged(loaded, tokenizer, adapter, selection, aside)
        merging = Merging(done.dtype, done.identical_tensors, done.identical_rows, done.identical_columns)
        facts = replace(facts, certificate=done.certificate, merging=merging)
        write_text(aside / "README.md", model_card(facts))
        # The record of what the certificate in the card says, in the dtype of the merged model.
        done.certificate.save(aside)
    return Exported(out, done.certificate, merging)


def _for_this_copy(
    selection: HeadSelection, made_in: str | None, loaded: PreTrainedModel, model: str, revision: str | None
) -> HeadSelection:
    """A selection, for the base in the dtype of the merged model.

    A base in float16 has another fingerprint than in float32 and bfloat16. Whether it is the one that the adapter was
    made for is seen in the dtype that this was done in; where it is not, merging tells.
    """
    here, then = fingerprint(loaded), made_in or stored_dtype(model, revision)
    if same_model(here, selection.model_fingerprint) or torch_dtype_of(then, "cpu") == loaded.dtype:
        return selection
    there = load(model, dtype=then, device="cpu", revision=revision).model
    is_it = same_model(fingerprint(there), selection.model_fingerprint)
    return replace(selection, model_fingerprint=here) if is_it else selection


def refuse_gguf(source: str | Path, out: str | Path, *, arm: str | None = None, base: str | None = None) -> NoReturn:
    """Say how llama.cpp makes GGUF files of an export: castune has no converter, and no package that is kept up has.

    Args:
        source: a run directory, or an adapter directory.
        out: the directory that would be written.
        arm: the arm of a run.
        base: the base model; the run's, or the one the adapter names, when absent.

    Raises:
        CastuneError: always; the message has the commands for an adapter and for a merged model, with these paths.
    """
    source, place = Path(source), Path(out).absolute()
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    model = base or (_named_base(source) if is_adapter else RunDirectory(source).load_recipe().model)
    options = ["--base", "BASE"] if model is None else _llama_cpp_base(model)

    def command(*words: object) -> str:
        return shlex.join(map(str, words))

    of_arm = [] if arm is None else ["--arm", arm]
    adapter = command("castune", "export", source, *of_arm, "--out", out)
    merged = command("castune", "export", source, *of_arm, "--merged", "--out", out)
    of_adapter = command("python", "convert_lora_to_gguf.py", *options, "--outfile", place / "adapter.gguf", place)
    of_model = command("python", "convert_hf_to_gguf.py", "--outfile", place / "model.gguf", place)
    raise CastuneError(
        "castune writes no GGUF files; the converters are scripts of https://github.com/ggml-org/llama.cpp, to be run "
        f"in a clone of it. The adapter: {adapter}, then {of_adapter}. The whole model: {merged}, then {of_model}"
    )


def _llama_cpp_base(model: str) -> list[str]:
    """The base model as options of llama.cpp's converter of adapters: it reads a config from a directory or the hub."""
    place = Path(model_source(model))
    return ["--base", str(place.absolute())] if place.is_dir() else ["--base-model-id", model]


def _run_facts(path: Path, name: str | None) -> tuple[Path, HeadSelection, CardFacts, Any]:
    """An arm of a run: adapter, selection, what the card says, and the recipe."""
    folder = RunDirectory(path)
    recipe = folder.load_recipe()
    arm = folder.arm(name)
    cmap = folder.load_map()
    selection = folder.load_selection(arm, cmap)
    # Without an adapter the missing tune result says what to do.
    made = folder.load_adapter(arm, selection) or folder.load_tuning(arm, selection)
    # An evaluation older than the adapter is none of it.
    wanted = {BASE: None, arm.name: made.certificate.adapter_hash}
    evaluations = {
        key: result
        for key, result in folder.load_evaluations().items()
        if key in wanted
        and result.model.get("adapter") == wanted[key]
        and result.model.get("fingerprint") == made.certificate.model_fingerprint
    }
    if isinstance(made, TuneResult):
        selection = made.trained(selection)
    facts = CardFacts(
        model=made.model,
        certificate=made.certificate,
        zone=arm.name,
        n_total=selection.n_total,
        cmap=cmap,
        tuning=made if isinstance(made, TuneResult) else None,
        masked=made if isinstance(made, MaskedAdapter) else None,
        projected=made if isinstance(made, ProjectedAdapter) else None,
        evaluations=evaluations,
        arm=arm.name,
        differences=differences(evaluations).get(arm.name),
        cost_ratio=cost_ratios(evaluations).get(arm.name),
    )
    return arm.adapter, selection, facts, recipe


def _adapter_facts(adapter: Path) -> tuple[HeadSelection, CardFacts]:
    """An adapter on its own: the heads of its certificate, and what its records say."""
    if not (adapter / CERTIFICATE_FILE).is_file():
        raise ArtifactError(
            f"{adapter} has no certificate.json; make a certified adapter of it with: castune mask {adapter} "
            "--run RUN --out DIR"
        )
    certificate = Certificate.load(adapter)
    try:
        found = adapter_hash(adapter)
    except FileNotFoundError as error:
        raise ArtifactError(f"{error.filename}: missing; the adapter is incomplete") from None
    if found != certificate.adapter_hash:
        raise ArtifactError(
            f"{adapter}: the adapter ({found}) is not the one its certificate was made for ({certificate.adapter_hash})"
        )
    tuning = TuneResult.load(adapter) if (adapter / TUNE_FILE).is_file() else None
    masked = MaskedAdapter.load(adapter) if (adapter / MASK_FILE).is_file() else None
    projected = ProjectedAdapter.load(adapter) if (adapter / PROJECTION_FILE).is_file() else None
    scaled = ScaledAdapter.load(adapter) if (adapter / SCALE_FILE).is_file() else None
    record = tuning or masked or projected or scaled
    # A training keeps no zone: that is its run's.
    made_of = masked or projected or scaled
    model = record.model if record else {"name": display_name(_named_base(adapter) or "") or "unknown"}
    selection = HeadSelection(
        units=certificate.units,
        zone=made_of.zone if made_of else "custom",
        fraction=None,
        buckets=None,
        bucket=None,
        score="conflict",
        seed=None,
        n_total=made_of.n_total if made_of else len(certificate.units),
        model_fingerprint=certificate.model_fingerprint,
        conflict_map_hash=None,
        mlp_groups=certificate.mlp_groups,
    )
    facts = CardFacts(
        model=model,
        certificate=certificate,
        zone=made_of.zone if made_of else None,
        n_total=made_of.n_total if made_of else None,
        tuning=tuning,
        masked=masked,
        projected=projected,
        scaled=scaled,
    )
    return selection, facts


def _named_base(adapter: Path) -> str | None:
    """The base model an adapter's configuration names."""
    path = adapter / ADAPTER_CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged: {error!r}") from None
    return str(name) if name else None
