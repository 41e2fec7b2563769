"""The shape of the package: who imports whom, what is public, what is loaded when."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import castune

SRC = Path(castune.__file__).parent
STAGES = {"diagnosis", "selection", "tuning", "evaluation", "report"}
SHARED = {"stats", "core", "artifacts", "data", "config", "names", "purposes", "errors", "secrets"}
# What each room may import of castune, itself aside; `cli` sees everything.
ALLOWED = {
    "errors": set(),
    "secrets": set(),
    "names": {"errors"},
    "purposes": set(),
    "config": {"errors", "names", "secrets"},
    "artifacts": {"errors", "names"},
    # Pure: nothing of ours but errors.
    "stats": {"errors"},
    "data": {"errors", "artifacts", "config"},
    "core": {"errors", "stats", "config", "data", "artifacts", "secrets"},
    # No stage imports another.
    **dict.fromkeys(STAGES, SHARED),
    "steps": SHARED | STAGES,
    # Of no run: whoever has the data asks what they cost.
    "plan": SHARED | STAGES,
    "pipeline": SHARED | STAGES | {"steps"},
    "console_table": set(),
    "console": SHARED | STAGES | {"steps", "plan", "console_table"},
    "study": SHARED | STAGES | {"steps", "plan", "console", "console_table"},
}
FILES = sorted(path for path in SRC.rglob("*.py"))


def part_of(path: Path) -> str:
    """The first part of the module name below castune: `core`, `select`, `cli`, ..."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of castune that a file imports, inside functions and for type checking too."""
    package = ["castune", *path.relative_to(SRC).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from castune import pipeline` imports a part, `from castune.core.heads import X` a name.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("castune.")}
    return found


def test_the_rooms_are_those_of_the_design() -> None:
    assert {part_of(path) for path in FILES} - {"__init__"} == {*ALLOWED, "cli"}


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in ALLOWED], ids=lambda p: str(p.relative_to(SRC)))
def test_no_room_imports_what_it_may_not_see(path: Path) -> None:
    part = part_of(path)
    foreign = imported_parts(path) - ALLOWED[part] - {part}
    assert not foreign, f"{path.relative_to(SRC)} imports {sorted(foreign)}"


def test_the_import_check_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SRC", tmp_path)
    path = tmp_path / "tuning" / "x.py"
    path.parent.mkdir()
    path.write_text(
        "import castune.evaluation.run\nfrom castune import selection\ndef f():\n    from ..diagnosis import score\n"
    )
    assert imported_parts(path) == {"evaluation", "selection", "diagnosis"}


@pytest.mark.processes
def test_light_parts_do_not_need_torch() -> None:
    parts = ("artifacts", "data.sources", "data.chat", "config", "errors", "selection", "steps.directory", "cli")
    parts += ("study.worker", "study.watch", "steps.gate", "report.gate")
    loaded = loaded_after("; ".join(f"import castune.{part}" for part in parts))
    assert {f"castune.{part}" for part in parts} <= loaded
    assert not loaded & {"torch", "transformers", "peft"}


def test_artifacts_know_no_model_library() -> None:
    for path in FILES:
        if part_of(path) in ("artifacts", "config", "errors", "selection"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(?:from|import) (?:torch|transformers|peft)\b", text, re.MULTILINE), path


def test_few_files_know_architectures() -> None:
    """One a kind of place: attention heads, keys and values, MLPs."""
    names = re.compile(
        r"\b(?:[qkv]_proj|o_proj|qkv_proj|c_attn|c_proj|query_key_value|Wqkv|out_proj|self_attn|LlamaAttention"
        r"|(?:gate|up|down|gate_up)_proj|c_fc|fc1|fc2|dense_h_to_4h|dense_4h_to_h)\b"
    )
    knowing = {}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        }
        hits = {
            hit
            for node in ast.walk(tree)
            for text in (
                [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
                else [node.attr] if isinstance(node, ast.Attribute)
                else []
            )
            for hit in names.findall(text)
        }  # fmt: skip
        if hits:
            knowing[str(path.relative_to(SRC))] = hits
    assert set(knowing) == {"core/heads.py", "core/key_values.py", "core/mlps.py"}, knowing


def test_hooks_are_registered_in_few_places() -> None:
    places = {
        str(path.relative_to(SRC))
        for path in FILES
        if re.search(r"\.register_\w*hook\(", path.read_text(encoding="utf-8"))
    }
    # losses.py: float32 logits from a 16-bit output head; generation.py: its inputs contiguous. No matter of heads.
    of_the_output_head = {"core/losses.py", "core/generation.py"}
    assert places == {"core/probes.py", "core/ablation.py", "core/attribution.py", *of_the_output_head}


def loaded_after(code: str) -> set[str]:
    """Names of all modules in a fresh interpreter after running `code`."""
    command = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "altair", "pyarrow", "pandas", "scipy", "numpy"}


@pytest.mark.processes
def test_import_castune_is_light() -> None:
    loaded = loaded_after("import castune; dir(castune); castune.__version__")
    assert "castune" in loaded
    assert not loaded & HEAVY


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["evaluate", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"sys.argv = ['castune', *{arguments!r}]\nfrom castune.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    loaded = loaded_after(code)
    assert "castune.cli" in loaded
    assert not loaded & HEAVY


# Section 3 of the design: name -> (positional parameters, keyword-only parameters with their defaults).
REQUIRED = inspect.Parameter.empty
SIGNATURES = {
    "load": (["name"], {"dtype": "auto", "device": "auto", "revision": None}),
    "examples": (["source"], {"limit": None, "seed": 0}),
    "diagnose": (["model", "tokenizer"], {"safety": REQUIRED, "utility": REQUIRED, "out": None}),
    "select": (
        ["cmap"],
        {"zone": "safe", "fraction": 0.25, "buckets": None, "bucket": None, "score": "conflict", "seed": None},
    ),
    "sparse_lora": (["model", "selection"], {"r": 32, "alpha": 32, "freeze_a": False}),
    "certify": (["base", "adapter", "selection"], {}),
    "judge": (["name"], {}),
    "evaluate": (["model", "tokenizer"], {}),
    "utility_cost_ratio": (
        [], dict.fromkeys(("utility_before", "utility_after", "safety_before", "safety_after"), REQUIRED)
    ),
    "correlation": (["scores", "costs"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_public_functions_have_the_signatures_of_the_design(name: str) -> None:
    parameters = inspect.signature(getattr(castune, name)).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword_only = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    expected_positional, expected_keywords = SIGNATURES[name]
    assert positional == expected_positional
    assert expected_keywords.items() <= keyword_only.items()
    # What the design does not name must be optional.
    assert all(default is not REQUIRED for key, default in keyword_only.items() if key not in expected_keywords)


def test_evaluate_takes_suites_by_keyword() -> None:
    assert inspect.signature(castune.evaluate).parameters["suites"].kind is inspect.Parameter.KEYWORD_ONLY


def test_public_classes_have_the_members_of_the_design() -> None:
    assert all(hasattr(castune.ConflictMap, name) for name in ("load", "save", "to_pandas"))
    assert all(hasattr(castune.HeadSelection, name) for name in ("load", "save"))
    assert hasattr(castune.HeadSelection, "heads")
    assert all(hasattr(castune.HeadLayout, name) for name in ("of", "n_layers", "n_heads"))
    wanted = {"measure", "ablation", "max_new_tokens", "judge", "batch_tokens", "sensitivity_rank"}
    assert wanted <= set(castune.DiagnoseConfig.model_fields)


def test_every_public_name_can_be_loaded() -> None:
    for name in castune.__all__:
        assert getattr(castune, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        castune.nothing_of_the_kind  # noqa: B018


def test_a_platform_without_file_locks_is_refused_in_one_line() -> None:
    code = "import sys; sys.modules['fcntl'] = None; sys.argv = ['castune', 'select', 'nowhere']; import castune.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"error: this platform has no POSIX file locks .*WSL 2\n", done.stderr)


def test_no_public_name_is_that_of_a_module() -> None:
    """The import system binds a module on its package when it is first imported, over whatever stands there."""
    modules = {path.stem for path in SRC.glob("*.py")} | {path.parent.name for path in SRC.glob("*/__init__.py")}
    assert {"diagnosis", "pipeline"} <= modules
    assert not modules & set(castune.__all__)


def test_the_package_prints_only_in_the_command_line() -> None:
    for path in FILES:
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert not calls or path == SRC / "cli" / "entry.py", path


def test_no_pickle_and_no_remote_code() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(?:import pickle|torch\.load|torch\.save|joblib|trust_remote_code=True)\b", text), path
        assert not re.search(r'"trust_remote_code": True', text), path
