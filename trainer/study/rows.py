"""Which runs make a row of a comparison."""

from collections.abc import Sequence

from flsep.trainer.config import list_differences
from flsep.trainer.errors import EvaluationError
from flsep.trainer.scoring.evaluation import Evaluated
from flsep.trainer.study.comparison import Comparison, Scores, compare_scores


def compare_evaluations(
    runs: Sequence[Evaluated], *, floor: Evaluated, oracle: Evaluated | None
) -> Comparison:
    """Compare evaluated runs in one table.

    Runs make one row of seeds where their configurations differ in the seed alone. Rows are named
    after the approach; after the teacher's signal too if it is the stems, after the mixing if
    the runs differ in it, after the Wiener filter, or as the user says.

    Raises
    ------
    EvaluationError
        If they were not scored on the same audio, or two runs of one name differ in more.
    ComparisonError
        As `compare_scores`.
    """
    members = [*runs, floor, *([oracle] if oracle else [])]
    for member in members:
        if (member.summary["audio"], member.summary["split"]) != (
            floor.summary["audio"],
            floor.summary["split"],
        ):
            raise EvaluationError(
                f"{member.label} and {floor.label} were scored on different audio (splits "
                f"{member.summary['split']} and {floor.summary['split']} of "
                f"{member.summary['shards']} and {floor.summary['shards']}); "
                "evaluate both on the same shards"
            )
    mixings = {run.config.data.mixing for run in runs}
    rows: dict[str, Evaluated] = {}
    scores = []
    for run in runs:
        row = run.name or _name_row(run, with_mixing=len(mixings) > 1)
        _require_alike(rows.setdefault(row, run), run, row)
        scores.append(
            Scores(
                label=run.label,
                approach=row,
                seed=run.config.fit.seed,
                folder=run.folder / "scores",
            )
        )
    return compare_scores(
        scores,
        floor=_as_scores(floor, "mixture"),
        oracle=_as_scores(oracle, "ideal ratio mask") if oracle else None,
    )


def _as_scores(evaluated: Evaluated, name: str) -> Scores:
    return Scores(
        label=evaluated.label, approach=name, seed=None, folder=evaluated.folder / "scores"
    )


def _name_row(run: Evaluated, *, with_mixing: bool) -> str:
    config = run.config
    name: str = config.approach.name
    if name != "none" and config.approach.teacher_signal == "stems":
        name += " stems"
    if with_mixing:
        name += f" {config.data.mixing}"
    return name + (" +wiener" if run.summary["wiener"] else "")


def _require_alike(first: Evaluated, other: Evaluated, row: str) -> None:
    differences = list_differences(first.config, other.config)
    differences.pop("fit.seed", None)
    for name, (old, new) in differences.items():
        raise EvaluationError(
            f"{first.label} and {other.label} are both {row!r} but differ in {name} "
            f"({old}, {new}): name one apart, e.g. 'other {row}={other.label}'"
        )
    if first.summary["fingerprint"] != other.summary["fingerprint"]:
        raise EvaluationError(
            f"{first.label} and {other.label} are both {row!r} but were trained on shards of "
            f"different configurations: name one apart, e.g. 'other {row}={other.label}'"
        )
