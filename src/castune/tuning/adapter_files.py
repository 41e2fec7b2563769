"""A LoRA adapter on disk, as PEFT writes it and reads it: settings and pairs of A and B."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from castune.artifacts import Certificate
from castune.artifacts.fingerprints import same_model
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CERTIFICATE_FILE
from castune.core.gguf import display_name
from castune.core.provenance import fingerprint
from castune.errors import CastuneError, CertificateError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER_NAME = "default"
# What PEFT puts before the module paths of the base model.
PREFIX = "base_model.model."
_COMPILED = "_orig_mod."

# Settings of an adapter whose tensors do not tell what it adds to the weights, with the reason.
_UNREADABLE = {
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "it pools the inputs",
    "use_bdlora": "its matrices are block diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it cuts singular values off the base weights",
    "monteclora_config": "it samples its matrices",
}
# Settings under which more than the selected rows would change, with the reason.
_NOT_PLAIN = {
    "use_dora": "DoRA rescales every row",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it trains embeddings",
    "rank_pattern": "ranks must be equal",
    "alpha_pattern": "alphas must be equal",
    "target_parameters": "it adapts parameters outside the query projections",
    "lora_bias": "it trains biases",
}
# Settings that say which modules an adapter is for.
_ADDRESSES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_PLAIN_INITS = (True, False, "gaussian")
# Others that leave the base weights as they are too; what is trained from them need not begin at zero.
_OTHER_INITS = ("eva", "orthogonal")


def save_adapter(peft_model: PeftModel, weights: dict[str, Tensor] | None, folder: str | Path) -> None:
    """Write an adapter as a standard PEFT adapter.

    Args:
        peft_model: the wrapped model.
        weights: the adapter's parameters; None: those that the model holds.
        folder: where to.
    """
    # PEFT would ask the hub whether the vocabulary was resized, and then save embeddings, which are never trained here.
    peft_model.save_pretrained(
        folder, selected_adapters=[ADAPTER_NAME], state_dict=weights, save_embedding_layers=False
    )
    _sort_modules(Path(folder))


def adapter_weights(peft_model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by name, gathered where FSDP has sharded them: all processes have to call this."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            full_tensor = getattr(parameter, "full_tensor", None)
            found[name] = (parameter if full_tensor is None else full_tensor()).detach()
    return found


def save_config(config: LoraConfig, folder: Path) -> None:
    """Write the settings of an adapter into a directory, as PEFT does but for the order of modules."""
    config.save_pretrained(folder)
    _sort_modules(folder)


def _sort_modules(folder: Path) -> None:
    """PEFT keeps module names in a set: without an order of their own, one training would have many hashes."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def plain_lora_config(adapter: Path) -> dict[str, Any]:
    """The settings of a plain LoRA adapter, `r` an int and `lora_alpha` a float; its update is `scaling_of` B A.

    Args:
        adapter: directory of a PEFT adapter.

    Raises:
        CertificateError: missing, damaged, or an adapter that changes more than its tensors A and B say.
    """
    config = _lora_config(adapter, {**_NOT_PLAIN, **_UNREADABLE}, _PLAIN_INITS, "plain LoRA")
    if config.get("bias", "none") != "none":
        raise CertificateError(f"{adapter / ADAPTER_CONFIG}: bias is {config['bias']!r}, accepted: none")
    return config


def any_lora_config(adapter: Path) -> dict[str, Any]:
    """The settings of a LoRA adapter whose tensors say what it adds to the weights, plain or not.

    Raises:
        CertificateError: missing, damaged, or an adapter whose tensors do not say it.
    """
    return _lora_config(adapter, _UNREADABLE, (*_PLAIN_INITS, *_OTHER_INITS), "LoRA and DoRA, of all modules or some")


def _lora_config(adapter: Path, refused: Mapping[str, str], inits: Sequence[object], accepted: str) -> dict[str, Any]:
    path = adapter / ADAPTER_CONFIG
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        peft_type = config["peft_type"]
        rank, alpha = int(config.get("r", 0)), float(config.get("lora_alpha", 0))
        _check_addresses(config)
        if not math.isfinite(alpha):
            raise ValueError(f"lora_alpha is {alpha}")
    except (FileNotFoundError, NotADirectoryError):
        raise CertificateError(f"{path}: no such file; {_what_else(adapter)}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise CertificateError(f"{path}: damaged: {error!r}") from None
    if peft_type != "LORA":
        raise CertificateError(f"{path}: peft_type is {peft_type}, accepted: LORA")
    if rank < 1:
        raise CertificateError(f"{path}: r is {rank}, accepted: at least 1")
    for key, reason in refused.items():
        if config.get(key):
            raise CertificateError(f"{path}: {key} is set: {reason}; accepted: {accepted}")
    if config.get("init_lora_weights", True) not in inits:
        raise CertificateError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}: it changes the base weights; "
            f"accepted: {', '.join(map(str, inits))}"
        )
    return {**config, "r": rank, "lora_alpha": alpha, "target_modules": config["target_modules"] or []}


def _check_addresses(config: Mapping[str, Any]) -> None:
    """Refuse settings by which PEFT could not tell the modules of an adapter: they are names, or regular expressions.

    Raises:
        KeyError, TypeError, ValueError, re.error: the message has the setting.
    """
    layers = config.get("layers_to_transform")
    if not (layers is None or type(layers) is int or _is_list_of(int, layers)):
        raise ValueError(f"layers_to_transform is {layers!r}")
    # Nothing is named where parameters are adapted, of experts for example.
    is_named = config["target_modules"] is not None or bool(config.get("target_parameters"))
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        names = config.get(key)
        if isinstance(names, str) and key != "modules_to_save":
            re.compile(names)
        elif not (names is None or _is_list_of(str, names)) or (key == "target_modules" and not is_named):
            raise ValueError(f"{key} is {names!r}")
        elif key == "layers_pattern":
            re.compile("|".join(names or ()))
    # PEFT takes them with each other alone.
    pattern = config.get("layers_pattern")
    if isinstance(config["target_modules"], str) and not (layers is None and pattern is None):
        raise ValueError("target_modules is a regular expression, and layers_to_transform or layers_pattern is set")
    if pattern and layers is None:
        raise ValueError("layers_pattern is set, and layers_to_transform is not")


def _is_list_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _what_else(adapter: Path) -> str:
    """What to give instead of a directory without an adapter; PEFT puts several of one model into directories below."""
    names = sorted(path.parent.name for path in adapter.glob(f"*/{ADAPTER_CONFIG}"))
    if len(names) > 1:
        return f"it holds several adapters ({', '.join(names)}): give the directory of one"
    return "give the directory of a PEFT adapter"


def scaling_of(config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B A by: alpha / r, of rank-stabilised LoRA alpha / sqrt(r)."""
    rank, alpha = config["r"], config["lora_alpha"]
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def adapter_tensors(weights: Path) -> dict[str, Tensor]:
    """All tensors of an adapter's weights file.

    Raises:
        CertificateError: no readable safetensors file. Pickled weights are never read.
    """
    pickled = weights.with_suffix(".bin")
    if pickled.is_file() and not weights.is_file():
        raise CertificateError(
            f"{weights}: no such file, and {pickled.name} beside it is pickled, which is never read: it could run "
            "code; load the adapter with PEFT where you trust it, and save it again (save_pretrained)"
        )
    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CertificateError(f"{weights}: no readable safetensors file ({error})") from None


def misnamed(key: str) -> str | None:
    """Why PEFT would not load a tensor of this name, in words; None where its name is one that PEFT writes."""
    if _COMPILED in key:
        return f"has the prefix {_COMPILED!r} of torch.compile"
    return None if key.startswith(PREFIX) else f"does not begin with {PREFIX!r}"


def lora_pairs(weights: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module path, A, B) of every module an adapter's weights file adapts.

    Raises:
        CertificateError: no readable safetensors file, or it holds anything but pairs of A and B.
    """
    tensors = adapter_tensors(weights)
    for key in tensors:
        if (why := misnamed(key)) is not None:
            raise CertificateError(f"{weights}: {key} {why}: PEFT would not load it, and the model would stay as it is")
    paths = sorted({key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for key in tensors})
    known = {f"{path}.lora_{part}.weight" for path in paths for part in "AB"}
    if known != tensors.keys():
        odd = sorted(known ^ tensors.keys())[0]
        why = "unexpected or missing tensor"
        if odd in tensors and (".base_layer." in odd or ".lora_embedding_" in odd or ".lora_" not in odd):
            why = (
                "the file holds more than LoRA of linear layers, as PEFT writes it where embeddings or the output head "
                "are trained; accepted: A and B of linear layers alone; castune inspect reads such an adapter"
            )
        raise CertificateError(f"{weights}: {odd}: {why}")
    for path in paths:
        yield path.removeprefix(PREFIX), tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]


def addressed_modules(config: Mapping[str, Any], modules: Collection[str]) -> set[str]:
    """Those of some modules of the base that PEFT would adapt by an adapter's settings."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = LoraConfig(**{key: config.get(key) for key in _ADDRESSES})
    return {path for path in modules if check_target_module_exists(settings, path)}


def check_loaded(adapter: Path, config: Mapping[str, Any], paths: Collection[str], modules: Collection[str]) -> None:
    """Refuse an adapter with tensors that PEFT leaves out without a word, by its own way of matching.

    Args:
        adapter: directory of a PEFT adapter.
        config: its settings.
        paths: of the modules that its weights file has tensors for.
        modules: of the base.
    """
    addressed = addressed_modules(config, paths)
    for path in paths:
        if path not in modules:
            raise CertificateError(
                f"{adapter / ADAPTER_WEIGHTS}: adapts {PREFIX}{path}, which this model does not have: made "
                "for another model"
            )
        if config["target_modules"] != "all-linear" and path not in addressed:
            told = (
                ", ".join(f"{key} = {config[key]!r}" for key in _ADDRESSES if config.get(key)) or "target_modules = []"
            )
            raise CertificateError(
                f"{adapter / ADAPTER_CONFIG}: by {told} PEFT would not load the tensors of {PREFIX}{path}"
            )


def check_base(adapter: Path, config: Mapping[str, Any], base: PreTrainedModel) -> None:
    """Refuse an adapter of another base model: by its certificate where it has one, else by the name it gives."""
    if (adapter / CERTIFICATE_FILE).is_file():
        certified, loaded = Certificate.load(adapter).model_fingerprint, fingerprint(base)
        if not same_model(certified, loaded):
            raise CastuneError(f"{adapter} was made for model {certified}, this model is {loaded}")
        return
    wanted, found = config.get("base_model_name_or_path"), getattr(base.config, "_name_or_path", "")
    # Directories may lie elsewhere and hub ids may be mirrored: only the model's own name counts.
    if wanted and found and _model_name(str(wanted)) != _model_name(str(found)):
        raise CastuneError(
            f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path is {wanted!r}, the base model here is "
            f"{display_name(str(found))!r}; if they are one model under two names, change it in that file"
        )


def _model_name(path: str) -> str:
    # A snapshot in the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    cached = [part.rpartition("--")[2] for part in Path(path).parts if part.startswith("models--")]
    return (cached[0] if cached else display_name(path).rstrip("/").rpartition("/")[2]).lower()
