"""Which node is which client: asked before a run's first round, and of an open run also of who comes later.

A node that is registered under a name, with a key of its own, may hold that name's task alone. Every node loads its
data and makes its head to answer, so that bad data are found before its first round.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from logging import WARNING

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from atm_fl.errors import RunError, printable
from atm_fl.runs.membership import JOINED
from atm_fl.runs.run import Run
from atm_fl.server import boundary
from atm_fl.server.grid import LOST, StreamingGrid, await_return
from atm_fl.settings import Settings

NAME = re.compile(r"\w([\w .+-]{0,78}[\w.+-])?")
"""What a task may be called that joins a run: what `tasks` and `participation` can name, and a file's name can have."""


def roll_call(grid: Grid, run: Run) -> dict[int, str]:
    """Which node is which client (`Settings.party_names`), in the order of the setting `tasks`.

    Of several clients of one task the first is the node with the lowest id. A node that holds another task joins an
    open run, and is left out of any other. RunError if more nodes hold one task than the run has clients of it (under
    `on-failure=skip` they are left out), or (as `on-failure` and `min-successful` allow) too few come within
    `node-timeout` or answer. Of an open run that goes on, who was away in its last round is not waited for, and whoever
    else is not there has left.
    """
    settings, skip = run.settings, run.settings.on_failure == "skip"
    expected = [client for client in settings.party_names if client not in run.membership.away]
    lenient = skip or (settings.is_open and run.rounds_done > 0)
    needed = settings.needed if lenient else max(settings.needed, len(expected))
    names = {node.node_id: node.name for node in _present(grid, settings, expected, needed)}
    holders: dict[str, list[int]] = {task: [] for task in settings.client_tasks}
    newcomers: dict[str, int] = {}
    failures = []
    for node, name in list(names.items()):
        if name and not settings.is_open and name not in settings.party_names:
            failures.append(f"{_called(node, name)} is not of this run: tasks={settings.tasks!r} does not name it")
            del names[node]
    for reply in _answers(grid, settings, list(names)):
        node = reply.metadata.src_node_id
        if reply.has_error():
            failures.append(boundary.reason(reply))
            continue
        try:
            task = _task(reply, names[node], settings)
            if task in holders:
                holders[task].append(node)
            elif not settings.is_open:
                raise boundary.Refused(f"{boundary.shown(task)} is no task that tasks={settings.tasks!r} names")
            elif newcomers.setdefault(_newcomer(task, names[node]), node) != node:
                raise boundary.Refused(f"{task} is there already")
        except boundary.Refused as error:
            failures.append(f"{_called(node, names[node])}: refused: {error}")
        finally:
            boundary.forget(reply)
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
    joining = {} if run.over else {task: newcomers[task] for task in sorted(newcomers)}
    missing = [client for client in expected if client not in nodes_of]
    there = f"no party holds {', '.join(missing)}" if missing else f"{len(nodes_of) + len(joining)} parties are there"
    told = "; ".join([f"roll call: {there}", *_once(failures, missing)])
    if (missing and not lenient) or (len(nodes_of) + len(joining) < needed and not run.over):
        raise RunError(told if missing else f"{told}; {needed} are needed")
    if missing or failures:
        log(WARNING, "%s", told)
    for task in joining:
        run.member(task, JOINED)
    return {node: client for client, node in (nodes_of | joining).items()}


class Newcomers:
    """The roll call of an open run for who comes while it goes on. Nobody waits for them.

    A node is asked when it is first seen online, and again once its SuperNode has started anew; whether its answer is
    there is looked up at the beginning of each round.
    """

    def __init__(self, grid: StreamingGrid) -> None:
        self._grid = grid
        self._asked: dict[int, str] = {}
        """Node → since when it had been online when it was asked."""
        self._waiting: dict[str, int] = {}

    def arrived(self, run: Run, nodes: Mapping[int, str]) -> dict[str, int]:
        """Client → its node, of those that have answered since the last call, by name.

        A client of the run that was away may be another node now, if it is registered under the client's name. Any
        other name is a task that may join. nodes: the run's, node → client. What cannot join is said in the run's
        warnings.
        """
        online = {node.node_id: node for node in self._grid.get_nodes()}
        strangers = [
            node
            for node in online.values()
            if node.node_id not in nodes and self._asked.get(node.node_id) != node.last_activated_at
        ]
        self._asked |= {node.node_id: node.last_activated_at for node in strangers}
        self._waiting |= self._grid.ask(_calls(run.settings, [node.node_id for node in strangers]))
        here = {client for node, client in nodes.items() if node in online}
        arrived: dict[str, int] = {}
        for reply in self._grid.answers(self._waiting):
            node = reply.metadata.src_node_id
            if node not in online or (reply.has_error() and reply.error.code in LOST):
                self._asked.pop(node, None)  # it is asked again when it is back
                boundary.forget(reply)
                continue
            name = online[node].name
            try:
                if reply.has_error():
                    raise boundary.Refused(boundary.reason(reply))
                task = _task(reply, name, run.settings)
                client = name if name in run.settings.party_names else _newcomer(task, name)
                if client in here | arrived.keys():
                    raise boundary.Refused(f"{client} is there already")
                arrived[client] = node
            except boundary.Refused as error:
                text = f"{_called(node, name)} cannot join: {error}"
                log(WARNING, "%s", text)
                run.record("warning", run.rounds_done, text=text)
            finally:
                boundary.forget(reply)
        return {client: arrived[client] for client in sorted(arrived)}


def _newcomer(task: str, name: str) -> str:
    """The name in the run of a task that joins it. Refused if its node is not registered under it."""
    if name != task:
        raise boundary.Refused(
            f"it holds task {boundary.shown(task)}, and who joins has to be registered under its task's name, by "
            "atm-fl deploy register"
        )
    if not NAME.fullmatch(task):
        raise boundary.Refused(f"task {boundary.shown(task)}: its name must be of letters, digits, spaces and .+-_")
    return task


def _called(node: int, name: str) -> str:
    return f"node {node}" + (f" ({printable(name)})" if name else "")


def _present(grid: Grid, settings: Settings, expected: list[str], needed: int) -> list[NodeInfo]:
    """The nodes that are online once all `expected` clients and `needed` ones are, or `node-timeout` is over.

    RunError if too few are then.
    """
    deadline = time.monotonic() + settings.node_timeout
    while True:
        nodes = list(grid.get_nodes())
        names = {node.name for node in nodes}
        nameless = sum(not node.name for node in nodes)
        missing = max(0, sum(client not in names for client in expected) - nameless)
        online = len(nodes) if settings.is_open else len(expected) - missing
        late = time.monotonic() > deadline
        if online >= needed and (late or not missing):
            return nodes
        if late:
            of = f"{online} of {max(len(expected), needed)} parties"
            raise RunError(f"{of} came online within node-timeout={settings.node_timeout:g} s")
        time.sleep(0.2)


def _once(failures: list[str], clients: list[str]) -> list[str]:
    """Each reason once, with the names before it of all whose it is."""
    whose: dict[str, list[str]] = {}
    for failure in failures:
        name = next((client for client in clients if failure.startswith(f"{client}: ")), "")
        whose.setdefault(failure.removeprefix(f"{name}: "), []).append(name)
    return [": ".join(filter(None, [", ".join(filter(None, names)), reason])) for reason, names in whose.items()]


def _task(reply: Message, name: str, settings: Settings) -> str:
    """The task that a node says it holds. Refused if it is registered under a name and holds another's.

    name: its task's, or its client's where several hold one task; "" if it is registered without one.
    """
    task = boundary.info(reply).get("task", "")
    if name and task != name and settings.task_of.get(name) != task:
        fix = "; a second party of a task needs tasks to name it twice" if task in settings.client_tasks else ""
        raise boundary.Refused(
            f"it is registered as {boundary.shown(name)} and says that it is {boundary.shown(task)}{fix}"
        )
    return task


def _answers(grid: Grid, settings: Settings, nodes: list[int]) -> Iterator[Message]:
    """The nodes' answers to the roll call; one that was lost is asked again, once, when its node is back."""
    until = time.monotonic() + settings.round_timeout
    lost: dict[int, Message] = {}
    for reply in _asked(grid, settings, nodes, settings.round_timeout):
        if reply.has_error() and reply.error.code in LOST:
            log(WARNING, "roll call: node %s was lost: %s", reply.metadata.src_node_id, boundary.reason(reply))
            lost[reply.metadata.src_node_id] = reply
        else:
            yield reply
    back = await_return(grid, set(lost), min(until, time.monotonic() + settings.node_timeout)) if lost else set()
    yield from (lost[node] for node in lost.keys() - back)
    yield from _asked(grid, settings, sorted(back), max(0.0, until - time.monotonic()))


def _asked(grid: Grid, settings: Settings, nodes: Iterable[int], timeout: float) -> Iterable[Message]:
    calls = _calls(settings, nodes)
    return grid.send_and_receive(calls, timeout=timeout) if calls else ()


def _calls(settings: Settings, nodes: Iterable[int]) -> list[Message]:
    plugins = {thing: plugin.digest for thing, plugin in settings.plugins(of_all=True).items()}
    content = {"info": ConfigRecord(), "plugins": ConfigRecord(plugins)}  # type: ignore[arg-type]
    return [Message(RecordDict(content), node, "query") for node in nodes]  # type: ignore[arg-type]
