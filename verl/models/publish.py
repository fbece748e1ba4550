"""Pushing a model directory to the Hugging Face Hub, in one commit: the repository has all of it or nothing."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

from verl.errors import UserError
from verl.manifest import MANIFEST
from verl.models.card import FILE as CARD
from verl.models.card import LICENCE_KEYS
from verl.models.foreign import check_repository
from verl.redaction import redact_text

HTTPError: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version of huggingface_hub uses
TOKENS = "make a token that may write at https://huggingface.co/settings/tokens, then run `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Place:
    """A repository on the Hub, which need not exist yet."""

    name: str
    endpoint: str

    @property
    def address(self) -> str:
        return f"{self.endpoint}/{self.name}"


def check_place(name: str, *, replace: bool) -> Place:
    """Check that a model can be pushed under a name, before anything is computed.

    Args:
        name: `owner/name`, or a name alone, of the user's own.
        replace: whether the repository may exist already.
    Raises:
        UserError: the name is none, the token is missing, wrong or another owner's, the Hub cannot be reached, or the repository exists.
    """
    api = HfApi()
    check_repository(name)
    with hub_errors_named(api.endpoint, name):
        user = api.whoami()
        place = Place(name if "/" in name else f"{user['name']}/{name}", api.endpoint)
        owners = [str(user["name"]), *(str(one["name"]) for one in user.get("orgs") or [])]
        if place.name.partition("/")[0] not in owners:
            fix = f"give a name of {' or '.join(owners)}, to which the token belongs, or use a token of that owner"
            raise UserError(f"the token may not write under {place.name.partition('/')[0]}", where=f"hub={name}", fix=fix)
        try:
            api.model_info(place.name)
        except RepositoryNotFoundError:
            return place
    if not replace:
        fix = "choose another name, or set hub_replace=true: files of the same names get a new version, and others stay"
        raise UserError(f"the repository exists: {place.address}", where=f"hub={name}", fix=fix)
    return place


def metadata_on_hub(model: str) -> dict[str, Any]:
    """Return licence and language that the Hub has of a model; empty if it cannot be asked."""
    try:
        data = HfApi().model_info(model).card_data
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError):
        return {}
    return {} if data is None else {key: value for key in LICENCE_KEYS if (value := data.to_dict().get(key))}


def push(folder: Path, place: Place, *, private: bool, replace: bool, card: str | None) -> str:
    """Make the repository and commit a directory to it, without the state of a trainer.

    Args:
        private: of a new repository.
        card: text of README.md, in place of the directory's own.
    Returns:
        the address of the commit.
    Raises:
        UserError: see `check_place`.
    """
    api = HfApi()
    added = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files_to_push(folder, with_card=card is None)]
    if card is not None:
        added.append(CommitOperationAdd(CARD, card.encode()))
    with hub_errors_named(place.endpoint, place.name):
        api.create_repo(place.name, private=private, exist_ok=replace)
        return str(api.create_commit(place.name, added, commit_message="Upload by verl export").commit_url)


def files_to_push(folder: Path, *, with_card: bool) -> list[Path]:
    """Return the files of a directory but those of a trainer, hidden ones and, if it is replaced, the card."""
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder).parts for path in inside}
    kept = [path for path in inside if names[path][0] != "trainer" and not any(part.startswith(".") for part in names[path])]
    return [path for path in kept if names[path] != (MANIFEST,) and (with_card or names[path] != (CARD,))]


@contextlib.contextmanager
def hub_errors_named(endpoint: str, name: str) -> Iterator[None]:
    """Raise what goes wrong at the Hub as a UserError with its fix. The token is never part of it."""
    where = f"hub={name}"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError("there is no token for the Hub", where=where, fix=TOKENS) from error
    except OfflineModeIsEnabled as error:
        raise UserError("the Hub may not be asked: HF_HUB_OFFLINE is set", where=where, fix="unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        raise _refused(error, endpoint, where) from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if (refused := _cause(error)) is not None:  # of a thread that uploads a file
            raise _refused(refused, endpoint, where) from None
        if isinstance(error, ValueError | RuntimeError) and not isinstance(error.__cause__, HTTPError):
            what = f"{endpoint} does not take it: {first_sentence(error.__cause__ or error)}"
            raise UserError(what, where=where, fix="correct what it says; nothing was committed") from error
        what = f"{endpoint} cannot be reached: {first_sentence(error) or type(error).__name__}"
        mirror = "HF_ENDPOINT names another address of the Hub" if "HF_ENDPOINT" not in os.environ else f"HF_ENDPOINT is {endpoint}"
        raise UserError(what, where=where, fix=f"check the network and its proxy (HTTPS_PROXY); {mirror}") from error


def _cause(error: BaseException | None) -> HfHubHTTPError | None:
    """Return the answer of the Hub that an error comes from; None if it is not one."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error


def _refused(error: HfHubHTTPError, endpoint: str, where: str) -> UserError:
    status, said = error.response.status_code, redact_text(str(error.server_message or "")).strip()
    told = f": {said}" if said else ""
    if status == 401:
        kind = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"
        return UserError(f"{endpoint} does not accept {kind}{told}", where=where, fix=TOKENS)
    if status == 403:
        fix = f"give a name of your own or of an organization in which you may write; {TOKENS}"
        return UserError(f"the token may not write there{told}", where=where, fix=fix)
    if status == 409:
        return UserError(f"the repository exists{told}", where=where, fix="choose another name, or set hub_replace=true")
    if status == 429 or status >= 500:
        return UserError(f"{endpoint} answers with status {status}{told}", where=where, fix="try again later; nothing was committed")
    return UserError(f"{endpoint} refuses it with status {status}{told}", where=where, fix="correct what it says; nothing was committed")


def first_sentence(error: BaseException) -> str:
    return redact_text(str(error).strip().splitlines()[0]) if str(error).strip() else ""
