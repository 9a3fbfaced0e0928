"""Where ``gptoss bundle create`` takes a bundle from: a running server, or the journal of a dead or living one."""

import contextlib
import importlib.metadata
import secrets
import shutil
import tempfile
import urllib.parse
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO

from gptoss.cli.admin_client import answer_of
from gptoss.clock import SystemClock
from gptoss.config import Settings
from gptoss.errors import ConfigError, GptossError
from gptoss.telemetry.bundle import Maker, make_bundle
from gptoss.telemetry.bundle_format import Manifest, file_name
from gptoss.telemetry.bundle_order import BundleOrder
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.bundle_redact import bundle_key
from gptoss.telemetry.recording import JournalRecording

TIMEOUT_S = 600.0
COPY_BYTES = 2**20


class Created:
    """A bundle on its way to its place: written beside it under another name first, so that no half of one is left.

    Args:
        output: the file, or the folder in which it gets a name of its own; None is the current folder.
        force: replace a file that is there.

    Raises:
        ConfigError: the file is there already, or its folder is not.
    """

    def __init__(self, output: Path | None, *, force: bool) -> None:
        folder = Path() if output is None else output if output.is_dir() else output.parent
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}; make it or choose another output")
        self.folder = folder
        self._target = None if output is None or output.is_dir() else output
        self._force = force
        if self._target is not None:
            self._refuse_to_replace(self._target)

    @contextlib.contextmanager
    def file(self) -> Generator[IO[bytes]]:
        """The file to write; it is gone again unless ``keep`` was called."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".gptoss-", suffix=".part", delete=False) as file:
                self._part = Path(file.name)
                try:
                    yield file
                finally:
                    file.close()
                    self._part.unlink(missing_ok=True)
        except OSError as error:
            raise GptossError(f"cannot write in {self.folder.resolve()}: {error.strerror or error}") from None

    def keep(self, file: IO[bytes]) -> tuple[Path, Manifest]:
        """Give the written bundle its name, once it has been opened as one.

        Raises:
            BundleError: what was written is no bundle.
        """
        file.flush()
        with BundleReader(self._part) as reader:
            manifest = reader.manifest
        target = self._target or self.folder / file_name(manifest)
        self._refuse_to_replace(target)
        self._part.replace(target)
        return target, manifest

    def _refuse_to_replace(self, target: Path) -> None:
        if target.exists() and not self._force:
            raise ConfigError(f"{target} is there already; choose another name with -o, or replace it with --force")


def maker(output: Created, node_key: bytes | None = None) -> Maker:
    """This program, with the node's key or a fresh one."""
    return Maker(
        key=bundle_key(node_key or secrets.token_bytes(32)),
        created_ns=SystemClock().wall_ns(),
        created_by=f"gptoss {importlib.metadata.version('gptoss')}",
        spool_folder=output.folder,
    )


def create_from_folder(settings: Settings, order: BundleOrder, output: Created) -> tuple[Path, Manifest]:
    """Cut a bundle out of the journal in a data folder.

    Raises:
        JournalError: there is no journal, or it is corrupt.
        RequestNotFound: nothing is recorded that was asked for.
    """
    recording = JournalRecording(settings.journal_path)
    try:
        node_key = (settings.data_path / "node.key").read_bytes()
    except OSError:  # Only the comparison of hashes between bundles depends on it.
        node_key = None
    with output.file() as file:
        make_bundle(file, recording, order, maker(output, node_key))
        return output.keep(file)


def create_from_server(url: str, query: Mapping[str, str], output: Created) -> tuple[Path, Manifest]:
    """Have a running server cut a bundle.

    Raises:
        NotReady: nothing answers there.
        RequestNotFound: the server has not recorded what was asked for.
        GptossError: it refuses, or is no gptoss server.
    """
    path = f"/admin/debug/bundle?{urllib.parse.urlencode(query)}"
    with answer_of(url, path, timeout_s=TIMEOUT_S) as answer, output.file() as file:
        if answer.headers.get_content_type() != "application/zip":
            raise GptossError(f"{url} answers with something else than a bundle; is it a gptoss server?")
        shutil.copyfileobj(answer, file, COPY_BYTES)
        return output.keep(file)
