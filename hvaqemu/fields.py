"""The kinds of values users write in their files, and how a model complains about several of them at once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from hvaqemu.errors import ConfigError
from hvaqemu.units import (
    SIZE_MOST,
    format_rate,
    format_share,
    parse_duration,
    parse_frequency,
    parse_rate,
    parse_share,
    parse_size,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Config(BaseModel):
    """What a user wrote: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Location = tuple[str | int, ...]


def complain(*complaints: tuple[Location, str]) -> None:
    """Raise what is wrong with fields taken together, at the places below the model that asks; nothing: return."""
    if complaints:
        raise ValidationError.from_exception_data(
            "config",
            [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{what}", {"what": what}), loc=where, input=None
                )
                for where, what in complaints
            ],
        )


def _size(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str | float | bool):
        return parse_size(value)  # type: ignore[arg-type]
    raise ValueError("write a size, for example 512M")


def _duration(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, str | float | bool):
        return parse_duration(value)
    raise ValueError("write a duration, for example 30s")


def _share(value: object) -> object:
    # A number is taken from our own models only: as a default. In a file 0.2 could be meant as 0.2 % or as 20 %.
    if isinstance(value, str):
        return parse_share(value)
    raise ValueError("write a share with its %, for example 5%")


def _rate(value: object) -> object:
    if isinstance(value, str):
        return parse_rate(value)
    raise ValueError("write a rate with its % and time, for example 0.2%/min")


def _frequency(value: object) -> object:
    # A number is taken from our own models only: in a file 50 could be meant as so many in all.
    if isinstance(value, str):
        return parse_frequency(value)
    if isinstance(value, float):
        return value
    raise ValueError("write how many a second, for example 50/s")


def _name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        raise ValueError("must be 1 to 63 letters, digits, '.', '_' or '-', and begin with a letter or digit")
    return value


def _a_path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("must be a path")
    return value


#: Bytes; written as a number or as text ("512M").
Size = Annotated[int, BeforeValidator(_size), Field(ge=0, le=SIZE_MOST)]
#: Seconds; written as a number or as text ("200ms").
Seconds = Annotated[float, BeforeValidator(_duration), Field(gt=0, allow_inf_nan=False)]
#: A part of a whole, 0 to 1; written as text ("5%").
Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1), PlainSerializer(format_share)]
#: A part of a whole a minute, 0 to 1; written as text ("0.2%/min").
Rate = Annotated[float, BeforeValidator(_rate), Field(ge=0, le=1), PlainSerializer(format_rate)]
#: Events a second; written "50/s".
Frequency = Annotated[float, BeforeValidator(_frequency), Field(gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, StringConstraints(min_length=1)]
HostPath = Annotated[Path, BeforeValidator(lambda value: _a_path(value) if isinstance(value, str) else value)]


def absolute(folder: Path, path: Path) -> Path:
    """``path`` of a file in ``folder``, where it is relative; ``~`` is the user's home.

    :raise ConfigError: nobody knows that user's home.
    """
    try:
        return folder.absolute() / path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: no home directory is known for {path.parts[0]}", "write the whole path") from error
