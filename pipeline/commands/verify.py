"""The commands ``flsep-precompute verify`` and ``flsep-precompute inspect``."""

from pathlib import Path

import click

from flsep.cache import Index, Mixes, ShardFile, read_index, verify_mixes, verify_shards
from flsep.cache.mixes.folder import holds_mixes
from flsep.pipeline.commands.mixes import describe_mixes
from flsep.pipeline.commands.parameter_types import FOLDER
from flsep.pipeline.commands.reporting import show_bytes, show_hours


@click.command("verify")
@click.argument("shards", type=FOLDER)
def verify_command(shards: Path) -> None:
    """Read every byte of SHARDS, or of a folder of mixes, and compare it with the digests.

    Use it after copying shards to another machine. The exit status is 1 if anything is wrong.

    To compare shards with their corpus, repeat `flsep-precompute run` into another folder. With the
    same versions, on the same kind of machine, both files index.json have the same digests.
    """
    from tqdm import tqdm

    if holds_mixes(shards):
        mixes = Mixes(shards)
        sizes, verdicts = mixes.num_bytes, verify_mixes(mixes)
        what = f"{len(sizes)} files, {mixes.num_epochs} epochs of mixes"
    else:
        index = read_index(shards)
        sizes, verdicts = index.shard_bytes, verify_shards(shards)
        what = f"{len(sizes)} shards, {len(index.tracks)} tracks"
    problems = []
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", dynamic_ncols=True) as bar:
        for verdict in verdicts:
            bar.update(verdict.num_bytes)
            if verdict.problem:
                problems.append(verdict.problem)
    result = f"{len(problems)} damaged" if problems else "all intact"
    click.echo(f"{what}, {show_bytes(total)}: {result}")
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise click.exceptions.Exit(1)


@click.command("inspect")
@click.argument("shard", type=FOLDER)
def inspect_command(shard: Path) -> None:
    """Show what a SHARD, a whole folder of shards, or a folder of mixes holds.

    \b
    Examples:
      flsep-precompute inspect shards/
      flsep-precompute inspect shards/train-0123456789abcdef.h5
    """
    if holds_mixes(shard):
        mixes = Mixes(shard)
        describe_mixes(mixes.config, mixes.num_epochs)
        click.echo(f"made by  {_join(mixes.packages)}")
        click.echo(f"shards   fingerprint {mixes.config.shards[:12]}")
        return
    stored: Index | ShardFile
    if shard.is_dir():
        stored = index = read_index(shard)
        size = sum(index.shard_bytes.values())
        rows = [(t.name, t.split, t.num_samples, t.num_windows, t.shard) for t in index.tracks]
        click.echo(f"{shard}: {len(index.shard_bytes)} shards, {show_bytes(size)}")
    else:
        stored = file = ShardFile(shard)
        rows = [
            (t.name, t.split, t.num_samples, t.num_windows, ", ".join(t.datasets))
            for t in file.tracks
        ]
        click.echo(f"{shard}: {show_bytes(file.num_bytes)}")
    layout = stored.layout
    seconds = sum(row[2] for row in rows) / layout.sample_rate_hz
    click.echo(f"tracks   {len(rows)}, {show_hours(seconds / 3600)}")
    click.echo(f"sources  {', '.join(layout.sources)}")
    click.echo(
        f"audio    {layout.sample_rate_hz} Hz, {layout.num_channels} channels; "
        f"STFT {layout.n_fft}, hop {layout.hop_samples}, {layout.stft_dtype}"
    )
    click.echo(
        f"teacher  {layout.teacher} (sha256 {layout.teacher_digest[:12]}), {layout.embedding_size} "
        f"dimensions, a window of {layout.window_seconds:g} s every {layout.window_hop_seconds:g} s"
    )
    click.echo(f"made by  {_join(stored.packages)}")
    click.echo(f"config   fingerprint {stored.fingerprint[:12]}")
    for name, split, num_samples, num_windows, rest in rows:
        seconds = num_samples / layout.sample_rate_hz
        click.echo(f"  {split:5} {seconds:8.1f} s {num_windows:5} windows  {name}  [{rest}]")


# The versions matter when two machines give different digests for the same corpus.
def _join(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())
