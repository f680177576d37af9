"""Bring configurations that an earlier flsep stored to the present form."""

from typing import Any

# The fields that each approach has now, of the one section that all approaches once shared.
_REGULARIZER = ("name", "teacher_signal", "weight", "silence_db")
_APPROACH_FIELDS = {
    "none": ("name",),
    "concat": ("name", "teacher_signal", "projection_size"),
    "contrastive": (*_REGULARIZER, "temperature", "projection_size"),
    "distance": _REGULARIZER,
}


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration in the form of `TrainConfig.to_json`.

    Before separators had names there was X-UMX alone, and all approaches shared one section with
    the fields of each. A configuration of the present form is returned as it is.
    """
    separator, approach = config.get("separator", {}), config["approach"]
    if "name" in separator or approach["name"] not in _APPROACH_FIELDS:
        return config
    kept = {name: approach[name] for name in _APPROACH_FIELDS[approach["name"]] if name in approach}
    return {**config, "separator": {"name": "xumx", **separator}, "approach": kept}
