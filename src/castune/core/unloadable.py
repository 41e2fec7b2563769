"""Why a model could not be loaded, in one line."""

from __future__ import annotations

from safetensors import SafetensorError

from castune.errors import CastuneError

# What transformers, tokenizers and safetensors raise for files that are missing, damaged or of another kind.
NOT_LOADABLE = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def unloadable(what: str, error: Exception) -> CastuneError:
    """The error to raise in the place of one of `NOT_LOADABLE`; `what` says what was tried."""
    return CastuneError(f"{what}: {_reason(error)} Accepted: default, a hub id, a model directory, a .gguf file.")


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which castune runs only where it is told to: read that code, pin its "
            "revision, and set trust_remote_code = true in the recipe (castune diagnose: --trust-remote-code)."
        )
    if "safetensors" in str(error) and not isinstance(error, SafetensorError):
        return f"{_first_line(error)} Pickled weights can run code and are not read: convert them to safetensors."
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
