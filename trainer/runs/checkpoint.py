"""Checkpoints: one safetensors file with the weights, and all else as JSON in its header.

Weights, configuration and training state cannot get mixed up, since they are one file that is
written atomically. Nothing is unpickled. ``best.safetensors`` holds weights; ``last.safetensors``
also holds what resuming needs. Tensors are named ``model.<name>``,
``optimizer.<parameter>.<name>``, ``average.model.<name>`` and ``random.<device>.<rank>``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flsep.cache import Layout
from flsep.cache.errors import FlsepError
from flsep.cache.files import replacing
from flsep.trainer.approaches.informed import InformedSeparator, build_model
from flsep.trainer.approaches.interface import find_needs
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import CheckpointError
from flsep.trainer.runs.upgrade import upgrade_config
from flsep.trainer.teacher import Standard

FORMAT_NAME = "flsep-checkpoint"
FORMAT_VERSION = 3
_HEADER = "flsep"
_FIELDS = [
    "config",
    "layout",
    "standard",
    "fingerprint",
    "epoch",
    "metrics",
    "packages",
    "training",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The content of a checkpoint."""

    config: TrainConfig
    layout: Layout
    # Statistics that the teacher's embeddings are standardised with.
    standard: Standard | None
    # Identifies the configuration of the shards.
    fingerprint: str
    # Number of completed epochs, and the last one's metrics as in ``metrics.jsonl``.
    epoch: int
    metrics: dict[str, Any]
    packages: dict[str, str]
    # JSON values that resuming needs, or None.
    training: dict[str, Any] | None
    tensors: Mapping[str, Tensor]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that the file is either the old one or the new one, complete.

    Raises CheckpointError if it cannot be written.
    """
    standard = checkpoint.standard
    header = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "config": checkpoint.config.to_json(),
        "layout": checkpoint.layout.to_json(),
        "standard": None
        if standard is None
        else {"mean": standard.mean.tolist(), "scale": standard.scale.tolist()},
        "fingerprint": checkpoint.fingerprint,
        "epoch": checkpoint.epoch,
        "metrics": checkpoint.metrics,
        "packages": checkpoint.packages,
        "training": checkpoint.training,
    }
    # safetensors refuses tensors that are not contiguous.
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()
    }
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); what was there is kept"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raises CheckpointError if it is missing, damaged or of another version."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; train one with flsep-train fit")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or no safetensors file ({error}); use another checkpoint"
        ) from error
    if header is None:
        raise CheckpointError(f"{path}: a safetensors file, but no {FORMAT_NAME}")
    try:
        values = json.loads(header)
        if values["format"] != FORMAT_NAME or not isinstance(values["version"], int):
            raise ValueError(f"format {values['format']!r}")
        version, fields = values["version"], {name: values[name] for name in _FIELDS}
        standard = fields["standard"]
        if standard is not None:
            arrays = (np.array(standard[name], np.float32) for name in ("mean", "scale"))
            fields["standard"] = Standard(*arrays)
        if version == 2:
            fields["config"] = upgrade_config(fields["config"])
            # A regularizer's projection had another name.
            tensors = {
                name.replace("approach.criterion.", "approach."): tensor
                for name, tensor in tensors.items()
            }
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its header is not readable ({error})") from error
    if version not in (2, FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: checkpoint version {version}, this flsep reads {FORMAT_VERSION}; use the "
            "flsep that wrote it"
        )
    try:
        fields["config"] = TrainConfig.from_json(fields["config"])
        fields["layout"] = Layout.from_json(fields["layout"])
    except FlsepError as error:
        raise CheckpointError(f"{path}: its header is not readable ({error})") from error
    return Checkpoint(**fields, tensors=tensors)


def load_model(checkpoint: Checkpoint, where: str) -> InformedSeparator:
    """Build the model that a checkpoint describes, with its weights, on the CPU, for evaluation.

    `where` names the file in messages. Raises CheckpointError if the weights are not those of such
    a model.
    """
    model = build_model(checkpoint.config, checkpoint.layout)
    load_weights(model, take(checkpoint.tensors, "model."), where)
    return model.eval()


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load weights into a model; raises CheckpointError unless names and shapes agree."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    # torch's own message would list all names at once, over many lines.
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{where}: {name} has shape {found.get(name, 'none')}, expected "
                f"{expected.get(name, 'none')}: a checkpoint of another model"
            )
    model.load_state_dict(dict(state))


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[list[Any], dict[str, Tensor]]:
    """Return an optimizer's groups as JSON values and its state as tensors."""
    state = optimizer.state_dict()
    tensors = {
        f"optimizer.{number}.{name}": value
        for number, entries in state["state"].items()
        for name, value in entries.items()
    }
    return state["param_groups"], tensors


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, groups: list[Any], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `pack_optimizer` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in take(tensors, "optimizer.").items():
        # torch identifies the parameters of an optimizer by number.
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def require_same_data(checkpoint: Checkpoint, layout: Layout, where: str) -> None:
    """Refuse data that a checkpoint's model cannot take.

    Raises CheckpointError with the first thing that differs.
    """
    names = ["sources", "sample_rate_hz", "num_channels", "n_fft", "hop_samples"]
    # A teacher that only training needs may be another one.
    if find_needs(checkpoint.config.approach).teacher_to_separate:
        names += ["teacher_digest", "embedding_size", "window_seconds", "window_hop_seconds"]
    for name in names:
        trained, found = getattr(checkpoint.layout, name), getattr(layout, name)
        if trained != found:
            raise CheckpointError(
                f"{where}: trained with {name} {_show(trained)}, the shards have {_show(found)}; "
                "use shards made with the same settings"
            )


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
