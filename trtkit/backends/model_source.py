"""Where a model comes from: a directory, a preset of the catalog, or the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from trtkit.spec.catalog import model_hub_id, model_preset
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.hf import load_model_spec
from trtkit.spec.model import ModelSpec

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SMALL_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model's shape, and where its weights are: in `directory`, or still on the hub under `hub_id`."""

    model: ModelSpec
    directory: Path | None = None
    hub_id: str = ""

    def fetch(self) -> Path:
        """The local directory, downloading the weights if need be.

        Raises:
            InputError: they cannot be downloaded.
        """
        return self.directory or download(self.hub_id, weights=True)


def resolve_model(text: str, *, name: str | None = None, look_up: bool = True) -> ModelSource:
    """Find a model by directory, preset name or hub id, in this order. Downloads no weights.

    Args:
        text: what the user wrote.
        name: what to call it instead of its directory's or its preset's name.
        look_up: read a hub model's own config there; otherwise the catalog's shape will do, where it has one.

    Raises:
        InputError: the directory or the hub does not give a model.
        UsageError: none of the three.
    """
    if Path(text).is_dir():
        return _named(ModelSource(model=load_model_spec(Path(text)), directory=Path(text)), name)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"{text}: no such model directory")
    hub_id, known = _hub_model(text)
    if known is not None and not look_up:
        return _named(ModelSource(model=known, hub_id=hub_id), name)
    model = load_model_spec(download(hub_id, weights=False))
    return _named(ModelSource(model=model, hub_id=hub_id), name or hub_id.rpartition("/")[2].lower())


def download(hub_id: str, *, weights: bool) -> Path:
    """Fetch a model from the hub into its cache, or find it there.

    Raises:
        InputError: offline, gated, unknown or interrupted; says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = [*_SMALL_FILES, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        raise InputError(f"{hub_id}: gated; accept its licence on the hub and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise InputError(f"{hub_id}: no such model on the hub (or it is private: run `hf auth login`)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise InputError(
            f"{hub_id}: not in the local cache, and the hub cannot be reached; go online or give --model DIRECTORY"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{hub_id}: the download failed ({type(error).__name__}); run the same command again"
        ) from None


def _hub_model(text: str) -> tuple[str, ModelSpec | None]:
    """Hub id and, where the catalog knows the model, its shape."""
    is_id = _HUB_ID.fullmatch(text) is not None
    try:
        return text if is_id else model_hub_id(text), model_preset(text)
    except UsageError as error:
        if is_id:
            return text, None
        raise UsageError(f"model {text!r}: no such directory, and {error}") from None


def _named(source: ModelSource, name: str | None) -> ModelSource:
    return source if name is None else replace(source, model=replace(source.model, name=name))
