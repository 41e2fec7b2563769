"""Recipes: unknown keys are refused, what was resolved is what is loaded, a bad value is one line."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from castune.config import DataConfig, DiagnoseConfig, EvaluateConfig, Recipe, SelectConfig, TuneConfig, to_toml
from castune.errors import CastuneError

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = {
    "safety": DataConfig, "utility": DataConfig, "align": DataConfig, "diagnose": DiagnoseConfig, "select": SelectConfig,
    "tune": TuneConfig, "evaluate": EvaluateConfig,
}  # fmt: skip


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def one_line(error: CastuneError) -> str:
    text = str(error)
    assert "\n" not in text
    assert "pydantic" not in text
    return text


# -- unknown keys


@pytest.mark.parametrize("stage", list(STAGES))
def test_unknown_key_of_a_stage_lists_the_accepted_ones(tmp_path: Path, stage: str) -> None:
    needed = 'source = "x"\n' if STAGES[stage] is DataConfig else ""
    path = written(tmp_path, f'out = "r"\n[{stage}]\n{needed}typo = 1\n')
    with pytest.raises(CastuneError) as caught:
        Recipe.load(path)
    text = one_line(caught.value)
    assert text.startswith(f"{path}: ")
    assert stage in text
    assert "unknown key" in text
    assert "typo" in text
    assert all(name in text for name in STAGES[stage].model_fields)


def test_unknown_top_level_key_lists_the_accepted_ones(tmp_path: Path) -> None:
    with pytest.raises(CastuneError, match="unknown key 'modle'") as caught:
        Recipe.load(written(tmp_path, 'out = "r"\nmodle = "x"\n'))
    assert all(name in one_line(caught.value) for name in Recipe.model_fields)


@pytest.mark.parametrize("config", [*dict.fromkeys(STAGES.values()), Recipe])
def test_every_config_refuses_unknown_keys_in_python_too(config: type[BaseModel]) -> None:
    needed = {DataConfig: {"source": "x"}, Recipe: {"out": "x"}}.get(config, {})
    config(**needed)
    with pytest.raises(CastuneError, match="'typo'"):
        config(**needed, typo=1)


@pytest.mark.parametrize("key", ["self", "cls"])
def test_a_key_that_python_uses_is_unknown_too(tmp_path: Path, key: str) -> None:
    for text in (f'out = "r"\n{key} = 1\n', f'out = "r"\n[tune]\n{key} = 1\n'):
        with pytest.raises(CastuneError, match=f"unknown key '{key}'"):
            Recipe.load(written(tmp_path, text))


def test_missing_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CastuneError, match="'out' is missing"):
        Recipe.load(written(tmp_path, 'model = "default"\n'))


# -- round trip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_resolve_to_themselves(tmp_path: Path, path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.load(written(tmp_path, recipe.to_toml())) == recipe


def test_resolved_recipe_writes_every_default_out(tmp_path: Path) -> None:
    values = tomllib.loads(Recipe(out="r").to_toml())
    for stage, config in STAGES.items():
        defaults = {name for name, field in config.model_fields.items() if field.default is not None}
        assert defaults <= values[stage].keys() | {"limit"}


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t\n\r"), min_size=1)
NUMBERS = st.floats(1e-12, 1e6)
SOURCES = st.builds(
    DataConfig, source=TEXT, limit=st.none() | st.integers(1, 10**6), balance=st.none() | TEXT,
    shares=st.none() | st.dictionaries(TEXT | st.just(""), st.floats(0, exclude_min=True, allow_infinity=False), min_size=1),
)  # fmt: skip
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,100}", fullmatch=True).filter(lambda name: name not in DataConfig.model_fields)


@settings(max_examples=100, deadline=None)
@given(
    recipe=st.builds(
        Recipe,
        model=TEXT, out=TEXT, seed=st.integers(-(2**40), 2**40), revision=st.none() | TEXT,
        safety=SOURCES,
        utility=SOURCES | st.dictionaries(NAMES, SOURCES, min_size=1).filter(
            lambda domains: len({name.lower() for name in domains}) == len(domains)
        ),
        diagnose=st.builds(DiagnoseConfig, layers=st.none() | st.lists(st.integers(0, 99)).map(tuple)),
        select=st.builds(SelectConfig, fraction=st.floats(0, 1, exclude_min=True)),
        tune=st.builds(TuneConfig, learning_rate=NUMBERS, alpha=NUMBERS, weight_decay=NUMBERS, freeze_a=st.booleans()),
        evaluate=st.builds(EvaluateConfig, suites=st.lists(TEXT, min_size=1, unique=True).map(tuple)),
    )
)  # fmt: skip
def test_resolved_toml_loads_to_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8", newline="")
    assert Recipe.load(path) == recipe


SHARED = {"a": 0.5, "b c": 1.0, "d.e": 2.5}


@pytest.mark.parametrize(
    "overrides",
    [
        ['align.shares={a = 0.5, "b c" = 1, "d.e" = 2.5}'],
        ["align.shares.a=0.5", "align.shares.b c=1", 'align.shares={a = 0.5, "b c" = 1.0, "d.e" = 2.5}'],
    ],
)
@pytest.mark.parametrize("lines", ['align = "mine.jsonl"', '[align]\nsource = "mine.jsonl"\nshares = {x = 1}'])
def test_shares_can_be_set(tmp_path: Path, lines: str, overrides: list[str]) -> None:
    recipe = Recipe.load(written(tmp_path, f'out = "r"\n{lines}\n'), overrides)
    assert recipe.align == DataConfig(source="mine.jsonl", shares=SHARED)
    assert tomllib.loads(recipe.to_toml())["align"]["shares"] == SHARED


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ("{}", "shares: Dictionary should have at least 1 item"),
        ("{harmful = 0}", "shares.harmful = 0: Input should be greater than 0"),
        ("{harmful = 1, benign = -0.5}", "shares.benign = -0.5: Input should be greater than 0"),
        ("{harmful = nan}", "shares.harmful = nan: "),
        ("{harmful = inf}", "shares.harmful = inf: Input should be a finite number"),
        ('{harmful = "half"}', "shares.harmful = 'half': Input should be a valid number"),
        ('{harmful = "0.5"}', "shares.harmful = '0.5': Input should be a valid number"),
        ("{harmful = true}", "shares.harmful = True: Input should be a valid number"),
        ("{harmful = {a = 1}}", "shares.harmful: Input should be a valid number"),
        ("{harmful = [1]}", "shares.harmful = [1]: Input should be a valid number"),
        ("0.5", "shares = 0.5: Input should be a valid dictionary"),
        ("[0.5, 0.5]", "shares = [0.5, 0.5]: Input should be a valid dictionary"),
        ("{harmful: 0.5}", "shares = '{harmful: 0.5}': Input should be a valid dictionary"),
    ],
)
@pytest.mark.parametrize("table", ["align", "utility.plain"])
def test_bad_shares_are_one_line_that_names_them(tmp_path: Path, table: str, shares: str, said: str) -> None:
    path = written(tmp_path, f'out = "r"\n[{table}]\nsource = "x"\n')
    with pytest.raises(CastuneError) as caught:
        Recipe.load(path, [f"{table}.shares={shares}"])
    assert said in one_line(caught.value)
    assert table.partition(".")[0] in str(caught.value)


def test_to_toml_leaves_absent_values_out() -> None:
    assert tomllib.loads(to_toml({"a": None, "b": {"c": None, "d": [1, 2]}})) == {"b": {"d": [1, 2]}}


@pytest.mark.parametrize(
    "values",
    [
        {"a": {"b": {"c": {"d": 1}, "e": 2}, "f": {}}, "g": 3},
        {"a": {"b": {"c": 1}}},
        {"a.b": {'"': {" ": 1}}, "": 2},
        {},
    ],
)
def test_to_toml_writes_tables_in_tables(values: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(values)) == values


# -- utility domains


DOMAINS = """
out = "r"
[utility]
plain = "starter-utility"
[utility.knowledge]
source = "mmlu"
limit = 100
"""


def test_a_table_without_a_source_is_a_table_of_domains(tmp_path: Path) -> None:
    recipe = Recipe.load(written(tmp_path, DOMAINS))
    knowledge = DataConfig(source="mmlu", limit=100)
    assert recipe.utility == {"plain": DataConfig(source="starter-utility"), "knowledge": knowledge}
    assert Recipe(**{**dict(recipe), "seed": 3}).utility == recipe.utility
    assert "\n[utility]\n" not in recipe.to_toml()
    assert "\n[utility.knowledge]\n" in recipe.to_toml()


def test_overrides_reach_into_domains(tmp_path: Path) -> None:
    path = written(tmp_path, DOMAINS)
    changes = ["utility.knowledge.limit=5", "utility.plain.limit=7", "utility.new=csqa=a b.jsonl"]
    recipe = Recipe.load(path, changes)
    assert recipe.utility == {
        "plain": DataConfig(source="starter-utility", limit=7),
        "knowledge": DataConfig(source="mmlu", limit=5),
        "new": DataConfig(source="csqa=a b.jsonl"),
    }
    assert Recipe.load(path, ["utility=mmlu"]).utility == DataConfig(source="mmlu")


BAD_DOMAINS = {
    "{}": "'source' is missing",
    "{limit = 5}": "'source' is missing",
    "{limit = 5, maths = 'x'}": "domain 'limit': this is a key of a data source",
    "{source = 'x', maths = 'y'}": "unknown key 'maths'; accepted here: source, limit",
    "{maths = {limit = 5}}": "domain 'maths': 'source' is missing",
    "{maths = {source = 'x', typo = 1}}": "domain 'maths': unknown key 'typo'; accepted here: source, limit",
    "{maths = {source = 'x', limit = 0}}": "domain 'maths': limit = 0",
    "{maths = 5}": "domain 'maths': accepted: a source, or a table",
    "{'a b' = 'x'}": "domain 'a b': accepted: 1 to 100 letters",
    "{'../x' = 'x', y = 'y'}": "domain '../x'",
    "{Maths = 'x', maths = 'y'}": "domains 'Maths' and 'maths' differ in capitals only",
    "['mmlu', 'csqa']": "accepted: a source, or a table",
}


@pytest.mark.parametrize("utility", BAD_DOMAINS)
def test_bad_domains_are_one_line_that_names_them(tmp_path: Path, utility: str) -> None:
    with pytest.raises(CastuneError) as caught:
        Recipe.load(written(tmp_path, f'out = "r"\nutility = {utility}\n'))
    text = one_line(caught.value)
    assert "utility" in text
    assert BAD_DOMAINS[utility] in text


# -- overrides


def test_overrides_take_toml_values_and_bare_words(tmp_path: Path) -> None:
    path = written(tmp_path, 'out = "r"\nsafety = "mine.jsonl"\n[tune]\nrank = 8\n')
    recipe = Recipe.load(
        path,
        [
            "tune.learning_rate=2e-4", "tune.rank=16", "tune.freeze_a=true", "model=some/model", "out='a b'",
            'evaluate.suites=["mmlu", "csqa"]', "select.zone = risky", "safety.limit=5", "align=mmlu=my copy.jsonl",
        ],
    )  # fmt: skip
    assert (recipe.tune.learning_rate, recipe.tune.rank, recipe.tune.freeze_a) == (2e-4, 16, True)
    assert (recipe.model, recipe.out, recipe.select.zone) == ("some/model", "a b", "risky")
    assert recipe.evaluate.suites == ("mmlu", "csqa")
    assert recipe.safety == DataConfig(source="mine.jsonl", limit=5)
    assert recipe.align.source == "mmlu=my copy.jsonl"
    assert recipe.tune.alpha == TuneConfig().alpha


def test_a_later_override_wins(tmp_path: Path) -> None:
    assert Recipe.load(written(tmp_path, 'out = "r"'), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["tune.rank", "=5", "", " =1"])
def test_override_without_key_or_value_shows_the_form(tmp_path: Path, override: str) -> None:
    with pytest.raises(CastuneError, match="key=value"):
        Recipe.load(written(tmp_path, 'out = "r"'), [override])


@pytest.mark.parametrize(
    "override", ["tune.rnk=1", "tnue.rank=1", "tune.rank.deep=1", "seed.deep=1", "tune=5", "out.x=1"]
)
def test_override_of_something_that_does_not_exist_is_one_line(tmp_path: Path, override: str) -> None:
    with pytest.raises(CastuneError) as caught:
        Recipe.load(written(tmp_path, 'out = "r"\nseed = 1\n'), [override])
    assert override.partition("=")[0].split(".")[0] in one_line(caught.value)


# -- bad files and values


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CastuneError, match=r"absent\.toml: no such recipe"):
        Recipe.load(tmp_path / "absent.toml")
    with pytest.raises(CastuneError, match=r"recipe\.toml: malformed TOML.*line 2"):
        Recipe.load(written(tmp_path, 'out = "r"\nmodel = \n'))
    (tmp_path / "recipe.toml").write_bytes(b'out = "\xff"')
    with pytest.raises(CastuneError, match="malformed TOML"):
        Recipe.load(tmp_path / "recipe.toml")


BAD_VALUES = [
    "select.fraction=0", "select.fraction=1.5", "select.fraction=-1", "select.fraction=nan", "select.fraction=half",
    "select.zone=middle", "select.score=luck", "select.buckets=0", "select.buckets=4", "select.bucket=1",
    'select.compare=["nowhere"]', "tune.learning_rate=0", "tune.learning_rate=-1e-4", "tune.learning_rate=nan",
    "tune.learning_rate=inf", "tune.rank=0", "tune.rank=1.5", "tune.alpha=0", "tune.alpha=inf", "tune.epochs=0",
    "tune.epochs=inf", "tune.max_steps=0", "tune.batch_size=-4", "tune.warmup_ratio=1", "tune.scheduler=random",
    "tune.weight_decay=-0.1", "tune.weight_decay=inf", "tune.max_grad_norm=0", "diagnose.measure=guess",
    "diagnose.ablation=noise", "diagnose.judge=coin", "diagnose.max_new_tokens=0", "diagnose.gradient_chunks=1",
    "diagnose.layers=[-1]", "diagnose.sensitivity_rank=both", "diagnose.domains=best", "evaluate.suites=[]", 'evaluate.suites=["mmlu", "mmlu"]',
    "evaluate.limit=0", "safety.limit=0", "dtype=float8", "seed=often", "safety=5",
]  # fmt: skip


@pytest.mark.parametrize("override", BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_it(tmp_path: Path, override: str) -> None:
    path = written(tmp_path, 'out = "r"\nsafety = "starter-safety"\n')
    with pytest.raises(CastuneError) as caught:
        Recipe.load(path, [override])
    key = override.partition("=")[0]
    text = one_line(caught.value)
    assert key in text or key.rpartition(".")[2] in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["select.zone=random"],
        ['select.compare=["random"]'],
        ["select.buckets=4", "select.bucket=5"],
        ['select.compare=["safe"]'],
        ['select.compare=["risky", "risky"]'],
    ],
)
def test_a_selection_that_cannot_be_made_fails_before_the_model_is_loaded(tmp_path: Path, overrides: list[str]) -> None:
    # A run would otherwise find out after hours of diagnosis.
    with pytest.raises(CastuneError):
        Recipe.load(written(tmp_path, 'out = "r"'), overrides)


def test_all_bad_values_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CastuneError) as caught:
        Recipe.load(written(tmp_path, 'out = "r"\n[tune]\nrank = 0\nalpha = -1\nlr = 3\n'))
    assert all(key in one_line(caught.value) for key in ("tune", "rank = 0", "alpha = -1", "unknown key", "lr"))


def test_defaults_are_the_papers_table_3() -> None:
    tune = TuneConfig()
    assert (tune.rank, tune.alpha, tune.learning_rate, tune.epochs) == (32, 32, 1e-4, 1)
    assert (tune.batch_size, tune.accumulation, tune.max_length) == (4, 2, 1024)
    select = SelectConfig()
    assert (select.zone, select.fraction, select.score) == ("safe", 0.25, "conflict")


def test_configs_cannot_be_changed_after_they_were_checked() -> None:
    config = TuneConfig()
    with pytest.raises(Exception, match="frozen"):
        config.rank = 0


@pytest.mark.parametrize("config", list(dict.fromkeys(STAGES.values())))
def test_config_defaults_survive_json(config: type[BaseModel]) -> None:
    needed: dict[str, Any] = {"source": "x"} if config is DataConfig else {}
    value = config(**needed)
    assert config(**value.model_dump(mode="json")) == value
    assert inspect.getdoc(config)
