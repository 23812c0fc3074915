"""Reading configurations: YAML and dotted overrides merged by OmegaConf, validated by pydantic.

Every problem is reported at once, naming the key and the nearest valid one, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from tcopd_fast.config import ELSEWHERE, Config, nearest
from tcopd_fast.errors import UserError
from tcopd_fast.refusals import SAMPLING_KEYS

S = TypeVar("S", bound=BaseModel)


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, installed: bool = True) -> Config:
    """Read a YAML file, apply `a.b.c=value` overrides, validate.

    installed: the optional packages that the run needs must be installed here.
    Raises UserError listing every unknown key (with the nearest valid one), wrong type and impossible combination.
    """
    return validate(read_tree(path, overrides), Config, None if installed else ELSEWHERE)


def read_tree(path: str | Path | None, overrides: Sequence[str] = (), defaults: Any = None) -> Any:
    """defaults, then the YAML file, then the overrides, merged into a plain tree. Raises UserError."""
    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise UserError(f"override {item!r}: write key.path=value, for example learner.lr=1e-5")
    merged: Any = OmegaConf.create({})
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"config file {path}: not found; see configs/ for examples")
        try:
            merged = OmegaConf.load(path)
        except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
            raise UserError(f"config file {path}: not valid YAML ({' '.join(str(error).split())})") from error
        if not OmegaConf.is_dict(merged):
            raise UserError(f"config file {path}: the top level must be a mapping of sections")
    try:
        merged = OmegaConf.merge(OmegaConf.create(defaults or {}), merged, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error


def validate(tree: Any, schema: type[S], context: str | None = None) -> S:
    """Validate a plain tree against a section; raises UserError as `load_config` does."""
    try:
        return schema.model_validate(tree, context=context)
    except ValidationError as error:
        lines = [_explain(item, schema) for item in error.errors()]
        raise UserError("config refused:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(lines))) from error


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_help() -> str:
    """Every key with its type, default and meaning, for --help."""
    lines: list[str] = []
    for key, annotation, default, text in _walk(Config, ""):
        lines.append(f"  {key}  ({annotation}; {default})\n      {text}")
    return "configuration keys (set in the YAML file or as key=value):\n" + "\n".join(lines)


def _walk(section: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _walk(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"
        annotation = str(field.annotation).replace("typing.", "").replace("tcopd_fast.config_sections.", "")
        if isinstance(field.annotation, type):
            annotation = field.annotation.__name__
        rows.append((prefix + name, annotation, default, " ".join((field.description or "").split())))
    return rows


def _explain(item: Any, schema: type[BaseModel]) -> str:
    """One pydantic error as one line: key, what is wrong, remedy."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden" and location[0] in ("rollout", "eval") and location[-1] in SAMPLING_KEYS:
        return (
            f"{key}: not offered: sampling with it follows another distribution than the policy whose logprobs are "
            "trained on and compared; temperature is the only such setting"
        )
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(location[-1], _siblings(location, schema))}"
    if item["type"] == "missing":
        return f"{key}: required, not set"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if location[:2] == ["objective", "lambdas"]:
        return "objective.lambdas: give a number per teacher, or a table of numbers per domain, not a mix of both"
    return f"{key}: {item['msg']} (got {item['input']!r})"


def _siblings(location: list[str], schema: type[BaseModel]) -> list[str]:
    """Valid keys beside an unknown one."""
    section: Any = schema
    for part in location[:-1]:
        if isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields:
            section = section.model_fields[part].annotation
        else:
            arguments = getattr(section, "__args__", ())
            section = arguments[-1] if arguments else section
        options = [a for a in getattr(section, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        if options and getattr(section, "__origin__", None) not in (dict, list):
            section = options[0]
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
