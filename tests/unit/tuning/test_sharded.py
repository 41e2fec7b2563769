"""FSDP2 on two processes: masked rows stay zero, and the adapter is that of one process.

accelerate shards on accelerators only, so the shards are made by torch itself, with a loop of our own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import needs_loopback
from processes import run_command
from safetensors.torch import load_file
from tiny_training import SOME

from castune.artifacts import HeadSelection, Unit
from castune.tuning.verify import certify

OTHERS = (*(Unit.head(*head) for head in SOME), Unit("o_head", 0, 2), Unit("mlp_group", 2, 1))

JOB = """
import os, sys
from pathlib import Path
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from castune.artifacts import HeadSelection
from castune.core.loading import load
from castune.core.losses import RowBatch, reply_nll
from castune.data.rows import Row
from castune.core.heads import HeadLayout
from castune.tuning.null_space import NullSpace, applied_weights
from castune.tuning.row_lora import sparse_lora
from castune.tuning.targets import targets, units_for
torch.set_num_threads(1)
folder, name, share = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
model, _ = load(str(folder / "model"), dtype="float32", device="cpu")
selection = HeadSelection.load(folder / "selection.json")
rows = [Row.of_replies([5 + i, 6, 7 + i], [[9, 10 + i, 11]]) for i in range(4)]
if world > 1:
    distributed.init_process_group("gloo")
space = None
if share:
    wanted = targets(units_for(model, HeadLayout.of(model), selection), selection)
    # The ranks may round differently; here they even disagree on how many directions there are.
    space = NullSpace.of(model, wanted, rows, share if rank == 0 else share / 2, batch_size=2)
torch.manual_seed(7)
peft_model = sparse_lora(model, selection, r=4, alpha=8).train()
if space is not None:
    space.keep(peft_model)
if world > 1:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(peft_model)
optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
for step in range(4):
    loss = reply_nll(peft_model, RowBatch.of(rows[rank::world])).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(peft_model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
weights = applied_weights(peft_model)
if rank == 0:
    peft_model.save_pretrained(folder / name, state_dict=weights)
if world > 1:
    assert any(hasattr(p, "full_tensor") for p in peft_model.parameters()), "nothing was sharded"
    distributed.barrier()
    distributed.destroy_process_group()
# Now and then a thread of gloo is still alive when the interpreter ends, which aborts the process: all is done here.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@needs_loopback
@pytest.mark.parametrize(
    ("others", "changed", "share"),
    [
        ({}, (24, 0), 0.0),
        ({"units": OTHERS, "mlp_groups": 4}, (24 + 2 * 12, 8 + 12), 0.0),
        ({"units": OTHERS, "mlp_groups": 4}, (24 + 2 * 12, 8 + 12), 0.6),
    ],
    ids=["query heads", "with columns", "in a null space"],
)
def test_two_shards_train_the_adapter_of_one_process(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    selection_of: Callable[..., HeadSelection],
    tmp_path: Path,
    others: dict[str, Any],
    changed: tuple[int, int],
    share: float,
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    selection = selection_of(model, SOME, **others)
    selection.save(tmp_path / "selection.json")
    (tmp_path / "job.py").write_text(JOB)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launch in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launch, str(tmp_path / "job.py"), str(tmp_path), name, str(share)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = run_command(command, env=environment)
        assert done.returncode == 0, done.stderr
    # The certificate holds: every row of B, and column of A, outside the selection is exactly zero.
    certificates = [certify(model, tmp_path / name, selection) for name in ("one", "two")]
    found = certificates[1]
    assert (found.changed_rows, found.changed_columns) == (found.selected_rows, found.selected_columns) == changed
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=1e-5), name
