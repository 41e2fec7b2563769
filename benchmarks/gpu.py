"""What a map and a training step of an 8B-shaped Llama cost on one accelerator, beside what `castune plan` foretold.

    python benchmarks/gpu.py [--config recipes/configs/llama3.1-8b] [--n 100] [--exact-layers 4] [--accelerator h100]

Random weights in bfloat16, starter data, the default model's tokenizer. The map by attribution is of all heads; the
exact map by margins of `--exact-layers` layers, spread over the depth, and its time for all of them is that times the
layers. At most ten minutes on an H100. On a CPU, give `--tiny`: a model of a few layers and 4 + 4 examples, to see that
it runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import castune as ct
from castune.core.loading import load_config
from castune.core.numbers import duration, gigabytes
from castune.plan.accelerators import accelerator_named
from castune.plan.planner import Planner

TINY = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 49_152,
}  # fmt: skip


class Peak:
    """Seconds of a block, and the peak of allocated memory on the accelerator."""

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        self.memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def model_of(config: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def row(what: str, found: Peak, foretold: float | None, memory: float | None = None) -> None:
    told = "–" if foretold is None else duration(foretold)
    needed = "–" if memory is None else gigabytes(memory)
    print(f"| {what} | {duration(found.seconds)} | {told} | {gigabytes(found.memory)} | {needed} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/configs/llama3.1-8b")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--exact-layers", type=int, default=4)
    parser.add_argument("--accelerator", default="h100")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    n = 4 if options.tiny else options.n
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.from_pretrained(options.config, **(TINY if options.tiny else {}))
    _, tokenizer = load_config("default")
    safety, utility = ct.examples("starter-safety", limit=n), ct.examples("starter-utility", limit=n)
    attribution = ct.DiagnoseConfig(measure="attribution", batch_tokens=8192)
    planner = Planner.of_config(
        config,
        tokenizer,
        settings=attribution,
        dtype=torch.bfloat16,
        device=device,
        accelerator=accelerator_named(options.accelerator),
    )
    planned = planner.diagnosis(safety, utility, attribution)
    model = model_of(config, device)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shape = planner.shape
    weights = gigabytes(shape.weight_bytes)
    print(f"{where}; {shape.n_units} heads, {weights} of weights, {n} + {n} examples\n")
    print("| | measured | foretold | peak memory | foretold |\n|---|---|---|---|---|")
    with Peak() as found:
        cmap = ct.diagnose(model, tokenizer, safety=safety, utility=utility, config=attribution)
    row("map by attribution", found, planned.total("attribution").seconds, planned.peak_memory.get("attribution"))
    n_layers = config.num_hidden_layers
    k = min(options.exact_layers, n_layers)
    layers = [(2 * i + 1) * n_layers // (2 * k) for i in range(k)]
    with Peak() as found:
        exact = attribution.model_copy(update={"measure": "margin", "layers": tuple(layers)})
        ct.diagnose(model, tokenizer, safety=safety, utility=utility, config=exact)
    row(f"map by margins, {k} of {n_layers} layers", found, planned.total("margin").seconds * k / n_layers)
    tune, align = ct.TuneConfig(max_steps=3), ct.examples("starter-align", limit=64)
    work = planner.training(align, [], tune)
    with tempfile.TemporaryDirectory() as folder, Peak() as found:
        result = ct.tune(model, tokenizer, ct.select(cmap), data=align, out=Path(folder) / "adapter", config=tune)
    row(f"training, {result.steps} steps and the certificate", found, work.cost.seconds, work.peak_memory)
    print(f"a step alone: {duration(result.seconds / result.steps)}")


if __name__ == "__main__":
    main()
