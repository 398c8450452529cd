"""Repositories of the Hugging Face hub: their names, and what is fetched of them into the hub's own cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from gpt_core.errors import InputError
from gpt_core.files.reading import exists

_HUB_NAME = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*")
_TIMEOUT = 10.0  # seconds, for the first answer


def is_hub_name(name: str) -> bool:
    """Whether a name that no folder has may be a repository's.

    A mistyped path of this machine is nobody else's business: where the first part is a folder here, it is one.
    """
    return _HUB_NAME.fullmatch(name) is not None and not exists(Path(name).parent)


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """The folder of a repository's files of these patterns.

    Raises:
        InputError: the package is missing, or there is no such repository within reach.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ModuleNotFoundError:
        raise InputError(
            f"{name}: no such folder; names on the Hugging Face hub need a package: pip install 'twingpt[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), etag_timeout=_TIMEOUT))
    except HFValidationError:
        return Path(name)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"{name}: no such folder, and no such repository within reach on the Hugging Face hub ({reason}); without "
            f"a network, give a folder"
        ) from None
