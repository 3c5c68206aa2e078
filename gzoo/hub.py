"""Publishing a model card or a trained model as a repository of the Hugging Face Hub."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from gzoo.card import UNNAMED
from gzoo.weights import FILENAME, HUB_ORGANIZATION, card_folder, write_pin

_NEEDED = (FILENAME, "config.json")


def push(source: str, organization: str = HUB_ORGANIZATION, name: str | None = None, private: bool = False) -> str:
    """Uploads a folder in one commit, and makes the repository where there is none.

    A card that goes to its place in our organization is pinned to that commit: pins.csv is then to be committed.

    Args:
        source: NAME.TAG of a model card, the --out of `gzoo train`, or a folder that has model.safetensors and
            config.json, such as the model/ in it.
        organization: of the Hub, or a user.
        name: of the repository, by default that of the card or the network.
        private: whether a new repository is visible to its owners only.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ValueError: the Hub takes no such name of a repository.
        PermissionError: nobody is logged in, or may not write there.
        ConnectionError: the Hub cannot be reached, or refuses for another reason.
    """
    folder, repository, _ = planned(source, organization, name)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        with _addressed(folder, repository) as own:
            commit = api.upload_folder(repo_id=repository, folder_path=own, commit_message=f"Upload {folder.name}")
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            "you are not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(
                f"{repository}: the Hub refused ({status}). Log in with a token that may write to {organization}, by "
                "`hf auth login` or HF_TOKEN, or give another --org"
            ) from error
        raise ConnectionError(f"{repository}: the Hub answered {status}: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("requests", "httpx", "httpx2"):  # the client's transport
            raise
        raise ConnectionError(f"the Hugging Face Hub cannot be reached: {error}. Connect and try again") from error
    if folder.parent == card_folder().resolve() and repository == f"{HUB_ORGANIZATION}/{folder.name}":
        write_pin(folder, commit.oid)
    return commit.commit_url


@contextmanager
def _addressed(folder: Path, repository: str) -> Iterator[Path]:
    """The folder with the repository's name in its README, which `gzoo train` could not know."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if f"hf-hub:{UNNAMED}" not in text:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, temporary, dirs_exist_ok=True))
        (copy / "README.md").write_text(text.replace(UNNAMED, repository), encoding="utf-8")
        yield copy


def planned(source: str, organization: str, name: str | None = None) -> tuple[Path, str, list[str]]:
    """What `push` would upload: the folder, the repository and the files."""
    folder = Path(source) if Path(source).is_dir() else card_folder() / source
    folder = folder.resolve()
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder  # of a run
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{source}: no card and no folder of that name; give NAME.TAG of a card in {card_folder().name}/, or the "
            "--out of `gzoo train`"
        )
    is_card = folder.parent == card_folder().resolve()
    missing = [file for file in (*_NEEDED, *(["README.md"] if is_card else [])) if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; give the model/ folder of a finished run, or make "
            "the card anew with `gzoo card`"
        )
    default = folder.name if is_card else json.loads((folder / "config.json").read_text()).get("architecture")
    if not default and not name:
        raise ValueError(f"{folder}/config.json names no architecture; make the folder anew with `gzoo train`")
    repository = f"{organization}/{name or default}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{repository} is no name of a repository: {error}") from error
    if (folder.parent / "checkpoint.pt").is_file() and not (folder.parent / "results.json").is_file():
        print(f"gzoo: {folder.parent}: this run has not finished; these are its weights so far", file=sys.stderr)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return folder, repository, files
