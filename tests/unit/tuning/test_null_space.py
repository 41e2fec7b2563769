"""Training in the null space of the utility activations: what utility inputs come to stays, whatever is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from tiny_training import CONFIG, SOME, THREE_EPOCHS, Interrupter, SelectionOf, Tuned, logits, weights
from torch import Tensor

from castune.artifacts import TuneResult
from castune.artifacts.tune_result import snapshots_of
from castune.config import TuneConfig
from castune.core.heads import HeadLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.errors import CastuneError
from castune.tuning.adapter_files import lora_pairs
from castune.tuning.null_space import NullSpace, leading_eigenvectors, second_moments
from castune.tuning.row_lora import sparse_lora
from castune.tuning.targets import targets, units_for
from castune.tuning.verify import certify

SHARE = 0.9
NULL = CONFIG.changed(null_space=SHARE)
OTHERS = (("o_head", 0, 2), ("k_group", 2, 1), ("v_group", 2, 1), ("mlp_group", 0, 1), ("mlp_group", 2, 3))
State = Callable[[Any], dict[str, Any]]


def rows_of(tokenizer: Any, examples: list[Example]) -> list[Any]:
    return [ChatFormat(tokenizer, max_length=CONFIG.max_length).loss_row(example) for example in examples]


def query_inputs(model: Any, rows: list[Any], layer: int) -> Tensor:
    """Inputs of a llama's query projection, `[tokens, D]` float64, row by row without padding and without hooks."""
    found = []
    for row in rows:
        with torch.no_grad():
            states = model.eval()(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            found.append(model.model.layers[layer].input_layernorm(states[layer])[0])
    return torch.cat(found).double()


def inputs_at(model: Any, rows: list[Any], path: str) -> Tensor:
    """The same of any projection."""
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    with torch.no_grad():
        for row in rows:
            model.eval()(input_ids=torch.tensor([row.ids]))
    handle.remove()
    return torch.cat([z.reshape(-1, z.shape[-1]) for z in found]).double()


def updates(adapter: Path) -> dict[str, Tensor]:
    """dW of every projection, `[rows, D]` float64."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / settings["r"]
    pairs = lora_pairs(adapter / "adapter_model.safetensors")
    return {path: scaling * b.double() @ a.double() for path, a, b in pairs}


def reached(update: Tensor, inputs: Tensor) -> tuple[float, float]:
    """How much an update does to inputs, and the most that it could with all of their second moment in its way."""
    return float((inputs @ update.T).square().sum()), float(
        torch.linalg.matrix_norm(update, ord=2).square() * inputs.square().sum()
    )


def assert_bounded(adapter: Path, model: Any, rows: list[Any], share: float) -> None:
    """The theorem, and that it was not true by doing nothing."""
    for path, update in updates(adapter).items():
        done, most = reached(update, inputs_at(model, rows, path))
        assert 0 < done <= (1 - share) * most * (1 + 1e-4), path


# -- the directions


@given(
    n_tokens=st.integers(1, 12), width=st.integers(1, 8), share=st.floats(0.01, 0.99), scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_fewest_directions_that_hold_the_share(
    n_tokens: int, width: int, share: float, scale: float, seed: int
) -> None:
    inputs = scale * torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moment = inputs.T @ inputs
    found = leading_eigenvectors(moment, share)
    n = found.shape[1]
    assert torch.allclose(found.T @ found, torch.eye(n, dtype=torch.float64), atol=1e-10)
    values = torch.linalg.svdvals(inputs).square()  # descending
    assert values[: n - 1].sum() <= (share + 1e-9) * values.sum()
    assert values[:n].sum() >= (share - 1e-9) * values.sum()
    left = inputs - inputs @ found @ found.T
    assert left.square().sum() <= (1 - share + 1e-9) * inputs.square().sum()


def test_nothing_is_left_out_of_inputs_that_are_zero() -> None:
    assert leading_eigenvectors(torch.zeros(5, 5), 0.9).shape == (5, 0)


def test_second_moments_are_those_of_real_tokens(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    selection_of: SelectionOf,
    state_of: State,
) -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()  # every module gets its own mode back
    selection = selection_of(model, SOME, OTHERS, mlp_groups=4)
    wanted = targets(units_for(model, HeadLayout.of(model), selection), selection)
    rows = rows_of(tiny_tokenizer, questions)
    before = state_of(model), [module.training for module in model.modules()]
    moments, holders = second_moments(model, wanted, rows, batch_size=4)  # rows of several lengths: padded
    after = state_of(model), [module.training for module in model.modules()]
    assert after[1] == before[1]
    assert {key: after[0][key] for key in ("hooks", "gradients", "requires_grad")} == {
        key: before[0][key] for key in ("hooks", "gradients", "requires_grad")
    }
    assert holders.keys() == wanted.keys()
    # One K for what reads one tensor; columns are chosen, and have one of their own.
    prefix = "model.layers."
    assert (
        holders[f"{prefix}2.self_attn.k_proj"]
        == holders[f"{prefix}2.self_attn.v_proj"]
        == f"{prefix}2.self_attn.q_proj"
    )
    assert holders[f"{prefix}0.mlp.up_proj"] == f"{prefix}0.mlp.gate_proj"
    assert holders[f"{prefix}2.mlp.down_proj"] == f"{prefix}2.mlp.down_proj"
    assert set(moments) == set(holders.values())
    for path, target in wanted.items():
        inputs = inputs_at(model, rows, path)
        if path.endswith("q_proj"):
            assert torch.allclose(inputs, query_inputs(model, rows, target.layer), rtol=1e-5, atol=1e-6)
        chosen = inputs[:, target.mask] if target.axis == 1 else inputs
        assert torch.allclose(moments[holders[path]].double(), chosen.T @ chosen, rtol=1e-4, atol=1e-5), path


def test_dropout_takes_no_part(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], selection_of: SelectionOf
) -> None:
    rows = rows_of(tiny_tokenizer, questions)
    found = []
    for training in (False, True):
        model = tiny_model("gpt2").train(training)
        selection = selection_of(model, SOME)
        wanted = targets(units_for(model, HeadLayout.of(model), selection), selection)
        found.append(second_moments(model, wanted, rows, batch_size=4)[0])
    assert len(found[0]) == 2
    assert all(torch.equal(moment, found[1][path]) for path, moment in found[0].items())


# -- the trained adapter


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_what_utility_inputs_come_to_is_bounded(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tuned: Tuned,
    questions: list[Example],
    state_of: State,
    tmp_path: Path,
    family: str,
    freeze_a: bool,
) -> None:
    model = tiny_model(family)
    rows, before = rows_of(tiny_tokenizer, questions), state_of(model)
    free = tuned(model, tmp_path / "free", CONFIG.changed(freeze_a=freeze_a))
    config = NULL.changed(freeze_a=freeze_a, snapshot_steps=2)
    bound = tuned(model, tmp_path / "bound", config, utility=questions)
    after = state_of(model)
    assert all(torch.equal(after["tensors"][name], tensor) for name, tensor in before["tensors"].items())
    assert {**after, "tensors": None} == {**before, "tensors": None}
    assert free.null_space is None
    assert "null_space" not in json.loads((tmp_path / "free" / "tune.json").read_text())
    record = bound.null_space
    assert record == TuneResult.load(tmp_path / "bound").null_space
    assert record is not None
    assert (record["share"], record["tokens"]) == (SHARE, sum(len(row.ids) for row in rows))
    assert bound.budget == free.budget
    freely = updates(tmp_path / "free")
    found = {path: inputs_at(model, rows, path) for path in freely}
    for path, inputs in found.items():
        taken, of = record["directions"][path]
        assert of == inputs.shape[1] > taken
        leading = torch.linalg.svd(inputs, full_matrices=False).Vh[:taken]
        # Final adapter and snapshot are saved as forward applies them: the eigenvectors themselves come to nothing.
        for adapter in (tmp_path / "bound", snapshots_of(tmp_path / "bound")[2]):
            update = updates(adapter)[path]
            assert (update @ leading.T).norm() < 1e-5 * update.norm()
            assert reached(freely[path], inputs)[0] > 5 * reached(update, inputs)[0]
    assert_bounded(tmp_path / "bound", model, rows, SHARE)
    # Plain PEFT loads it, and the model is another one.
    plain = logits(tiny_model(family))
    assert not torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path / "bound")), plain)


def test_masked_rows_and_columns_stay_zero(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tuned: Tuned,
    questions: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME, OTHERS, mlp_groups=4)
    config = NULL.changed(null_space=0.6)
    result = tuned(model, tmp_path / "a", config, selection=selection, utility=questions)
    found = certify(model, tmp_path / "a", selection)
    assert found.changed_rows == found.selected_rows > 0
    assert found.changed_columns == found.selected_columns > 0
    wanted = targets(units_for(model, HeadLayout.of(model), selection), selection)
    rows = rows_of(tiny_tokenizer, questions)
    assert result.null_space is not None
    directions = result.null_space["directions"]
    for path, update in updates(tmp_path / "a").items():
        mask, inputs = wanted[path].mask, inputs_at(model, rows, path)
        if wanted[path].axis == 1:
            assert not update[:, ~mask].any()
            inputs = inputs * mask
        assert directions[path][1] == (int(mask.sum()) if wanted[path].axis == 1 else inputs.shape[1])
        done, most = reached(update, inputs)
        assert 0 < done <= 0.4 * most * (1 + 1e-4), path


def test_in_16_bits_the_projection_is_not_rounded(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], selection_of: SelectionOf
) -> None:
    """Autocast would take both products in bfloat16, and leave some thousandths of every direction."""
    model = tiny_model("llama").to(torch.bfloat16)
    selection = selection_of(model, SOME)
    wanted = targets(units_for(model, HeadLayout.of(model), selection), selection)
    space = NullSpace.of(model, wanted, rows_of(tiny_tokenizer, questions), SHARE, batch_size=2)
    peft_model = sparse_lora(model, selection, r=4, seed=1)
    space.keep(peft_model)
    for path, directions in space.directions.items():
        a = peft_model.base_model.model.get_submodule(path).lora_A["default"]
        assert a.weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            applied = a.applied(a.weight)
        assert applied.dtype == torch.float32
        assert (applied @ directions).norm() < 1e-5 * a.weight.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stopped_training_comes_to_the_same_adapter(
    tiny_model: Callable[..., Any],
    tuned: Tuned,
    questions: list[Example],
    interrupter: Interrupter,
    tmp_path: Path,
    family: str,
) -> None:
    config = THREE_EPOCHS.changed(null_space=SHARE, checkpoint_steps=1, snapshot_steps=2)

    def train(name: str) -> TuneResult:
        return tuned(tiny_model(family), tmp_path / name, config, utility=questions)

    whole = train("whole")
    interrupter.countdown = 6
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    stopped = train("stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert (stopped.losses, stopped.null_space) == (whole.losses, whole.null_space)
    snapshots = [snapshots_of(tmp_path / name) for name in ("whole", "stopped")]
    assert list(snapshots[0]) == list(snapshots[1]) == [2, 4]
    assert all(weights(snapshots[0][step]) == weights(snapshots[1][step]) for step in (2, 4))
    tuned(tiny_model(family), tmp_path / "free", config.changed(null_space=None))
    assert weights(tmp_path / "free") != weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [{"surgery": "pcgrad"}, {"surgery": "pcgrad", "surgery_granularity": "head"}, {"method": "dpo"}, {"replay": 0.2}],
    ids=str,
)
def test_it_goes_with_other_ways_to_train(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tuned: Tuned,
    aligned: list[Example],
    questions: list[Example],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    model = tiny_model("llama")
    if changes.get("method") == "dpo":
        pytest.importorskip("trl")
        aligned = [dataclasses.replace(example, rejected="No.") for example in aligned]
    result = tuned(model, tmp_path / "a", NULL.changed(**changes), data=aligned, utility=questions)
    assert result.null_space is not None
    assert (result.surgery is not None) == ("surgery" in changes)
    rows = rows_of(tiny_tokenizer, questions)
    assert_bounded(tmp_path / "a", model, rows, SHARE)


# -- refusals


def test_a_share_that_leaves_no_direction(
    tiny_model: Callable[..., Any], tuned: Tuned, questions: list[Example], state_of: State, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(CastuneError, match=r"null_space = 1: .*q_proj .* all 32 directions.*smaller share"):
        tuned(model, tmp_path / "a", NULL.changed(null_space=1 - 1e-15), utility=questions)
    assert {**state_of(model), "tensors": None} == {**before, "tensors": None}
    assert list(tmp_path.iterdir()) == []


def test_it_needs_utility_data(tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for utility in (None, []):
        with pytest.raises(CastuneError, match=r"null_space = 0\.9 needs utility data.*--utility"):
            tuned(model, tmp_path / "a", NULL, utility=utility)
    assert list(tmp_path.iterdir()) == []


def test_shares_and_what_they_do_not_go_with() -> None:
    for share in (0.0, 1.0, -0.5, float("nan"), "much"):
        with pytest.raises(CastuneError, match="null_space"):
            CONFIG.changed(null_space=share)
    with pytest.raises(CastuneError, match=r"reselect_steps does not go with null_space = 0\.9 yet"):
        NULL.changed(reselect_steps=2)


def test_what_follows_utility_data() -> None:
    assert NULL.needs_utility
    assert not NULL.trains_on_utility
    assert NULL.changed(replay=0.1).trains_on_utility


def test_records_from_before_there_was_a_choice_are_of_none() -> None:
    old = {key: value for key, value in CONFIG.record().items() if key != "null_space"}
    assert TuneConfig(**old).record() == CONFIG.record()


def test_activations_that_are_not_finite_are_told(
    tiny_model: Callable[..., Any], tuned: Tuned, questions: list[Example], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(
        CastuneError, match=r"activations of D_util at model\.layers\.0\.self_attn\.q_proj .*not finite"
    ):
        tuned(model, tmp_path / "a", NULL, utility=questions)
    assert list(tmp_path.iterdir()) == []
