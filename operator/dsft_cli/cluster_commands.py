"""`dsft get`, `watch`, `logs`, `save`, `suspend`, `resume`: runs on a cluster. The Kubernetes client is loaded when needed."""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dsft_api.conditions import ConditionType, ExitCode, FailureClass, Phase
from dsft_api.status import FineTuneStatus
from dsft_cli.output import Format, document, err, out

if TYPE_CHECKING:
    from dsft_cli.cluster import ClusterClient

NameArgument = Annotated[str, typer.Argument(help="Name of the resource.")]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Default: the namespace of the kubeconfig's context.")
]
OutputOption = Annotated[Format, typer.Option("--output", "-o", help="How the result is printed.")]


def get(
    name: Annotated[str | None, typer.Argument(help="Name of the resource. Default: all.")] = None,
    namespace: NamespaceOption = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    output: OutputOption = Format.TEXT,
) -> None:
    """Show the runs on the cluster."""
    client = _connect(namespace)
    items = [_asked(client.get, name)] if name else _asked(client.list, everywhere=everywhere)
    if output is not Format.TEXT:
        document(items[0] if name else items, output)
        return
    table = Table("namespace", "name", "phase", "step", "attempt", "age", "message", box=None)
    for item in items:
        meta, status = item["metadata"], _status(item)
        progress = status.progress
        table.add_row(
            meta["namespace"],
            meta["name"],
            str(status.phase or ""),
            f"{progress.step}/{progress.total_steps}" if progress else "",
            str(status.attempt or ""),
            _age(meta["creationTimestamp"]),
            escape(status.message or ""),
        )
    out.print(table)


def watch(name: NameArgument, namespace: NamespaceOption = None, output: OutputOption = Format.TEXT) -> None:
    """Follow a run on the cluster to its end: one line for each change. Exit code 0 when it succeeded, else as `dsft run`."""
    status = _follow(_connect(namespace), name, _is_over)
    if output is not Format.TEXT:
        document(status.to_wire(), output)
    raise typer.Exit(_exit_code(status))


def save(
    name: NameArgument,
    namespace: NamespaceOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is committed.")] = True,
    output: OutputOption = Format.TEXT,
) -> None:
    """Have a run commit a checkpoint at its next step, and go on. Exit code 1 if the run ended or stopped without it."""
    client, request = _connect(namespace), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    if _asked(client.get, name)["spec"].get("program"):
        err.print(f"{name} runs a program of its own (spec.program), which decides itself when it saves", style="red")
        raise typer.Exit(ExitCode.BAD_INPUT)
    status = _status(_asked(client.ask_for_checkpoint, name, request))
    if wait:
        idle = (Phase.SUSPENDED, Phase.SUCCEEDED, Phase.FAILED)
        status = _follow(
            client,
            name,
            lambda status: request == status.checkpoint_request or status.phase in idle or _is_over(status),
        )
    latest = status.checkpoints.latest if status.checkpoints else None
    if output is not Format.TEXT:
        document(status.to_wire(), output)
    elif wait and latest is not None:
        out.print(f"step {latest.step}: {latest.uri}", highlight=False)
    if wait and status.checkpoint_request != request:
        err.print(f"{name} is {status.phase}: nothing was committed for this request", style="red", highlight=False)
        raise typer.Exit(ExitCode.OTHER)


def suspend(
    name: NameArgument,
    namespace: NamespaceOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it until its nodes are free.")] = True,
    output: OutputOption = Format.TEXT,
) -> None:
    """Let a run commit at its next step, and free its nodes. A run that has ended stays as it is."""
    client = _connect(namespace)
    status = _status(_asked(client.suspend, name, suspend=True))
    if wait:
        status = _follow(client, name, lambda status: status.phase is Phase.SUSPENDED or _is_over(status))
    if output is not Format.TEXT:
        document(status.to_wire(), output)


def resume(name: NameArgument, namespace: NamespaceOption = None) -> None:
    """Let a suspended run go on from its last commit."""
    _asked(_connect(namespace).suspend, name, suspend=False)
    err.print(f"{name} goes on; `dsft watch {name}` follows it", highlight=False)


def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the head ends.")] = False,
    namespace: NamespaceOption = None,
) -> None:
    """Print what a run's driver and ranks print, from the Ray head's pod."""
    from dsft_cli.cluster import ClusterError

    try:
        for line in _connect(namespace).log_lines(name, follow=follow):
            sys.stdout.write(line)
    except ClusterError as error:
        raise _fail(error) from error


def _connect(namespace: str | None) -> "ClusterClient":
    from dsft_cli.cluster import ClusterClient, ClusterError

    try:
        return ClusterClient(namespace)
    except ClusterError as error:
        raise _fail(error) from error


def _asked(call: Any, *arguments: Any, **options: Any) -> Any:
    from dsft_cli.cluster import ClusterError

    try:
        return call(*arguments, **options)
    except ClusterError as error:
        raise _fail(error) from error


def _follow(client: "ClusterClient", name: str, is_over: Callable[[FineTuneStatus], bool]) -> FineTuneStatus:
    """One line for each change, until it is over or the resource is gone; the last status. Ctrl-C ends only the looking."""
    said = ""
    status = FineTuneStatus()
    try:
        for resource in _watched(client, name):
            status = _status(resource)
            line = f"{status.phase or 'Pending'}: {status.message or 'the operator has not seen it yet'}"
            if line != said:
                err.print(escape(f"{datetime.now(UTC):%H:%M:%S} {line}"), highlight=False)
                said = line
            if is_over(status):
                break
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    return status


def _watched(client: "ClusterClient", name: str) -> Any:
    from dsft_cli.cluster import ClusterError

    try:
        yield from client.watch(name)
    except ClusterError as error:
        raise _fail(error) from error


def _fail(error: Exception) -> typer.Exit:
    err.print(escape(str(error)), style="red", highlight=False)
    return typer.Exit(ExitCode.ACCESS)


def _status(resource: Any) -> FineTuneStatus:
    from dsft_cli.cluster import status_of

    return status_of(resource)


def _is_over(status: FineTuneStatus) -> bool:
    """Ended, or refused: nothing will happen by itself."""
    return status.completion_time is not None or any(
        c.type is ConditionType.STALLED and c.status == "True" for c in status.conditions
    )


def _exit_code(status: FineTuneStatus) -> int:
    """As `dsft run` has it. Some runs end without an attempt: by a preflight, or by the deadline of a wait."""
    succeeded = next((c for c in status.conditions if c.type is ConditionType.SUCCEEDED), None)
    if succeeded is not None and succeeded.status == "True":
        return ExitCode.OK
    if succeeded is not None and succeeded.reason in set(FailureClass):
        return FailureClass(succeeded.reason).failure.exit_code
    return ExitCode.BAD_INPUT


def _age(created: str) -> str:
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
