"""The model hub, through its own library: the only file that imports `huggingface_hub` (extra `hub`).

The library's download call starts over after an interruption, so files are fetched by its `http_get`, which can begin
at any byte.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from zimage.errors import FetchError, RequestError, install_hint

TIMEOUT = 20.0  # seconds without an answer


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it: a large one by sha256, others by git's hash of their content."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    commit: str
    files: tuple[Remote, ...]


class Hub:
    """One repository. Every failure is a FetchError, except RequestError where the library is not installed."""

    def __init__(self, repository: str, endpoint: str | None = None):
        _require_library()
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging

        disable_progress_bars()  # the command line shows its own, and a failure is reported once
        logging.set_verbosity(logging.CRITICAL)
        self.repository = repository
        self._api = HfApi(endpoint=endpoint)

    def listing(self, revision: str | None) -> Listing:
        """What the repository holds at a branch, tag or commit (default: its main branch)."""
        with self._one_line(f"revision {revision or 'main'}"):
            info = self._api.model_info(
                self.repository, revision=revision or "main", files_metadata=True, timeout=TIMEOUT
            )
        if not info.sha:
            raise FetchError(f"{self._api.endpoint} returned no commit for {self.repository}; it is not a model hub")
        return Listing(info.sha, tuple(map(self._described, info.siblings or ())))

    def read(self, remote: Remote, commit: str, stream: BinaryIO, begin: int) -> None:
        """Append a file's bytes from `begin` on to `stream`, resuming by itself after short breaks."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, remote.path, revision=commit, endpoint=self._api.endpoint)
        # A compressed transfer could not be resumed at one of the file's bytes.
        headers = {**build_hf_headers(library_name="zimage"), "Accept-Encoding": "identity"}
        with self._one_line(remote.path):
            http_get(url, stream, resume_size=begin, headers=headers, expected_size=remote.size)

    def _described(self, sibling: Any) -> Remote:
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if size is None:
            raise FetchError(f"{self._api.endpoint} states no size of {sibling.rfilename}, so it cannot be checked")
        return Remote(sibling.rfilename, size, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)

    @contextlib.contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        """Turn the library's errors, which run over many lines and vary with its HTTP package, into one line each."""
        from huggingface_hub import errors

        place = f"{self.repository} at {self._api.endpoint}"
        try:
            yield
        except errors.GatedRepoError as error:
            raise FetchError(f"{place} is gated: accept its terms there, then log in with `hf auth login`") from error
        except errors.RevisionNotFoundError as error:
            raise FetchError(f"{place} has no {what}; name a branch, a tag or a commit") from error
        except errors.RepositoryNotFoundError as error:
            raise FetchError(f"{place} was not found; it may be private: log in with `hf auth login`") from error
        except errors.HfHubHTTPError as error:
            raise FetchError(f"{place} answered {error.response.status_code} for {what}; {AGAIN}") from error
        except (errors.HTTPError, ConnectionError, TimeoutError) as error:
            raise FetchError(f"{place} cannot be reached ({_brief(error)}) for {what}; {AGAIN}") from error
        except OSError as error:
            if error.errno is not None:
                raise  # of this machine: the disk, not the hub
            raise FetchError(f"{place} broke off ({_brief(error)}) during {what}; {AGAIN}") from error
        except ValueError as error:  # a name the library refuses, or an answer that is not JSON
            raise FetchError(f"{place} gave no usable answer ({_brief(error)}) for {what}") from error


AGAIN = "run the same command again to resume"


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _require_library() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError:
        raise RequestError(f"fetching needs huggingface_hub, the extra `hub`: {install_hint('hub')}") from None
