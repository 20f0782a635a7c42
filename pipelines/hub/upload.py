"""Sends a repository's files to the Hub in one commit, and puts its failures into a sentence.

push_command.py calls `upload`. The client is huggingface_hub's. It sends only content that the Hub
lacks, so an upload that broke off goes on where it was, and makes no commit where nothing changed.
The token is the client's own (HF_TOKEN, or the login's); no text here may hold it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import logging, validate_repo_id

from ...schemas.errors import InputError, shortened
from .contents import Contents

_AGAIN = "give the same command again, which sends only what is missing"
_SENTENCES = {
    401: "the hub does not accept the token; log in again (`hf auth login`), or set HF_TOKEN to a "
    "token that may write",
    403: "the token may not write there; give it the right to write, or name a repository of yours",
    404: "is not there, or the token may not see it; check the name and the token's rights",
    409: f"the hub reports a conflict with another change; {_AGAIN}",
    412: f"somebody else changed it meanwhile; {_AGAIN}",
    413: "the hub finds the upload too large; see the limits of your account",
    429: f"the hub's limit on requests is reached; wait some minutes, then {_AGAIN}",
}


def require_repo(repo: str) -> None:
    """Raises InputError unless the name has the form owner/name."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        valid = False
    else:
        valid = repo.count("/") == 1
    if not valid:
        raise InputError(
            f"repository {shortened(repo, 100)!r}: is not a name on the hub; give owner/name, of "
            "letters, digits, dots, dashes and underscores"
        )


def upload(contents: Contents, repo: str, public: bool) -> tuple[str, bool]:
    """Make the repository hold the files; its address, and whether a commit was made.

    A new repository is private unless `public`; the visibility of one that exists never changes.

    Raises:
        InputError: no token, a refusal of the hub, another visibility, or no connection.
    """
    token = get_token()
    if token is None:
        raise InputError(
            f"push {repo}: there is no token; log in (`hf auth login`), or set HF_TOKEN to a token "
            "that may write"
        )
    logging.set_verbosity_error()  # an upload without changes is no warning
    with _one_sentence(repo, token):
        api = HfApi(token=token)
        at = _opened(api, contents.kind, repo, public)
        held = api.list_repo_files(repo, repo_type=contents.kind, revision=at)
        gone = [
            name
            for name in held
            if name not in contents.files
            and any(fnmatchcase(name, pattern) for pattern in contents.replaces)
        ]
        made = api.create_commit(
            repo,
            [
                *(CommitOperationDelete(name) for name in gone),
                *(CommitOperationAdd(name, data) for name, data in contents.files.items()),
            ],
            commit_message=f"{contents.title}, by trace-opd push",
            repo_type=contents.kind,
            parent_commit=at,
        )
        prefix = "datasets/" if contents.kind == "dataset" else ""
        return f"{api.endpoint}/{prefix}{repo}", made.oid != at


def _opened(api: HfApi, kind: str, repo: str, public: bool) -> str:
    """The newest commit of the repository, which is made if it is not there."""
    try:
        info = api.repo_info(repo, repo_type=kind)
    except RepositoryNotFoundError:
        api.create_repo(repo, repo_type=kind, private=not public)
        info = api.repo_info(repo, repo_type=kind)
    if bool(info.private) == public:
        is_, mend = ("private", "leave --public out") if public else ("public", "give --public")
        raise InputError(
            f"push {repo}: the repository is {is_}; {mend}, change it on the hub, or name another"
        )
    assert info.sha is not None, "the hub names the newest commit"
    return info.sha


@contextmanager
def _one_sentence(repo: str, token: str) -> Iterator[None]:
    """Turns the client's errors, also those of its threads, into an InputError without the
    token.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        sentence = _sentence(error, token)
        if sentence is None:
            raise
        raise InputError(f"push {repo}: {sentence}") from None


def _sentence(error: BaseException, token: str) -> str | None:
    """What to tell of an error or of what caused it; None: a fault of the program."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the hub is not asked; unset it"
        if isinstance(cause, HfHubHTTPError):
            return _of_status(cause, token)
        if isinstance(cause, httpx2.HTTPStatusError):  # of where large files are sent
            return f"the upload of a file failed ({cause.response.status_code}); {_AGAIN}"
        if isinstance(cause, httpx2.TransportError):
            kind = type(cause).__name__
            return (
                f"the hub cannot be reached ({kind}); check the network and HF_ENDPOINT, then "
                f"{_AGAIN}"
            )
        cause = cause.__cause__
    if isinstance(error, ValueError):  # the hub's own word on metadata, or a reply of another form
        said = shortened(str(error).replace(token, "***"))
        return f"the hub refuses the upload ({said}); mend it, then give the same command again"
    return None


def _of_status(error: HfHubHTTPError, token: str) -> str:
    status = error.response.status_code
    if status in _SENTENCES:
        return _SENTENCES[status]
    said = shortened((error.server_message or error.response.reason_phrase).replace(token, "***"))
    if status >= 500:
        return f"the hub fails ({status}: {said}); later {_AGAIN}"
    return f"the hub refuses the upload ({status}: {said}); mend it, then give the command again"
