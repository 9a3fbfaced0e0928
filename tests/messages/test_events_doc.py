"""``docs/events.md`` says what the catalogue says."""

import subprocess
import sys
from pathlib import Path

from gptoss.messages.codec import EVENT_TYPES

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_current() -> None:
    check = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "events_doc.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_the_page_has_every_event_with_its_fields() -> None:
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    for name, cls in EVENT_TYPES.items():
        entry = page.split(f"### {name}\n")[1].split("\n### ")[0]
        assert f"Version {cls.VERSION}, {cls.FAMILY}." in entry
        assert all(f"- `{field}`: `" in entry for field in cls.__struct_fields__)
