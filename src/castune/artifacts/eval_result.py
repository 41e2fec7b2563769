"""What an evaluation measured, with the samples it was measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from castune.artifacts.files import locked, text_hash, write_text
from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import ModelRecord, Provenance, Settings
from castune.artifacts.rules import warn_of_old_rules
from castune.artifacts.samples import Sample, is_letter, is_problem
from castune.errors import ArtifactError

METRICS_FILE, SAMPLES_FILE = "metrics.json", "samples.jsonl"
_KIND = "evaluation"
# Metrics of samples that are about to be written.
_NEXT = f".{METRICS_FILE}.next"


@dataclass(frozen=True)
class SuiteResult:
    """The headline number of one suite.

    Attributes:
        suite: the data source.
        purpose: what it measures, and so how `value` is to be read (`castune.purposes`).
        metric: of the purpose: accuracy, refusal_rate, nll, ...
        value: the rate over scored examples, or their mean in nats; None when nothing could be scored.
        standard_error: of `value`; None for fewer than two scored examples.
        interval: Wilson's 95 % interval of a rate, Student's of a mean; None without scored examples.
        n: scored examples.
        unscored: examples the judge could not decide. They are in neither numerator nor denominator.
        judge: `argmax` for scored choices, `stated letter` for written ones, `final answer` for problems,
            `log-likelihood` for continuous suites, else the judge's name.
        max_new_tokens: length limit of generated replies; None where nothing is generated.
        extra: further numbers, for example `answer_margin` with its standard error.
        data_hash: hash of the examples.
        seconds: wall time.
    """

    suite: str
    purpose: str
    metric: str
    value: float | None
    standard_error: float | None
    n: int
    unscored: int
    judge: str
    max_new_tokens: int | None
    extra: dict[str, float | None]
    data_hash: str
    seconds: float
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.interval is not None:
            # JSON has lists.
            object.__setattr__(self, "interval", tuple(self.interval))


@dataclass(frozen=True)
class EvalResult:
    """One model (base or tuned) on several suites.

    Attributes:
        name: which arm this is: `base`, `safe`, `risky`, ...
        suites: results in the order asked for.
        samples: one plain record an example (`castune.artifacts.samples`).
        settings: the resolved `EvaluateConfig`.
        model: identity of the evaluated model.
        provenance: versions, machine, command, time.
    """

    name: str
    suites: tuple[SuiteResult, ...]
    samples: tuple[Sample, ...]
    settings: Settings
    model: ModelRecord
    provenance: Provenance

    def suite(self, name: str) -> SuiteResult:
        """The result of one suite."""
        for result in self.suites:
            if result.suite == name:
                return result
        raise KeyError(f"no suite {name!r}; suites: {', '.join(result.suite for result in self.suites)}")

    def samples_of(self, suite: str) -> list[Sample]:
        """Samples of one suite, in order."""
        return [sample for sample in self.samples if sample["suite"] == suite]

    def outcomes_of(self, suite: str) -> list[float | bool | None]:
        """Outcomes of the examples of one suite, in order."""
        return [sample["outcome"] for sample in self.samples_of(suite)]

    def mean(self, purpose: str) -> float | None:
        """Mean value over the suites of a purpose, as the paper averages; None if one is missing or unscored."""
        values = [result.value for result in self.suites if result.purpose == purpose]
        if not values or any(value is None for value in values):
            return None
        return sum(value for value in values if value is not None) / len(values)

    def save(self, directory: str | Path) -> Path:
        """Write `samples.jsonl`, which only its owner may read, and `metrics.json`: both, whenever this is killed."""
        directory, lines = Path(directory), _json_lines(self.samples)
        content = asdict(self)
        del content["samples"]
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            # Samples may take the place of others. Which metrics are theirs is told by their digest.
            write_json(directory / _NEXT, _KIND, {**content, "samples_hash": text_hash(lines)})
            write_text(directory / SAMPLES_FILE, lines, private=True)
            (directory / _NEXT).replace(directory / METRICS_FILE)
        return directory

    @staticmethod
    def settle(directory: str | Path) -> None:
        """Finish what `save` had begun where it was killed, so that the two files belong together on their own."""
        directory = Path(directory)
        if not (directory / _NEXT).is_file():
            return
        # Nothing can be finished where one of the two is no longer what was written.
        with locked(directory), suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            noted = json.loads((directory / _NEXT).read_bytes())["samples_hash"]
            if noted == text_hash((directory / SAMPLES_FILE).read_bytes().decode()):
                (directory / _NEXT).replace(directory / METRICS_FILE)

    @classmethod
    def load(cls, directory: str | Path) -> EvalResult:
        """Read an evaluation directory."""
        directory = Path(directory)
        if not directory.is_dir():
            return cls._read(directory)
        with locked(directory, shared=True):
            return cls._read(directory)

    @classmethod
    def _read(cls, directory: Path) -> EvalResult:
        path = directory / METRICS_FILE
        made_by = _command_of(directory)
        record = read_json(path, _KIND, made_by)
        again = f"remove {directory} and run: {made_by}"
        try:
            text = (directory / SAMPLES_FILE).read_bytes().decode()
            samples = tuple(json.loads(line) for line in text.split("\n") if line.strip())
        except FileNotFoundError:
            raise ArtifactError(f"{directory / SAMPLES_FILE}: missing beside {METRICS_FILE}; {again}") from None
        except OSError as error:
            raise ArtifactError(f"{directory / SAMPLES_FILE}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{directory / SAMPLES_FILE}: damaged: {error}; {again}") from None
        text_digest = text_hash(text)
        if text_digest != record.get("samples_hash", text_digest) and (directory / _NEXT).is_file():
            # It was killed between the two.
            record = read_json(directory / _NEXT, _KIND, again)
        result = typed(path, _KIND, cls, {**record, "samples": []})
        n_samples = sum(suite.n + suite.unscored for suite in result.suites)
        if len(samples) != n_samples:
            raise ArtifactError(
                f"{directory / SAMPLES_FILE}: {len(samples)} samples, {METRICS_FILE} was computed from {n_samples}; "
                f"{again}"
            )
        # Evaluations from before it was noted have none.
        if text_digest != record.get("samples_hash", text_digest):
            raise ArtifactError(
                f"{directory / SAMPLES_FILE}: damaged, or changed after {METRICS_FILE} was computed from it "
                f"(digest {text_digest}, recorded: {record['samples_hash']}); {again}"
            )
        known = {suite.suite for suite in result.suites}
        for sample in samples:
            if not isinstance(sample, dict) or sample.get("suite") not in known or "id" not in sample:
                raise ArtifactError(f"{directory / SAMPLES_FILE}: damaged: a line is no sample of a suite; {again}")
        # Scored choices and prompts follow no rules of reading.
        if any(is_letter(sample) or is_problem(sample) for sample in samples):
            warn_of_old_rules(directory, "evaluation", result.provenance)
        return replace(result, samples=samples)


def _command_of(directory: Path) -> str:
    """What makes an evaluation at RUN/evaluation/ARM, RUN/evaluation/ARM/strengths/0.5 or RUN/attacks/ARM/direction."""
    parents = directory.parents
    is_attack = directory.parent.name not in ("evaluation", "strengths")
    if is_attack and len(parents) > 2 and parents[1].name == "attacks":
        return f"castune attack {parents[2]}"
    return f"castune evaluate {parents[3 if directory.parent.name == 'strengths' else 1]}"


def _json_lines(rows: Sequence[Sample]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
