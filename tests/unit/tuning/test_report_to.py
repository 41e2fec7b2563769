"""Trackers follow a training of castune's and change nothing: not the adapter, not its record, not the run it belongs to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_training import CONFIG, SOME, Interrupter, SelectionOf, Tuned, weights

from castune.artifacts import TuneResult
from castune.config import Recipe, TuneConfig
from castune.data.example import Example
from castune.errors import CastuneError
from castune.pipeline import run
from castune.tuning.trackers import log_folder, require_trackers, trackers_in
from castune.tuning.train import tune
from castune.tuning.workspace import Workspace

LOGGED = CONFIG.changed(report_to=("tensorboard",))

# The interface of the package that transformers writes TensorBoard's files with where tensorboard itself is missing.
STAND_IN = """
import json, pathlib
class SummaryWriter:
    def __init__(self, log_dir):
        self.path = pathlib.Path(log_dir) / "events.jsonl"
    def add_scalar(self, name, value, step=None):
        with self.path.open("a") as file:
            file.write(json.dumps([name, value, step]) + "\\n")
    add_text = add_scalar
    def flush(self):
        pass
    close = flush
"""


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package that writes plain lines."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "tensorboardX.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def events(folder: Path) -> dict[str, dict[int, Any]]:
    """What was written, by name and step."""
    found: dict[str, dict[int, Any]] = {}
    for line in (folder / "tensorboard" / "events.jsonl").read_text().splitlines():
        name, value, step = json.loads(line)
        found.setdefault(name, {})[step] = value
    return found


@pytest.mark.usefixtures("tensorboard")
def test_a_logged_training_is_the_training_without(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path
) -> None:
    plain = tuned(tiny_model("llama"), tmp_path / "plain", CONFIG)
    environment = dict(os.environ)
    logged = tuned(tiny_model("llama"), tmp_path / "logged", LOGGED)
    assert dict(os.environ) == environment
    assert weights(tmp_path / "logged") == weights(tmp_path / "plain")
    assert logged.settings == plain.settings
    assert not (tmp_path / "plain-logs").exists()
    assert {path.name for path in (tmp_path / "logged").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}

    told = events(tmp_path / "logged-logs" / "1")
    assert told["train/loss"] == {step: pytest.approx(loss) for step, loss in logged.losses}
    rates = [CONFIG.learning_rate * (3 - done) / 3 for done in range(3)]
    assert list(told["train/learning_rate"].values()) == pytest.approx(rates)
    assert told["train/grad_norm"].keys() == {1, 2, 3}


@pytest.mark.usefixtures("tensorboard")
def test_conflicts_of_gradients_are_logged_as_they_are_recorded(
    tiny_model: Callable[..., Any], tuned: Tuned, harmful: list[Example], tmp_path: Path
) -> None:
    config = LOGGED.changed(surgery="pcgrad", surgery_batch_size=4)
    result = tuned(tiny_model("llama"), tmp_path / "a", config, utility=harmful)
    told = events(tmp_path / "a-logs" / "1")
    assert result.surgery is not None
    cosines = list(told["train/surgery/cosine"].values())
    assert sum(cosines) / len(cosines) == pytest.approx(result.surgery["mean_cosine"])
    assert told["train/surgery/conflicting_share"][3] == result.surgery["conflicting_steps"] / 3
    shares = [sum(c < 0 for c in cosines[:n]) / n for n in (1, 2, 3)]
    assert list(told["train/surgery/conflicting_share"].values()) == shares


@pytest.mark.usefixtures("tensorboard")
def test_a_stopped_training_goes_on_whatever_it_is_logged_to(
    tiny_model: Callable[..., Any], tuned: Tuned, interrupter: Interrupter, tmp_path: Path
) -> None:
    config = LOGGED.changed(checkpoint_steps=1)
    whole = tuned(tiny_model("llama"), tmp_path / "whole", config)
    interrupter.countdown = 5  # in the third step
    with pytest.raises(KeyboardInterrupt):
        tuned(tiny_model("llama"), tmp_path / "a", config)
    assert Workspace.beside(tmp_path / "a").last_checkpoint() is not None
    # Without a tracker: it is the same training, and its checkpoint is found.
    result = tuned(tiny_model("llama"), tmp_path / "a", config.changed(report_to=()))
    assert (result.losses, weights(tmp_path / "a")) == (whole.losses, weights(tmp_path / "whole"))
    assert events(tmp_path / "a-logs" / "1")["train/loss"].keys() == {1, 2}

    interrupter.countdown = 5
    with pytest.raises(KeyboardInterrupt):
        tuned(tiny_model("llama"), tmp_path / "a", config)
    tuned(tiny_model("llama"), tmp_path / "a", config)
    assert events(tmp_path / "a-logs" / "2")["train/loss"].keys() == {1, 2, 3}
    assert {path.name for path in (tmp_path / "a-logs").iterdir()} == {"1", "2"}


def test_places_of_the_environment_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "mine")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)

    def look() -> None:
        with trackers_in(tmp_path / "1", ("wandb", "tensorboard")):
            assert os.environ["WANDB_DIR"] == "mine"
            assert os.environ["WANDB_PROJECT"] == "castune"
            assert Path(os.environ["TENSORBOARD_LOGGING_DIR"]).is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert os.environ["WANDB_DIR"] == "mine"
    assert not {"WANDB_PROJECT", "TENSORBOARD_LOGGING_DIR"} & os.environ.keys()
    assert log_folder(tmp_path / "a", goes_on=True) == log_folder(tmp_path / "a", goes_on=False)


# -- bad input


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_missing_is_refused_before_anything_is_loaded(
    tracker: str,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in (tracker, "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    said = f'report_to = "{tracker}" needs the package {tracker}.* python -m pip install {tracker}$'
    with pytest.raises(CastuneError, match=said):
        require_trackers([tracker])
    # There is no such model: this would be told next.
    recipe = {"model": str(tmp_path / "nowhere"), "out": str(tmp_path / "run"), "tune": {"report_to": tracker}}
    with pytest.raises(CastuneError, match=said):
        run(Recipe(**recipe))
    assert not (tmp_path / "run").exists()
    model = tiny_model("llama")
    with pytest.raises(CastuneError, match=said):
        tune(
            model,
            tiny_tokenizer,
            selection_of(model, SOME),
            data=aligned,
            out=tmp_path / "a",
            config=CONFIG.changed(report_to=tracker),
        )
    assert not (tmp_path / "a-logs").exists()


def test_what_cannot_be_imported_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    # Logs that lie where Python looks for packages, and a package that lacks what it needs itself.
    (tmp_path / "logs_of_a_tracker").mkdir()
    (tmp_path / "broken_tracker.py").write_text("import what_it_needs")
    with pytest.raises(CastuneError, match=r"\(it is not installed\)"):
        require_trackers(["logs_of_a_tracker"])
    with pytest.raises(CastuneError, match=r"\(No module named 'what_it_needs'\)"):
        require_trackers(["broken_tracker"])
    require_trackers(["json"])


def test_unknown_trackers_are_refused() -> None:
    with pytest.raises(CastuneError, match=r"report_to.0 = 'tensorbord'.*'tensorboard', 'wandb' or 'trackio'"):
        Recipe(out="x", tune={"report_to": "tensorbord"})
    assert TuneConfig(report_to="wandb").report_to == ("wandb",)
    assert TuneConfig(**TuneConfig(report_to="wandb").record()) == TuneConfig()


# -- the package itself


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_reads_what_was_logged(tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tuned(tiny_model("llama"), tmp_path / "a", LOGGED)
    assert result == TuneResult.load(tmp_path / "a")
    read = EventAccumulator(str(tmp_path / "a-logs" / "1" / "tensorboard"))
    read.Reload()
    losses = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in result.losses]
    assert "train/learning_rate" in read.Tags()["scalars"]
