"""Redaction of what a run shows and stores: no secrets, no control characters."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dptrain.errors import ConfigError

if TYPE_CHECKING:
    from dptrain.config.train_config import TrainConfig

_SECRET_VARIABLE = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|((^|_)(PAT|PASS|PWD|SAS|DSN|AUTH|COOKIE)))"
    r"(_(ID|STRING|URL|[0-9]+))?$",
    re.IGNORECASE,
)
_NO_SECRET = frozenset({"PWD", "OLDPWD"})  # the folder a shell is in
# Not every …token: a tokenizer's pad_token is a setting like others.
_SECRET_FIELD = re.compile(
    r"(api_?key|access_?key|private_?key|secret|password|passwd|passphrase|credentials?|connection_string"
    r"|(access|auth|api|hf|github|gitlab|bearer|sas)_token|(^|[._])(\w+_)?dsn"
    # Not every …_pass and …_pat: a forward_pass and a file_pat are settings like others.
    r"|(^|\.)((db|user|sql|mysql|pg|postgres|redis|mongo|smtp|ssh|ftp|admin|root|login)_?)?(pass|pwd)"
    r"|(^|\.)((git|github|gitlab|azure|devops)_?)?pat|(^|\.)((azure|blob|storage|account)_?)?sas)$",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")  # of an address
_SECRET_MIN_LENGTH = 8  # shorter values are words that a config holds for reasons of its own
_BLANK = "[secret]"


def refuse_secrets(config: TrainConfig) -> None:
    """Refuse settings that hold a secret, as `without_secrets` defines it: they are kept in the run's files.

    Blanking it there instead would make a run that cannot go on from its own folder.

    Raises:
        ConfigError: with the name of the setting, without its value.
    """
    variables = _secrets()
    for name, value in _values(asdict(config)):
        found = next((variable for secret, variable in variables.items() if secret in str(value)), None)
        in_name = next(((secret, variable) for secret, variable in variables.items() if secret in name), None)
        if in_name is not None:
            place = name.partition(in_name[0])[0].rstrip(".") or "a name"
            raise ConfigError(
                f"a name in {place} holds the value of the environment variable {in_name[1]}, and settings are kept in "
                "the run folder: let the task read it from the environment"
            )
        if _SECRET_FIELD.search(name) and value not in (None, ""):
            what = "looks like a secret"
        elif found is not None:
            what = f"holds the value of the environment variable {found}"
        elif _LOGIN.search(str(value)):
            what = "holds an address with a login in it"
        else:
            continue
        raise ConfigError(
            f"{name} {what}, and settings are kept in the run folder: let the task read it from the environment"
        )


def _values(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - any tree of plain data
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _values(child, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for child in node:
            yield from _values(child, name)
    elif not isinstance(node, bool):  # `use_password: true` is none
        yield name, node


def without_secrets(value: Any) -> Any:  # noqa: ANN401 - any tree of dicts, lists and plain values, returned alike
    """Copy a tree of settings with its secrets blanked: nothing else changes, and no field is dropped.

    A secret is a text in a field called api_key, password or alike, each occurrence of the value of an environment
    variable whose name ends in KEY, TOKEN, SECRET, PASSWORD, PASS, PAT, SAS, DSN or alike, and the login in an address;
    in names as in values.
    """
    known = sorted(_secrets(), key=len, reverse=True)  # one may be part of another

    def blank(node: Any, *, name: str = "") -> Any:  # noqa: ANN401 - as above
        """Return a part of the tree without its secrets; `name` is the field that it stands in."""
        if isinstance(node, Mapping):
            return {
                blank(key) if isinstance(key, str) else key: blank(child, name=str(key)) for key, child in node.items()
            }
        if isinstance(node, list | tuple):
            return [blank(child, name=name) for child in node]
        if not isinstance(node, str):
            return node
        if node and _SECRET_FIELD.search(name):
            return _BLANK
        for secret in known:
            node = node.replace(secret, _BLANK)
        return _LOGIN.sub(_BLANK, node)

    return blank(value)


def _secrets() -> dict[str, str]:
    """The secrets in the environment, each with the name of its variable."""
    return {
        value: name
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and name not in _NO_SECRET and len(value) >= _SECRET_MIN_LENGTH
    }


def spelled_out(text: str) -> str:
    """Spell out what a terminal would act on: escapes, line ends, characters that turn the direction of writing."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """Make of a text from outside one line without secrets, to be shown on a terminal or kept in a file."""
    return spelled_out(without_secrets(text))
