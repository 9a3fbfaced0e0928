"""Durations as people type them: ``30s``, ``10m``, ``2h``, ``7d``."""

import re

from gptoss.errors import ConfigError

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_WRITTEN = re.compile(r"(\d{1,6})([smhd])", re.ASCII)


def seconds_of(written: str, option: str) -> int:
    """Seconds.

    Raises:
        ConfigError: it is not written so; the message names ``option``.
    """
    match = _WRITTEN.fullmatch(written)
    if match is None:
        raise ConfigError(f"{option} is {written!r}; write a number and a unit, such as 30s, 10m, 2h or 7d")
    return int(match[1]) * _UNITS_S[match[2]]
