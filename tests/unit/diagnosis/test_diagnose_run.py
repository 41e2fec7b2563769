"""`diagnose`: what it refuses, what it leaves behind, and conflicts planted in a real model."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import castune
from castune import CastuneError, DiagnoseConfig, UnsupportedArchitecture
from castune.data.example import Example

MARGIN = DiagnoseConfig(measure="margin", max_new_tokens=4)
DECISION = DiagnoseConfig(measure="decision", max_new_tokens=4)


def hooks_left(model: torch.nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in model.modules()
    )


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Asserts that everything a user can see of the model is bit for bit as it was."""

    def state() -> Any:
        return (
            [
                (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
                for m in model.modules()
            ],
            [(p.requires_grad, p.grad is None, p.dtype) for p in model.parameters()],
            model.config.to_dict(),
            model.generation_config.to_dict(),
        )

    before, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert state() == before
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) or value.isnan().any() for name, value in weights.items())


@pytest.mark.parametrize("config", [MARGIN, DECISION, MARGIN.model_copy(update={"ablation": "mean"})])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    config: DiagnoseConfig,
    training: bool,
) -> None:
    model = tiny_model("gpt2").train(training)  # gpt2 has dropout
    model.lm_head.weight.requires_grad_(False)
    with unchanged(model):
        first = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=config)
        second = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=config)
    assert first.table.equals(second.table), "a diagnosis has no randomness, and no dropout"


def test_a_partly_frozen_model_keeps_the_mode_of_each_part(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    """Training code keeps frozen parts in evaluation mode while the rest trains."""
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    with unchanged(model):
        castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=MARGIN)


BAD_INPUT: dict[str, tuple[Any, str]] = {
    "no reply": (
        lambda s, u: ([*s, replace(s[0], id="bare", reply=None)], u),
        "safety: example 'bare' has no reply; columns needed: prompt, target",
    ),
    "a question among the harmful prompts": (lambda s, u: ([*s, u[0]], u), "example 'letter-sky' has no reply"),
    "not a question": (lambda s, u: (s, [*u, s[0]]), "utility: example 'h0' is no multiple-choice question"),
    "one harmful prompt": (lambda s, u: (s[:1], u), "safety: 1 examples, a diagnosis needs at least 2"),
    "one question": (lambda s, u: (s, u[:1]), "utility: 1 examples"),
    "nothing": (lambda s, u: ([], []), "0 examples"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_data_is_told(
    case: str,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
) -> None:
    change, message = BAD_INPUT[case]
    safety, utility = change(harmful, questions)
    with pytest.raises(CastuneError) as error:
        castune.diagnose(tiny_model("llama"), tiny_tokenizer, safety=safety, utility=utility, out=tmp_path)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", [(3,), (0, 7), ()])
def test_layers_that_do_not_exist_are_told(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    layers: tuple[int, ...],
) -> None:
    config = MARGIN.model_copy(update={"layers": layers})
    with pytest.raises(CastuneError, match="accepted are layers with heads, of 0 to 2"):
        castune.diagnose(tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=questions, config=config)


def test_chosen_layers_have_the_measures_of_a_whole_diagnosis(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    """Ranks are among the chosen heads; what is measured on a head does not depend on which others are."""
    model = tiny_model("llama")
    whole, some = (
        castune.diagnose(
            model,
            tiny_tokenizer,
            safety=harmful,
            utility=questions,
            config=MARGIN.model_copy(update={"layers": layers}),
        )
        for layers in (None, (2, 0, 2))
    )
    assert some.heads == [(layer, head) for layer in (0, 2) for head in range(4)]
    kept = [whole.heads.index(head) for head in some.heads]
    for column in ("optimization_conflict", "optimization_conflict_se", "utility_shift", "safety_shift"):
        np.testing.assert_allclose(some.column(column), whole.column(column)[kept], rtol=1e-6, atol=1e-9)
    assert sorted(some.column("utility_rank")) == pytest.approx(np.linspace(0, 1, 8))


@pytest.mark.parametrize("where", ["embedding", "mlp", "head"])
@pytest.mark.parametrize("config", [MARGIN, DECISION])
def test_weights_that_are_not_numbers_are_told(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    where: str,
    config: DiagnoseConfig,
) -> None:
    model = tiny_model("llama")
    weight = {
        "embedding": model.model.embed_tokens.weight,
        "mlp": model.model.layers[1].mlp.up_proj.weight,
        "head": model.lm_head.weight,
    }[where]
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(CastuneError) as error, unchanged(model):
        castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=config)
    assert not isinstance(error.value, UnsupportedArchitecture), "the architecture is fine, the weights are not"
    assert "nan" in str(error.value).lower()


class _NoGradient(torch.autograd.Function):
    """Identity whose backward overflows, as float16's does when a loss is finite and its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.inf * 0


def test_gradients_that_are_not_finite_are_told(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    """NaN gradients must not pass for heads without conflict (O = 0.5)."""
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda _m, _args, out: _NoGradient.apply(out))
    with pytest.raises(CastuneError):
        castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=MARGIN)


@pytest.mark.parametrize("config", [MARGIN, DECISION])
def test_scores_that_are_not_finite_under_ablation_are_told(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    config: DiagnoseConfig,
) -> None:
    """The whole model is fine, without its first head it overflows: no decision, neither right nor wrong."""
    model = tiny_model("llama")

    def overflow(_module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        is_gone = args[0][..., :8].abs().amax((1, 2), keepdim=True) == 0
        return torch.where(is_gone, torch.nan, out)

    model.model.layers[2].self_attn.o_proj.register_forward_hook(overflow)
    with pytest.raises(CastuneError, match="could not be measured|not finite"):
        castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=config)


def test_a_model_that_never_replies_is_told(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    """Every reply empty: unscored is not "did not refuse"."""
    model = tiny_model("llama")
    end = torch.zeros(258)
    end[257] = 1e4
    model.lm_head.register_forward_hook(lambda _m, _args, out: out + end)
    with pytest.raises(CastuneError, match="safety shift of 12 heads could not be measured"):
        castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=DECISION)


def _same_objective(n: int) -> tuple[list[Example], list[Example]]:
    """Harmful prompts and questions with the same prompt and the same right reply."""
    safety = [Example(id=f"s{i}", prompt=f"Say {i}.", reply=f"It is {i}.") for i in range(n)]
    utility = [
        Example(id=f"u{i}", prompt=e.prompt, choices=(e.reply or "", "No."), answer=0, scoring="likelihood")
        for i, e in enumerate(safety)
    ]
    return safety, utility


def test_the_same_objective_twice_is_no_conflict(any_tiny_model: Any, tiny_tokenizer: Any) -> None:
    safety, utility = _same_objective(5)
    cmap = castune.diagnose(any_tiny_model, tiny_tokenizer, safety=safety, utility=utility, config=MARGIN)
    assert np.abs(cmap.column("optimization_conflict")).max() < 1e-6
    assert cmap.column("conflict_score").max() < 1e-5


class _Flip(torch.autograd.Function):
    """Identity with the gradient of one head turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: slice) -> Tensor:
        ctx.rows = rows
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        turned = grad.clone()
        turned[..., ctx.rows] *= -1
        return turned, None


@pytest.mark.parametrize("planted", [0, 2, 3])
def test_a_planted_conflict_ranks_first(tiny_model: Callable[..., Any], tiny_tokenizer: Any, planted: int) -> None:
    """One objective twice, but for one head the second gradient points the other way: O = 1 there, 0 elsewhere."""
    model = tiny_model("llama", seed=5)
    safety, utility = _same_objective(6)
    n_forwards = 0

    def flip_utility(_module: Any, _args: Any, out: Tensor) -> Tensor:
        nonlocal n_forwards
        if not torch.is_grad_enabled():
            return out
        n_forwards += 1
        # Two chunks of safety, one batch each; then those of utility. Layer 0: nothing below it is disturbed.
        return _Flip.apply(out, slice(planted * 8, (planted + 1) * 8)) if n_forwards > 2 else out

    model.model.layers[0].self_attn.q_proj.register_forward_hook(flip_utility)
    config = MARGIN.model_copy(update={"gradient_chunks": 2})
    cmap = castune.diagnose(model, tiny_tokenizer, safety=safety, utility=utility, config=config)
    assert n_forwards == 4
    expected = [float(head == (0, planted)) for head in cmap.heads]
    np.testing.assert_allclose(cmap.column("optimization_conflict"), expected, rtol=0, atol=1e-6)
    first = int(cmap.column("conflict_score").argmax())
    assert cmap.heads[first] == (0, planted)
    assert cmap.column("bucket")[first] == 1
    assert cmap.column("conflict_score")[first] == pytest.approx(cmap.column("functional_sensitivity")[first])


def test_the_map_says_what_it_was_made_from(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
) -> None:
    model = tiny_model("qwen3")
    cmap = castune.diagnose(
        model, tiny_tokenizer, safety=harmful, utility=questions, config=MARGIN, out=tmp_path, seed=9,
        sources={"safety": "mine"},
    )  # fmt: skip
    assert castune.ConflictMap.load(tmp_path) == cmap
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ablation.parquet",
        "conflict_map.parquet",
        "gradients.parquet",
    ]
    assert cmap.metadata["data"]["safety"]["source"] == "mine"
    assert cmap.metadata["data"]["utility"]["n"] == 6
    assert cmap.metadata["settings"]["measure"] == "margin"
    assert cmap.metadata["provenance"]["seed"] == 9
    np.testing.assert_allclose(
        cmap.column("conflict_score"),
        cmap.column("optimization_conflict") * cmap.column("functional_sensitivity"),
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        cmap.column("functional_sensitivity"),
        np.exp(cmap.column("utility_rank") - cmap.column("safety_rank")),
        rtol=1e-12,
    )
    assert math.isfinite(cmap.column("optimization_conflict_se").sum())


def test_batch_size_changes_nothing(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    model = tiny_model("gemma2")
    small, large = (
        castune.diagnose(
            model,
            tiny_tokenizer,
            safety=harmful,
            utility=questions,
            config=MARGIN.model_copy(update={"batch_tokens": n}),
        )
        for n in (1, 100_000)
    )
    for column in ("optimization_conflict", "optimization_conflict_se", "utility_shift", "safety_shift"):
        np.testing.assert_allclose(small.column(column), large.column(column), rtol=0, atol=2e-5)


def test_the_map_of_whoever_was_first_counts(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(out: Path) -> castune.ConflictMap:
        return castune.diagnose(
            tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=questions, config=MARGIN, out=out
        )

    # Made by the same command on a machine whose sums differ in the last digits.
    first = measure(tmp_path / "first")
    other = castune.ConflictMap(first.table, {**first.metadata, "seconds": -1.0})
    run_module = importlib.import_module("castune.diagnosis.run")
    plain = run_module.conflict_map

    def last_moment(*arguments: Any) -> Any:
        other.save(tmp_path / "both")
        return plain(*arguments)

    monkeypatch.setattr(run_module, "conflict_map", last_moment)
    assert measure(tmp_path / "both").metadata["seconds"] == -1.0
    assert castune.ConflictMap.load(tmp_path / "both") == other
    assert not (tmp_path / "both" / "journal").exists()
