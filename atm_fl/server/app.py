"""The ServerApp: wait for the parties, call the roll, run the strategy, write the report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from logging import INFO
from pathlib import Path

from flwr.app import ConfigRecord, Context
from flwr.common.logger import FLOWER_LOGGER, log
from flwr.serverapp import Grid, ServerApp

from atm_fl.runs.directory import told_if_full
from atm_fl.runs.report import write_report
from atm_fl.runs.run import Run
from atm_fl.server.fetch import Bound
from atm_fl.server.grid import StreamingGrid
from atm_fl.server.roll_call import Newcomers, roll_call
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
        strategy = AtmStrategy(run, roll_call(grid, run), Newcomers(grid) if settings.is_open else None)
        if not run.over:
            with suppress(RunIsOver):
                strategy.start(grid, strategy.arrays(), settings.rounds - run.rounds_done, settings.round_timeout)
        else:
            messages = strategy.configure_evaluate(0, strategy.arrays(), ConfigRecord(), grid)
            strategy.aggregate_evaluate(0, grid.send_and_receive(messages, timeout=settings.round_timeout))
    log(INFO, "report: %s", write_report(run.directory))
    return run
