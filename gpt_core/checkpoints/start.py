"""What a run begins with: the weights of a checkpoint of any format or fresh ones, and the tokenizer of its text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_core.checkpoints.hashing import WeightsHash, parts
from gpt_core.checkpoints.pretrained import open_pretrained
from gpt_core.cli import progress
from gpt_core.config import ModelConfig
from gpt_core.data.config import DataConfig
from gpt_core.data.prepared import Index
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import exists, is_file
from gpt_core.formats.base import Checkpoint
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import Origin, run_of
from gpt_core.runs.saved import RUN_FILE, saved_steps
from gpt_core.storage.checkpoint_config import read_checkpoint_config
from gpt_core.text.finding import find_tokenizer, open_tokenizer, text_tokenizer
from gpt_core.text.gpt2 import GPT2, gpt2_tokenizer, is_gpt2
from gpt_core.text.tokenizer import Tokenizer

FREE_FIELDS = ("dropout", "context_length", "rope_theta", "rope_scaling")
"""Fields of a model that touch no weight, where it has no table of positions."""


_HASH = "tokenizer_sha256"  # in the settings of prepared tokens, unless GPT-2's tokenizer cut them


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Args:
        tokenizer: Of its text.
        checkpoint: Whose weights are those of step 0; None: fresh ones, or the run has a checkpoint of its own.
    """

    tokenizer: Tokenizer
    checkpoint: Checkpoint | None = None

    def origin(self, config: RunConfig) -> Origin | None:
        """What the run's folder records of it; reads all weights once, some at a time."""
        if self.checkpoint is None:
            return None
        weights = WeightsHash(self.checkpoint.config)
        every = list(parts(self.checkpoint.config))
        with progress() as bar:
            for part in bar.track(every, description=f"reading {config.train.start_from}"):
                weights.add(part, self.checkpoint.read(part))
        return Origin(
            _lasting(str(config.train.start_from), self.checkpoint.path), weights.hexdigest(), self.checkpoint.path
        )

    def saved_tokenizer(self, model: ModelConfig) -> Tokenizer | None:
        """What is written beside a new model: the tokenizer, where there is a row for each of its tokens."""
        return self.tokenizer if model.vocab_size >= self.tokenizer.vocab_size else None


def _lasting(start_from: str, checkpoint: Path) -> str:
    """What weights are called for good, from anywhere: `RUN` and `RUN@best` are others once that run goes on."""
    run, place = run_of(checkpoint), Path(start_from)
    if run is not None and place != checkpoint:
        return f"{run.absolute()}@{checkpoint.name}"
    return str(place.absolute()) if exists(place) else start_from  # which is a name on the hub


def begin(config: RunConfig, run: Path) -> Start:
    """What a run begins with; a run that has a checkpoint goes on without its source.

    Raises:
        InputError: the source is missing or damaged or holds another model, or the data were cut by another tokenizer.
    """
    checkpoint = None
    if config.train.start_from is not None and not (is_file(run / RUN_FILE) and saved_steps(run)):
        checkpoint = open_pretrained(config.train.start_from)
        _require_same(checkpoint.config, config.model, config.train.start_from)
    home = checkpoint.path if checkpoint is not None else run if is_file(run / RUN_FILE) else None
    return Start(tokenizer_of_data(config, home), checkpoint)


def tokenizer_of_data(config: RunConfig, home: Path | None) -> Tokenizer:
    """The tokenizer of a run's text: that of its weights or, where they have none, of its data.

    Args:
        config: The run.
        home: Where the weights lie, or None.

    Raises:
        InputError: it cannot be read, or the data were cut by another one.
    """
    data, found = config.data, None if home is None else find_tokenizer(home)
    if home is None or found is None or found.kind is None or (data.tokenizer is not None and not found.readable):
        return _tokenizer_of(data)
    tokenizer = text_tokenizer(home, "set data.tokenizer to one that can be read")
    if data.prepared is not None:
        index = Index.read(Path(data.prepared))
        if not _cut(index, tokenizer):
            raise InputError(
                f"{data.prepared}: its tokens were cut by the tokenizer {_cutter(index)}, and the weights have another "
                f"({tokenizer.name}); prepare the text with theirs: gpt-data prepare SOURCE DESTINATION "
                f"--tokenizer {home}"
            )
    elif data.tokenizer is not None and open_tokenizer(data.tokenizer).sha256 != tokenizer.sha256:
        raise InputError(
            f"data.tokenizer = {data.tokenizer}: another tokenizer than that of the weights ({tokenizer.name}); leave "
            f"it out"
        )
    return tokenizer


def _tokenizer_of(data: DataConfig) -> Tokenizer:
    """The tokenizer that data name.

    Raises:
        InputError: it cannot be read, or is not the one that cut the data.
    """
    if data.prepared is None:
        return gpt2_tokenizer() if data.tokenizer is None else open_tokenizer(data.tokenizer)
    folder = Path(data.prepared)
    index = Index.read(folder)
    if _HASH not in index.settings:
        return gpt2_tokenizer()
    own = open_tokenizer(data.prepared) if find_tokenizer(folder).kind is not None else None
    if own is None or not _cut(index, own):
        raise InputError(
            f"{data.prepared}: its tokens were cut by the tokenizer {_cutter(index)}, which does not lie beside them "
            f"{'any more' if own is None else 'as it was'}; put its files back, or prepare the text again"
        )
    return own


def _cutter(index: Index) -> str:
    """The name of the tokenizer that cut prepared tokens."""
    return str(index.settings.get("tokenizer", GPT2))


def _cut(index: Index, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is the one that cut prepared tokens."""
    if _HASH not in index.settings:
        return is_gpt2(tokenizer)
    return bool(index.settings[_HASH] == tokenizer.sha256)


def started_model(config_of: ModelConfig, given: Mapping[str, Any], start_from: str) -> ModelConfig:
    """The model of a run that starts from weights: theirs, with what the run changes of it.

    Args:
        config_of: Of the weights.
        given: Fields that the run gives.
        start_from: Where the weights lie, for messages.

    Raises:
        InputError: a field that the weights depend on would change, or one is bad.
    """
    model = ModelConfig.from_dict(config_of.to_dict() | dict(given), source="model")
    _require_same(config_of, model, start_from)
    return model


def _require_same(theirs: ModelConfig, ours: ModelConfig, start_from: str) -> None:
    before, after = theirs.to_dict(), ours.to_dict()
    free = set(FREE_FIELDS) - ({"context_length"} if theirs.position == "learned" else set())
    changed = [name for name in before if before[name] != after[name] and name not in free]
    if changed:
        name = changed[0]
        raise InputError(
            f"model.{name} = {shown(after[name])}, and the weights of {start_from} have {shown(before[name])}; leave "
            f"`model` out, or change only what touches no weight: {', '.join(sorted(free))}"
        )


def model_of(start_from: str, run: Path) -> ModelConfig:
    """The model of a run that starts from weights: the run's own where it has begun, else that of the weights.

    Raises:
        InputError: neither can be read.
    """
    if is_file(run / RUN_FILE) and saved_steps(run):
        return read_checkpoint_config(run)
    return open_pretrained(start_from).config
