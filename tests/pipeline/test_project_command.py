"""`castune project`: Safe LoRA's projection of an arm, evaluated, reported, gated and published like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_one_error, castune, command, refused
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from castune.artifacts import EvalResult, HeadSelection, ProjectedAdapter
from castune.config import Recipe
from castune.tuning.safe_lora import project_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> Path:
    """A run whose training changed replies."""
    return finished_run(tune__learning_rate=0.2)


def moved(model: Any) -> None:
    """Move every matrix in a few directions."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            left, right = (torch.randn(size, 4, generator=generator) for size in parameter.shape)
            parameter += 0.02 * left @ right.T


@pytest.fixture
def before(models: Callable[..., Path]) -> Path:
    """The run's model as it was before its alignment."""
    return models(name="before", change=moved)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def test_an_arm_is_projected_evaluated_reported_gated_and_published(
    finished: Path, before: Path, tmp_path: Path
) -> None:
    said = command("project", finished / "adapter", "--unaligned", before, "--run", finished, "--as", "safe-lora", "--threshold", 1)  # fmt: skip
    arm, n_layers = finished / "arms" / "safe-lora", len(HeadSelection.load(finished).layers)
    made = ProjectedAdapter.load(arm / "adapter")
    assert len(made.projected) == len(made.updates) == n_layers
    assert f"{n_layers} of {n_layers} updates projected (cosine below 1), cosines 0." in said
    assert f"all {4 * n_layers} heads of the adapted layers, of 12, may change now" in said
    # The certificate is for what may have changed: all heads of the layers, and not the arm's own few.
    assert HeadSelection.load(arm).heads == made.certificate.heads
    assert len(made.certificate.heads) == 4 * n_layers > len(HeadSelection.load(finished).heads)
    base, unaligned = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", before))
    by_hand = project_adapter(finished / "adapter", base, unaligned, tmp_path / "by-hand", threshold=1)
    assert by_hand.updates == made.updates

    recipe = Recipe.load(finished / "recipe.toml").evaluate
    command("evaluate", finished, "--suites", ",".join(recipe.suites), "--max-new-tokens", recipe.max_new_tokens)
    assert EvalResult.load(finished / "evaluation" / "safe-lora").model["adapter"] == made.certificate.adapter_hash
    command("report", finished)
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "Projected by Safe LoRA, without training" in report
    assert "model − before" in report

    policy = tmp_path / "gate.toml"
    policy.write_text('[[rule]]\narm = "safe-lora"\ncertificate = true\n', encoding="utf-8")
    verdict = tmp_path / "gate.json"
    command("gate", finished, "--policy", policy, "--json", verdict)
    [rule] = json.loads(verdict.read_text(encoding="utf-8"))["rules"]
    assert rule["verdict"] == "pass"
    assert "not those once trained" in rule["detail"]

    command("export", finished, "--arm", "safe-lora", "--out", tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "head-sparse" not in card
    assert "## Projection" in card
    assert f"the query rows of {4 * n_layers} of 12 attention heads" in card
    command("export", tmp_path / "adapter", "--merged", "--base", tmp_path / "model", "--out", tmp_path / "merged")
    read = logits(PeftModel.from_pretrained(base, arm / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, read, rtol=1e-4, atol=1e-4)

    assert "made from other adapters" in refused("tune", finished, "--arm", "safe-lora")
    assert "made from other adapters" in refused("drift", finished, "--arm", "safe-lora")
    again = ["project", finished / "adapter", "--unaligned", before, "--run", finished, "--as", "safe-lora"]
    assert "exists already" in refused(*again)
    command(*again, "--layers", 1, "--overwrite")
    assert ProjectedAdapter.load(arm / "adapter").layers == 1


def test_an_adapter_without_a_run(before: Path, models: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models())
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    get_peft_model(model, config).save_pretrained(tmp_path / "foreign")
    where = ["--base", tmp_path / "model", "--unaligned", before]
    # Computed with in bfloat16 or not: the difference is that of the weights as they are stored.
    for dtype in ("float32", "bfloat16"):
        command("project", tmp_path / "foreign", *where, "--layers", 3, "--dtype", dtype, "--out", tmp_path / dtype)
    one, other = (ProjectedAdapter.load(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert one.updates == other.updates
    assert len(one.projected) == 3
    assert {unit.kind for unit in one.certificate.units} == {"q_head", "v_group"}
    assert (one.model["dtype"], other.model["dtype"], other.aligned["dtype"]) == ("float32", "bfloat16", "float32")
    said = command("project", tmp_path / "foreign", *where, "--threshold", 0, "--out", tmp_path / "none")
    assert "0 of 6 updates projected" in said
    assert "the adapter is unchanged" in said
    exact = ["--aligned", before, "--exact", "--out", tmp_path / "exact"]
    command("project", tmp_path / "foreign", "--base", tmp_path / "model", "--unaligned", tmp_path / "model", *exact)
    found = ProjectedAdapter.load(tmp_path / "exact")
    assert (found.exact, found.aligned["name"], found.unaligned["name"]) == (True, "before", "model")
    assert {update.rank for update in found.updates} == {4}


def test_what_project_refuses(finished: Path, before: Path, tmp_path: Path) -> None:
    files = sorted(tmp_path.rglob("*"))
    adapter, to = finished / "adapter", ["--out", tmp_path / "made" / "out"]
    assert "choose one output" in refused("project", adapter, "--unaligned", before)
    assert "choose one output" in refused("project", adapter, "--unaligned", before, "--as", "x", *to)
    assert "choose one output" in refused("project", adapter, "--unaligned", before, "--as", "x")
    of_run = ["--run", finished, "--unaligned", before]
    assert "already has an arm 'safe'" in refused("project", adapter, *of_run, "--as", "safe")
    assert "not a valid name" in refused("project", adapter, *of_run, "--as", "../x")
    assert "no such file" in refused("project", tmp_path / "nowhere", *of_run, *to)
    assert "give one of them" in refused("project", adapter, *of_run, "--layers", 1, "--threshold", 0.5, *to)
    assert "is the same in the aligned and the unaligned model" in refused(
        "project", adapter, "--run", finished, "--unaligned", tmp_path / "model", *to
    )
    assert "but the loaded model is" in refused("project", adapter, *of_run, "--base", before, "--as", "x")
    done = castune("project", adapter, "--run", finished, "--unaligned", "./nowhere", *to, cwd=tmp_path)
    assert_one_error(done, "nowhere: no such directory")
    assert sorted(tmp_path.rglob("*")) == files
