"""The ServerApp: wait for the parties, call the roll, run the strategy, write the report."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.logger import FLOWER_LOGGER, log
from flwr.serverapp import Grid, ServerApp

from atm_fl.errors import RunError, printable
from atm_fl.runs.directory import told_if_full
from atm_fl.runs.report import write_report
from atm_fl.runs.run import Run
from atm_fl.server import boundary
from atm_fl.server.fetch import Bound
from atm_fl.server.grid import LOST, StreamingGrid, await_return
from atm_fl.server.strategy import AtmStrategy, RunIsOver
from atm_fl.settings import Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the settings of the run config to their end."""
    serve(grid, Settings.parse(context.run_config))


@contextmanager
def logs_to(path: Path) -> Iterator[None]:
    """While the body runs, send Flower's log lines to a file, without colours, and not to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before, FLOWER_LOGGER.handlers = FLOWER_LOGGER.handlers, [handler]
    try:
        yield
    finally:
        FLOWER_LOGGER.handlers = before
        handler.close()


def serve(grid: Grid, settings: Settings) -> Run:
    """Run `settings` with the parties on `grid`; returns the finished run. RunError if it could not finish."""
    with told_if_full(Path(settings.run_dir)), closing(Run(settings)) as run:
        grid = StreamingGrid(grid, Bound.of_vector(run.base_layout.size))
        strategy = AtmStrategy(run, roll_call(grid, settings))
        if not run.over:
            with suppress(RunIsOver):
                strategy.start(grid, strategy.arrays(), settings.rounds - run.rounds_done, settings.round_timeout)
        else:
            messages = strategy.configure_evaluate(0, strategy.arrays(), ConfigRecord(), grid)
            strategy.aggregate_evaluate(0, grid.send_and_receive(messages, timeout=settings.round_timeout))
    log(INFO, "report: %s", write_report(run.directory))
    return run


def roll_call(grid: Grid, settings: Settings) -> dict[int, str]:
    """Which node is which client (`Settings.party_names`), in the order of the setting `tasks`.

    A node that is registered under a name may hold that name's task alone. Every node loads its data and makes its head
    to answer, so that bad data ends the run before its first round. Of several clients of one task the first is the
    node with the lowest id. RunError if a node holds a task that was not asked for or more hold one than were (under
    `on-failure=skip` they are left out), or (as `on-failure` and `min-successful` allow) too few come within
    `node-timeout` or answer.
    """
    wanted = settings.party_names
    deadline = time.monotonic() + settings.node_timeout
    while len(nodes := list(grid.get_node_ids())) < len(wanted):
        if time.monotonic() > deadline:
            if len(nodes) >= settings.needed:
                break
            raise RunError(
                f"{len(nodes)} of {len(wanted)} parties came online within node-timeout={settings.node_timeout:g} s"
            )
        time.sleep(0.2)
    names = {node.node_id: node.name for node in grid.get_nodes()}
    holders: dict[str, list[int]] = {task: [] for task in settings.client_tasks}
    failures, skip = [], settings.on_failure == "skip"
    for reply in _answers(grid, settings, nodes):
        node = reply.metadata.src_node_id
        called = f"node {node}" + (f" ({printable(names[node])})" if names.get(node) else "")
        if reply.has_error():
            failures.append(boundary.reason(reply))
            continue
        try:
            task = boundary.info(reply).get("task", "")
            _check_name(task, names.get(node, ""), settings)
        except boundary.Refused as error:
            failures.append(f"{called}: refused: {error}")
            continue
        finally:
            boundary.forget(reply)
        if task not in holders:
            message = f"node {node} holds task {boundary.shown(task)}, which tasks={settings.tasks!r} does not name"
            if not skip:
                raise RunError(f"roll call: {message}")
            failures.append(message)
            continue
        holders[task].append(node)
    asked_for = Counter(settings.client_tasks)
    for task, holding in holders.items():
        if len(holding) > asked_for[task]:
            message = f"nodes {' and '.join(map(str, sorted(holding)))} both hold task {task!r}"
            message += "; tasks names it once for each that should"
            if not skip:
                raise RunError(f"roll call: {message}")
            failures.append(message)
            holders[task] = []  # which of them is the true one is not known
    queues = {task: sorted(holding) for task, holding in holders.items()}
    nodes_of = {client: queues[task].pop(0) for client, task in settings.task_of.items() if queues[task]}
    missing = [client for client in wanted if client not in nodes_of]
    if missing:
        message = "; ".join([f"roll call: no party holds {', '.join(missing)}", *_once(failures, missing)])
        if len(nodes_of) < settings.needed:
            raise RunError(message)
        log(WARNING, "%s", message)
    return {node: client for client, node in nodes_of.items()}


def _once(failures: list[str], clients: list[str]) -> list[str]:
    """Each reason once, with the names before it of all whose it is."""
    whose: dict[str, list[str]] = {}
    for failure in failures:
        name = next((client for client in clients if failure.startswith(f"{client}: ")), "")
        whose.setdefault(failure.removeprefix(f"{name}: "), []).append(name)
    return [": ".join(filter(None, [", ".join(filter(None, names)), reason])) for reason, names in whose.items()]


def _check_name(task: str, name: str, settings: Settings) -> None:
    """Refused if a node that is registered under a name, with a key of its own, holds another's task.

    name: its task's, or its client's where several hold one task; "" if it is registered without one.
    """
    if name and task != name and settings.task_of.get(name) != task:
        raise boundary.Refused(f"it is registered as {boundary.shown(name)} and says that it is {boundary.shown(task)}")


def _answers(grid: Grid, settings: Settings, nodes: list[int]) -> Iterator[Message]:
    """The nodes' answers to the roll call; one that was lost is asked again, once, when its node is back."""
    until = time.monotonic() + settings.round_timeout
    lost: dict[int, Message] = {}
    for reply in _called(grid, settings, nodes, settings.round_timeout):
        if reply.has_error() and reply.error.code in LOST:
            log(WARNING, "roll call: node %s was lost: %s", reply.metadata.src_node_id, boundary.reason(reply))
            lost[reply.metadata.src_node_id] = reply
        else:
            yield reply
    back = await_return(grid, set(lost), min(until, time.monotonic() + settings.node_timeout)) if lost else set()
    yield from (lost[node] for node in lost.keys() - back)
    yield from _called(grid, settings, sorted(back), max(0.0, until - time.monotonic()))


def _called(grid: Grid, settings: Settings, nodes: Iterable[int], timeout: float) -> Iterable[Message]:
    plugins = {thing: plugin.digest for thing, plugin in settings.plugins(of_all=True).items()}
    content = {"info": ConfigRecord(), "plugins": ConfigRecord(plugins)}  # type: ignore[arg-type]
    call = [Message(RecordDict(content), node, "query") for node in nodes]  # type: ignore[arg-type]
    return grid.send_and_receive(call, timeout=timeout) if call else ()
