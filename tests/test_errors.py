"""The tree drawn in ``gptoss.errors`` is the tree of its classes."""

import inspect
import re

import pytest

from gptoss import errors
from gptoss.errors import GptossError, Overloaded, RequestError

CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, GptossError)}


def drawn() -> dict[str, tuple[str, str, int | None]]:
    """Name -> (parent, code, status) as drawn."""
    found: dict[str, tuple[str, str, int | None]] = {}
    ancestors = {0: "GptossError"}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([│├└─ ]+)(\w+) +(\w+)(?: +(\d{3})\b)?", line)
        if match and "─" in match[1]:
            depth = len(match[1]) // 4
            ancestors[depth] = match[2]
            found[match[2]] = (ancestors[depth - 1], match[3], int(match[4]) if match[4] else None)
    return found


def test_the_drawing_has_every_class_and_no_other() -> None:
    assert set(drawn()) | {"GptossError"} == set(CLASSES)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"GptossError"}))
def test_parent_code_and_status_are_as_drawn(name: str) -> None:
    parent, code, status = drawn()[name]
    cls = CLASSES[name]
    assert cls.__bases__ == (CLASSES[parent],)
    assert cls.code == code
    assert cls.status == (500 if status is None else status)


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in CLASSES.values()]
    assert len(codes) == len(set(codes))


def test_every_class_says_what_it_means() -> None:
    assert all(cls.__doc__ for cls in CLASSES.values())


def test_an_error_keeps_its_message_and_what_its_family_adds() -> None:
    assert RequestError("bad", param="top_p").param == "top_p"
    assert RequestError("bad").message == str(RequestError("bad")) == "bad"
    assert Overloaded("later", retry_after_s=2.5).retry_after_s == 2.5
