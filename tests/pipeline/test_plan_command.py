"""`castune plan` on the real command line: from a config alone, and one error for what cannot be planned."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import assert_one_error, castune
from transformers import T5Config

Models = Callable[..., Path]


@pytest.fixture
def data(own_data: dict[str, Path]) -> list[object]:
    return ["--safety", own_data["safety"], "--utility", own_data["utility"]]


def test_a_config_alone_is_enough(models: Models, data: list[object], tmp_path: Path) -> None:
    """No weights: neither are they there, nor is anything written."""
    model = models()
    for file in model.glob("*.safetensors"):
        file.unlink()
    before = sorted(tmp_path.rglob("*"))
    done = castune("plan", model, *data, "--accelerator", "h100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 layers, 12 heads" in done.stdout
    assert re.search(r"map by margins: [\d.]+ s on one h100", done.stdout)
    assert "not measured" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_of_the_machine_that_is_planned_for_need_not_be_here(
    models: Models, data: list[object], tmp_path: Path
) -> None:
    model = models()
    done = castune("plan", model, *data, "--device", "cuda:99", "--accelerator", "h100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_one_error(castune("plan", model, *data, "--device", "cuda:99", cwd=tmp_path), "device 'cuda:99'", "cpu")


def test_several_domains_are_planned_together(models: Models, data: list[object], tmp_path: Path) -> None:
    model = models()
    other = tmp_path / "other.jsonl"
    other.write_bytes((tmp_path / "utility.jsonl").read_bytes())
    one = castune("plan", model, *data, "--accelerator", "h100", cwd=tmp_path)
    two = castune("plan", model, *data, "--utility", other, "--accelerator", "h100", cwd=tmp_path)
    forwards = [int(re.search(r"utility sweep\W+(\d+)", done.stdout)[1]) for done in (one, two)]  # type: ignore[index]
    assert forwards[1] == 2 * forwards[0]


def test_reply_domains_are_counted_apart(
    models: Models,
    data: list[object],
    own_data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # wide enough for a row a line
    options = ["--utility", own_data["align"], "--reply-domains", "align", "--accelerator", "h100"]
    done = castune("plan", models(), *data, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for by in ("margins", "decisions"):
        assert re.search(rf"sweep of reply domains, {by}\W+\d+", done.stdout)


def test_what_cannot_be_planned_is_one_error(models: Models, data: list[object], tmp_path: Path) -> None:
    model = models()
    T5Config().save_pretrained(tmp_path / "t5")
    for arguments, said in (
        (["no/such/model/there"], "no such directory"),
        ([tmp_path / "t5"], "t5 is no causal language model"),
        ([model, "--accelerator", "abacus"], "accepted: a100"),
        ([model, "--decoded-share", "2"], "accepted: 0 to 1"),
        ([model, "--batch-tokens", "0"], "batch_tokens"),
        ([model, "--safety", tmp_path / "absent.jsonl"], "absent.jsonl"),
        ([model, "--reply-domains", "chat"], "names 'chat', and there is no such utility domain; there is 'utility'"),
    ):
        assert_one_error(castune("plan", *arguments, *data[2:], cwd=tmp_path), said)
