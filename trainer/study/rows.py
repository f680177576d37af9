"""Group evaluated runs into the rows of a comparison.

Configurations are compared as stored: plain JSON, whatever fields a separator or an approach has.
"""

from collections.abc import Sequence
from typing import Any

from flsep.trainer.errors import EvaluationError
from flsep.trainer.scoring.evaluation import Evaluated
from flsep.trainer.study.comparison import Comparison, compare_scores
from flsep.trainer.study.scores import Scores


def compare_evaluations(
    runs: Sequence[Evaluated], *, floor: Evaluated, oracle: Evaluated | None
) -> Comparison:
    """Compare evaluated runs in one table.

    Runs make one row if their configurations differ in the seed alone. A row has the name that the
    user gave, or that of the approach, followed by ``stems`` if the stems are the teacher's
    signal, by the mixing if the runs differ in it, and by ``+wiener`` after the Wiener filter.

    Raises
    ------
    EvaluationError
        If the runs were not scored on the same audio with the same engine, or two runs of one
        name differ in more than the seed.
    ComparisonError
        As `compare_scores`.
    """
    for member in [*runs, *([oracle] if oracle else [])]:
        _require_same_scoring(member, floor)
    mixings = {run.summary["config"]["data"]["mixing"] for run in runs}
    rows: dict[str, Evaluated] = {}
    scores = []
    for run in runs:
        row = run.name or _name_row(run, with_mixing=len(mixings) > 1)
        # Each run is compared with the first one of its row.
        _require_alike(rows.setdefault(row, run), run, row)
        scores.append(_locate_scores(run, row, run.summary["config"]["fit"]["seed"]))
    return compare_scores(
        scores,
        floor=_locate_scores(floor, "mixture"),
        oracle=_locate_scores(oracle, "ideal ratio mask") if oracle else None,
        engine=floor.summary["engine"],
    )


def _require_same_scoring(member: Evaluated, floor: Evaluated) -> None:
    """Refuse an evaluation of other audio, or with another engine, than the floor's."""
    mine, other = member.summary, floor.summary
    if (mine["audio"], mine["split"]) != (other["audio"], other["split"]):
        raise EvaluationError(
            f"{member.label} and {floor.label} were scored on different audio (splits "
            f"{mine['split']} and {other['split']} of {mine['shards']} and {other['shards']}); "
            "evaluate both on the same shards"
        )
    if mine["engine"] != other["engine"]:
        raise EvaluationError(
            f"{member.label} and {floor.label} were scored with different engines "
            f"({mine['engine']} and {other['engine']}); evaluate both with the same one"
        )


def _locate_scores(evaluated: Evaluated, row: str, seed: int | None = None) -> Scores:
    return Scores(
        label=evaluated.label, approach=row, seed=seed, folder=evaluated.folder / "scores"
    )


def _name_row(run: Evaluated, *, with_mixing: bool) -> str:
    config = run.summary["config"]
    approach = config["approach"]
    name: str = approach["name"]
    # The plain separator has no teacher, whatever its configuration says.
    if name != "none" and approach.get("teacher_signal") == "stems":
        name += " stems"
    if with_mixing:
        name += f" {config['data']['mixing']}"
    return name + (" +wiener" if run.summary["wiener"] else "")


def _require_alike(first: Evaluated, other: Evaluated, row: str) -> None:
    """Refuse to put two runs into one row that differ in more than the seed."""
    remedy = f"name one apart, e.g. 'other {row}={other.label}'"
    differences = _list_differences(first.summary["config"], other.summary["config"])
    differences.pop("fit.seed", None)
    for name, (old, new) in differences.items():
        raise EvaluationError(
            f"{first.label} and {other.label} are both {row!r} but differ in {name} "
            f"({old}, {new}): {remedy}"
        )
    # The configuration of the training does not hold that of the shards.
    if first.summary["fingerprint"] != other.summary["fingerprint"]:
        raise EvaluationError(
            f"{first.label} and {other.label} are both {row!r} but were trained on shards of "
            f"different configurations: {remedy}"
        )


def _list_differences(
    old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Return ``section.field`` -> (old, new) for each field that differs; a missing one is None."""
    differences = {}
    # A dict keeps the order: what only the new configuration has comes last.
    for section in {**old, **new}:
        before, after = old.get(section, {}), new.get(section, {})
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                differences[f"{section}.{name}"] = before.get(name), after.get(name)
    return differences
