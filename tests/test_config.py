"""Settings: defaults, what is allowed, and messages that name field, value and range."""

from __future__ import annotations

import dataclasses

import pytest

import lce_inductor
from lce_inductor import Config
from lce_inductor.config import make_config

BAD = [
    ("min_logits_bytes", -1, "an integer >= 0"),
    ("min_logits_bytes", 1.5, "an integer >= 0"),
    ("min_logits_bytes", True, "an integer >= 0"),
    ("min_logits_bytes", None, "an integer >= 0"),
    ("min_logits_bytes", "64M", "an integer >= 0"),
    ("chunk_tokens", 0, "an integer >= 1 or None"),
    ("chunk_tokens", -4, "an integer >= 1 or None"),
    ("chunk_tokens", False, "an integer >= 1 or None"),
    ("chunk_tokens", 512.0, "an integer >= 1 or None"),
    ("workspace_bytes", 0, "an integer >= 1"),
    ("workspace_bytes", None, "an integer >= 1"),
    ("gradients", "backward", "one of 'auto', 'forward', 'recompute'"),
    ("gradients", None, "one of 'auto', 'forward', 'recompute'"),
    ("gradients", ["auto"], "one of 'auto', 'forward', 'recompute'"),
    ("returned_logits", "drop", "one of 'defer', 'keep'"),
    ("returned_logits", True, "one of 'defer', 'keep'"),
    ("prefer", "size", "one of 'speed', 'memory'"),
    ("prefer", None, "one of 'speed', 'memory'"),
]


def test_defaults():
    config = Config()
    assert dataclasses.asdict(config) == {
        "min_logits_bytes": 64 * 2**20,
        "chunk_tokens": None,
        "workspace_bytes": 3 * 2**29,
        "gradients": "auto",
        "returned_logits": "defer",
        "prefer": "speed",
    }


@pytest.mark.parametrize("field, value, allowed", BAD, ids=str)
def test_a_bad_value_names_field_value_and_range(field, value, allowed):
    for build in (Config, lce_inductor.install, lce_inductor.inductor_options):
        with pytest.raises(ValueError) as error:
            build(**{field: value})
        assert str(error.value) == f"{field} = {value!r}: must be {allowed}"
    assert not lce_inductor.is_installed()


@pytest.mark.parametrize(
    "settings",
    [
        {"min_logits_bytes": 0},
        {"chunk_tokens": 1},
        {"workspace_bytes": 1},
        {"gradients": "forward"},
        {"gradients": "recompute"},
        {"returned_logits": "keep"},
        {"prefer": "memory"},
    ],
    ids=str,
)
def test_values_at_the_edge(settings):
    config = make_config(settings)
    assert config == Config(**settings) != Config()
    assert config.key() != Config().key()


def test_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(TypeError) as error:
        lce_inductor.install(chunk_token=3)
    assert "unknown setting 'chunk_token'" in str(error.value)
    assert all(field.name in str(error.value) for field in dataclasses.fields(Config))


def test_frozen_and_hashable():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.chunk_tokens = 3
    assert hash(config) == hash(Config()) and len({Config(), Config(chunk_tokens=3), Config()}) == 2


def test_the_key_tells_settings_apart():
    """Equal texts mean equal compiled code: no two values may look alike."""
    configs = [Config(chunk_tokens=n) for n in (None, 1, 11)] + [Config(workspace_bytes=1), Config(min_logits_bytes=1)]
    assert len({c.key() for c in configs}) == len(configs)


def test_every_field_is_documented():
    for field in dataclasses.fields(Config):
        assert f"{field.name}:" in Config.__doc__
