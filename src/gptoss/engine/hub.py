"""Models from the Hugging Face hub, through its own client and into its own cache.

Rules: safetensors weights, configs and tokenizers only, from the top of the repository; never code, pickles or GGUF.
What the client raises leaves here as ``ModelLoadError`` with one line that says what to do. ``HF_HUB_OFFLINE``,
``HF_HOME`` and tokens are the client's own affair.
"""

from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType] - partly typed
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import tqdm

from gptoss.engine.model_folder import Progress
from gptoss.errors import ModelLoadError

ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
# Subfolders hold other formats (gpt-oss: original/ and metal/), consolidated* a second copy of the weights (Mistral).
IGNORED = ("*/*", "consolidated*")


def download_model(repo_id: str, progress: Progress) -> Path:
    """The local folder of a hub model; what is already in the client's cache is not fetched again.

    Raises:
        ModelLoadError: not found, gated, no network, or an interrupted download.
    """
    try:
        folder = snapshot_download(
            repo_id, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED), tqdm_class=_bar_class(progress)
        )
    except GatedRepoError:
        raise ModelLoadError(
            f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelLoadError(
            f"the hub has no model {repo_id}, or it is private: check the name, or run `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, IncompleteSnapshotError):
        raise ModelLoadError(
            f"{repo_id} is not in the local cache and the hub cannot be reached: run `hf download {repo_id}` where "
            "there is a network, or pass a model folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ModelLoadError(f"downloading {repo_id} failed ({cause}); start again to go on where it broke") from None
    return Path(folder)


def _bar_class(progress: Progress) -> type[tqdm]:
    """A progress bar class that draws nothing and reports the bytes that are complete on disk."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            cast("Any", super()).__init__(*args, **{**kwargs, "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            del msg, pos
            # The client keeps a second byte bar for the network, which restarts and overlaps with this one.
            if self.unit == "B" and not str(self.desc).startswith("Download"):
                progress("downloading", int(self.n), int(self.total or 0), "bytes")

    return Bar
