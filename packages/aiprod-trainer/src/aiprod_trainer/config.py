"""Training configurations: YAML read into pydantic models, unknown keys refused by name."""

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from aiprod_core.errors import InputError


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Section)


def run_script(doc: str | None, schema: type[C], train: Callable[[C, Path], object]) -> None:
    """What every training script does: CONFIG --out FOLDER [--set KEY=VALUE ...], then `train`.

    A mistake in the configuration is one sentence and exit code 2. `doc` is the script's docstring.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args()
    try:
        train(read_config(arguments.config, schema, arguments.set), arguments.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def read_config(path: Path, schema: type[C], overrides: list[str] | None = None) -> C:
    """Reads `path` and applies `key.sub=value` overrides (values are YAML).

    Raises InputError for a missing file, bad YAML, an unknown key (naming the nearest one) or a
    value of the wrong kind.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise InputError(f"--set {override}: write it as key=value, e.g. --set steps=100")
        *parents, leaf = key.split(".")
        target: dict[str, Any] = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = yaml.safe_load(value)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error, schema)}") from error


def _first_problem(error: ValidationError, schema: type[BaseModel]) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{place}: {first['msg']} (got {first['input']!r})"
    known = _keys(schema)
    nearest = difflib.get_close_matches(place, known, 1) or difflib.get_close_matches(
        place.split(".")[-1], [key.split(".")[-1] for key in known], 1
    )
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; known keys: {', '.join(known)}"
    return f"unknown key {place}{hint}"


def _keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys
