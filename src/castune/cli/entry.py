"""What surrounds a command: one line for an error, exit codes, signals, and libraries that keep quiet."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress

from typer.completion import completion_init

from castune.cli.commands import NAME, app
from castune.errors import CastuneError, NothingScored, of_the_machine
from castune.secrets import redacted

_INTERRUPTED = 130
_stopped_by: int = signal.SIGINT


def main() -> None:
    """Entry point: user errors are one line and exit code 2; an interrupt leaves finished stages in place."""
    _quiet_libraries()
    completion_init()
    # Schedulers of clusters ask so before they kill: what was begun is tidied up, as at Ctrl-C.
    with suppress(ValueError):  # not in the main thread of a program that calls this
        signal.signal(signal.SIGTERM, _terminated)
    try:
        # By its name wherever it was started from, which is what shells complete and messages repeat.
        app(prog_name=NAME)
    except CastuneError as error:
        _fail(str(error), 1 if isinstance(error, NothingScored) else 2)
    except Exception as error:
        if not (message := of_the_machine(error)):
            raise
        _fail(message)
    except KeyboardInterrupt:
        _tell_stopped()
    except SystemExit as end:
        if end.code != _INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise
        _tell_stopped()


def _terminated(number: int, frame: object) -> None:
    global _stopped_by
    _stopped_by = number
    raise KeyboardInterrupt


def _tell_stopped() -> None:
    word = "interrupted" if _stopped_by == signal.SIGINT else "terminated"
    print(f"\n{word}; finished stages are kept, run the same command again to continue", file=sys.stderr)
    sys.exit(128 + _stopped_by)


def _fail(message: str, code: int = 2) -> None:
    # One line, whatever a library put into it; and what went wrong may have had a key in it.
    print(f"error: {redacted(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


def _quiet_libraries() -> None:
    """castune's own log on standard error; libraries speak up only for warnings and errors."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The first rank of a torchrun job speaks for all.
    logging.getLogger("castune").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # PEFT imports it where it is installed, and it tells of kernels that only 4-bit layers on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Warnings by libraries about their own deprecations are not for the user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    # Every shape of a batch adds its kernels to oneDNN's cache, half a gigabyte by the time its 1,024 places are full.
    # The layers of a model share theirs, so a batch needs a few dozen. Read when torch is loaded.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
