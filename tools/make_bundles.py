"""Records the incidents of ``tests/replay/scenarios.py`` anew and writes them as bundles, the tests' data.

    python tools/make_bundles.py [NAME ...]

Committed bundles are history: they must go on replaying. So make one anew only when its schema cannot be read any more.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "replay"))

import scenarios  # noqa: E402

from gptoss.clock import SystemClock  # noqa: E402
from gptoss.telemetry.bundle_writer import Purpose, write_bundle  # noqa: E402
from gptoss.telemetry.recording import ListRecording  # noqa: E402


async def recordings(names: set[str]) -> dict[str, tuple[ListRecording, str]]:
    """Recordings by name, each with what it is for."""
    found: dict[str, tuple[ListRecording, str]] = {}
    for name, make in scenarios.INCIDENTS.items():
        if not names or name in names:
            found[name] = (await make(), str(make.__doc__).partition("\n")[0])
    if not names or "preempted" in names:
        with tempfile.TemporaryDirectory() as folder:
            found["preempted"] = (
                await scenarios.preempted(scenarios.tiny_llama(Path(folder))),
                str(scenarios.preempted.__doc__).partition("\n")[0],
            )
    if not names or "doctored" in names:
        recording, was = scenarios.doctored(await scenarios.shrunk(), scenarios.with_more_tokens)
        found["doctored"] = (recording, f"Record {was.meta.pos} was changed: admission granted a token less.")
    return found


def main() -> None:
    folder = scenarios.bundles_folder()
    folder.mkdir(exist_ok=True)
    for name, (recording, reason) in asyncio.run(recordings(set(sys.argv[1:]))).items():
        path = folder / f"{name}.gptoss.zip"
        purpose = Purpose(created_ns=SystemClock().wall_ns(), created_by="tools/make_bundles.py", reason=reason)
        with path.open("wb") as file:
            manifest = write_bundle(file, recording, purpose)
        print(f"{path}: {sum(part.records for part in manifest.parts)} records, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
