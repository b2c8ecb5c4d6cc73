"""YAML from untrusted files: plain values, no aliases, tags or duplicate keys, capped in size and depth. No torch."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from synthkit.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (`no` is a word, `1e-3` a number); aliases and duplicate keys are errors."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not allowed{_place(self.peek_event().start_mark)}")
        tag = getattr(self.peek_event(), "tag", None)
        if tag is not None:  # !!python/..., but also !!int "" and !!timestamp x, which fail in ways of their own
            raise yaml.YAMLError(f"tags (here {tag[:80]}) are not allowed{_place(self.peek_event().start_mark)}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels{_place(self.peek_event().start_mark)}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", ""))
            if name in seen:
                raise yaml.YAMLError(f"the key {name!r} stands twice{_place(key.start_mark)}")
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _place(mark: Any) -> str:
    return f" (line {mark.line + 1})" if mark is not None else ""


_BOOL = re.compile(r"^(?:true|True|false|False)$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"
)
_INT = re.compile(r"^[-+]?[0-9]+$")
_NULL = re.compile(r"^(?:~|null|Null|)$")
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", _BOOL, "tTfF"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))


def loads(text: str, source: str = "the YAML text", max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The mapping that `text` describes.

    Raises:
        ConfigError: not YAML, not a mapping of names, too large, too deep, or it uses aliases or object tags.
    """
    if len(text.encode(errors="surrogatepass")) > max_bytes:
        raise ConfigError(f"{source} is larger than {max_bytes // 1024} KiB", hint="that is no recipe")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {_reason(error)}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source} must hold `name: value` lines", got=type(value).__name__)
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{source}: every key must be a name", got=key)
    return value


def load(path: str | Path) -> dict[str, Any]:
    """`loads` of a file.

    Raises:
        ConfigError: also when the file is missing, unreadable or not text.
    """
    return loads(read_text(Path(path)), str(path))


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a regular file of at most `max_bytes`: a pipe would wait for ever, /dev/zero would never end.

    Raises:
        ConfigError: it is none, or larger, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"cannot read {path}: it is not a plain file")
        if status.st_size > max_bytes:
            raise ConfigError(f"{path} is larger than {max_bytes // 1024} KiB", hint="that is no recipe")
        with open(path, "rb") as stream:
            data = stream.read(max_bytes + 1)  # it may have grown meanwhile; `loads` looks at the size again
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if problem:
        return f"{problem}{_place(mark)}"
    return str(error).splitlines()[0]


class _Dumper(yaml.SafeDumper):
    """Plain values, no aliases, floats that every YAML reader takes for floats."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    if text in {"inf", "-inf", "nan"}:
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}[text]
    elif "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)
# Text that only our loader takes for a number (`1e-3`) must be quoted too.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def dumps(value: dict[str, Any]) -> str:
    """YAML of plain values, in the order given; `loads(dumps(x)) == x`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
