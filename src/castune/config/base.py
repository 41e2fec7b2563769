"""What all settings have in common: unknown keys are refused, and what is wrong is told in one line."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from castune.errors import CastuneError

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Settings that cannot be changed once they were checked; the docstring under a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    # Shows the user one line instead of pydantic's report.
    def __init__(self, /, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise CastuneError(_one_line(error, type(self))) from None


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or model.__name__
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {where!r}; accepted here: {', '.join(_accepted(model, item['loc'][:-1]))}")
        elif item["type"] == "missing":
            parts.append(f"{where!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # A whole table as input: the message of the nested model names the key.
            plain = not item["loc"] or isinstance(item["input"], dict)
            parts.append(
                f"{where}: {message}"
                if plain and item["loc"]
                else message
                if plain
                else f"{where} = {item['input']!r}: {message}"
            )
    return "; ".join(parts)


def _accepted(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)
