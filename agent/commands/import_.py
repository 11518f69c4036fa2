"""`turntrace import`: trajectories of other programs as a run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agent.terminal import one_line

MAX_SHOWN = 50


def import_(
    source: Annotated[Path, typer.Argument(help="A .json or .jsonl file, or a folder of them.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from", metavar="atif|verl", help="atif, or verl: files of trainer.rollout_data_dir."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write. It must not exist.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A folder with the tokenizer.json of the token ids, and the image processor's "
            "settings. It is copied into the run."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="A folder, for atif: images that documents name by path are read below it, and "
            "nowhere else."
        ),
    ] = None,
) -> None:
    """Import ATIF documents or verl's rollout dumps as a run.

    What they lack is listed; no token id is invented.
    """
    from agent.runs.manifest import command_line
    from conversations.imports.job import import_run

    try:
        done = import_run(
            source,
            from_,
            out,
            tokenizer=tokenizer,
            images=images,
            command=command_line(sys.argv[1:]),
        )
    except KeyboardInterrupt:
        print(f"interrupted: nothing was written to {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    for defect in done.defects[:MAX_SHOWN]:
        print(one_line(defect), file=sys.stderr)
    if len(done.defects) > MAX_SHOWN:
        print(f"... and {len(done.defects) - MAX_SHOWN} more", file=sys.stderr)
    print(
        f"{done.trajectories} trajectories in {out}, {done.with_ids} of them with token ids; "
        f"{len(done.defects)} defects"
    )
    for warning, count in done.warnings.most_common(MAX_SHOWN):
        print(f"  {count}: {one_line(warning)}")
    if len(done.warnings) > MAX_SHOWN:
        print(f"  ... and {len(done.warnings) - MAX_SHOWN} other warnings")
    raise typer.Exit(1 if done.defects else 0)
