"""What a recording says about the server that made it."""

from typing import Any, get_type_hints

import msgspec

from gptoss.config import Settings
from gptoss.messages import events as ev
from gptoss.messages.codec import UNREADABLE

_KINDS = get_type_hints(Settings, include_extras=True)
_BEFORE = {"policy_version": 1}
"""Settings whose defaults changed what is decided, with what those decided by who did not know them."""


def settings_of(started: ev.NodeStarted) -> tuple[Settings, list[str]]:
    """The settings in force, and what of them could not be read: another version has other settings, a bundle masks."""
    try:
        given: dict[str, Any] = msgspec.json.decode(started.settings, type=dict[str, Any])
    except UNREADABLE as error:
        return Settings(), [f"the recorded settings cannot be read ({error}); the defaults are taken"]
    values: dict[str, Any] = dict(_BEFORE)
    notes: list[str] = []
    for name, value in given.items():
        if name not in _KINDS:
            notes.append(f"the recorded setting {name} is unknown to this version")
            continue
        try:
            values[name] = msgspec.convert(value, _KINDS[name])
        except msgspec.ValidationError:
            notes.append(
                f"the recorded setting {name} is {value!r}, which this version does not take; its default is taken"
            )
    return Settings(**values), notes
