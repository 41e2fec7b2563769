"""Existing adapters: cut down to chosen heads, projected by Safe LoRA, and published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castune.cli.help import COMBINES, MEASURES, READS
from castune.cli.options import PLACE, AdapterOut, BesideArm, OverwriteOwn
from castune.cli.options import Arm as ArmOption
from castune.cli.settings import Values
from castune.cli.values import numbers
from castune.console import say, show_masked, show_projected
from castune.errors import CastuneError

if TYPE_CHECKING:
    from castune.steps.arm import Arm
    from castune.steps.directory import RunDirectory


def mask(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Directories of plain PEFT LoRA adapters.")
    ],
    *,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", rich_help_panel=READS, help="Run whose heads to keep. All heads by default."),
    ] = None,
    arm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=READS,
            help="Arm of the run whose heads to keep; all keeps every head. The main arm by default.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", rich_help_panel=READS, help="Base model, if there is no run.")
    ] = None,
    combination: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            rich_help_panel=COMBINES,
            help="How to combine several adapters before masking: linear or ties.",
            autocompletion=lambda: ["linear", "ties"],
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            rich_help_panel=COMBINES,
            help="Weight of each adapter, such as 1,0.5,0.5. By default 1 each.",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="X", rich_help_panel=COMBINES, help="Share of the values that ties keeps. By default 0.5."
        ),
    ] = None,
    of_model: Annotated[Values, PLACE],
    out: AdapterOut = None,
    beside: BesideArm = None,
    overwrite: OverwriteOwn = False,
) -> None:
    """Cut existing LoRA adapters down to the selected heads.

    Keeps only the rows of the selected heads, of one adapter or of several combined, and writes a certified PEFT
    adapter. Without --run, or with --arm all, keeps the rows of all query heads, for comparison.

    Examples:
        castune mask my-adapter --run runs/first --out masked
        castune mask my-adapter other --run runs/first --combination ties --as ties
        castune mask my-adapter --base default --out all-heads
    """
    from castune.artifacts.masked_adapter import MASK_FILE
    from castune.steps.directory import RunDirectory
    from castune.tuning.mask import every_head, mask_adapter

    _check_places(run, base, arm, out, beside)
    combined: Values = {
        "combination": combination,
        "weights": None if weights is None else numbers(weights, "--weights", float, "1,0.5,0.5"),
        "density": density,
    }
    folder = None if run is None else RunDirectory(run)
    target = None if folder is None or beside is None else folder.new_arm(beside)
    place, overwrite = _place(target, out, MASK_FILE, overwrite=overwrite)
    selection = None
    if folder is not None and arm != "all":
        selection = folder.load_selection(folder.arm(arm), folder.load_map())
    model = _base_model(folder, str(base), of_model)
    selection = selection or every_head(model)
    result = mask_adapter(model, adapters, selection, place, overwrite=overwrite, **combined)
    if target is not None:
        selection.save(target.folder)
    show_masked(result)
    say(f"adapter: {place}")


def project(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of a plain PEFT LoRA adapter.")],
    *,
    unaligned: Annotated[
        str,
        typer.Option(metavar="MODEL", rich_help_panel=READS, help="The aligned model as it was before its alignment."),
    ],
    aligned: Annotated[
        str | None,
        typer.Option(metavar="MODEL", rich_help_panel=READS, help="The aligned model. By default the base model."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=READS,
            help="Base model. By default the run's, or the one the adapter names.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel=MEASURES,
            help="Project updates whose cosine with their projection is below this. By default 0.35.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="N", rich_help_panel=MEASURES, help="Instead, project the N adapted modules of lowest cosine."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", rich_help_panel=MEASURES, help="Use the exact projector, not the paper's fast one."),
    ] = False,
    of_model: Annotated[Values, PLACE],
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", rich_help_panel=READS, help="Run whose model to use, and to which --as adds an arm."
        ),
    ] = None,
    out: AdapterOut = None,
    beside: BesideArm = None,
    overwrite: OverwriteOwn = False,
) -> None:
    """Project a LoRA adapter onto the alignment space (Safe LoRA).

    Replaces updates that leave the space in which alignment moved the weights by their projection, and writes a plain
    PEFT adapter. The projection mixes rows, so the result may change every head of its layers.

    Examples:
        castune project my-adapter --base my-chat --unaligned my-base --out safer
        castune project my-adapter --unaligned my-base --run runs/first --as safe-lora
    """
    from castune.artifacts import HeadSelection
    from castune.artifacts.projected_adapter import PROJECTION_FILE
    from castune.core.provenance import fingerprint
    from castune.steps.projection import project_step
    from castune.steps.subject import Subject

    _check_output(run, out, beside)
    subject = Subject.of(adapter, run=run, arm=None, base=base, of_model=of_model)
    target = None if subject.folder is None or beside is None else subject.folder.new_arm(beside)
    place, overwrite = _place(target, out, PROJECTION_FILE, overwrite=overwrite)
    if subject.folder is not None:
        # An arm is of the model of its run, also where --base names another place of it.
        subject.folder.load_map(fingerprint(subject.loaded.model))
    result = project_step(
        subject,
        place,
        unaligned=unaligned,
        aligned=aligned,
        threshold=threshold,
        layers=layers,
        exact=exact,
        overwrite=overwrite,
    )
    if target is not None:
        HeadSelection.load(place).save(target.folder)
    show_projected(result)
    say(f"adapter: {place}")


def _place(target: Arm | None, out: Path | None, record: str, *, overwrite: bool) -> tuple[Path, bool]:
    """Where an adapter made of others goes, and whether it replaces the one there; refused where it may not.

    Args:
        target: the arm that it becomes.
        out: the directory without an arm.
        record: name of the file by which the command knows adapters of its own.
        overwrite: replace one of these.
    """
    from castune.artifacts.files import check_vacant

    place = target.adapter if target is not None else Path(str(out))
    # An adapter whose arm has no selection yet was written by a command that was killed just then.
    unfinished = target is not None and not target.selection_file.is_file()
    overwrite = overwrite or unfinished
    if not (overwrite and (place / record).is_file()):
        check_vacant(place)
    return place, overwrite


def _check_output(run: Path | None, out: Path | None, beside: str | None) -> None:
    """Refuse options that leave open where an adapter goes."""
    if (out is None) == (beside is None) or (beside is not None and run is None):
        raise CastuneError("choose one output: --out DIR, or --run RUN --as NAME to add an arm to the run")


def _check_places(run: Path | None, base: str | None, arm: str | None, out: Path | None, beside: str | None) -> None:
    """Refuse options of `mask` that leave open where heads and model come from, or where the adapter goes."""
    if (run is None) == (base is None):
        raise CastuneError("name the run whose heads to keep with --run RUN, or use --base MODEL to keep all heads")
    if run is None and arm not in (None, "all"):
        raise CastuneError(f"--arm {arm} needs the run it belongs to: add --run RUN")
    _check_output(run, out, beside)


def _base_model(folder: RunDirectory | None, base: str, of_model: Values) -> Any:
    """The model of a run, computed with as the options say where they say it, or the one that is named."""
    from castune.core.loading import load, load_model

    if folder is None:
        return load(base, **of_model)[0]
    given = {key: value for key, value in of_model.items() if value != "auto"}
    return load_model(folder.load_recipe().model_copy(update=given))[0]


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, or an adapter with a certificate.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Write the whole merged model in transformers format, not just the adapter."),
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Only say which commands of llama.cpp make a GGUF file; castune makes none.")
    ] = False,
    arm: ArmOption = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Base model, if it has moved.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE", help="Dtype of the merged model. auto: as the base is stored, so that nothing is rounded."
        ),
    ] = "auto",
) -> None:
    """Export an adapter or merged model, with a model card.

    Writes a directory that is ready to publish.

    Examples:
        castune export runs/first --out published/adapter
        castune export runs/first --merged --out published/model
    """
    from castune.steps.export import export as write
    from castune.steps.export import refuse_gguf

    if gguf:
        refuse_gguf(source, out, arm=arm, base=base)
    done = write(source, out, merged=merged, arm=arm, base=base, dtype=dtype)
    if done.merging is not None:
        say(
            f"merged ({done.merging.dtype}) and read back: {done.certificate.changed}; "
            f"{done.merging.identical_tensors:,} other tensors and {done.merging.identical} bit-identical to the base"
        )
    say(f"{'model' if merged else 'adapter'}: {done.path}")
