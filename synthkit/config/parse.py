"""From command line, YAML or keyword arguments to one validated config, in two stages. No torch.

Stage one finds the name of the method or loss (flag, file or default) and its class in the table; stage two builds a
jsonargparse parser for exactly that config, so help, checks and suggestions know every `--method.*` option. Files and
Python values are turned into the same flags that a user would type and take the same way, hence the same errors.
The command line wins over `--config`; a later file wins over an earlier one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from synthkit import tables
from synthkit.config import recipes, safe_yaml, schema
from synthkit.config.checks import check_needs, check_tables
from synthkit.config.fields import Option, describe, flatten, options_of, unknown
from synthkit.config.words import Words, as_text, word_value
from synthkit.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Command:
    """A command that takes a config."""

    config: type
    plugin: str | None = None
    """The field whose config depends on a name of a table: method or loss."""
    default: str = ""
    """That name when nothing is said."""


COMMANDS: dict[str, Command] = {
    "synthesize": Command(schema.SynthesizeConfig, "method", "cudfkd"),
    "distill": Command(schema.DistillConfig, "loss", "kd"),
    "relabel": Command(schema.RelabelConfig),
    "teach": Command(schema.TeachConfig),
    "evaluate": Command(schema.EvaluateConfig),
}

_SUMS = (
    " Or a weighted sum of them: ce+0.9*kd+dkd@ramp20, a term being [WEIGHT*]NAME[@SCHEDULE] with the schedules rampN, "
    "untilN, fromN (epochs) and cosine; the options of its terms are --loss.NAME.OPTION."
)
"""What the help of --loss says of sums."""

PLACE_ONLY = ("out", "resume", "shards", "eval_data", "eval_every", "runtime")
"""Fields that say where and how a run computes or what it reports, not what it makes: not part of `config_hash`."""


@dataclass(frozen=True)
class Parsed:
    """What a command line asked for: a config to run, or a text to print."""

    config: Any = None
    text: str | None = None
    json: bool = False
    """Whether the result should be printed as JSON."""


def parse_config(command: str, source: Sequence[str] | Mapping[str, Any]) -> Any:
    """The validated config of `command`.

    `source` is either command-line words (`["--teacher", "r34", "--method.lr_g", "1e-3"]`) or a mapping: field names,
    nested or dotted, `method`/`loss` as a name or as `{name: ..., option: ...}`, and `config` for a recipe below it.

    Raises:
        ConfigError: unknown name, option or choice (with the nearest), a value of the wrong type, a missing field,
            or an unreadable file.
    """
    if isinstance(source, Mapping):
        values = _plain(source)
        files = values.pop("config", None)
        files = [files] if isinstance(files, str) else files or []
        return _Build(command, [*_load_files(command, files), _checked_mapping(command, values, command)]).config()
    parsed = parse_command_line(command, source)
    if parsed.text is not None:
        raise UsageError(f"{command}: --help and --print_config only print", hint="leave them out here")
    return parsed.config


def parse_command_line(command: str, argv: Sequence[str]) -> Parsed:
    """Like `parse_config`, and answers `--help` and `--print_config` with the text to print."""
    words = Words(command, argv)
    build = _Build(command, _load_files(command, words.take("config")), words)
    if words.help:
        return Parsed(text=build.help())
    if words.print_config:
        return Parsed(text=dump_config(command, build.config()))
    return Parsed(config=build.config(), json=words.json)


def load_recipe(recipe: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Any:
    """The config of a recipe (a path, or the name of a shipped one), with `overrides` on top."""
    command = recipe_command(recipes.load(recipe))
    return parse_config(command, {**(overrides or {}), "config": os.fspath(recipe)})


def recipe_command(values: Mapping[str, Any]) -> str:
    """The command a recipe is for: its `command` key, else synthesize."""
    command = values.get("command", "synthesize")
    if command not in COMMANDS:
        raise ConfigError("recipe: no such command", got=command, allowed=COMMANDS)
    return str(command)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, `method`/`loss` as `{name: ..., options}`; `parse_config` takes it back."""
    plain: dict[str, Any] = {}
    for entry in fields(config):
        value: Any = getattr(config, entry.name)
        if entry.name in ("method_name", "loss_name"):
            continue
        if is_dataclass(value) and not isinstance(value, type):
            value = config_to_dict(value)
        if entry.name in ("method", "loss") and hasattr(config, f"{entry.name}_name"):
            name = {"name": getattr(config, f"{entry.name}_name")}
            value = name | value if isinstance(value, dict) else name
        plain[entry.name] = list(value) if isinstance(value, tuple) else value
    return plain


def config_hash(config: Any, *, exclude: Sequence[str] = PLACE_ONLY) -> str:
    """12 hex digits that depend on what the run makes, not on where it runs (`exclude` names top-level fields)."""
    kept = {k: v for k, v in config_to_dict(config).items() if k not in exclude}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dump_config(command: str, config: Any) -> str:
    """The effective recipe as YAML; `--config` takes it back."""
    return safe_yaml.dumps({"command": command, **config_to_dict(config)})


# --- files and mappings --------------------------------------------------------------------------------------------


def _load_files(command: str, files: Sequence[str]) -> list[dict[str, Any]]:
    return [_checked_mapping(command, recipes.load(f), str(f)) for f in files]


def _checked_mapping(command: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    values = dict(values)
    meant = values.pop("command", command)
    if meant != command:
        raise ConfigError(f"{where} is a recipe for `synthkit {meant}`, not for `synthkit {command}`")
    if {"arch", "num_classes"} <= values.keys():
        raise ConfigError(f"{where} is a model card, not a recipe", hint=f"give it as a model: --teacher {where}")
    plugin = _command(command).plugin
    if plugin and isinstance(values.get(plugin), str):
        values[plugin] = {"name": values[plugin]}
    if plugin and values.get(plugin, "") is None:
        del values[plugin]
    flat = flatten(values)
    if plugin and f"{plugin}_name" in flat:
        flat[f"{plugin}.name"] = flat.pop(f"{plugin}_name")
    if plugin and plugin in flat:
        raise ConfigError(f"{where}: {plugin} must be a name, or a mapping with a name", got=flat[plugin])
    return {"": where, **flat}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = config_to_dict(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        plain[str(key)] = _plain(value) if isinstance(value, Mapping) else value
    return flatten(plain) if any("." in k for k in plain) else plain


def _command(command: str) -> Command:
    if command not in COMMANDS:
        raise ConfigError("this command takes no config", got=command, allowed=COMMANDS)
    return COMMANDS[command]


# --- stage two -----------------------------------------------------------------------------------------------------


class _Build:
    """One config in the making: layers of flat values, the concrete plug-in config, the parser."""

    def __init__(self, command: str, layers: list[dict[str, Any]], words: Words | None = None):
        self.command, self.spec = command, _command(command)
        self.layers, self.words = layers, words
        self.plugin = self.spec.plugin
        self.name = self._plugin_name() if self.plugin else ""
        self.plugin_config = tables.lookup(self.plugin, self.name).Config if self.plugin else None
        self.skip = {self.plugin, f"{self.plugin}_name"} if self.plugin else set()
        self.options = options_of(self.spec.config, skip=self.skip)
        if self.plugin and self.plugin_config:
            self.options.update(options_of(self.plugin_config, f"{self.plugin}."))

    def _plugin_name(self) -> str:
        key, name, where, configured = f"{self.plugin}.name", self.spec.default, "", ""
        for layer in self.layers:
            if key in layer:
                name, where = str(layer[key]), layer[""]
            if any(k.startswith(f"{self.plugin}.") and k != key for k in layer):
                configured = name
        if self.words:
            taken = self.words.take(str(self.plugin)) + self.words.take(key)
            name = taken[-1] if taken else name
        if configured and configured != name and configured in self._table():
            raise ConfigError(
                f"the recipe sets options of the {self.plugin} {configured!r}, which do not fit {name!r}",
                hint=f"leave --{self.plugin} {name} out, or use a recipe for it" + (f" ({where})" if where else ""),
            )
        return name

    def _table(self) -> dict[str, str]:
        return tables.methods() if self.plugin == "method" else tables.losses()

    def config(self) -> Any:
        """The validated config."""
        flags = self._file_flags() + self._word_flags()
        given = {f[2:].split("=", 1)[0] for f in flags}
        self._check_required(given)
        try:
            values = self._parser().parse_args(flags).as_dict()
        except argparse.ArgumentError as error:
            raise self._bad_value(str(error), flags) from error
        if self.plugin and self.plugin_config:
            own = values.pop(self.plugin, None)  # the name itself where no part of it has options
            part = _instance(self.plugin_config, own if isinstance(own, Mapping) else {})
            values.update({self.plugin: part, f"{self.plugin}_name": self.name})
        check_tables(self.command, values)
        if self.command == "synthesize":
            from synthkit.synthesis.base import requirements

            check_needs(values, requirements(tables.lookup("method", self.name), values["method"]))
        return _instance(self.spec.config, values)

    def help(self) -> str:
        """The help page of the concrete config."""
        return self._parser(describe_fields=True).format_help()

    def _file_flags(self) -> list[str]:
        flags = []
        for layer in self.layers:
            for name, value in layer.items():
                if name in ("", f"{self.plugin}.name"):
                    continue
                full = self._resolve(name)
                if full is None:
                    raise unknown(layer[""], repr(name), name, self.options, "", f"synthkit {self.command} --help")
                flags.append(f"--{full}={as_text(value, self.options[full])}")
        return flags

    def _word_flags(self) -> list[str]:
        flags = []
        for name, values in self.words.pairs if self.words else []:
            full = self._resolve(name)
            if full is None:
                raise unknown(
                    self.command, f"--{name}", name, self._flag_names(), "--", f"synthkit {self.command} --help"
                )
            flags.append(f"--{full}={word_value(full, values, self.options[full])}")
        return flags

    def _flag_names(self) -> list[str]:
        plugin = [self.plugin] if self.plugin else []
        return [*self.options, *plugin, "config", "print_config", "json", "help"]

    def _resolve(self, name: str) -> str | None:
        """The option that `name` means: itself, or its short form without `runtime.`."""
        if name in self.options:
            return name
        short = f"runtime.{name}"
        return short if short in self.options else None

    def _check_required(self, given: set[str]) -> None:
        missing = [f"--{o.name}" for o in self.options.values() if o.required and o.name not in given]
        if missing:
            needs = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed"
            raise ConfigError(f"{self.command}: {needs}", hint=f"see synthkit {self.command} --help")

    def _bad_value(self, message: str, flags: list[str]) -> ConfigError:
        found = re.search(r'key "([^"]+)"', message)
        option = self.options.get(found.group(1)) if found else None
        if option is None:
            return ConfigError(f"{self.command}: {message}")
        values = [f.split("=", 1)[1] for f in flags if f.startswith(f"--{option.name}=")]
        got = values[-1] if values else None
        if option.choices:
            return ConfigError(f"{option.name}: not a choice", got=got, allowed=option.choices)
        return ConfigError(f"{option.name}: expected {option.expected}", got=got)

    def _parser(self, describe_fields: bool = False) -> Any:
        # One add_argument per option, not add_class_arguments: that one executes the `if TYPE_CHECKING` imports of the
        # method's file, torch among them, to resolve annotations which are resolved here already.
        from jsonargparse import ArgumentParser

        needed = "".join(f" --{o.name} {_metavar(o)}" for o in self.options.values() if o.required)
        usage = f"synthkit {self.command}{needed} [options]"
        parser = ArgumentParser(prog=f"synthkit {self.command}", usage=usage, exit_on_error=False)
        recipe = "A recipe: a file, or the name of a shipped one (synthkit list recipes); flags win over it."
        parser.add_argument("--config", metavar="RECIPE", help=recipe, default=argparse.SUPPRESS)
        effective = "Print the effective recipe as YAML and exit; --config takes it back."
        parser.add_argument("--print_config", action="store_true", help=effective, default=argparse.SUPPRESS)
        parser.add_argument("--json", action="store_true", help="Print the result as JSON.", default=argparse.SUPPRESS)
        for title, config, prefix in self._sections():
            group = parser.add_argument_group(title)
            own = [o for o in self.options.values() if o.name.rpartition(".")[0] == prefix.removesuffix(".")]
            texts = describe(config) if describe_fields and own else {}
            if prefix == f"{self.plugin}.":
                told = f"One of: {', '.join(sorted(self._table()))}.{_SUMS if self.plugin == 'loss' else ''}"
                group.add_argument(f"--{self.plugin}", metavar="NAME", default=self.name, help=told)
            for option in own:
                text = texts.get(option.name.rpartition(".")[2], "") or " "
                details: dict[str, Any] = {"required": True} if option.required else {"default": option.default}
                if describe_fields:
                    details["metavar"] = _metavar(option)
                action: Any = group.add_argument(f"--{option.name}", type=option.type, help=text, **details)
                short = option.name.removeprefix(prefix)
                if prefix == "runtime." and short not in self.options:
                    action.option_strings = [f"--{short}"]  # what the help page shows
        return parser

    def _sections(self) -> list[tuple[str, type, str]]:
        """(title, dataclass, prefix) of every group of options, in the order of the help page."""
        sections = [(self.spec.config.__doc__ or "", self.spec.config, "")]
        if self.plugin and self.plugin_config:
            sections.append((self.plugin_config.__doc__ or "", self.plugin_config, f"{self.plugin}."))
            parts = {f.name: _nested_type(self.plugin_config, f) for f in fields(self.plugin_config)}
            sections += [(p.__doc__ or "", p, f"{self.plugin}.{name}.") for name, p in parts.items() if p is not None]
        sections.append((schema.RuntimeConfig.__doc__ or "", schema.RuntimeConfig, "runtime."))
        return [(doc.strip().splitlines()[0].rstrip("."), config, prefix) for doc, config, prefix in sections]


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    kind = option.expected.split(" or ")[0]
    words = {"a whole number": "N", "a number": "X", "true": "[true|false]", "text": "TEXT"}
    return words.get(kind, "X,X" if option.sequence else option.name.rpartition(".")[2].upper())


def _instance(config: type, values: Mapping[str, Any]) -> Any:
    made = {}
    for entry in fields(config):
        if entry.name in values:
            value = values[entry.name]
            nested = _nested_type(config, entry)
            made[entry.name] = _instance(nested, value) if nested and isinstance(value, Mapping) else value
    return config(**made)


def _nested_type(config: type, entry: dataclasses.Field[Any]) -> type | None:
    import typing

    hint = typing.get_type_hints(config)[entry.name]
    return hint if is_dataclass(hint) and isinstance(hint, type) else None


__all__ = [
    "COMMANDS",
    "config_hash",
    "config_to_dict",
    "dump_config",
    "load_recipe",
    "parse_command_line",
    "parse_config",
]
