"""Bad input of every kind, and what castune says to it.

    python tests/pipeline/bad_input.py        # writes docs/reference/errors.md

A case makes its files and gives the arguments of a command. Every one must end in one line and exit code 2, and leave
the directory as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "errors.md"
Make = Callable[[Path], list[str]]


class Case(NamedTuple):
    """What is wrong, in words, and how to make it."""

    section: str
    what: str
    make: Make


def recipe(*lines: str, name: str = "recipe.toml") -> Callable[[Path], None]:
    """A recipe of these lines behind one that sets `out`."""
    return lambda place: _write(place / name, "\n".join(['out = "run"', *lines]) + "\n") and None


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def with_recipe(*lines: str) -> Make:
    def make(place: Path) -> list[str]:
        recipe(*lines)(place)
        return ["run", "recipe.toml"]

    return make


def setting(*settings: str) -> Make:
    def make(place: Path) -> list[str]:
        recipe()(place)
        return ["run", "recipe.toml", *(word for one in settings for word in ("--set", one))]

    return make


def data(content: str | bytes, *, of: str = "align", name: str = "data.jsonl") -> Make:
    """Data of a run in a file."""

    def make(place: Path) -> list[str]:
        _write(place / name, content)
        return setting(f"{of}={name}")(place)

    return make


def row(**values: Any) -> str:
    return json.dumps(values) + "\n"


def command(*arguments: str) -> Make:
    return lambda place: list(arguments)


def broken_run(change: Callable[[Path], object], *arguments: str) -> Make:
    """A copy of a finished run of a tiny model, something wrong with it, and a command."""

    def make(place: Path) -> list[str]:
        shutil.copytree(Path(os.environ["CASTUNE_FINISHED_RUN"]), place / "run")
        change(place / "run")
        return [*arguments]

    return make


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    """A JSON artifact with other values, and without its digest: edited on purpose."""

    def change(run: Path) -> None:
        record = json.loads((run / name).read_text(encoding="utf-8"))
        record.pop("digest", None)
        _write(run / name, json.dumps({**record, **changes}))

    return change


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: _write(run / name, content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda run: _write(run / name, (run / name).read_bytes()[:-40])


def flipped(name: str) -> Callable[[Path], object]:
    """One digit of a number in a text file changed."""

    def change(run: Path) -> None:
        text = (run / name).read_text(encoding="utf-8")
        # The first digit of a number: the last of seventeen may change nothing.
        place = max(found.start() for found in re.finditer(r"(?<=[ \[])[1-8]", text[: len(text) // 2]))
        _write(run / name, text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])

    return change


def policy(*lines: str, options: tuple[str, ...] = ()) -> Make:
    """A finished run and a policy of one rule, or of none."""

    def make(place: Path) -> list[str]:
        _write(place / "gate.toml", "\n".join(["[[rule]]", *lines]) if lines else "")
        return broken_run(lambda run: None, "gate", "run", "--policy", "gate.toml", *options)(place)

    return make


CASES = [
    *(
        Case("Recipes", *one)
        for one in (
            ("no such file", command("run", "absent.toml")),
            ("a directory in its place", lambda place: [(place / "recipe.toml").mkdir(), ["run", "recipe.toml"]][1]),
            ("malformed TOML", with_recipe("model = ")),
            ("not UTF-8", lambda place: [_write(place / "recipe.toml", b"out = \"\xff\""), ["run", "recipe.toml"]][1]),
            ("nested too deeply", with_recipe("x = " + "[" * 3000)),
            ("an unknown key", with_recipe("[tune]", "learning_rat = 1e-4")),
            ("an unknown table", with_recipe("[tunes]", "rank = 4")),
            ("no `out`", lambda place: [_write(place / "recipe.toml", "seed = 1\n"), ["run", "recipe.toml"]][1]),
            ("a number where a table belongs", with_recipe("tune = 3")),
            ("text where a number belongs", setting('tune.rank="four"')),
            ("a rank of zero", setting("tune.rank=0")),
            ("a negative learning rate", setting("tune.learning_rate=-1e-4")),
            ("a learning rate that is no number", setting("tune.learning_rate=nan")),
            ("a share above one", setting("select.fraction=1.5")),
            ("a share of no example", setting("align=starter-align", "align.shares={harmful = 1, benign = 0}")),
            ("shares without the values they are of", setting("align=starter-align", "align.shares=0.5")),
            ("a bucket without their number", setting("select.bucket=2")),
            ("a bucket beyond the last", setting("select.buckets=4", "select.bucket=5")),
            ("a random arm without a seed", setting('select.compare=["random"]')),
            ("no such arm", setting('select.compare=["safest"]')),
            ("a path as an arm", setting('select.compare=["../../etc"]')),
            ("an arm twice", setting('select.compare=["risky", "risky"]')),
            ("no such zone", setting("select.zone=middle")),
            ("no such measure", setting("diagnose.measure=guess")),
            ("no such utility domain", setting('diagnose.reply_domains=["overrefusal"]')),
            ("no such kind of unit", setting('diagnose.units=["neurons"]')),
            ("no such dtype", setting("dtype=float8")),
            ("no such judge", setting("evaluate.judge=crystal-ball")),
            ("a suite twice", setting('evaluate.suites=["starter-safety-eval", "starter-safety-eval"]')),
            ("no suites", setting("evaluate.suites=[]")),
            ("a path as the name of a utility domain", setting('utility."../up".source=starter-utility')),
            ("two domains that differ in capitals only", with_recipe("[utility.maths]", 'source = "starter-utility"', "[utility.Maths]", 'source = "starter-utility"')),
            ("DPO and data replay together", setting("tune.method=dpo", "tune.replay=0.1")),
            ("all of the utility activations left alone", setting("tune.null_space=1")),
            ("a null space and other heads on the way", setting("tune.null_space=0.95", "tune.reselect_steps=10")),
            ("a setting without a value", command("run", "--set", "tune.rank")),
            ("a key in it", setting("model=hf_abcdefghijklmnopqrstuvwx")),
            ("a password in it", setting("safety=https://me:pass@example.org/data.jsonl")),
        )
    ),
    *(
        Case("Data", *one)
        for one in (
            ("no such file", setting("align=absent.jsonl")),
            ("no such named source", setting("utility=mmlux=copy.jsonl")),
            ("neither a file nor a source nor a hub id", setting("align=nothing")),
            ("an unknown file type", data("a,b\n", name="data.xlsx")),
            ("empty", data("")),
            ("malformed JSON", data(row(prompt="a", completion="b") + '{"prompt": \n')),
            ("a number of thousands of digits", data('{"prompt": ' + "1" * 5000 + "}\n")),
            ("lists within lists without end", data('{"prompt": ' + "[" * 100_000 + "\n")),
            ("not UTF-8", data(b'{"prompt": "\xff\xfe"}\n')),
            ("a list instead of an object", data("[1, 2]\n")),
            ("a column is missing", data(row(question="a", completion="b"))),
            ("no reply to train on", data(row(prompt="a"))),
            ("an empty prompt", data(row(prompt="  ", completion="b"))),
            ("a reply that is no text", data(row(prompt="a", completion=7))),
            ("half of a character", data('{"prompt": "a\\ud800", "completion": "b"}\n')),
            ("an id twice", data(row(id="x", prompt="a", completion="b") + row(id="x", prompt="c", completion="d"))),
            ("a question with one choice", data(row(prompt="a", choices=["x"], answer=0), of="utility")),
            ("a question with eleven choices", data(row(prompt="a", choices=list("abcdefghijk"), answer=0), of="utility")),
            ("an answer beyond the choices", data(row(prompt="a", choices=["x", "y"], answer=2), of="utility")),
            ("an answer as text", data(row(prompt="a", choices=["x", "y"], answer="y"), of="utility")),
            ("an unknown scoring", data(row(prompt="a", choices=["x", "y"], answer=1, scoring="luck"), of="utility")),
            ("a conversation that ends with nothing to reply to", data(row(messages=[{"role": "assistant", "content": "a"}]))),
            ("messages that are no list", data(row(messages="hello"))),
            ("a preference without the rejected reply", data(row(prompt="a", chosen="b"))),
            ("shares of what is not there", setting("align=starter-align", "align.shares={harmful = 1, harmless = 1}")),
            ("shares of a column that is not there", lambda place: [_write(place / "t.jsonl", row(prompt="a", completion="b")), setting("align=t.jsonl", "align.shares={harmful = 1}")(place)][1]),
            ("prompts with replies as D_util", data(row(prompt="a", completion="b") + row(prompt="c", completion="d"), of="utility")),
            ("questions where prompts with replies were named", lambda place: [_write(place / "q.jsonl", row(prompt="a", choices=["x", "y"], answer=0) * 2), setting("utility=q.jsonl", 'diagnose.reply_domains=["utility"]')(place)][1]),
            ("harmful prompts without safe replies", data(row(prompt="a") + row(prompt="b"), of="safety")),
            ("broken Parquet", data(b"PAR1 and no more", name="data.parquet")),
            ("training prompts in a suite", lambda place: [_write(place / "t.jsonl", row(prompt="How are you?", completion="Well.")), setting("align=t.jsonl", 'evaluate.suites=["safety:t.jsonl"]')(place)][1]),
            ("no such suite", setting('evaluate.suites=["xtest"]')),
            ("own data without a purpose", lambda place: [_write(place / "p.jsonl", row(prompt="a")), setting('evaluate.suites=["p.jsonl"]')(place)][1]),
        )
    ),
    *(
        Case("Models", *one)
        for one in (
            ("no such directory", command("diagnose", "./absent", "--out", "run")),
            ("a directory without a model", lambda place: [(place / "empty").mkdir(), ["diagnose", "./empty", "--out", "run"]][1]),
            ("a broken config", lambda place: [_write(place / "m" / "config.json", "{"), ["diagnose", "./m", "--out", "run"]][1]),
            ("a config of no known family", lambda place: [_write(place / "m" / "config.json", '{"model_type": "perceptron"}'), ["diagnose", "./m", "--out", "run"]][1]),
            ("a file that is no GGUF", lambda place: [_write(place / "m.gguf", b"not a model"), ["diagnose", "m.gguf", "--out", "run"]][1]),
        )
    ),
    *(
        Case("Commands", *one)
        for one in (
            ("no such device", command("diagnose", "default", "--layers", "0", "--device", "tpu", "--out", "run")),
            ("layers that are no numbers", command("diagnose", "default", "--layers", "first", "--out", "run")),
            ("a shard beyond the last", command("diagnose", "default", "--shard", "3/2", "--out", "run")),
            ("a shard that is none", command("diagnose", "default", "--shard", "half", "--out", "run")),
            ("shares without their values", command("diagnose", "default", "--safety-shares", "0.5", "--out", "run")),
            ("two utility sets of one name", command("diagnose", "default", "--utility", "a/x.jsonl", "--utility", "b/x.jsonl", "--out", "run")),
            ("a directory that is no run", command("report", ".")),
            ("a file in the place of a run", lambda place: [_write(place / "run", ""), ["diagnose", "default", "--layers", "0", "--out", "run"]][1]),
            ("a file in the place of a study", lambda place: [recipe()(place), _write(place / "run", ""), ["study", "recipe.toml"]][2]),
            ("a run without a map", lambda place: [recipe()(place), ["select", ".", "--zone", "safe"]][1]),
            ("an unknown accelerator", command("plan", "default", "--accelerator", "abacus")),
            ("a study without arms", lambda place: [recipe("[study]", "seeds = []")(place), ["study", "recipe.toml"]][1]),
            ("more accelerators than there are", lambda place: [recipe()(place), ["study", "recipe.toml", "--gpus", "64"]][1]),
            ("a launcher that is not there", lambda place: [recipe()(place), ["study", "recipe.toml", "--launch", "nosuchrun -n 2"]][1]),
            ("a status of nothing", command("watch", ".")),
            ("a target that the run does not measure", broken_run(lambda run: None, "dial", "run", "--target", "nll=0.1")),
            ("a target that is no share", broken_run(lambda run: None, "dial", "run", "--target", "refused=90")),
            ("a strength that is too high", broken_run(lambda run: None, "dial", "run", "--strengths", "1,3")),
            ("an attack of no known kind", broken_run(lambda run: None, "attack", "run", "--kind", "bribe")),
            ("an attack on an arm that is not there", broken_run(lambda run: None, "attack", "run", "--arm", "nobody")),
            ("more rows than there are", broken_run(lambda run: None, "attack", "run", "--kind", "relearn", "--n-rows", "1000")),
            ("harmless prompts to count refusals on", broken_run(lambda run: None, "attack", "run", "--kind", "dial", "--prompts", "starter-overrefusal-eval")),
            ("an adapter without a strength", broken_run(lambda run: None, "dial", "run", "--export", "adapter")),
        )
    ),
    *(
        Case("Policies of a gate", *one)
        for one in (
            ("no such file", command("gate", "run", "--policy", "absent.toml")),
            ("no rule", policy()),
            ("an unknown key", policy('metric = "safety"', "at_lest = 0.9")),
            ("no threshold", policy('metric = "safety"')),
            ("two thresholds", policy('metric = "safety"', "at_least = 0.9", "at_most = 0.95")),
            ("a threshold without a metric", policy("at_least = 0.9")),
            ("text where a number belongs", policy('metric = "safety"', 'at_least = "0.9"')),
            ("a threshold that is no number", policy('metric = "safety"', "at_least = nan")),
            ("a rate in per cent", policy('metric = "safety"', "at_least = 90")),
            ("a negative margin", policy('metric = "safety"', 'against = "base"', "no_worse_than = -0.1")),
            ("nothing to be worse than", policy('metric = "safety"', "no_worse_than = 0.1")),
            ("rules that contradict each other", policy('metric = "safety"', "at_least = 0.9", "[[rule]]", 'metric = "safety"', "at_most = 0.8")),
            ("no such metric", policy('metric = "safty"', "at_least = 0.9")),
            ("no such arm", policy('arm = "safest"', 'metric = "safety"', "at_least = 0.9")),
            ("a baseline that is not given", policy('metric = "safety"', 'against = "baseline"', "no_worse_than = 0.1")),
            ("a result in the place of the policy", policy('metric = "safety"', "at_least = 0.9", options=("--json", "gate.toml"))),
        )
    ),
    *(
        Case("Runs that were damaged, or changed", *one)
        for one in (
            ("the map cut short", broken_run(cut("conflict_map.parquet"), "report", "run")),
            ("the map is another file", broken_run(replaced("conflict_map.parquet", b"PAR1"), "select", "run", "--zone", "safe")),
            ("the selection is cut short", broken_run(cut("selection.json"), "report", "run")),
            ("a digit of the selection changed", broken_run(flipped("selection.json"), "report", "run")),
            ("a selection of another kind", broken_run(edited("selection.json", kind="shopping list"), "report", "run")),
            ("a selection of a later version", broken_run(edited("selection.json", schema_version=99), "report", "run")),
            ("a path as the zone of a selection", broken_run(edited("selection.json", zone="../../up"), "report", "run")),
            ("heads that are text", broken_run(edited("selection.json", heads="all"), "report", "run")),
            ("heads of another map", broken_run(edited("selection.json", conflict_map_hash="0123456789abcdef"), "report", "run")),
            ("heads for another model", broken_run(edited("selection.json", conflict_map_hash=None, model_fingerprint="0123456789abcdef"), "report", "run")),
            ("a second arm of one name", broken_run(lambda run: None, "select", "run", "--zone", "risky")),
            ("the adapter's weights changed", broken_run(lambda run: _write(run / "adapter" / "adapter_model.safetensors", (run / "arms/risky/adapter/adapter_model.safetensors").read_bytes()), "report", "run")),
            ("the adapter's weights are gone", broken_run(lambda run: (run / "adapter" / "adapter_model.safetensors").unlink(), "report", "run")),
            ("a digit of the certificate changed", broken_run(flipped("adapter/certificate.json"), "report", "run")),
            ("a digit of the training's record changed", broken_run(flipped("adapter/tune.json"), "report", "run")),
            ("a digit of the metrics changed", broken_run(flipped("evaluation/base/metrics.json"), "report", "run")),
            ("a reply changed", broken_run(lambda run: _write(run / "evaluation/base/samples.jsonl", (run / "evaluation/base/samples.jsonl").read_text().replace('"prompt": "', '"prompt": "X', 1)), "report", "run")),
            ("replies are missing", broken_run(lambda run: (run / "evaluation/base/samples.jsonl").unlink(), "report", "run")),
            ("no arm of that name", broken_run(lambda run: None, "export", "run", "--arm", "safest", "--out", "exported")),
            ("a place that is taken", broken_run(lambda run: None, "export", "run", "--out", "run/arms")),
            ("the run made again into itself", broken_run(lambda run: None, "reproduce", "run", "--out", "run")),
            ("heads that are not in the model", broken_run(edited("selection.json", heads=[[0, 99]], conflict_map_hash=None, zone="custom", fraction=None), "tune", "run", "--data", "starter-align", "--overwrite")),
        )
    ),
]  # fmt: skip


def key(case: Case) -> str:
    """A name for a test."""
    return f"{case.section}: {case.what}"


def what_it_says(case: Case, place: Path) -> str:
    """Run a case in a directory; the one line it ends with, without the machine's own paths.

    Raises:
        AssertionError: no error, another exit code, more than a line, a traceback, or files that are new or changed.
    """
    arguments = case.make(place)
    before = snapshot(place)
    code, said = run_cli(arguments, place)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2, f"{key(case)}: exit code {code}: {said[-1500:]}"
    assert "Traceback" not in said, said
    # Typer's own refusals come with the usage.
    usage = [line.removeprefix("Error: ") for line in said.splitlines() if line.startswith("Error: ")]
    assert len(lines) + len(usage) == 1, said
    assert snapshot(place) == before, f"{key(case)}: something was written or lost"
    text = lines[0].removeprefix("error: ") if lines else usage[0]
    return text.replace(f"{place.resolve()}/", "").replace(f"{place}/", "").replace(str(place), ".")


def snapshot(place: Path) -> dict[str, str]:
    """A digest of every file."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(place.rglob("*"))
    }


def run_cli(arguments: list[str], place: Path) -> tuple[int, str]:
    """The command line in this process, in a directory: its exit code, and what it wrote to standard error."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    from castune import cli

    here, argv, error = Path.cwd(), sys.argv, io.StringIO()
    os.chdir(place)
    sys.argv = ["castune", *arguments]
    try:
        with redirect_stderr(error), redirect_stdout(io.StringIO()):
            cli.main()
        code: Any = 0
    except SystemExit as end:
        code = end.code
    finally:
        os.chdir(here)
        sys.argv = argv
    return int(code or 0), error.getvalue()


def page(found: Iterator[tuple[Case, str]]) -> str:
    """The page of all cases."""
    parts = [
        "# Errors\n\nBad input ends in one line and exit code 2; nothing is written and no finished work is lost. These\n"
        "tables are made by running every case, and a test keeps them true. File names are those of the\ncases.\n"
    ]
    section = ""
    for case, text in found:
        if case.section != section:
            section = case.section
            parts.append(f"\n## {section}\n\n| what is wrong | what castune says |\n|---|---|\n")
        parts.append(f"| {case.what} | `{shown(text)}` |\n")
    return "".join(parts)


def shown(text: str) -> str:
    """A message as it stands in a cell of the table."""
    # Digests depend on where the model lies.
    text = re.sub(r"[0-9a-f]{16}", "0123456789abcdef", text).replace("`", "'").replace("|", "/")
    return text if len(text) <= 420 else f"{text[:420]} ..."


def finished_run(folder: Path) -> Path:
    """A whole run of a tiny model; the same each time."""
    from tiny_models import make_tiny_model, make_tiny_tokenizer

    from castune.config import Recipe
    from castune.pipeline import run

    make_tiny_model("llama").save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    made = Recipe.of(
        model=str(folder / "model"),
        dtype="float32",
        device="cpu",
        out=str(folder / "run"),
        safety={"source": "starter-safety", "limit": 2},
        utility={"source": "starter-utility", "limit": 2},
        align={"source": "starter-align", "limit": 4},
        diagnose={"measure": "margin", "max_new_tokens": 2, "gradient_chunks": 2},
        select={"zone": "safe", "fraction": 0.25, "compare": ["risky"]},
        tune={"rank": 2, "max_steps": 1},
        evaluate={"limit": 2, "max_new_tokens": 2},
    )
    return run(made).path


def main() -> None:
    """Write the page."""

    def results() -> Iterator[tuple[Case, str]]:
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder:
                yield case, what_it_says(case, Path(folder))

    with tempfile.TemporaryDirectory() as folder:
        os.environ["CASTUNE_FINISHED_RUN"] = str(finished_run(Path(folder)))
        PAGE.write_text(page(results()), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main()
