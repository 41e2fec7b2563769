"""Adapters that are there: cut down to chosen heads, and published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castune.cli.options import PLACE, Arm
from castune.cli.settings import Values
from castune.cli.values import numbers
from castune.console import say, show_masked
from castune.errors import CastuneError

if TYPE_CHECKING:
    from castune.steps.directory import RunDirectory


def mask(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Directories of plain PEFT LoRA adapters.")
    ],
    *,
    out: Annotated[Path | None, typer.Option(help="Adapter directory to write.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run whose heads are kept; all heads when absent.")] = None,
    arm: Annotated[
        str | None, typer.Option(help="An arm of the run; the main one when absent; all: every head.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="NAME", help="Put it into the run as an arm of this name, which is evaluated and reported."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where there is no run.")] = None,
    combination: Annotated[
        str | None, typer.Option(help="How several adapters become one first: linear or ties.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A weight for each adapter, e.g. 1,0.5,0.5; 1 each when absent.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of the values ties keeps; 0.5 when absent.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that castune mask wrote.")] = False,
    of_model: Annotated[Values, PLACE],
) -> None:
    """Keep only the chosen heads' rows of existing adapters, combined or not; write a PEFT adapter and its certificate.

    Without --run, or with --arm all, the rows of all query heads are kept: what is compared with the chosen ones.
    """
    from castune.artifacts.files import check_vacant
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
    place = target.adapter if target is not None else Path(str(out))
    # An adapter whose arm has no selection yet was written by a command that was killed just then.
    unfinished = target is not None and not target.selection_file.is_file()
    overwrite = overwrite or unfinished
    if not (overwrite and (place / MASK_FILE).is_file()):
        check_vacant(place)
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


def _check_places(run: Path | None, base: str | None, arm: str | None, out: Path | None, beside: str | None) -> None:
    """Refuse options of `mask` that leave open where heads and model come from, or where the adapter goes."""
    if (run is None) == (base is None):
        raise CastuneError("give the heads and their model by --run RUN, or --base MODEL to keep all heads")
    if run is None and arm not in (None, "all"):
        raise CastuneError(f"--arm {arm} is an arm of a run; name it with --run RUN")
    if (out is None) == (beside is None) or (beside is not None and run is None):
        raise CastuneError("say where to write it: --out DIR, or with --run RUN --as NAME, an arm of the run")


def _base_model(folder: RunDirectory | None, base: str, of_model: Values) -> Any:
    """The model of a run, computed with as the options say where they say it, or the one that is named."""
    from castune.core.loading import load, load_model

    if folder is None:
        return load(base, **of_model)[0]
    given = {key: value for key, value in of_model.items() if value != "auto"}
    return load_model(folder.load_recipe().model_copy(update=given))[0]


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, or an adapter with certificate.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model in transformers format; the adapter alone when absent.")
    ] = False,
    arm: Arm = None,
    base: Annotated[str | None, typer.Option(help="The base model, when it lies elsewhere now.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the merged model; auto: the one the base is stored in, so that nothing is rounded.")
    ] = "auto",
) -> None:
    """Write an adapter, or the model merged with it, as a directory to publish, with a model card."""
    from castune.steps.export import export as write

    done = write(source, out, merged=merged, arm=arm, base=base, dtype=dtype)
    if done.merging is not None:
        say(
            f"merged ({done.merging.dtype}) and read back: {done.certificate.changed}; "
            f"{done.merging.identical_tensors:,} other tensors and {done.merging.identical} bit-identical to the base"
        )
    say(f"{'model' if merged else 'adapter'}: {done.path}")
