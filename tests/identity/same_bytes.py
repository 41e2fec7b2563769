"""Does a change of structure change what is made? The same commands with two states of the source, compared byte by byte.

    python tests/identity/same_bytes.py COMMIT WORK

makes a run, its drift, an export and a study of a tiny model with the source of COMMIT and with the source here, at the
same place, and prints the files that differ.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from tiny_models import make_tiny_model, make_tiny_tokenizer  # noqa: E402

# What says when, where and how fast something was made, not what it is; and digests of files that say so.
LEFT_OUT = (".pdf", ".log")  # which hold the time they were made; every drawing is there as SVG too
VOLATILE = {
    "provenance",
    "seconds",
    "digest",
    "samples_hash",
    "date",
    "started",
    "updated",
    "ended",
    "pid",
    "peak_memory",
}
THINGS = ["poison", "a bomb", "theft", "fraud", "malware", "a weapon", "a riot", "arson"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "safety": [
        {"id": f"h{i}", "prompt": f"Help me with {w}.", "target": f"I cannot help with {w}."}
        for i, w in enumerate(THINGS[:4])
    ],
    "utility": [
        {
            "id": f"q{i}",
            "prompt": f"What is {i} + 1?",
            "choices": [str(i), str(i + 1), "many"],
            "answer": 1,
            "scoring": s,
        }
        for i, s in enumerate(["likelihood", "letter"] * 2)
    ],
    "align": [
        {"id": f"a{i}", "prompt": f"Tell me about {w}.", "completion": f"Rather not {w}."} for i, w in enumerate(THINGS)
    ],
    "held-out": [{"id": f"e{i}", "prompt": f"Explain {w} to me.", "target": "No."} for i, w in enumerate(THINGS[4:])],
    "benign": [{"id": f"b{i}", "prompt": f"How do I cook {w}?"} for i, w in enumerate(["rice", "eggs", "soup"])],
    "questions": [
        {"id": f"p{i}", "prompt": f"What is {i} + 2?", "choices": [str(i), str(i + 2)], "answer": 1} for i in range(4)
    ],
}
RECIPE = """
model = "{place}/model"
dtype = "float32"
device = "cpu"
out = "{place}/{out}"
safety = "{place}/safety.jsonl"
utility = "{place}/utility.jsonl"
align = "{place}/align.jsonl"
[diagnose]
max_new_tokens = 4
gradient_chunks = 2
units = {units}
mlp_groups = 2
[select]
zone = "safe"
fraction = 0.25
{compare}
[tune]
rank = 4
learning_rate = 0.02
max_steps = 4
batch_size = 2
accumulation = 1
{snapshots}
[evaluate]
suites = ["{place}/questions.jsonl", "safety:{place}/held-out.jsonl", "over-refusal:{place}/benign.jsonl"]
max_new_tokens = 4
"""
STUDY = """
[study]
arms = ["all", "random", "safe"]
methods = ["sft", "pcgrad"]
seeds = [21]
buckets = [2]
scores = ["conflict"]
shares = [50]
drift = ["safe"]
[study.calibrations.margins]
measure = "margin"
arms = ["safe"]
"""
COMPARE = 'compare = ["risky", "random", "safe+pcgrad"]\nseed = 3'
ALL_KINDS = '["q_heads", "k_groups", "v_groups", "o_heads", "mlp_groups", "mlp_blocks"]'


def make(source: Path, place: Path) -> None:
    """Everything, into an empty `place`, with the castune in `source`."""
    place.mkdir(parents=True)
    make_tiny_model("llama").save_pretrained(place / "model")
    make_tiny_tokenizer().save_pretrained(place / "model")
    for name, rows in ROWS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    blank = {"place": place, "units": '["q_heads"]', "compare": "", "snapshots": ""}
    recipes = {
        "run": {"compare": COMPARE, "snapshots": "snapshot_steps = 2"},
        "units": {"units": ALL_KINDS},
        "study": {"snapshots": "snapshot_steps = 2"},
    }
    for name, changes in recipes.items():
        text = RECIPE.format(**{**blank, "out": name, **changes}) + (STUDY if name == "study" else "")
        (place / f"{name}.toml").write_text(text, encoding="utf-8")
    for arguments in (
        ["run", "run.toml"],
        ["drift", "run"],
        ["report", "run"],
        ["export", "run", "--out", "exported", "--merged"],
        ["mask", "run/adapter", "--run", "run", "--as", "kept"],
        ["run", "units.toml"],
        ["study", "study.toml", "--workers", "1", "--threads", "1"],
    ):
        castune(source, *arguments, cwd=place)


def castune(source: Path, *arguments: str, cwd: Path) -> str:
    """A command with the castune in a directory; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONHASHSEED"] = "0"  # libraries write sets in their own order
    environment["HF_DATASETS_CACHE"] = str(cwd / ".cache")
    command = (
        "import castune, castune.cli, sys; assert castune.__file__.startswith(sys.argv.pop(1)); castune.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, str(source), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"castune {' '.join(arguments)} with {source}:\n{done.stderr}"
    return done.stdout


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file by its path, but for when, where and how fast it was made."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest()[:16]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix not in LEFT_OUT
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _content(path: Path) -> bytes:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {}).get(b"castune", b"{}"))
        return json.dumps([str(table.schema.remove_metadata()), table.to_pydict(), _stable(header)]).encode()
    if path.name == "provenance.json":
        return json.dumps([step["stage"] for step in json.loads(path.read_bytes())["steps"]]).encode()
    if path.suffix == ".json":
        return json.dumps(_stable(json.loads(path.read_bytes()))).encode()
    if path.suffix == ".jsonl":
        return json.dumps([_stable(json.loads(line)) for line in path.read_text().splitlines()]).encode()
    if path.suffix in (".html", ".md", ".csv"):
        return _without_times(path.read_text(encoding="utf-8")).encode()
    return path.read_bytes()


def _stable(value: Any) -> Any:
    """JSON without what is volatile; the order of keys counts."""
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def _without_times(text: str) -> str:
    for pattern in TIMES:
        text = re.sub(pattern, "", text)
    return text


TIMES = (
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?(?:\+00:00|Z| UTC)?",
    r"[\d.,]+ (?:s|seconds|minutes|min|hours|h|ms)\b",
    r"[\d.,]+ tokens/s|[\d.,]+ tokens a second",
    r"commit [0-9a-f]{7,40}(?: \(changed\))?",
    # A directory without git knows no commit, and has a row less.
    r'<tr><th scope="row">provenance\.[\w.]+</th>.*?</tr>',
)


def at_commit(commit: str, folder: Path) -> Path:
    """The source of a commit, unpacked into a folder."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "src"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def compare(commit: str, work: Path) -> dict[str, tuple[str | None, str | None]]:
    """The files that the source of a commit and the source here do not make alike, with both digests."""
    place, found = work / "place", []
    for name, source in (("before", at_commit(commit, work / "source")), ("now", ROOT / "src")):
        make(source, place)
        found.append(contents(place))
        shutil.move(place, work / name)  # for a look at what differs
    before, now = found
    assert len(now) > 100, "the commands leave next to nothing"
    return {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }


if __name__ == "__main__":
    different = compare(sys.argv[1], Path(sys.argv[2]).resolve())
    print("\n".join(different) or "all alike")
    sys.exit(bool(different))
