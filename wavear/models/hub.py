"""Upload a checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.models.card import CARD, UNKNOWN_LICENSE, write_card
from wavear.models.checkpoint import load, read_config
from wavear.models.saving import CONFIG, WEIGHTS

logger = get_logger(__name__)


def push(
    directory: str | Path, name: str, *, private: bool = False, overwrite: bool = False
) -> str:
    """Upload a checkpoint and its model card; return the address of the commit.

    Parameters
    ----------
    directory : str or Path
        A folder that `save` or `wavear train` wrote. A missing card is written.
    name : str
        "owner/name" on the hub; it is created there.
    private : bool
        Create it for its owner only.
    overwrite : bool
        Upload to a model that exists.

    Raises
    ------
    FileNotFoundError, CheckpointError
        If the folder is missing, or is a damaged checkpoint.
    WavearError
        If the hub refuses the name, the login or the upload.
    """
    from huggingface_hub import HfApi

    folder = Path(directory).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    if name.count("/") != 1:
        raise WavearError(f"{name} is not a name on the hub: it has the form owner/name")
    load(folder)  # refuses a damaged one
    if not (folder / CARD).exists():
        write_card(folder, read_config(folder))
    if UNKNOWN_LICENSE in (folder / CARD).read_text(encoding="utf-8", errors="replace"):
        logger.warning("%s states no licence: edit `license` and push again", folder / CARD)
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=overwrite)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[CONFIG, WEIGHTS, CARD],
            commit_message="Upload a checkpoint of wavear",
        )
    except Exception as error:  # of the HTTP library of this version of huggingface_hub, too
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", 0)
        hint = {409: "; if it exists, --overwrite replaces it", 401: "; run `hf auth login`"}
        raise WavearError(
            f"cannot upload to {name} on the hub: {reason}{hint.get(status, '')}"
        ) from None
    return str(commit)
