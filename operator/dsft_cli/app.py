"""The `dsft` command (also `kubectl dsft`): plan, preflight, run, validate, status, ls here; others on a cluster."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from dsft_api.conditions import ExitCode
from dsft_api.job import Ranks
from dsft_api.manifest import parse
from dsft_api.not_supported import cluster_only
from dsft_api.problem import ManifestError, Problem
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.status import FineTuneStatus
from dsft_cli import cluster_commands, planning
from dsft_cli.devices import Machine, ranks_here, this_machine
from dsft_cli.follow import follow, read_status, settle_status
from dsft_cli.local_preflight import look_ahead
from dsft_cli.local_run import LocalRun, find_run, has_ended, is_running, job_for, runs_folder, trainer_environment
from dsft_cli.output import Format, document, err, out, refuse
from dsft_cli.view import View, checkpoint_line, size, usage_line

app = typer.Typer(
    help="Fine-tune models with DeepSpeed ZeRO-3 on Ray, from one DeepSpeedFineTune manifest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    cluster_commands.get,
    cluster_commands.watch,
    cluster_commands.logs,
    cluster_commands.save,
    cluster_commands.suspend,
    cluster_commands.resume,
):
    app.command(rich_help_panel="On a cluster")(command)

FileOption = Annotated[str, typer.Option("--filename", "-f", help="The manifest; - reads standard input.")]
OutputOption = Annotated[Format, typer.Option("--output", "-o", help="How the result is printed.")]


@app.command()
def run(
    filename: FileOption,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ranks. Default: as many as the pools ask and fit here; 2 on CPU.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again instead of resuming; the old run is kept.")
    ] = False,
    runtime: Annotated[str, typer.Option(help="Who starts the ranks: ray or torchrun.")] = "ray",
    output: OutputOption = Format.TEXT,
) -> None:
    """Run a manifest on this machine, without a cluster. Run it again to resume; Ctrl-C loses nothing.

    Exit codes: 0 done, 2 bad manifest or data, 3 no access, 4 out of memory, 5 diverged, 6 interrupted (run again), 7 hang,
    8 GPU fault, 1 other.
    """
    try:
        resource = _read(filename)
        _refuse_here(resource, filename, runtime)
        environment = trainer_environment(resource, filename, _environment())
        machine = this_machine()
        ranks = ranks_here(resource.spec, machine, workers)
        _refuse_too_many(ranks, machine, workers, filename)
        local = _find(resource, fresh=fresh)
        _refuse_running(local, filename)
        settle_status(local)
        job = job_for(local, ranks, filename)
    except ManifestError as error:
        raise typer.Exit(refuse(error, output)) from error
    if local.finished:
        err.print(f"{resource.metadata.name} is done already; --fresh starts it again")
        _print_status(local, output)
        raise typer.Exit(ExitCode.OK)
    without_effect = cluster_only(resource)
    if without_effect:
        err.print(f"[dim]no effect without a cluster: {', '.join(without_effect)}[/]")
    goes_on = f", attempt {job.attempt}" if job.attempt > 1 else ""
    err.print(
        f"{resource.metadata.name}{goes_on}: {ranks.count} ranks on {ranks.device}, DeepSpeed ZeRO-3; {local.storage_prefix}",
        highlight=False,
    )
    with View(err) as view:
        code = follow(local, job, runtime, environment, view)
    _print_end(local, code, local.log_file(job.attempt), output)
    raise typer.Exit(code)


@app.command()
def validate(filename: FileOption, output: OutputOption = Format.TEXT) -> None:
    """Check a manifest: every problem at once, each with its place and what to write instead. Exit code 2 if there is any."""
    try:
        resource = _read(filename)
    except ManifestError as error:
        raise typer.Exit(refuse(error, output)) from error
    if output is Format.TEXT:
        out.print(
            f"{escape(filename)}: {resource.metadata.namespace}/{resource.metadata.name} is valid", highlight=False
        )
    else:
        document({"file": filename, "valid": True, "problems": []}, output)


@app.command()
def plan(
    filename: FileOption,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine. Default: the pools of the manifest.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU, such as 80Gi. Default: by nodeSelector nvidia.com/gpu.product.")
    ] = None,
    storage_rate: Annotated[
        str, typer.Option(help="Bytes per second that a node uploads, such as 2G; for the time of a checkpoint.")
    ] = "500M",
    most_rows: Annotated[
        int, typer.Option(min=1, help="Rows to tokenise; of longer data, so many from all over it.")
    ] = 100_000,
    output: OutputOption = Format.TEXT,
) -> None:
    """Show what a manifest's run will need, before anything starts: memory, steps, tokens, checkpoints, and what will not fit.

    Reads the model's config and the data, never the weights. Exit code 2 if something will not fit.
    """
    try:
        resource = _read(filename)
        machine = this_machine()
        place = planning.place_of(
            resource.spec, machine, workers=workers, gpu_memory=gpu_memory, storage_rate=storage_rate, source=filename
        )
        planned = planning.plan(resource, place, filename, most_rows=most_rows)
    except ManifestError as error:
        raise typer.Exit(refuse(error, output)) from error
    if output is Format.TEXT:
        planning.show(planned, resource.metadata.name, place.device)
    else:
        document(planned.to_wire(), output)
    raise typer.Exit(ExitCode.BAD_INPUT if planned.problems else ExitCode.OK)


@app.command()
def preflight(
    filename: FileOption,
    workers: Annotated[int | None, typer.Option(min=1, help="Ranks, as of `dsft run`.")] = None,
    output: OutputOption = Format.TEXT,
) -> None:
    """Look for what a run of the manifest would find missing here: storage, model, data, one sample, disk. Starts no ranks.

    Exit codes: 0 nothing found, 2 bad manifest or data, 3 no access.
    """
    try:
        resource = _read(filename)
        environment = trainer_environment(resource, filename, _environment())
        local = _find(resource)
        job = job_for(local, ranks_here(resource.spec, this_machine(), workers), filename)
    except ManifestError as error:
        raise typer.Exit(refuse(error, output)) from error
    raise typer.Exit(look_ahead(job, environment, output))


@app.command()
def status(filename: FileOption, output: OutputOption = Format.TEXT) -> None:
    """Show how far the manifest's run on this machine is."""
    try:
        local = _find(_read(filename))
    except ManifestError as error:
        raise typer.Exit(refuse(error, output)) from error
    settle_status(local)
    if read_status(local) is None:
        err.print(f"no run of {escape(filename)} in {local.state}; start it with: dsft run -f {escape(filename)}")
        raise typer.Exit(ExitCode.OTHER)
    _print_status(local, output)


@app.command("ls")
def list_commits(
    uri: Annotated[str, typer.Argument(help="A run's folder, as in status.resolved.storagePrefix.")],
    endpoint_url: Annotated[str | None, typer.Option(help="Endpoint of an S3-compatible server.")] = None,
    region: Annotated[str | None, typer.Option(help="Region of the bucket.")] = None,
    output: OutputOption = Format.TEXT,
) -> None:
    """List the committed checkpoints of a run: those that a resume would choose from, oldest first."""
    from dsft_trainer.checkpoint.commits import Commit
    from dsft_trainer.checkpoint.listing import read_commits
    from dsft_trainer.checkpoint.ray_book import read_ledger
    from dsft_trainer.checkpoint.store import open_store
    from dsft_trainer.errors import TrainerError

    try:
        store = open_store(uri, endpoint_url=endpoint_url, region=region)
        ledger = read_ledger(store)
        commits = ledger.checkpoints if ledger is not None else read_commits(store)
    except TrainerError as error:
        err.print(escape(str(error)), style="red", highlight=False)
        raise typer.Exit(error.exit_code) from error
    if output is not Format.TEXT:
        document([commit.to_wire() for commit in commits], output)
        return
    table = Table("checkpoint", "step", "epoch", "ranks", "size", "committed", "metrics", box=None)
    for commit in commits:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in commit.metrics.items())
        table.add_row(
            commit.name if isinstance(commit, Commit) else commit.uri.rpartition("/")[2],
            str(commit.step),
            f"{commit.epoch:.2f}",
            str(commit.world_size),
            size(commit.bytes),
            f"{commit.time:%Y-%m-%d %H:%M:%S}",
            metrics,
        )
    out.print(table)


def _read(filename: str) -> DeepSpeedFineTune:
    try:
        text = sys.stdin.read() if filename == "-" else Path(filename).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        problem = Problem("--filename", f"cannot be read: {reason}", "name a manifest file", filename)
        raise ManifestError(filename, (problem,)) from error
    return parse(text, filename)


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def _refuse_here(resource: DeepSpeedFineTune, filename: str, runtime: str) -> None:
    problems: list[Problem] = []
    if resource.spec.suspend:
        problems.append(Problem("spec.suspend", "the run is suspended", "set it to false to run it here", True))
    if runtime not in ("ray", "torchrun"):
        problems.append(Problem("--runtime", "unknown runtime", "write ray or torchrun", runtime))
    data = resource.spec.data
    if runtime == "torchrun" and data is not None and data.loader == "ray-data":
        problems.append(
            Problem("spec.data.loader", "ray-data needs Ray", "write torch, or use --runtime ray", data.loader)
        )
    if runtime == "torchrun" and resource.spec.program is not None:
        problems.append(Problem("spec.program", "needs Ray", "use --runtime ray"))
    if problems:
        raise ManifestError(filename, tuple(problems))


def _refuse_too_many(ranks: Ranks, machine: Machine, workers: int | None, filename: str) -> None:
    if ranks.device == "cuda" and ranks.count > machine.gpus:
        field = "--workers" if workers else "spec.execution.device"
        message = f"{ranks.count} ranks on cuda need as many GPUs, and {machine.gpus} are here"
        raise ManifestError(filename, (Problem(field, message, f"use {machine.gpus} ranks at most, or device cpu"),))


def _refuse_running(local: LocalRun, filename: str) -> None:
    # The driver refuses too, but by then this call would have written over the live run's progress and status.
    if not has_ended(local):
        remedy = f"wait for it, or stop it; `dsft status -f {filename}` shows it"
        raise ManifestError(filename, (Problem("metadata.name", "this run is running already", remedy),))


def _find(resource: DeepSpeedFineTune, *, fresh: bool = False) -> LocalRun:
    from dsft_trainer.errors import TrainerError

    try:
        return find_run(resource, runs_folder(), fresh=fresh)
    except TrainerError as error:
        err.print(escape(str(error)), style="red", highlight=False)
        raise typer.Exit(error.exit_code) from error


def _print_status(local: LocalRun, output: Format) -> None:
    current = read_status(local)
    if output is not Format.TEXT:
        body = current.to_wire() if current is not None else {}
        document({"status": body, "statusFile": str(local.status_file), "running": is_running(local)}, output)
    elif current is not None:
        _print_text(local, current)


def _print_text(local: LocalRun, current: FineTuneStatus) -> None:
    table = Table("", Column(overflow="fold"), box=None, show_header=False)
    running = "running" if is_running(local) else "not running"
    table.add_row("phase", f"{current.phase} ({running})")
    table.add_row("message", escape(current.message or ""))
    if current.progress is not None:
        loss = f", loss {current.progress.loss:.4f}" if current.progress.loss is not None else ""
        table.add_row("progress", f"step {current.progress.step}/{current.progress.total_steps}{loss}")
    if current.evaluation is not None:
        values = ", ".join(f"{name} {value:.4f}" for name, value in current.evaluation.metrics.items())
        table.add_row("evaluation", f"step {current.evaluation.step}: {values}")
        if current.evaluation.samples:
            table.add_row("samples", escape(current.evaluation.samples))
    for checkpoint in current.checkpoints.retained if current.checkpoints else ():
        table.add_row("checkpoint", checkpoint_line(checkpoint))
    if current.output is not None:
        table.add_row("output", f"{current.output.uri} ({size(current.output.bytes)})")
    table.add_row("attempts", str(len(current.attempts)))
    if current.usage is not None:
        table.add_row("goodput", usage_line(current.usage))
    table.add_row("status", str(local.status_file))
    out.print(table)


def _print_end(local: LocalRun, code: int, log: Path, output: Format) -> None:
    current = read_status(local)
    if code != ExitCode.OK:
        style = "yellow" if code == ExitCode.INTERRUPTED else "red"
        err.print(escape(current.message if current and current.message else "failed"), style=style, highlight=False)
        err.print(f"log: {log}", highlight=False)
        if current and current.attempts and (evidence := current.attempts[-1].evidence):
            err.print(f"of the rank that failed: {escape(evidence)}", highlight=False, soft_wrap=True)
    if code == ExitCode.OK or output is not Format.TEXT:
        _print_status(local, output)


def main() -> None:
    """The entry point."""
    app()
