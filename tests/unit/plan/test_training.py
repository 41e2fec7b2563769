"""Work and memory of trainings: what is counted is what is run, and it grows as it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import pytest
import torch
from shapes import counting, shape_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from castune.artifacts import HeadSelection
from castune.config import TuneConfig
from castune.core.heads import HeadLayout
from castune.core.loading import load
from castune.core.losses import RowBatch, reply_nll
from castune.core.provenance import fingerprint
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row
from castune.errors import CastuneError
from castune.plan.memory import training_memory
from castune.plan.training import training_work
from castune.plan.work import Size
from castune.tuning.row_lora import sparse_lora
from castune.tuning.train import tune

CONFIG = TuneConfig(rank=4, batch_size=2, accumulation=2, epochs=2)
ROWS = [Row.of_replies(range(10 + n), [range(3 + n % 4)]) for n in range(11)]
# Wide enough that what small tensors take does not matter.
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_attention_heads": 8,
    "head_dim": 16,
    "num_hidden_layers": 6,
    "vocab_size": 2000,
}
UTILITY = [Row.of_replies(range(20 + n), [range(2)]) for n in range(5)]


def all_heads(model: Any) -> HeadSelection:
    heads = HeadLayout.of(model).heads
    return HeadSelection.custom(heads, n_total=len(heads), model_fingerprint=fingerprint(model))


@pytest.fixture
def aligned() -> list[Example]:
    words = ["tea", "a long walk", "rain", "the sea at night", "bread", "snow", "music"]
    return [
        Example(id=f"a{i}", prompt=f"Tell me about {w}.", reply=f"I like {w}{'!' * i}") for i, w in enumerate(words)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_flops_of_a_training_equal_those_of_torch(tiny_model: Callable[..., Any], family: str) -> None:
    """But for the inputs of the lowest layer: their gradients are counted, and nobody needs them."""
    model = tiny_model(family)
    shape, layout = shape_of(model.config), HeadLayout.of(model)
    peft_model = sparse_lora(model, all_heads(model), r=4, alpha=4)
    model.set_attn_implementation("eager")
    batch = RowBatch.of(ROWS)
    with FlopCounterMode(display=False) as counter:
        reply_nll(peft_model, batch, fused=True).mean().backward()
    config = CONFIG.changed(batch_size=len(ROWS), accumulation=1, epochs=1)
    work = training_work(shape, ROWS, config)
    n_rows, length, n_scored = work.largest
    assert (n_rows, length) == batch.ids_BS.shape
    assert n_scored == batch.tokens_BT.numel()
    tokens = n_rows * length
    attention = layout.decoder_layers(model)[0].get_submodule(layout.at(0).path.rpartition(".")[2])
    weights = sum(p.numel() for n, p in attention.named_parameters() if p.dim() == 2 and "lora" not in n)
    into = weights - layout.output_projection(model, 0).weight.numel()
    spared = tokens * (2 * into + 2 * 4 * shape.hidden + shape.flops.pair_L[0] * length)
    flops = shape.all_flops(work.work)
    assert flops - spared == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert flops >= counter.get_total_flops()


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"surgery": "pcgrad"}, {"surgery": "pcgrad", "surgery_batch_size": 3}, {"replay": 0.4}, {"max_steps": 3}],
)
def test_the_counted_training_is_the_one_that_runs(
    changes: dict[str, Any],
    group_by_length: bool,
    aligned: list[Example],
    questions: list[Example],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    model, config = tiny_model("llama"), CONFIG.changed(group_by_length=group_by_length, **changes)
    utility = questions if config.needs_utility else None
    with counting(model) as forwards:
        done = tune(
            model, tiny_tokenizer, all_heads(model), data=aligned, out=tmp_path / "a", config=config, utility=utility
        )
    chat = ChatFormat(tiny_tokenizer, max_length=config.max_length)
    rows, utility_rows = [chat.loss_row(e) for e in aligned], [chat.loss_row(e) for e in questions]
    work = training_work(shape_of(model.config), rows, config, utility_rows=utility_rows)
    assert work.steps == done.steps
    forwards = [size for size in forwards if size != (1, 8)]  # looks for the heads
    assert work.work.forwards == len(forwards)
    tokens = sum(n_rows * length for n_rows, length in forwards)
    # Without grouping the order, and so the padding, is another random one.
    assert work.work.tokens == (tokens if group_by_length else pytest.approx(tokens, rel=0.2))


def test_a_training_grows_with_what_it_does(tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(tiny_model("llama").config)

    def work(**changes: Any) -> Any:
        return training_work(shape, ROWS, CONFIG.changed(**changes), utility_rows=UTILITY)

    usual = work()
    assert work(epochs=4).steps == 2 * usual.steps == 4 * work(epochs=1).steps
    twice, once = work(max_steps=6, epochs=9), work(max_steps=3, epochs=9)
    assert (twice.steps, once.steps) == (6, 3)
    assert 1.5 < twice.work.layer_flops / once.work.layer_flops < 2.5
    for more in (
        {"surgery": "pcgrad"}, {"replay": 0.5}, {"null_space": 0.9}, {"gradient_checkpointing": True}, {"rank": 8}
    ):  # fmt: skip
        assert work(**more).work.layer_flops > usual.work.layer_flops, more
    # A forward more of what was two.
    again = work(gradient_checkpointing=True).work.layer_flops - usual.work.layer_flops
    assert 0.4 < again / usual.work.layer_flops < 0.55
    # Utility batches as large as the steps', but of other lengths.
    assert work(surgery="pcgrad").work.tokens > 2 * usual.work.tokens


def test_preferences_take_two_replies_and_a_reference(tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(tiny_model("llama").config)
    pairs = [{"prompt_ids": [1] * 10, "chosen_ids": [2] * n, "rejected_ids": [3] * 6} for n in (2, 4, 5, 6)] * 2
    work = training_work(shape, [], CONFIG.changed(method="dpo", epochs=1), pairs=pairs)
    assert (work.steps, work.work.forwards) == (2, 4)
    assert work.work.tokens == 4 * 4 * 16
    assert work.work.n_scored == 3 * work.work.tokens


def test_trainings_that_cannot_be_are_refused(tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(tiny_model("llama").config)
    with pytest.raises(CastuneError, match="needs examples"):
        training_work(shape, [], CONFIG)
    for changes in ({"surgery": "pcgrad"}, {"replay": 0.5}, {"null_space": 0.9}):
        with pytest.raises(CastuneError, match="need utility"):
            training_work(shape, ROWS, CONFIG.changed(**changes))


def test_the_largest_micro_batch_may_be_one_of_utility_examples(tiny_model: Callable[..., Any]) -> None:
    shape = shape_of(tiny_model("llama").config)
    long = [Row.of_replies(range(90), [range(2)])] * 5
    assert training_work(shape, ROWS, CONFIG, utility_rows=long).largest.length < 90
    assert training_work(shape, ROWS, CONFIG.changed(surgery="pcgrad"), utility_rows=long).largest.length >= 90


# -- memory


class Held(TorchDispatchMode):
    """Bytes of all tensors that are alive inside the `with` block, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: WeakKeyDictionary[Any, None] = WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.hold(*(leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)))
        return made

    def hold(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = None
                finalize(storage, self._free, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)

    def _free(self, n_bytes: int) -> None:
        self.now -= n_bytes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("n_scored", [8, 64])
def test_memory_is_what_a_training_step_holds(
    tiny_model: Callable[..., Any], dtype: torch.dtype, checkpointing: bool, n_scored: int
) -> None:
    """Against the tensors that are alive at the peak of a step, counted one by one."""
    model = tiny_model("llama", **WIDE).to(dtype)
    peft_model = sparse_lora(model, all_heads(model), r=4, alpha=4).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    rows = [Row.of_replies(range(120), [range(n_scored)])] * 4

    def step() -> None:
        reply_nll(peft_model, RowBatch.of(rows), fused=True).mean().backward()
        optimiser.step()

    step()
    optimiser.zero_grad()
    with Held() as held:
        moments = [value for state in optimiser.state.values() for value in state.values()]
        held.hold(*peft_model.parameters(), *moments)
        step()
    config = TuneConfig(rank=4, gradient_checkpointing=checkpointing)
    found = training_memory(shape_of(model.config, dtype=dtype), config, Size.of(rows))
    assert found == pytest.approx(held.most, rel=0.08)


def test_weights_adapter_and_its_optimiser_are_exact(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", **WIDE)
    shape = shape_of(model.config)
    base = sum(parameter.nbytes for parameter in model.parameters())
    peft_model = sparse_lora(model, all_heads(model), r=4, alpha=4)
    adapter = [parameter for name, parameter in peft_model.named_parameters() if "lora_" in name]
    trained = [
        parameter
        for parameter in adapter
        if "lora_B" in next(n for n, p in peft_model.named_parameters() if p is parameter)
    ]
    none, config = Size(0, 0, 0), TuneConfig(rank=4)
    n_bytes = sum(parameter.nbytes for parameter in adapter)
    of_b = sum(parameter.nbytes for parameter in trained)
    assert training_memory(shape, config, none) == base + 4 * n_bytes
    # A frozen A has neither gradient nor moments; surgery holds a second gradient.
    assert training_memory(shape, config.changed(freeze_a=True), none) == base + n_bytes + 3 * of_b
    assert training_memory(shape, config.changed(surgery="pcgrad"), none) == base + 5 * n_bytes


def test_adapters_of_all_units_are_counted(tiny_model: Callable[..., Any]) -> None:
    config = tiny_model("llama", **WIDE).config
    heads, both, mlps = (shape_of(config, *kinds) for kinds in (["q_heads"], ["q_heads", "mlp_groups"], ["mlp_groups"]))
    assert both.adapter_width == heads.adapter_width + mlps.adapter_width
    # Gate and up: 128 inputs, 344 outputs; down the other way round; six layers.
    assert mlps.adapter_width == 6 * 3 * (128 + 344)
    size, settings = Size(4, 100, 64), TuneConfig()
    assert training_memory(both, settings, size) > training_memory(heads, settings, size)


def test_a_quantised_base_packs_its_linear_layers_alone(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Against what bitsandbytes makes of the model; embeddings, norms and output head stay as they are."""
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", **WIDE).bfloat16()
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    packed, _ = load(tmp_path, dtype="bfloat16", device="cpu", quantization="nf4")
    held = {id(parameter): parameter.nbytes for parameter in packed.parameters()}
    for module in packed.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held |= {id(tensor): tensor.nbytes for tensor in (state.absmax, state.state2.absmax)}
    shape, none = shape_of(model.config, dtype=torch.bfloat16), Size(0, 0, 0)
    adapter = training_memory(shape, TuneConfig(), none) - shape.weight_bytes
    found = training_memory(shape, TuneConfig(quantization="nf4"), none) - adapter
    assert found == pytest.approx(sum(held.values()), rel=0.01)
