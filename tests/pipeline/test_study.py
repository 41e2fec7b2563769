"""Studies on a tiny model: the tables, what is not done twice, and workers that die, here and under Ray."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from command_line import BIN, assert_one_error, castune
from loopback import needs_loopback

from castune.artifacts import ConflictMap, EvalResult, TuneResult
from castune.artifacts.samples import references_of
from castune.config import Recipe
from castune.core.loading import load_config
from castune.data.chat import ChatFormat
from castune.selection import select
from castune.stats.estimates import utility_cost_ratio
from castune.steps.directory import RunDirectory
from castune.steps.inputs import load_data
from castune.study.directory import StudyDirectory
from castune.study.findings import findings
from castune.study.graph import Graph
from castune.study.run import study_graph
from castune.study.schedule import load_states
from castune.study.trials import read_results

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]
Made = Callable[..., Path]

STUDY = {
    "arms": ["all", "random", "risky", "safe"],
    "methods": ["sft", "pcgrad"],
    "seeds": [21, 42],
    "buckets": [4],
    "scores": ["conflict"],
    "shares": [50],
    "calibrations": {
        "margins": {"measure": "margin"},
        "one-rank": {"sensitivity_rank": "of-difference", "arms": ["bucket-1-of-4"]},
    },
    "drift": ["safe"],
}
FEW = {
    **STUDY,
    "arms": ["all", "safe"],
    "methods": ["sft"],
    "seeds": [21],
    "scores": ["conflict"],
    "shares": [],
    "calibrations": {},
    "drift": [],
}


@pytest.fixture
def study_of(models: Models, recipe_of: RecipeOf, tmp_path: Path) -> Callable[..., Path]:
    """Write a study's recipe over the tiny model; returns the file."""
    model = models()

    def write(name: str = "study", study: dict[str, Any] = STUDY, **changes: Any) -> Path:
        recipe = recipe_of(model, out=name, select={"fraction": 0.25}, tune__snapshot_steps=1, **changes)
        # What a user has written, and no more.
        values = recipe.model_dump(mode="json", exclude_unset=True) | {"study": study}
        path = tmp_path / f"{name}.toml"
        path.write_text(Recipe.of(**values).to_toml(), encoding="utf-8")
        return path

    return write


@pytest.fixture
def small(study_of: Callable[..., Path], made: Made, tmp_path: Path) -> Path:
    """The recipe of a small study that is done."""
    path = study_of(study=FEW)
    made(tmp_path / "study", f"small study: {path.read_text()}", lambda: done(path))
    return path


@pytest.fixture
def expected(small: Path) -> dict[str, bytes]:
    """The tables of a small study that nothing disturbed."""
    return table_files(small.with_name("study"))


def done(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    found = castune("study", path, "--threads", "1", *options, cwd=path.parent, timeout=900)
    assert found.returncode == 0, found.stderr
    return found


def table_files(folder: Path) -> dict[str, bytes]:
    # Own data are called by their paths, which are other ones in every test.
    here = str(folder.parent).encode()
    return {path.name: path.read_bytes().replace(here, b"") for path in sorted((folder / "tables").glob("*.csv"))}


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def result_files(folder: Path) -> dict[str, float]:
    names = ("*.safetensors", "conflict_map.parquet", "samples.jsonl", "ablation.parquet")
    return {str(path.relative_to(folder)): path.stat().st_mtime for name in names for path in folder.rglob(name)}


def test_a_study_and_what_its_tables_say(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path, folder = study_of(), tmp_path / "study"
    said = done(path, "--workers", "2")
    assert "Table 1" in said.stdout
    graph = study_graph(Recipe.load(path))
    results = read_results(graph)
    assert not results.missing
    assert results.base is not None
    # Every row against the evaluations themselves, read by another way.
    base = EvalResult.load(graph.base_folder / "evaluation" / "base")
    for trial, row in zip(results.trials, rows(folder, "trials"), strict=True):
        run = next(one for one in graph.runs if (one.calibration, one.seed) == (trial.calibration, trial.seed))
        result = EvalResult.load(run.folder / "evaluation" / trial.trained)
        for suite in result.suites:
            assert float(row[suite.suite]) == pytest.approx(100 * suite.value)  # type: ignore[operator]
            assert int(row[f"{suite.suite}_n"]) == suite.n
        cmap = ConflictMap.load(graph.maps[trial.calibration].out)
        mean = cmap.to_pandas().set_index(["layer", "head"]).loc[list(trial.selection.heads)]["conflict_score"].mean()
        assert float(row["mean_conflict"]) == pytest.approx(mean)
        ratio = utility_cost_ratio(
            utility_before=base.mean("utility"), utility_after=result.mean("utility"),  # type: ignore[arg-type]
            safety_before=base.mean("safety"), safety_after=result.mean("safety"),  # type: ignore[arg-type]
        )  # fmt: skip
        assert row["ucr"] == ("" if ratio is None else pytest.approx(f"{ratio:.10g}"))
    first = rows(folder, "table_1_sft")
    assert [row["arm"] for row in first] == ["base", *STUDY["arms"]]  # type: ignore[has-type]
    suite = base.suites[0].suite
    for row in first[1:]:
        of_seed = [
            float(t[suite]) for t in rows(folder, "trials") if (t["arm"], t["calibration"]) == (row["arm"], "main")
        ]
        assert len(of_seed) == int(row["seeds"]) == 2
        assert float(row[suite]) == pytest.approx(sum(of_seed) / 2)
        assert float(row[f"{suite}_se"]) == pytest.approx(abs(of_seed[0] - of_seed[1]) / 2)
    assert [row["arm"] for row in rows(folder, "table_2_pcgrad")][1:] == [f"{arm}+pcgrad" for arm in STUDY["arms"]]
    buckets = rows(folder, "table_7_buckets")
    assert [(row["score"], row["bucket"]) for row in buckets] == [("conflict", str(n)) for n in (1, 2, 3, 4)]
    scores = [float(row["mean_score"]) for row in buckets if row["score"] == "conflict"]
    assert scores == sorted(scores, reverse=True)
    assert [row["arm"] for row in rows(folder, "table_9_budget")] == [
        "base",
        "all",
        "risky",
        "risky-50",
        "safe",
        "safe-50",
    ]
    assert {row["calibration"] for row in rows(folder, "table_10_11_calibrations")} == {"one-rank"}
    # The map that ranks otherwise was made of what the main one measured.
    main, one_rank = (ConflictMap.load(graph.maps[name].out) for name in ("main", "one-rank"))
    assert one_rank.metadata["reranked_from"] == main.content_hash
    for column in ("optimization_conflict", "utility_shift", "safety_shift"):
        assert main.table[column].equals(one_rank.table[column])
    assert not main.table["functional_sensitivity"].equals(one_rank.table["functional_sensitivity"])
    assert "Conflict drift" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "figures" / "drift_safe.svg").is_file()
    # An arm with the heads of another is trained once.
    assert graph.runs[0].same_as["bucket-1-of-4"] == "risky"
    assert not (graph.runs[0].folder / "arms" / "bucket-1-of-4").exists()
    # A run of a study is a run directory like any other.
    assert "report:" in castune("report", graph.runs[0].folder, cwd=tmp_path).stdout
    assert RunDirectory(graph.runs[0].folder).load_recipe().tune.seed == 21

    before, files = table_files(folder), result_files(folder)
    done(path, "--workers", "2")
    assert table_files(folder) == before
    assert result_files(folder) == files
    # Only judging is asked for again; no worker has loaded the model for anything else.
    states, _, _ = load_states(StudyDirectory(folder))
    assert {state.stage for state in states.values() if not state.was_there} == {"judge"}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_report_of_a_study_in_a_browser(
    study_of: Callable[..., Path], own_data: dict[str, Path], tmp_path: Path, browser: Browser
) -> None:
    attack = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    with own_data["held-out"].open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": attack, "prompt": f"Explain {attack}", "target": "No."}) + "\n")
    path, folder = study_of(study=FEW), tmp_path / "study"
    done(path)
    ready = (
        "document.querySelector('.explorer')?.dataset.ready === 'true' && "
        "[...document.querySelectorAll('[data-chart]')].every((box) => box.dataset.drawn === 'true')"
    )
    for dark in (True, False):
        browser.open(folder / "report.html", ready, dark=dark)
        assert browser.console == []
        assert browser.requests == [(folder / "report.html").as_uri()]
    assert browser.run("document.title").startswith("castune study: ")
    assert attack in browser.run("document.body.textContent")
    # A move of the budget is what `castune select` would choose.
    (recipe,) = study_graph(Recipe.load(path)).maps.values()
    cmap = ConflictMap.load(recipe.out)
    for share in (25, 50):
        browser.run(
            f"(() => {{ const slider = document.querySelector('[data-part=budget]'); slider.value = '{share}';"
            "slider.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        browser.settle()
        marked = browser.run(
            "[...document.querySelectorAll('.grid .cell.safe')].map((cell) => Number(cell.dataset.row))"
        )
        assert {cmap.heads[row] for row in marked} == set(select(cmap, zone="safe", fraction=share / 100).heads)
    headings = browser.run("[...document.querySelectorAll('h2')].map((h) => h.textContent)")
    assert headings == ["Arms", "Scores and costs", "Budget", "Conflict maps", "Sample replies", "Provenance"]
    # Sentences of the verdict follow from the results.
    said = browser.run("[...document.querySelectorAll('header .verdict, header li')].map((one) => one.textContent)")
    recipe = Recipe.load(path)
    assert said == findings(read_results(study_graph(recipe)), recipe.study).verdict
    assert {row["words"] for row in rows(folder, "comparisons") if row["purpose"] == "utility"} <= set(said)
    assert (folder / "report.html").stat().st_size < 5_000_000


@pytest.mark.slow
def test_a_study_of_other_units_beside_heads(study_of: Callable[..., Path], tmp_path: Path) -> None:
    units = {"max_new_tokens": 4, "gradient_chunks": 2, "units": ["q_heads", "mlp_groups"], "mlp_groups": 4}
    path, folder = study_of(study=FEW, diagnose=units), tmp_path / "study"
    done(path)
    # Three layers of 4 heads and 4 groups of neurons; a quarter of each kind.
    by_arm = {row["arm"]: row for row in rows(folder, "table_1_sft")}
    assert (by_arm["all"]["heads"], by_arm["safe"]["heads"]) == ("24", "6")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "query heads</h3>" in page
    assert "groups of MLP neurons</h3>" in page
    # Scores of several kinds do not add up.
    assert not (folder / "tables" / "budget.csv").exists()
    assert_one_error(
        castune("budget", study_graph(Recipe.load(path)).runs[0].folder, cwd=tmp_path), "heads and groups of MLP"
    )


@pytest.mark.slow
def test_another_seed_adds_runs_and_leaves_the_others(small: Path, tmp_path: Path) -> None:
    path, folder = small, tmp_path / "study"
    files = result_files(folder)
    done(path, "--set", "study.seeds=[21, 42]")
    after = result_files(folder)
    assert files.items() <= after.items()
    assert any("42" in name for name in after.keys() - files.keys())
    assert [row["seeds"] for row in rows(folder, "table_1_sft")] == ["", "2", "2"]
    # Another training lies beside; another evaluation takes the place of the first.
    done(path, "--set", "tune.learning_rate=0.05")
    assert files.items() <= result_files(folder).items()


@pytest.mark.slow
def test_random_draws_and_a_seed_of_one_arm_add_runs_and_leave_the_others(small: Path, tmp_path: Path) -> None:
    path, folder = small, tmp_path / "study"
    files = result_files(folder)
    done(path, "--set", "study.random_draws=2", "--set", "study.arm_seeds.safe=[21, 42]")
    assert files.items() <= result_files(folder).items()
    assert {row["arm"]: row["seeds"] for row in rows(folder, "table_1_sft")} == {"base": "", "all": "1", "safe": "2"}
    of_random = [row for row in rows(folder, "trials") if row["arm"] == "random"]
    assert [(row["seed"], row["selection_seed"]) for row in of_random] == [("21", "1000"), ("21", "1001")]
    # Other heads, trained as the zone's.
    for draw in sorted((folder / "runs").glob("main-21-draw-100?-*")):
        recipe = RunDirectory(draw).load_recipe()
        (zone,) = (path for path in (folder / "runs").glob("main-21-*") if "draw" not in path.name)
        assert recipe.tune == RunDirectory(zone).load_recipe().tune
        assert recipe.select.seed == int(draw.name.split("-")[3])
    assert {(row["n"], row["seeds"]) for row in rows(folder, "nulls")} <= {("2", "1"), ("0", "0")}
    assert "21, 42" in (folder / "report.html").read_text(encoding="utf-8")


def start(path: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(BIN / "castune"), "study", str(path), "--threads", "1", *options], cwd=path.parent, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def children(pid: int) -> Iterator[int]:
    """Living descendants of a process."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from children(int(child))


def running(folder: Path, stage: str) -> bool:
    if not (folder / "status.json").is_file():
        return False
    states, _, _ = load_states(StudyDirectory(folder))
    return any(state.stage == stage and state.state == "running" for state in states.values())


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_killed_three_times_the_study_ends_with_the_same_tables(
    study_of: Callable[..., Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    killed = study_of("killed", FEW)
    for stage in ("diagnose", "tune", "evaluate"):
        kill_during(stage, killed, tmp_path / "killed")
    done(killed, "--workers", "2")
    assert table_files(tmp_path / "killed") == expected


def kill_during(stage: str, path: Path, folder: Path) -> None:
    process = start(path, "--workers", "2")
    wait_for(lambda: running(folder, stage) or process.poll() is not None)
    assert process.poll() is None, f"nothing was left to kill: {process.communicate()[1]}"
    kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a study. Its workers end with it: nobody writes beside its successor."""
    workers = list(children(process.pid))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(map(alive, workers)), 30)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_worker_that_is_killed_loses_its_unit_only(
    study_of: Callable[..., Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    hurt = study_of("hurt", FEW)
    process = start(hurt, "--workers", "2")
    wait_for(lambda: running(tmp_path / "hurt", "tune"))
    for pid in list(children(process.pid))[:1]:
        os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "killed by signal 9" in said
    assert "attempt 2 follows" in said
    assert table_files(tmp_path / "hurt") == expected


@pytest.mark.slow
@needs_loopback
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_ray_and_a_ray_worker_that_is_killed(
    study_of: Callable[..., Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    hurt = study_of("hurt", FEW)
    process = start(hurt, "--workers", "2", "--executor", "ray", "--shards", "2")
    wait_for(lambda: running(tmp_path / "hurt", "tune"))
    wait_for(lambda: bool(ray_tasks(process.pid)))
    os.kill(ray_tasks(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "attempt 2 follows" in said
    assert table_files(tmp_path / "hurt") == expected


def ray_tasks(pid: int) -> list[int]:
    """Processes of Ray in which a unit is being done."""
    found = []
    for child in children(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
        except FileNotFoundError:
            continue
        # Ray's own agents are called ray:: too; a node dies with them.
        if command.startswith((b"ray::tune", b"ray::evaluate")):
            found.append(child)
    return found


@pytest.mark.slow
def test_shares_of_separate_jobs_come_to_the_same_tables(
    study_of: Callable[..., Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    shared = study_of("shared", FEW)
    for _ in range(3):
        for share in ("1/2", "2/2"):
            done(shared, "--shard", share)
        assert not (tmp_path / "shared" / "tables").exists()
    assert "wait for other shares" not in done(shared, "--shard", "2/2").stdout
    done(shared)
    states, _, _ = load_states(StudyDirectory(tmp_path / "shared"))
    assert {state.stage for state in states.values() if not state.was_there} == {"judge"}
    assert table_files(tmp_path / "shared") == expected


@pytest.mark.slow
@needs_loopback
def test_diagnoses_and_trainings_by_two_processes_each(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path, folder = study_of(study=FEW), tmp_path / "study"
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    done(path, "--launch", launch, "--workers", "1")
    assert [row["arm"] for row in rows(folder, "table_1_sft")] == ["base", "all", "safe"]
    # Two processes take two micro-batches of 2 a step: all 8 examples in 2 steps, of which one process sees 4.
    (run,) = study_graph(Recipe.load(path)).runs
    tuned = TuneResult.load(run.folder / "arms" / "safe" / "adapter")
    chat = ChatFormat(load_config(run.recipe.model)[1])
    align = load_data(run.recipe.align, run.recipe.seed)
    assert (len(align), tuned.steps) == (8, 2)
    assert tuned.tokens == sum(len(chat.loss_row(example).ids) for example in align)
    # A launcher that dies is tried again, and then given up; what does not need it is done.
    other = study_of("other", FEW)
    found = castune("study", other, "--threads", "1", "--launch", "false", cwd=tmp_path, timeout=900)
    assert found.returncode == 1
    assert "attempt 3 follows" in found.stderr
    assert "false ended (exit code 1)" in found.stderr


def test_watching_a_study(small: Path, tmp_path: Path) -> None:
    assert_one_error(castune("watch", tmp_path / "nowhere", "--once", cwd=tmp_path), "no such study status")
    path = small
    said = castune("watch", tmp_path / "study", cwd=tmp_path).stdout
    n_units = len(study_graph(Recipe.load(path)).units)
    assert f"{n_units} of {n_units} units done" in said
    assert re.search(r"map main-[0-9a-f]{10}: reliability of C", said)
    status = json.loads((tmp_path / "study" / "status.json").read_text())
    del status["digest"]  # changed on purpose
    name = "tune main/21/safe"
    status["units"][name] |= {"state": "running", "started": time.time() - 60, "attempts": 2}
    (tmp_path / "study" / "status.json").write_text(json.dumps(status))
    said = castune("watch", tmp_path / "study", "--once", cwd=tmp_path).stdout
    assert re.search(rf"{name}.*6\d s.*2", said)


def test_a_budget_from_a_run_of_a_study(small: Path, tmp_path: Path) -> None:
    path = small
    (run,) = study_graph(Recipe.load(path)).runs
    said = castune("budget", run.folder, cwd=tmp_path).stdout
    assert "Predicted cost" in said
    assert re.search(r"elbow: (none|\d+ heads)", said)
    said = castune("budget", run.folder, "--anchor", "all", "--max-loss", "100", cwd=tmp_path).stdout
    assert "anchor: all, 12 heads" in said
    assert "at most 100 points: 12 heads (100 %) by prediction" in said
    for options, error in (
        (["--max-loss", "1"], "go together"),
        (["--anchor", "all"], "go together"),
        (["--anchor", "risky", "--max-loss", "1"], "no selection named risky"),
        (["--anchor", "bucket-1-of-4", "--max-loss", "1"], "safest heads"),
        (["--anchor", "all", "--max-loss", "-1"], "at least 0"),
    ):
        assert_one_error(castune("budget", run.folder, *options, cwd=tmp_path), error)


@pytest.fixture
def continuous(study_of: Callable[..., Path], own_data: dict[str, Path], made: Made, tmp_path: Path) -> Path:
    """The recipe of a small study in nats, with adapters at half strength too, that is done."""
    suites = [
        str(own_data["utility"]),
        f"nll:{own_data['utility']}",
        f"kl:{own_data['benign']}",
        f"safety-margin:{own_data['held-out']}",
    ]
    path = study_of(study=FEW, evaluate__suites=suites, evaluate__strengths=[0.5], evaluate__reference_tokens=4)
    made(tmp_path / "study", f"study in nats: {path.read_text()}", lambda: done(path))
    return path


def test_a_study_in_nats(continuous: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    graph = study_graph(Recipe.load(continuous))
    (run,) = graph.runs
    base, safe = (EvalResult.load(run.folder / "evaluation" / name) for name in ("base", "safe"))
    by_arm = {row["arm"]: row for row in rows(folder, "table_1_sft")}
    for arm, result in (("base", base), ("safe", safe)):
        for column, purpose in (
            ("nll_average", "nll"),
            ("kl_average", "kl"),
            ("safety_margin_average", "safety-margin"),
        ):
            assert float(by_arm[arm][column]) == pytest.approx(result.mean(purpose), abs=1e-9)
    assert float(by_arm["base"]["kl_average"]) == pytest.approx(0, abs=1e-6)
    assert references_of(safe.samples) == references_of(base.samples) != {}
    against_safe = {row["purpose"]: row for row in rows(folder, "comparisons") if row["arm"] == "all"}
    every = EvalResult.load(run.folder / "evaluation" / "all")
    assert float(against_safe["nll"]["minus_safe"]) == pytest.approx(every.mean("nll") - safe.mean("nll"))  # type: ignore[operator]
    # No refusals were counted, so nothing is divided by them.
    in_nats = {"nll_added", "kl", "nll_at_safety", "kl_at_safety"}
    assert {row["cost"] for row in rows(folder, "validity")} == {"utility_lost", *in_nats}
    # Half an adapter lies between none and all of it.
    half = EvalResult.load(run.folder / "evaluation" / "all" / "strengths" / "0.5")
    assert 0 < half.mean("kl") < every.mean("kl")  # type: ignore[operator]
    (at_equal_safety,) = findings(read_results(graph), graph.recipe.study).equal_safety.values()
    assert at_equal_safety.safety == "safety-margin"
    points = at_equal_safety.points["kl"]["all"]
    assert [point.strength for point in points] == [0, 0.5, 1]
    assert [point.cost for point in points[1:]] == pytest.approx([half.mean("kl"), every.mean("kl")], abs=1e-6)
    assert "Cost at equal safety" in (folder / "report.html").read_text(encoding="utf-8")
    said = castune("budget", run.folder, "--anchor", "all", "--cost", "nll", "--max-loss", "50", cwd=tmp_path).stdout
    assert "at most 50 nats per token: 12 heads (100 %) by prediction" in said
    for options, error in (
        (["--cost", "nll"], "needs --max-loss"),
        (["--anchor", "all", "--max-loss", "1", "--cost", "ucr"], "accepted: utility, nll, kl"),
        (["--anchor", "all", "--max-loss", "-1", "--cost", "kl"], "accepted: nats per token, at least 0"),
    ):
        assert_one_error(castune("budget", run.folder, *options, cwd=tmp_path), error)


@pytest.mark.slow
def test_what_is_missing_of_a_study_in_nats_is_measured_and_nothing_else(continuous: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    graph, before, files = study_graph(Recipe.load(continuous)), table_files(folder), result_files(folder)
    (run,) = graph.runs
    lost = run.folder / "evaluation" / "safe" / "strengths" / "0.5"
    shutil.rmtree(lost)
    assert "safe" not in next(iter(findings(read_results(graph), graph.recipe.study).equal_safety.values())).arms
    done(continuous)
    assert table_files(folder) == before
    changed = {name for name, time in result_files(folder).items() if files[name] != time}
    assert changed == {str(lost.relative_to(folder) / "samples.jsonl")}
    # Arms that were measured on other replies of the base model than it has given are no part of the study.
    place = graph.base_folder / "evaluation" / "base"
    base = EvalResult.load(place)
    samples: list[Any] = [
        {**sample, "reference": sample["reference"][:1] * 3} if "reference" in sample else sample
        for sample in base.samples
    ]
    replace(base, samples=tuple(samples)).save(place)
    assert "main/21/safe" in read_results(graph).missing
    done(continuous)
    assert read_results(graph).missing == ()
    assert references_of(EvalResult.load(lost).samples) == references_of(samples)


@pytest.mark.slow
def test_a_unit_that_fails_leaves_the_others(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path, folder = study_of(study=FEW), tmp_path / "study"
    graph: Graph = study_graph(Recipe.load(path))
    # A file where an arm's directory should be.
    broken = graph.runs[0].folder / "arms" / "all"
    broken.parent.mkdir(parents=True)
    broken.write_text("")
    found = castune("study", path, "--threads", "1", cwd=tmp_path, timeout=900)
    assert found.returncode == 1
    assert "units failed" in found.stderr
    assert "missing: main/21/all" in found.stdout
    assert [row["arm"] for row in rows(folder, "table_1_sft")] == ["base", "safe"]
    broken.unlink()
    done(path)
    assert [row["arm"] for row in rows(folder, "table_1_sft")] == ["base", "all", "safe"]


@pytest.mark.slow
def test_a_base_that_was_not_judged_when_the_study_was_killed(small: Path, tmp_path: Path) -> None:
    path, folder = small, tmp_path / "study"
    before = table_files(folder)
    base = study_graph(Recipe.load(path)).base_folder / "evaluation" / "base"
    result = EvalResult.load(base)
    replace(result, settings={**result.settings, "judge": "not judged"}).save(base)
    done(path)
    assert table_files(folder) == before
    assert EvalResult.load(base).settings["judge"] == result.settings["judge"]


@pytest.mark.slow
def test_an_adapter_that_was_lost_is_trained_again(small: Path, tmp_path: Path) -> None:
    path, folder = small, tmp_path / "study"
    before = table_files(folder)
    (run,) = study_graph(Recipe.load(path)).runs
    # What a damaged adapter's message asks for.
    shutil.rmtree(run.folder / "arms" / "safe" / "adapter")
    done(path)
    assert table_files(folder) == before


def test_evaluations_of_other_settings_or_adapters_are_missing_and_not_compared(small: Path) -> None:
    graph = study_graph(Recipe.load(small))
    (run,) = graph.runs
    assert read_results(graph).missing == ()
    evaluation = run.folder / "evaluation" / "safe"
    result = EvalResult.load(evaluation)
    for stale in (
        replace(result, model={**result.model, "adapter": "of an earlier training"}),
        replace(result, suites=(replace(result.suites[0], data_hash="of other examples"), *result.suites[1:])),
    ):
        stale.save(evaluation)
        # A bucket with the same heads is the same training.
        assert read_results(graph).missing == ("main/21/safe", "main/21/bucket-4-of-4")


def test_bad_studies_are_refused_before_anything_is_written(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path = study_of(study=FEW)
    for options, said in (
        (["--set", "study.arms=['sfae']"], "sfae"),
        (["--executor", "slurm"], "accepted: local, ray"),
        (["--workers", "0"], "1 or more"),
        (["--address", "auto"], "--executor ray"),
        (["--memory", "-4", "--executor", "ray"], "must be above 0"),
        (["--gpus", "-1"], "0 or more"),
        (["--gpus", "999"], r"this machine has \d+ accelerators"),
        (["--launch", "no-such-launcher --option"], "program 'no-such-launcher' not found"),
        (["--launch", "torchrun 'open"], "No closing quotation"),
        (["--set", "safety=nowhere.jsonl"], "nowhere"),
        (["--set", "evaluate.judge=oracle"], "oracle"),
        (["--set", "study.buckets=[99]"], "99 buckets of 12 heads"),
    ):
        assert_one_error(castune("study", path, *options, cwd=tmp_path), said)
        assert not (tmp_path / "study").exists()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_two_studies_in_one_directory(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path = study_of(study=FEW)
    process = start(path)
    wait_for(lambda: running(tmp_path / "study", "diagnose"))
    assert_one_error(castune("study", path, cwd=tmp_path), "another castune study is running")
    kill(process)


def test_a_dry_run_shows_the_graph_and_writes_nothing(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path = study_of()
    # From a data sheet; test_cost.py measures.
    found = castune("study", path, "--dry-run", "--accelerator", "h100", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "12 heads" in found.stdout
    assert "bucket-1-of-4: same heads as risky" in found.stdout
    assert not (tmp_path / "study").exists()
