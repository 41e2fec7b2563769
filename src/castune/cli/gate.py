"""A run against the thresholds of a policy, for CI."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from castune.cli.options import Run
from castune.console import say
from castune.errors import CastuneError

# 2 is bad input, as everywhere.
EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}


def gate(
    run_directory: Run,
    policy: Annotated[Path, typer.Option(metavar="FILE", help="A TOML file of rules.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help='Another run, for rules with against = "baseline".')
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the result as JUnit XML.")
    ] = None,
) -> None:
    """Check a run's intervals and certificate against a policy.

    Exit code 0: every rule passes. 1: a rule fails. 2: bad input. 3: none fails, but not all could be decided.

    Examples:
        castune gate runs/x --policy gate.toml --junit gate.xml
        castune gate runs/new --policy gate.toml --baseline runs/released
    """
    from castune.artifacts.files import replacing
    from castune.report.gate import gate_lines, junit_xml
    from castune.steps.directory import RunDirectory
    from castune.steps.gate import gate_step

    _check_files(policy, {"--json": json_file, "--junit": junit_file})
    result = gate_step(
        RunDirectory(run_directory), policy, baseline=None if baseline is None else RunDirectory(baseline)
    )
    # Both files or, where one cannot be written, neither; and no verdict then.
    with contextlib.ExitStack() as files:
        if json_file is not None:
            result.save(files.enter_context(replacing(json_file)))
        if junit_file is not None:
            files.enter_context(replacing(junit_file)).write_text(junit_xml(result), encoding="utf-8")
    for line in gate_lines(result):
        say(line)
    raise typer.Exit(EXIT_CODES[result.verdict])


def _check_files(policy: Path, outputs: dict[str, Path | None]) -> None:
    """Refuse to write where something else is read or written, or a directory is."""
    taken = {policy.resolve(): "--policy"}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise CastuneError(f"{option} {path}: is a directory; give a file to write")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir():
            raise CastuneError(f"{option} {path}: {above} is a file, not a directory; give another path")
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise CastuneError(f"{option} {path}: the same file as {other}; choose another")
