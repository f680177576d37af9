from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import Runner, contents, write_track
from slurm_node import running_slurm


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tracks; t0 is the longest, so its shard is begun first."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(6):
        write_track(root / "train" / f"t{number}", number, 4 - number / 10)
    return root


@pytest.fixture
def runner(corpus: Path, tiny_teacher: Path, tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(corpus, tiny_teacher, tmp_path)
    yield runner
    runner.stop()


@pytest.fixture(scope="session")
def undisturbed(
    corpus: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a run without workers and without trouble leaves."""
    runner = Runner(corpus, tiny_teacher, tmp_path_factory.mktemp("undisturbed"))
    runner.run("--workers", "0")
    return contents(runner.shards)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run SLURM; ``SLURM_CONF`` in the environment leads all programs to it."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder
