"""Gradient surgery: what g becomes, that a training does just that, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from loopback import needs_loopback
from processes import run_command
from safetensors.torch import load_file
from tiny_training import SOME, SelectionOf, Tuned
from torch import Tensor

from castune.artifacts import TuneResult
from castune.config import TuneConfig
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, reply_nll
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example, content_hash
from castune.errors import ArtifactError, CastuneError, DataError, TrainingError
from castune.tuning import surgery as surgery_module
from castune.tuning.row_lora import sparse_lora
from castune.tuning.surgery import Gramian, Operation, Surgery, parameter_groups, require_method, utility_batches
from castune.tuning.train import tune
from castune.tuning.trainer import ReplyTrainer
from castune.tuning.verify import certify

# With this seed of A the gradients of `opposed` conflict with those of `aligned`.
CONFIG = TuneConfig(
    rank=4,
    alpha=8,
    learning_rate=0.02,
    max_steps=3,
    batch_size=2,
    accumulation=2,
    max_length=128,
    surgery="pcgrad",
    seed=1,
)
OWN = ("pcgrad", "pcgrad-symmetric")
SOLVERS = {"cagrad": "cvxpy", "upgrad": "quadprog"}
BY_TORCHJD = ("cagrad", "upgrad", "mgda", "gradvac", "alignedmtl", "imtlg")


def parts(vector: Any) -> list[Tensor]:
    """A vector of 12 in float32 as two tensors of different shapes."""
    values = torch.tensor(np.asarray(vector, dtype=np.float32))
    return [values[:8].reshape(4, 2), values[8:]]


def whole(tensors: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([t.flatten() for t in tensors]).double().numpy()


def method_or_skip(method: str) -> Surgery:
    if method in BY_TORCHJD:
        pytest.importorskip("torchjd")
    if method in SOLVERS:
        pytest.importorskip(SOLVERS[method], exc_type=ImportError)
    return Surgery(method)  # type: ignore[arg-type]


# -- pure: against the formulas of the papers in float64

SCALES = st.sampled_from([1e-15, 1e-3, 1.0, 1e15])
VECTORS = hnp.arrays(np.float32, 12, elements=st.floats(-1, 1, width=32))
PAIRS = st.builds(
    lambda g, u, a, b: (np.float32(a) * g, np.float32(b) * u), VECTORS, VECTORS, SCALES, SCALES
)  # fmt: skip
RNG = np.random.default_rng(0)
G, U = RNG.standard_normal((2, 12)).astype(np.float32)
HOSTILE = {
    "parallel": (G, 3 * G),
    "opposite": (G, -G),
    "opposite, longer": (G, -7.3 * G),
    "orthogonal": (np.eye(12)[0], np.eye(12)[1]),
    "zero u": (G, 0 * G),
    "zero g": (0 * G, G),
    "both zero": (0 * G, 0 * G),
    "all but opposite": (G, -G + 1e-6 * U),
    "large": (1e15 * G, -1e15 * G + 1e14 * U),
    "small": (1e-15 * G, -1e-15 * G + 1e-16 * U),
    "large against small": (1e15 * G, -1e-15 * G + 1e-16 * U),
    "small against large": (1e-15 * G, -1e15 * G + 1e14 * U),
}


def projected(g: np.ndarray, u: np.ndarray) -> np.ndarray:
    """g - min(0, g.u / |u|^2) u in float64."""
    g, u = g.astype(np.float64), u.astype(np.float64)
    return g - min(0.0, (g @ u) / (u @ u)) * u if (u @ u) > 0 else g


def assert_pcgrad(g: np.ndarray, u: np.ndarray) -> None:
    before, other = parts(g), parts(u)
    after = Surgery("pcgrad")(before, other)
    g_64, u_64 = whole(before), whole(other)
    assert np.isfinite(whole(after)).all()
    # Rounding to float32 is the only error, measured by the length of what was rounded.
    assert np.abs(whole(after) - projected(g_64, u_64)).max() <= 1e-6 * np.abs(g_64).max() + 1e-38
    if g_64 @ u_64 >= 0:
        assert all(one is two for one, two in zip(after, before, strict=True)), "left as it is, bit for bit"
    else:
        # No component against u is left, up to that rounding, and that of numbers too small to have all their digits.
        assert whole(after) @ u_64 >= -(1e-6 * np.linalg.norm(g_64) + 1e-38) * np.linalg.norm(u_64)
        assert np.linalg.norm(whole(after)) <= np.linalg.norm(g_64) * (1 + 1e-6) + 1e-38


@settings(deadline=None)
@given(PAIRS)
def test_pcgrad_is_the_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert_pcgrad(*pair)


@pytest.mark.parametrize("case", HOSTILE)
def test_pcgrad_on_hostile_gradients(case: str) -> None:
    assert_pcgrad(*HOSTILE[case])


def test_an_opposite_gradient_vanishes_and_a_right_angle_stays() -> None:
    surgery = Surgery("pcgrad")
    assert not whole(surgery(parts(G), parts(-G))).any()
    [after] = surgery([torch.tensor([-1.0, 2.0])], [torch.tensor([3.0, 0.0])])
    assert after.tolist() == [0.0, 2.0]


@settings(deadline=None)
@given(PAIRS, SCALES)
def test_pcgrad_is_blind_to_the_length_of_the_reference(pair: tuple[np.ndarray, np.ndarray], scale: float) -> None:
    g, u = pair
    surgery = Surgery("pcgrad")
    one, other = surgery(parts(g), parts(u)), surgery(parts(g), [t.double() * scale for t in parts(u)])
    assert np.abs(whole(one) - whole(other)).max() <= 1e-6 * np.abs(g).max()


@settings(deadline=None)
@given(PAIRS)
def test_symmetric_is_the_sum_of_both_projections(pair: tuple[np.ndarray, np.ndarray]) -> None:
    g, u = map(parts, pair)
    after = whole(Surgery("pcgrad-symmetric")(g, u))
    g_64, u_64 = whole(g), whole(u)
    expected = projected(g_64, u_64) + projected(u_64, g_64) if (u_64 @ u_64) > 0 else g_64
    assert np.abs(after - expected).max() <= 1e-6 * max(np.abs(g_64).max(), np.abs(u_64).max()) + 1e-38


@settings(deadline=None)
@given(PAIRS)
def test_symmetric_equals_the_pcgrad_of_torchjd(pair: tuple[np.ndarray, np.ndarray]) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    g, u = map(parts, pair)
    if not whole(u).any():
        return  # torchjd agrees, but returns g + u anew
    expected = aggregation.PCGrad()(torch.tensor(np.stack([whole(g), whole(u)]))).numpy()
    after = whole(Surgery("pcgrad-symmetric")(g, u))
    assert np.abs(after - expected).max() <= 1e-6 * max(np.abs(whole(g)).max(), np.abs(whole(u)).max()) + 1e-38


AGGREGATORS = {
    "cagrad": ("CAGrad", {"c": 0.5}), "upgrad": ("UPGrad", {}), "mgda": ("MGDA", {}), "gradvac": ("GradVac", {}),
    "alignedmtl": ("AlignedMTL", {}), "imtlg": ("IMTLG", {}),
}  # fmt: skip


@pytest.mark.parametrize("method", BY_TORCHJD)
def test_the_other_methods_are_those_of_torchjd(method: str) -> None:
    surgery = method_or_skip(method)
    name, arguments = AGGREGATORS[method]
    aggregator = getattr(pytest.importorskip("torchjd.aggregation"), name)(**arguments)
    # Several steps: GradVac remembers.
    for seed in range(4):
        g, u = np.random.default_rng(seed).standard_normal((2, 12)).astype(np.float32)
        expected = aggregator(torch.tensor(np.stack([g, u]), dtype=torch.float64)).numpy()
        assert np.allclose(whole(surgery(parts(g), parts(u))), expected, atol=1e-4)


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("method", [*OWN, *BY_TORCHJD])
def test_every_method_stays_finite(method: str, case: str) -> None:
    surgery = method_or_skip(method)
    g, u = map(parts, HOSTILE[case])
    after = surgery(g, u)
    assert np.isfinite(whole(after)).all()
    assert [t.dtype for t in after] == [t.dtype for t in g]
    if not whole(u).any():
        assert all(one is two for one, two in zip(after, g, strict=True)), "a zero u leaves g alone"


@pytest.mark.parametrize("method", BY_TORCHJD)
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_both_gradients_is_only_a_scale(method: str, scale: float) -> None:
    one = method_or_skip(method)(parts(G), parts(U))
    other = method_or_skip(method)(parts(scale * G), parts(scale * U))
    assert np.allclose(whole(other) / scale, whole(one), rtol=1e-3, atol=1e-5)


def test_random_orders_do_not_move_the_random_state() -> None:
    surgery = method_or_skip("gradvac")
    before = torch.get_rng_state()
    surgery(parts(G), parts(U))
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None)
@given(PAIRS)
def test_inner_products_add_up_over_groups(pair: tuple[np.ndarray, np.ndarray]) -> None:
    g, u = map(parts, pair)
    split = Gramian.of(g[:1], u[:1]) + Gramian.of(g[1:], u[1:])
    together = Gramian.of(g, u)
    assert (split.gg, split.gu, split.uu) == (together.gg, together.gu, together.uu)
    if together.cosine is None:
        assert not whole(g).any() or not whole(u).any()
    else:
        assert -1 <= together.cosine <= 1
        assert (together.cosine < 0) == together.is_conflict


def test_tensors_that_are_no_pairs_are_refused() -> None:
    for g, u in ((parts(G), parts(U)[:1]), (parts(G)[:1], parts(U))):
        with pytest.raises(ValueError, match="zip"):
            Surgery("pcgrad")(g, u)


def test_a_method_goes_on_with_what_another_remembers() -> None:
    surgery, later, fresh = (method_or_skip("gradvac") for _ in range(3))
    steps = np.random.default_rng(0).standard_normal((6, 2, 12))
    for g, u in steps[:3]:
        surgery(parts(g), parts(g + 0.1 * u))  # nearly parallel: GradVac holds later gradients to it
    later.remember(json.loads(json.dumps(surgery.memory)))
    assert later.memory == surgery.memory
    differences = 0.0
    for g, u in steps[3:]:
        one, other, forgetful = (whole(each(parts(g), parts(u))) for each in (surgery, later, fresh))
        assert np.array_equal(one, other)
        differences = max(differences, np.abs(one - forgetful).max())
    assert later.memory == surgery.memory
    assert differences > 1e-3, "what is remembered matters"


def test_the_state_of_an_operation_is_restored_to_the_last_bit() -> None:
    method_or_skip("gradvac")
    config = CONFIG.changed(surgery="gradvac")
    # One group has been trained and one has not.
    state = {"cosines": [0.5, None, -0.2], "conflicts": 1, "memories": [[[0.0, 0.1], [-0.3, 0.0]], None]}
    operation = Operation([], config, [[], []])
    operation.restore(json.loads(json.dumps(state)))
    assert operation.state() == state
    assert operation.record == {"steps": 3, "conflicting_steps": 1, "mean_cosine": pytest.approx(0.15)}
    # Where other parameters are trained now, what was remembered of the old ones is not theirs.
    other = Operation([], config, [[], [], []])
    other.restore(state, memories=False)
    assert other.state() == {**state, "memories": [None] * 3}
    with pytest.raises(ValueError, match="zip"):
        other.restore(state)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 5))
def test_utility_batches_go_through_all_examples(n: int, size: int, seed: int) -> None:
    batches = list(islice(utility_batches(n, size, seed), 2 * n))
    assert batches == list(islice(utility_batches(n, size, seed), 2 * n))
    assert {len(batch) for batch in batches} == {min(n, size)}
    drawn = [index for batch in batches for index in batch]
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))


# -- in a training


@pytest.fixture
def opposed(aligned: list[Example]) -> list[Example]:
    """Utility examples whose gradients conflict with those of `aligned` on the tiny llama."""
    return [Example(id=f"u{i}", prompt=example.prompt, reply="}}}}") for i, example in enumerate(aligned)]


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, Tensor]]]:
    """The gradients of every optimiser step of a training, after surgery and before clipping."""
    found: list[list[tuple[str, Tensor]]] = []
    step = ReplyTrainer.training_step

    def look(self: Any, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = step(self, model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            found.append([(n, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad])
        return loss

    monkeypatch.setattr(ReplyTrainer, "training_step", look)
    return found


def gradient_of(peft_model: Any, tokenizer: Any, data: Sequence[Example]) -> list[Tensor]:
    """Gradient of the mean loss of all examples in one batch, plainly."""
    chat = ChatFormat(tokenizer, max_length=128)
    loss = reply_nll(peft_model, RowBatch.of([chat.loss_row(example) for example in data])).mean()
    return list(torch.autograd.grad(loss, [p for p in peft_model.parameters() if p.requires_grad]))


def by_hand(peft_model: Any, g: list[Tensor], u: list[Tensor], granularity: str, method: str) -> list[Tensor]:
    """g after the paper's projection, or the sum of both gradients after theirs, written out for layers 0 and 2 of the tiny llama with heads of width 8."""
    names = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    keys = [
        "all" if granularity == "global" else f"{name}" if granularity == "tensor" or "lora_A" in name else None
        for name in names
    ]
    flat: dict[str, list[tuple[int, slice]]] = {}
    for i, (name, key) in enumerate(zip(names, keys, strict=True)):
        if key is not None:
            flat.setdefault(key, []).append((i, slice(None)))
        else:
            for head in (1, 3) if "layers.0" in name else (0,):
                flat[f"{name} {head}"] = [(i, slice(8 * head, 8 * head + 8))]
    after = [t.clone() for t in g]
    for group in flat.values():
        one = np.concatenate([g[i][rows].double().numpy().ravel() for i, rows in group])
        other = np.concatenate([u[i][rows].double().numpy().ravel() for i, rows in group])
        new = torch.tensor(projected(one, other) + (projected(other, one) if method == "pcgrad-symmetric" else 0))
        for i, rows in group:
            size = after[i][rows].numel()
            after[i][rows] = new[:size].reshape(after[i][rows].shape).float()
            new = new[size:]
    return after


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("granularity", ["global", "tensor", "head"])
def test_a_step_is_the_projected_step(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    opposed: list[Example],
    selection_of: SelectionOf,
    gradients: list[list[tuple[str, Tensor]]],
    tmp_path: Path,
    granularity: str,
    method: str,
) -> None:
    # All examples in one step: 2 micro-batches of 4, and the whole of D_util.
    config = CONFIG.changed(max_steps=1, batch_size=4, surgery=method, surgery_granularity=granularity)
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    result = tune(
        model, tiny_tokenizer, selection, data=aligned, out=tmp_path / "a", config=config, utility=opposed
    )  # fmt: skip

    fresh = tiny_model("llama")
    peft_model = sparse_lora(fresh, selection, r=4, alpha=8, seed=config.seed)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    g, u = (gradient_of(peft_model, tiny_tokenizer, data) for data in (aligned, opposed))
    expected = by_hand(peft_model, g, u, granularity, method)
    assert max((one - other).abs().max().item() for one, other in zip(expected, g, strict=True)) > 1e-3

    [found] = gradients
    for (name, gradient), by_formula in zip(found, expected, strict=True):
        assert torch.allclose(gradient, by_formula, rtol=1e-5, atol=1e-7), name

    # And the weights are those that clipping and AdamW make of it.
    for parameter, gradient in zip(trained, expected, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
    torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0).step()
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            weight = saved[name.replace(".default", "")]
            # Where a gradient is near Adam's eps (1e-8), its rounding shows.
            assert torch.isclose(weight, parameter, atol=1e-5).float().mean() > 0.99, name

    cosine = Gramian.of(g, u).cosine
    assert cosine is not None
    assert cosine < 0
    assert result.surgery is not None
    assert result.surgery["conflicting_steps"] == result.surgery["steps"] == 1
    assert result.surgery["mean_cosine"] == pytest.approx(cosine, rel=1e-4)


def test_no_conflict_no_change(
    tiny_model: Callable[..., Any], tuned: Tuned, aligned: list[Example], tmp_path: Path
) -> None:
    # Its own data as the reference: gradients agree, and the adapter is that of a training without surgery, bit for bit.
    weights = []
    for name, surgery in (("plain", "none"), ("operated", "pcgrad")):
        model = tiny_model("llama")
        config = CONFIG.changed(max_steps=2, batch_size=4, surgery=surgery)
        result = tuned(model, tmp_path / name, config, utility=aligned)
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert result.surgery is not None
    assert result.surgery["conflicting_steps"] == 0
    assert result.surgery["mean_cosine"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", OWN)
def test_accumulated_batches_are_operated_on_like_one_large_batch(
    tiny_model: Callable[..., Any],
    tuned: Tuned,
    opposed: list[Example],
    gradients: list[list[tuple[str, Tensor]]],
    tmp_path: Path,
    method: str,
) -> None:
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        model = tiny_model("llama")
        # A small step, so that what Adam makes of rounding does not grow from step to step.
        config = CONFIG.changed(
            surgery=method, batch_size=batch, accumulation=accumulation, surgery_batch_size=3, learning_rate=1e-6,
            max_steps=2,
        )  # fmt: skip
        result = tuned(model, tmp_path / str(batch), config, utility=opposed)
        assert result.surgery is not None
        assert result.surgery["conflicting_steps"] == result.surgery["steps"] == 2
    one, some, many = gradients[:2], gradients[2:4], gradients[4:]
    for other in (some, many):
        for step, other_step in zip(one, other, strict=True):
            for (name, gradient), (_, again) in zip(step, other_step, strict=True):
                assert torch.allclose(gradient, again, rtol=0, atol=1e-6), name
    assert any(gradient.abs().max() > 1e-2 for _, gradient in one[0])


@pytest.mark.parametrize("granularity", ["global", "tensor", "head"])
@pytest.mark.parametrize("method", [*OWN, "mgda"])
def test_the_certificate_holds_and_the_record_tells(
    tiny_model: Callable[..., Any],
    tuned: Tuned,
    questions: list[Example],
    opposed: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
    method: str,
    granularity: str,
) -> None:
    method_or_skip(method)
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    config = CONFIG.changed(surgery=method, surgery_granularity=granularity, weight_decay=0.1, max_length=160)
    utility = [*opposed, *(q for q in questions if q.scoring == "likelihood")]
    result = tuned(model, tmp_path / "a", config, selection=selection, utility=utility, utility_source="own")
    assert certify(model, tmp_path / "a", selection) == result.certificate
    assert result.certificate.changed_rows == result.certificate.selected_rows == 24
    assert result == TuneResult.load(tmp_path / "a")
    assert result.surgery is not None
    assert result.surgery["steps"] == 3
    assert result.utility == {
        "source": "own", "n": 11, "hash": content_hash(utility), "cut": 0, "replies_cut": 0, "replayed": 0,
    }  # fmt: skip
    assert result.settings["surgery"] == method


def test_b_alone_with_fused_and_transposed_projections(
    tiny_model: Callable[..., Any], tuned: Tuned, opposed: list[Example], tmp_path: Path
) -> None:
    for family in ("phi3", "gpt2", "gpt_neox"):
        model = tiny_model(family)
        config = CONFIG.changed(surgery="pcgrad-symmetric", surgery_granularity="head", freeze_a=True, max_steps=2)
        result = tuned(model, tmp_path / family, config, utility=opposed)
        assert result.certificate.changed_rows == 24


def test_the_reference_of_lettered_questions_is_the_gradient_of_the_letter(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    questions: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    """By brute force: a question at a time, the log-probability of its letter behind its prompt, and nothing else."""
    letters = [q for q in questions if q.scoring == "letter"]
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    config = CONFIG.changed(max_steps=1, batch_size=8, accumulation=1, surgery="pcgrad", max_length=1024)
    result = tune(model, tiny_tokenizer, selection, data=aligned, out=tmp_path / "a", config=config, utility=letters)

    peft_model = sparse_lora(tiny_model("llama"), selection, r=4, alpha=8, seed=config.seed)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    losses = []
    for question in letters:
        turns = [{"role": "user", "content": question.user_text}]
        ids = tiny_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        letter = tiny_tokenizer.encode("ABCD"[question.answer or 0], add_special_tokens=False)[0]
        losses.append(-peft_model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[letter])
    u = torch.cat([part.flatten() for part in torch.autograd.grad(torch.stack(losses).mean(), trained)])
    g = torch.cat([part.flatten() for part in gradient_of(peft_model, tiny_tokenizer, aligned)])
    cosine = float(torch.nn.functional.cosine_similarity(g, u, dim=0))
    assert result.surgery is not None
    assert result.surgery["mean_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert abs(cosine) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_groups_hold_every_trained_row_once(
    tiny_model: Callable[..., Any], selection_of: SelectionOf, family: str
) -> None:
    model = tiny_model(family)
    selection, layout = selection_of(model, SOME), HeadLayout.of(model)
    peft_model = sparse_lora(model, selection, r=4)
    for granularity, n in (("global", 1), ("tensor", 4), ("head", 5)):
        groups = parameter_groups(peft_model, UnitLayout(layout), selection, granularity)  # type: ignore[arg-type]
        assert len(groups) == n
        for name, parameter in peft_model.named_parameters():
            if not parameter.requires_grad:
                continue
            seen = torch.zeros(len(parameter), dtype=torch.int)
            for group in groups:
                for member, rows in group:
                    seen[rows] += member is parameter
            assert seen.max() == 1, name
            masked = parameter is not None and "lora_B" in name and granularity == "head"
            assert int(seen.sum()) == (8 * (2 if "layers.0" in name else 1) if masked else len(parameter)), name


# -- several processes

TWO_RANKS = """
import os, sys
import torch
sys.path[:0] = sys.argv[4:]
from pathlib import Path
from castune.artifacts import HeadSelection
from castune.config import TuneConfig
from castune.core.loading import load
from castune.data.example import Example
from castune.tuning.train import tune
from castune.tuning.trainer import ReplyTrainer
import json
torch.set_num_threads(1)
model, tokenizer = load(sys.argv[1], dtype="float32", device="cpu")
job = json.loads(Path(sys.argv[2]).read_text())
rank = os.environ.get("RANK", "0")
found, step = [], ReplyTrainer.training_step
def look(self, model, *args, **kwargs):
    loss = step(self, model, *args, **kwargs)
    if self.accelerator.sync_gradients:
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    return loss
ReplyTrainer.training_step = look
data, utility = ([Example(**e) for e in job[name]] for name in ("data", "utility"))
selection = HeadSelection.load(sys.argv[3])
result = tune(model, tokenizer, selection, data=data, out=Path(sys.argv[3]).parent / job["name"],
              config=TuneConfig(**job["config"]), utility=utility)
torch.save({"gradients": found, "surgery": result.surgery, "world": int(os.environ.get("WORLD_SIZE", "1"))},
           Path(sys.argv[3]).parent / f"{job['name']}-{rank}.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.processes
@needs_loopback
def test_two_processes_train_like_one(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    opposed: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    selection_of(model, SOME).save(tmp_path / "selection.json")
    (tmp_path / "job.py").write_text(TWO_RANKS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, batch, launch in (("one", 4, []), ("two", 2, torchrun)):
        # Five utility examples: the ranks' shares differ in size. One-way PCGrad is blind to the scale of u; this is not.
        config = CONFIG.changed(
            surgery="pcgrad-symmetric", batch_size=batch, surgery_batch_size=5, learning_rate=1e-6, max_steps=2
        )
        job = {
            "name": name, "config": config.model_dump(), "data": [vars(e) for e in aligned],
            "utility": [vars(e) for e in opposed],
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(job))
        arguments = [tmp_path / "job.py", tmp_path / "model", tmp_path / f"{name}.json", tmp_path / "selection.json"]
        done = run_command([sys.executable, *launch, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    assert first["world"] == 2
    for alone, here, there in zip(one["gradients"], first["gradients"], second["gradients"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True)), "ranks hold the same gradient"
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(alone, here, strict=True))
    assert one["surgery"]["conflicting_steps"] == first["surgery"]["conflicting_steps"] == 2
    assert one["surgery"]["mean_cosine"] == pytest.approx(first["surgery"]["mean_cosine"], abs=1e-5)


# -- refusals


def refused(model: Any, tokenizer: Any, selection: Any, out: Path, data: list[Example], **more: Any) -> CastuneError:
    with pytest.raises(CastuneError) as caught:
        tune(model, tokenizer, selection, data=data, out=out / "run" / "a", **more)
    assert not (out / "run").exists() or not list((out / "run").iterdir())
    assert not any("lora" in name for name, _ in model.named_modules())
    return caught.value


def test_surgery_without_utility_data(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    for utility in (None, []):
        error = refused(model, tiny_tokenizer, selection, tmp_path, aligned, config=CONFIG, utility=utility)
        assert "needs utility data" in str(error)
        assert "--utility" in str(error)
    bare = [Example(id="bare", prompt="a")]
    error = refused(model, tiny_tokenizer, selection, tmp_path, aligned, config=CONFIG, utility=bare)
    assert isinstance(error, DataError)
    assert "'bare'" in str(error)


@pytest.mark.parametrize(
    ("method", "module", "package"),
    [
        ("mgda", "torchjd.aggregation", '"torchjd==0.18.0"'),
        ("cagrad", "cvxpy", '"torchjd[cagrad]==0.18.0"'),
        ("upgrad", "quadprog", '"torchjd[quadprog_projector]==0.18.0"'),
    ],
)
def test_a_method_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, method: Any, module: str, package: str
) -> None:
    def without(name: str) -> Any:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return SimpleNamespace()

    monkeypatch.setattr(surgery_module, "import_module", without)
    with pytest.raises(CastuneError) as caught:
        require_method(method)
    assert f"python -m pip install {package}" in str(caught.value)
    assert f"needs the module {module.partition('.')[0]}, which" in str(caught.value)
    require_method("pcgrad")
    require_method("none")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_gradients_that_are_not_in_grad(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    opposed: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    check = Operation.check

    def pretend(self: Operation, _accelerator: Any) -> None:
        check(self, SimpleNamespace(distributed_type=DistributedType[kind], scaler=None))

    monkeypatch.setattr(Operation, "check", pretend)
    model = tiny_model("llama")
    error = refused(
        model, tiny_tokenizer, selection_of(model, SOME), tmp_path, aligned, config=CONFIG, utility=opposed
    )  # fmt: skip
    assert isinstance(error, TrainingError)
    assert kind in str(error)
    assert 'surgery = "none"' in str(error)


def test_scaled_gradients_are_refused() -> None:
    operation = Operation([], CONFIG, [])
    for kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
        operation.check(SimpleNamespace(distributed_type=DistributedType[kind], scaler=None))
        operation.check(SimpleNamespace(distributed_type=kind))  # an accelerate that has neither
    with pytest.raises(TrainingError, match="float16"):
        operation.check(SimpleNamespace(distributed_type=DistributedType.NO, scaler=object()))


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("utility loss", lambda loss: loss * float("nan")),
        # The root of 0 is 0, and rises there infinitely fast.
        ("gradient of the utility loss", lambda loss: (0 * loss).sqrt()),
    ],
)
def test_a_utility_loss_that_is_not_finite(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    opposed: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    broken: Callable[[Tensor], Tensor],
) -> None:
    monkeypatch.setattr(surgery_module, "reply_nll", lambda *args: broken(reply_nll(*args)))
    model = tiny_model("llama")
    error = refused(
        model, tiny_tokenizer, selection_of(model, SOME), tmp_path, aligned, config=CONFIG, utility=opposed
    )  # fmt: skip
    assert isinstance(error, TrainingError)
    assert str(error).startswith(f"the {what} is nan at step 1; ")


# -- the record


def test_records_from_before_there_was_surgery_load(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    config = CONFIG.changed(surgery="none", max_steps=1)
    result = tuned(model, tmp_path / "a", config)
    assert result.surgery is None
    path = tmp_path / "a" / "tune.json"
    record = json.loads(path.read_text())
    assert record.pop("surgery") is None
    del record["digest"]
    path.write_text(json.dumps(record))
    assert TuneResult.load(path) == result
    path.write_text(json.dumps({**record, "surgery": 3}))
    with pytest.raises(ArtifactError, match="damaged tune result"):
        TuneResult.load(path)
    assert replace(result, surgery={"steps": 1}) != result
