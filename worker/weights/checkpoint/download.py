"""Downloads pipelines from a hub, and explains failures in one sentence."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from diffusers import DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ....protocol.errors import StartFailed

_CONFIGURATIONS = ["**/*.json", "*.json", "*.txt", "**/*.txt", "**/*.model"]  # what `from_single_file` fetches


def download_pipeline(
    name: str, *, variant: str | None = None, revision: str | None = None, without: Sequence[str] = ()
) -> Path:
    """The directory of the hub's pipeline ``name``, without the components ``without``. Raises ``StartFailed``."""
    with _in_words(name, variant, revision):
        return Path(
            DiffusionPipeline.download(
                name, use_safetensors=True, variant=variant, revision=revision, **dict.fromkeys(without)
            )
        )


def download_configurations(name: str, *, revision: str | None = None) -> Path:
    """A directory with the hub's pipeline ``name`` except its weights. Raises ``StartFailed``."""
    with _in_words(name, None, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=_CONFIGURATIONS))


@contextlib.contextmanager
def _in_words(name: str, variant: str | None, revision: str | None) -> Iterator[None]:
    """Turn the libraries' errors into ``StartFailed``, without diffusers' own log lines."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        raise StartFailed(_sentence(name, variant, revision, error)) from error
    finally:
        logger.setLevel(before)


def _sentence(name: str, variant: str | None, revision: str | None, error: Exception) -> str:
    causes = list(_chain(error))
    for kind, sentence in (
        (
            GatedRepoError,
            f"The repository {name} is gated: accept its terms at {constants.ENDPOINT}/{name}, and set HF_TOKEN to a "
            "token of the account that did.",
        ),
        (
            RepositoryNotFoundError,
            f"The hub {constants.ENDPOINT} has no repository {name}, or it is private: check the name, or set HF_TOKEN "
            "to a token of an account that may read it.",
        ),
        (
            RevisionNotFoundError,
            f"The repository {name} has no revision {revision!r}; --revision takes a branch, a tag or a commit.",
        ),
    ):
        if any(isinstance(cause, kind) for cause in causes):
            return sentence
    if any(_is_connection_error(cause) for cause in causes):
        return (
            f"The hub {constants.ENDPOINT} cannot be reached to fetch {name}, and its files are not all in the cache "
            f"{constants.HF_HUB_CACHE}; check the network and HF_ENDPOINT, or give the path of a directory."
        )
    if any(isinstance(cause, EntryNotFoundError) for cause in causes):
        return f"The repository {name} is not a diffusers pipeline, because it has no model_index.json."
    of_variant = f" with the variant {variant!r}" if variant is not None else ""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"The repository {name} could not be fetched{of_variant}: {said[0].rstrip('.')}."


def _is_connection_error(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    names = {kind.__name__ for kind in type(error).__mro__}  # of whichever HTTP library huggingface_hub uses
    lost = {"NetworkError", "TimeoutException", "ConnectionError", "ProxyError"}
    return isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or bool(names & lost)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
