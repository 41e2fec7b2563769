"""What a result was made from: a model's fingerprint, versions, machine, command, time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from castune.artifacts.files import text_hash
from castune.artifacts.fingerprints import QUANTISED
from castune.artifacts.records import CodeRecord, ModelRecord, Provenance
from castune.artifacts.rules import RULES
from castune.core.gguf import display_name
from castune.core.quantisation import is_quantised
from castune.data.template import prints_date, template_date
from castune.secrets import redacted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Elements sampled from every tensor for the fingerprint.
_SAMPLES = 4096


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A digest of names, shapes and sampled values of all parameters: 16 hex digits of SHA-256.

    Values are compared after rounding to bfloat16, so the same checkpoint loaded in float32 and in bfloat16 has
    the same fingerprint. It tells models apart; it is no proof that every weight is equal (`certify` is).

    The first 8 digits are of what quantisation leaves as it is, vectors and the input embeddings; the others of the
    rest. A quantised model has the word `quantised` in their place.
    """
    kept, rest = hashlib.sha256(), hashlib.sha256()
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=True)):
        is_kept = parameter.ndim < 2 or (embeddings is not None and parameter is embeddings.weight)
        if is_kept or parameter.is_floating_point():
            _add(kept if is_kept else rest, name, parameter)
    return kept.hexdigest()[:8] + (QUANTISED if is_quantised(model) else rest.hexdigest()[:8])


def _add(digest: Any, name: str, parameter: Tensor) -> None:
    flat = parameter.detach().flatten()
    if flat.numel() > _SAMPLES:
        # Random places: a fixed stride would meet the same few columns in every row.
        places = torch.randint(flat.numel(), (_SAMPLES,), generator=torch.Generator().manual_seed(0))
        flat = flat[places.to(flat.device)]
    sample = flat.to(device="cpu", dtype=torch.bfloat16)
    digest.update(f"{name}{tuple(parameter.shape)}".encode())
    digest.update(sample.view(torch.int16).numpy().tobytes())


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the template that prompts go through, on its day: with another everything measured is another thing."""
    text = str(getattr(tokenizer, "chat_template", None) or "")
    return text_hash(text + template_date(tokenizer).isoformat() if prints_date(tokenizer) else text)


def model_record(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase = None, *, name: str | None = None
) -> ModelRecord:
    """Identity of a model as it is stored in artifacts; with its chat template where a tokenizer is given."""
    config = model.config
    record: ModelRecord = {
        "name": name or display_name(getattr(config, "_name_or_path", "")) or type(model).__name__,
        "type": config.model_type,
        "fingerprint": fingerprint(model),
        # Packed integers hold several parameters each.
        "parameters": model.num_parameters() if is_quantised(model) else sum(p.numel() for p in model.parameters()),
        "quantised": is_quantised(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "commit": getattr(config, "_commit_hash", None),
    }
    if tokenizer is not None:
        record["chat_template"] = chat_template_digest(tokenizer)
        if prints_date(tokenizer):
            record["template_date"] = template_date(tokenizer).isoformat()
    # Where transformers puts the modules that came with a model.
    if type(model).__module__.startswith("transformers_modules"):
        record["remote_code"] = True
    return record


def provenance(seed: int | None = None) -> Provenance:
    """Versions, machine, command and time of this process."""
    packages = ("castune", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    optional = ("torchjd", "trl", "bitsandbytes", "math-verify", "vllm", "openai", "lm_eval", "ray")
    return {
        "rules": RULES,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in (*packages, *optional)}},
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "code": _code_state(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_state() -> CodeRecord | None:
    """Commit and dirty flag of castune's own checkout; None where it is installed without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        return {
            "commit": _git(root, "rev-parse", "HEAD"),
            "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
