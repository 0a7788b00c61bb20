"""Secrets stay out of what is kept and printed, and text from outside steers no terminal."""

from __future__ import annotations

import pytest

from dptrain.errors import ConfigError
from dptrain.tracking.redact import printable, refuse_secrets, spelled_out, without_secrets
from dptrain.train import LogConfig, TrainConfig

CANARY = "canary0123456789canary0123456789canary01"


def test_secrets_are_blanked_and_nothing_else_is(monkeypatch):
    """Secret fields, values of secret variables and logins, wherever they stand; all the rest is unchanged."""
    monkeypatch.setenv("SOME_TOKEN", CANARY)
    monkeypatch.setenv("LONGER_TOKEN", f"{CANARY}-and-more")
    monkeypatch.setenv("SORT_KEY", "name")  # a word, too short for a secret
    plain = {
        "tokens_seen": 5,
        "pad_token": "<pad>",
        "key": "name",
        "api_key": None,
        "path": "run/1",
        "url": "https://host/a:b@c",
        "n": {"a": [1, 2.5, True]},
    }
    secret = {"x": {"api_key": "abc", "list": [f"a {CANARY} b", f"{CANARY}-and-more"]}, "password": "p"}
    assert without_secrets({**plain, **secret, "from": "http://me:pw@host/x"}) == {
        **plain,
        "x": {"api_key": "[secret]", "list": ["a [secret] b", "[secret]"]},
        "password": "[secret]",
        "from": "http://[secret]@host/x",
    }


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (TrainConfig(task_options={"api_key": "abc"}), "task_options.api_key looks like a secret"),
        (TrainConfig(task_options={"a": {"hf_token": 12345}}), "task_options.a.hf_token looks like a secret"),
        (
            TrainConfig(task_options={"a": [f"x{CANARY}"]}),
            "task_options.a holds the value of the environment variable T",
        ),
        *(
            (TrainConfig(task_options={name: "abc"}), f"task_options.{name} looks like a secret")
            for name in ("github_pat", "DB_PASS", "azure_sas", "sentry_dsn", "dsn", "pass", "connection_string")
        ),
        (TrainConfig(task_options={CANARY: 1}), "a name in task_options holds the value of the environment variable"),
        (TrainConfig(run_dir=f"runs/{CANARY}"), "run_dir holds the value of the environment variable MY_TOKEN"),
        (TrainConfig(log=LogConfig(project=CANARY)), "log.project holds the value"),
        (
            TrainConfig(task_options={"url": "https://me:hunter2@host/x"}),
            "task_options.url holds an address with a login",
        ),
    ],
)
def test_settings_with_a_secret_are_refused(monkeypatch, config, part):
    """With the name of the setting and what to do instead, and never with the secret."""
    monkeypatch.setenv("MY_TOKEN", CANARY)
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(config)
    assert part.replace("variable T", "variable MY_TOKEN") in str(caught.value)
    assert "read it from the environment" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in (CANARY, "hunter2", "abc", "12345"))


def test_settings_without_a_secret_pass(monkeypatch):
    """A switch named after a secret, an empty one, and ordinary settings are none."""
    monkeypatch.setenv("SORT_KEY", "digits")
    options = {"use_password": True, "api_key": "", "access_token": None, "pad_token": "<pad>", "url": "https://host/x"}
    refuse_secrets(TrainConfig(task="digits", task_options=options))


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "a\rb", "\u202eabc", "\x07", "\x9b2J", "\ud800"])
def test_what_steers_a_terminal_is_spelled_out(hostile):
    """Escapes, line ends, a turned direction of writing; letters and spaces of any script stay as they are."""
    assert spelled_out(f"ä 本\u00a0{hostile}") == f"ä 本\u00a0{repr(hostile)[1:-1]}"


def test_a_printed_sentence_has_neither(monkeypatch):
    """One line, without secrets."""
    monkeypatch.setenv("MY_TOKEN", CANARY)
    assert printable(f"401 for {CANARY}\n\x1b[31m") == "401 for [secret]\\n\\x1b[31m"


@pytest.mark.parametrize(
    "name", ["GITHUB_PAT", "DB_PASS", "AZURE_SAS", "DSN", "SENTRY_DSN", "PGPASSWORD", "AWS_ACCESS_KEY_ID", "API_KEY_2"]
)
def test_the_value_of_a_variable_that_is_named_for_a_secret_is_blanked(monkeypatch, name):
    """In values and in names."""
    monkeypatch.setenv(name, CANARY)
    assert printable(f"401 for {CANARY}") == "401 for [secret]"
    assert without_secrets({"a": {CANARY: [CANARY]}}) == {"a": {"[secret]": ["[secret]"]}}


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "COMPASS", "PATH", "LS_COLORS"])
def test_other_variables_are_no_secrets(monkeypatch, name):
    """The folder that a shell is in stands in many a message."""
    monkeypatch.setenv(name, CANARY)
    assert printable(CANARY) == CANARY


@pytest.mark.parametrize("name", ["forward_pass", "file_pat", "pad_token", "compass", "mask", "two_pass"])
def test_settings_that_are_named_like_none_are_taken(name):
    """Words of machine learning that end as a secret does."""
    refuse_secrets(TrainConfig(task_options={name: "abc"}))
