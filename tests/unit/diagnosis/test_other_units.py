"""Diagnosis of units beside query heads: gradients, shifts, ranks within a kind, a conflict planted in an MLP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import castune
from castune import CastuneError, ConflictMap, DiagnoseConfig, HeadLayout, UnsupportedArchitecture
from castune.core.ablation import can_resume
from castune.core.generation import generate_replies
from castune.core.journal import Journal
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.decode import ReplyMeasure
from castune.diagnosis.gradients import gradient_passes, gram_matrices, partial_gradients
from castune.diagnosis.groups import ablate_groups
from castune.diagnosis.sweep import sweep
from castune.names import KINDS, kind_words

MARGIN = DiagnoseConfig(measure="margin", max_new_tokens=4, mlp_groups=3)
ROWS = [
    Row.of_replies(list(range(40, 40 + n)), [list(range(90, 90 + m))]) for n, m in ((9, 3), (25, 1), (4, 6), (7, 7))
]
MEASURED = ("optimization_conflict", "optimization_conflict_se", "utility_shift", "safety_shift")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "falcon", "opt"])
def test_gram_is_the_inner_products_of_what_a_unit_owns(tiny_model: Callable[..., Any], family: str) -> None:
    """By masks over whole gradients: those of a projection's units are disjoint and add up to it."""
    model = tiny_model(family)
    layout = UnitLayout.of(model, HeadLayout.of(model), [*KINDS.values()], n_mlp_groups=5)
    paths = [path for one in gradient_passes(model, layout, layout.units, n_chunks=3, limit=1e9) for path in one]
    assert len(set(paths)) == len(paths)
    chunks = partial_gradients(model, paths, ROWS, n_chunks=3, batch_tokens=100)
    grams = gram_matrices(layout, layout.units, chunks)
    for one, gram in zip(layout.units, grams, strict=True):
        expected = np.zeros((3, 3))
        for path in paths:
            mask = torch.zeros_like(chunks[0][path])
            for part in layout.parts(one):
                if part.path == path:
                    part.of(mask)[:] = 1
            owned = [(chunk[path] * mask).double().flatten() for chunk in chunks]
            expected += [[float(a @ b) for b in owned] for a in owned]
        assert expected.trace() > 0
        np.testing.assert_allclose(gram, expected, rtol=1e-9, atol=1e-18)
    by_kind = {
        kind: sum(gram for one, gram in zip(layout.units, grams, strict=True) if one.kind == kind)
        for kind in ("mlp_block", "mlp_group")
    }
    np.testing.assert_allclose(by_kind["mlp_group"], by_kind["mlp_block"], rtol=1e-9)


def test_passes_hold_what_fits_and_change_nothing(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    model = tiny_model("llama")
    layout = UnitLayout.of(model, HeadLayout.of(model), ("q_head", "mlp_group"), n_mlp_groups=3)
    size = {path: 4 * 16 * layout.weight(model, path).numel() for path in _paths(layout)}
    limit = max(size.values()) * 2.5
    passes = gradient_passes(model, layout, layout.units, n_chunks=16, limit=limit)
    assert [path for one in passes for path in one] == list(size)
    assert all(sum(size[path] for path in one) <= limit for one in passes)
    assert 1 < len(passes) < len(size)
    tiny = gradient_passes(model, layout, layout.units, n_chunks=16, limit=1)
    assert tiny == [[path] for path in size]
    config = MARGIN.model_copy(update={"units": ("q_heads", "mlp_groups")})
    whole, parts = (
        castune.diagnose(
            model, tiny_tokenizer, safety=harmful, utility=questions,
            config=config.model_copy(update={"gradient_memory": memory}),
        )
        for memory in (40, limit / 1e9)
    )  # fmt: skip
    np.testing.assert_allclose(
        whole.column("optimization_conflict"), parts.column("optimization_conflict"), rtol=0, atol=1e-12
    )


def _paths(layout: UnitLayout) -> list[str]:
    return list(dict.fromkeys(part.path for one in layout.units for part in layout.parts(one)))


@pytest.mark.parametrize(
    ("ablation", "measure"),
    [
        ("zero", "decision"),
        ("mean", "margin"),
        pytest.param("zero", "margin", marks=pytest.mark.slow),
        pytest.param("mean", "decision", marks=pytest.mark.slow),
    ],
)
def test_every_kind_has_the_rows_of_a_map_of_its_own(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    measure: Any,
    ablation: Any,
) -> None:
    """Together or alone: the same measures, and ranks, buckets and intervals within the kind."""
    model = tiny_model("llama")
    data: dict[str, Any] = {"safety": harmful, "utility": questions}
    config = MARGIN.model_copy(update={"measure": measure, "ablation": ablation})
    kinds = ("q_heads", "o_heads", "v_groups", "mlp_groups")
    together = castune.diagnose(model, tiny_tokenizer, config=config.model_copy(update={"units": kinds}), **data)
    assert together.kinds == ["q_head", "o_head", "v_group", "mlp_group"]
    assert [kind for kind, _, _ in together.units] == ["q_head"] * 12 + ["o_head"] * 12 + ["v_group"] * 6 + [
        "mlp_group"
    ] * 9
    assert together.mlp_groups == 3
    for kind in kinds:
        alone = castune.diagnose(model, tiny_tokenizer, config=config.model_copy(update={"units": (kind,)}), **data)
        rows = together.rows_of(KINDS[kind])
        for name in (*alone.table.column_names[3:], "conflict_magnitude"):
            np.testing.assert_allclose(together.column(name)[rows], alone.column(name), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(
            together.only(KINDS[kind]).column("conflict_magnitude"), together.column("conflict_magnitude")[rows]
        )
        assert together.metadata["kinds"][KINDS[kind]]["ties"] == alone.metadata["ties"]
        # Of one kind alone the record says what it always said.
        assert "kinds" not in alone.metadata
    # Without a head's columns of the output projection the model is the one without the head.
    for name in ("utility_shift", "safety_shift"):
        found = together.column(name)
        assert np.array_equal(found[together.rows_of("q_head")], found[together.rows_of("o_head")])
    assert not np.allclose(
        *(together.column("optimization_conflict")[together.rows_of(k)] for k in ("q_head", "o_head"))
    )
    assert together.metadata["reliability"]["warnings"] == [
        f"{kind_words(kind)}: {text}"
        for kind, found in together.metadata["kinds"].items()
        for text in found["reliability"]["warnings"]
    ]


def test_domains_and_several_kinds(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example], tmp_path: Any
) -> None:
    model = tiny_model("gpt2")
    config = MARGIN.model_copy(update={"units": ("q_heads", "mlp_blocks")})
    utility = {"a": questions[:3], "b": questions[3:]}
    cmap = castune.diagnose(model, tiny_tokenizer, safety=harmful, utility=utility, config=config, out=tmp_path)
    assert ConflictMap.load(tmp_path) == cmap
    assert all(one.units == cmap.units for one in cmap.domains.values())
    np.testing.assert_allclose(
        cmap.column("conflict_score"), np.mean([d.column("conflict_score") for d in cmap.domains.values()], axis=0)
    )
    outcomes = pq.read_table(tmp_path / "ablation.parquet").to_pandas()
    assert set(outcomes["unit"]) == {"q_head", "mlp_block"}
    assert len(outcomes) == len(cmap) * (len(harmful) + len(questions))


def test_groups_of_one_unit_are_the_map(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    model = tiny_model("phi3")
    config = MARGIN.model_copy(update={"units": ("k_groups", "mlp_groups")})
    data: dict[str, Any] = {"safety": harmful, "utility": questions, "config": config}
    cmap = castune.diagnose(model, tiny_tokenizer, **data)
    found = ablate_groups(model, tiny_tokenizer, groups=[[one] for one in cmap.units], **data)
    for name in ("utility_shift", "safety_shift"):
        np.testing.assert_allclose(getattr(found, name), cmap.column(name), atol=1e-5)


def test_an_interrupted_diagnosis_of_units_continues_to_the_same_map(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    config = MARGIN.model_copy(update={"units": ("v_groups", "q_heads", "mlp_groups")})
    data: dict[str, Any] = {"safety": harmful, "utility": questions, "config": config}
    expected = castune.diagnose(model, tiny_tokenizer, **data)
    plain, written = Journal.append, 0

    def stop(self: Journal, record: dict[str, Any]) -> None:
        nonlocal written
        plain(self, record)
        written += 1
        if written % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stop)
    found, n_stops = None, 0
    while found is None:
        try:
            found = castune.diagnose(model, tiny_tokenizer, out=tmp_path, **data)
        except KeyboardInterrupt:
            n_stops += 1
    assert n_stops > 3
    assert found.table.equals(expected.table)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_replies_without_a_unit_are_those_of_a_model_with_zeroed_weights(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example], family: str
) -> None:
    """Verified, and decoded from recorded keys and values (a KV group's own among them), against plain generation."""

    def chance_judge(_prompts: Any, replies: Any) -> list[bool | None]:
        """A random model never says "I cannot"."""
        return [None if not reply else sum(reply.encode()) % 2 == 0 for reply in replies]

    model, harmful = tiny_model(family, seed=3), harmful[:3]
    layout = UnitLayout.of(model, HeadLayout.of(model), ("k_group", "v_group", "mlp_group"), n_mlp_groups=2)
    chat, ablator = (
        ChatFormat(tiny_tokenizer),
        Ablator(model, layout, layout.units, can_resume(model, layout.heads)),
    )
    prompts = [chat.prompt_ids(example)[0] for example in harmful]
    options: dict[str, Any] = {"end_tokens": chat.end_tokens(model), "max_new_tokens": 6, "batch_tokens": 600}
    replies = generate_replies(model, tiny_tokenizer, prompts, **options)
    measure = ReplyMeasure(
        ablator, tiny_tokenizer, prompts, [e.prompt for e in harmful], replies, judge=chance_judge,
        is_settled=lambda _: False, **options,
    )  # fmt: skip
    found = sweep("safety", ablator, measure, journal=Journal.of(None, 0), shard=Shard())
    assert found is not None
    assert found.n_decoded > 0
    expected = []
    for one in layout.units:
        crippled = copy.deepcopy(model)
        for part in layout.parts(one):
            module = crippled.get_submodule(part.path)
            with torch.no_grad():
                part.of(module.weight)[:] = 0
                if part.axis == 0 and module.bias is not None:
                    module.bias[part.at] = 0
        texts = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = crippled.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                eos_token_id=options["end_tokens"], pad_token_id=257,
            )  # fmt: skip
            texts.append(tiny_tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
        expected.append([np.nan if v is None else float(v) for v in chance_judge(None, texts)])
    assert len({tuple(row) for row in expected}) > 2, "outcomes must vary over units"
    np.testing.assert_array_equal(found.ablated_HN, expected)


# -- planted conflicts


def _same_objective(n: int) -> tuple[list[Example], list[Example]]:
    """Harmful prompts and questions with the same prompt and the same right reply."""
    safety = [Example(id=f"s{i}", prompt=f"Say {i}.", reply=f"It is {i}.") for i in range(n)]
    utility = [
        Example(id=f"u{i}", prompt=e.prompt, choices=(e.reply or "", "No."), answer=0, scoring="likelihood")
        for i, e in enumerate(safety)
    ]
    return safety, utility


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_one_objective_twice_is_no_conflict_on_any_unit(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, family: str
) -> None:
    safety, utility = _same_objective(4)
    config = MARGIN.model_copy(update={"units": tuple(KINDS)})
    cmap = castune.diagnose(tiny_model(family), tiny_tokenizer, safety=safety, utility=utility, config=config)
    assert np.abs(cmap.column("optimization_conflict")).max() < 1e-6
    assert cmap.kinds == [*KINDS.values()]


class _Opposed(nn.Module):
    """An activation in which a group of neurons acts weakly, with one sign or the other, a sign a batch row.

    Weakly, so that nothing else differs much between the signs."""

    def __init__(self, neurons: slice) -> None:
        super().__init__()
        self.neurons = neurons
        self.sign_B: Tensor | None = None

    def forward(self, gate: Tensor) -> Tensor:
        out = nn.functional.silu(gate)
        if self.sign_B is None:
            return out
        factor = torch.ones_like(out)
        factor[..., self.neurons] = 0.2 * self.sign_B[:, None, None].to(out)
        return out * factor


@pytest.mark.parametrize(("layer", "planted"), [(0, 1), (1, 2), (2, 0)])
def test_a_planted_conflict_in_a_group_of_neurons_ranks_first(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, layer: int, planted: int
) -> None:
    """Safety and utility pull one group of neurons in opposite directions, and both hang on it.

    The model is given the same task by both sets. A mark in the harmful prompts, which it embeds like any full stop, lets
    one group of neurons act with the other sign: what it has to do more of for one set it has to do less of for the other.
    """
    model = tiny_model("llama", seed=5)
    opposed = _Opposed(slice(16 * planted, 16 * (planted + 1)))
    model.model.layers[layer].mlp.act_fn = opposed
    stop, mark = tiny_tokenizer(".#", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[mark] = model.model.embed_tokens.weight[stop]

    def read_mark(_module: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        opposed.sign_B = torch.where((ids == mark).any(-1), 1.0, -1.0)

    model.register_forward_pre_hook(read_mark, with_kwargs=True)
    safety = [Example(id=f"s{i}", prompt=f"Say # {i}", reply=f"It is {i}") for i in range(6)]
    utility = [
        Example(id=f"u{i}", prompt=f"Say . {i}", choices=(f"It is {i}", "No"), answer=0, scoring="likelihood")
        for i in range(6)
    ]
    config = MARGIN.model_copy(update={"units": ("q_heads", "mlp_groups"), "gradient_chunks": 2})
    cmap = castune.diagnose(model, tiny_tokenizer, safety=safety, utility=utility, config=config)
    rows = cmap.rows_of("mlp_group")
    first = rows[int(cmap.column("conflict_score")[rows].argmax())]
    assert cmap.units[first] == ("mlp_group", layer, planted)
    conflict = cmap.column("optimization_conflict")
    assert conflict[first] == conflict.max() > 0.8
    assert min(cmap.column("utility_shift")[first], cmap.column("safety_shift")[first]) > 1e-3, "it must matter"
    assert cmap.column("bucket")[first] == 1
    risky = castune.select(cmap, zone="risky", fraction=0.1)
    assert [one for one in risky.units if not one.is_head] == [("mlp_group", layer, planted)]
    assert ("mlp_group", layer, planted) not in castune.select(cmap, zone="safe", fraction=0.5).units


# -- what is refused


def test_experts_are_refused_only_where_they_are_asked_for(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    model = tiny_model("mixtral")
    data: dict[str, Any] = {"safety": harmful, "utility": questions}
    for kind in ("mlp_blocks", "mlp_groups"):
        with pytest.raises(UnsupportedArchitecture, match=r"layer 0 .*mixture of experts.*diagnose\.units"):
            castune.diagnose(model, tiny_tokenizer, config=MARGIN.model_copy(update={"units": (kind,)}), **data)
    config = MARGIN.model_copy(update={"units": ("q_heads", "v_groups")})
    assert len(castune.diagnose(model, tiny_tokenizer, config=config, **data)) == 12 + 6


def test_layers_of_units(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    data: dict[str, Any] = {"safety": harmful, "utility": questions}
    model = tiny_model("llama4_text")  # the layer in the middle has experts
    config = MARGIN.model_copy(update={"units": ("mlp_groups",), "layers": (0, 2)})
    cmap = castune.diagnose(model, tiny_tokenizer, config=config, **data)
    assert cmap.units == [("mlp_group", layer, number) for layer in (0, 2) for number in range(3)]
    with pytest.raises(CastuneError, match="accepted are layers, of 0 to 2"):
        castune.diagnose(model, tiny_tokenizer, config=config.model_copy(update={"layers": (3,)}), **data)


@pytest.mark.parametrize("units", [(), ("q_heads", "q_heads"), ("neurons",)])
def test_units_that_make_no_sense_are_told(units: Any) -> None:
    with pytest.raises(CastuneError, match="units"):
        DiagnoseConfig(units=units)
