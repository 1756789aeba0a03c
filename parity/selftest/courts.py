"""The selftest of several dtypes at once: each has a process of its own, since most of it is compiling on one core."""

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from pathlib import Path

from convert import Checkpoint
from parity.inputs import Suite
from parity.metrics import Precision
from parity.selftest.trials import Row, selftest

__all__ = ["hold_courts"]


def hold_courts(path: Path, *, dtypes: Sequence[Precision], inputs: Suite, seed: int) -> Iterator[Row]:
    """Run `selftest` on a checkpoint, every dtype in its own process.

    Args:
        path: the checkpoint.
        dtypes: see `selftest`, as for the others.
        inputs: the suite.
        seed: of its token ids.

    Yields:
        The rows of all dtypes, as soon as each is there.

    Raises:
        RuntimeError: a process ended before it had given all its rows; what it said of it is on stderr.
    """
    if len(dtypes) == 1:
        yield from selftest(Checkpoint.open(path), dtypes=dtypes, inputs=inputs, seed=seed)
        return
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    pending: dict[Connection, Precision] = {}
    processes = []
    for dtype in dtypes:
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_hold, args=(sender, path, dtype, inputs, seed), daemon=True))
        processes[-1].start()
        sender.close()  # ours: its end is to be seen when the process's own is closed
        pending[receiver] = dtype
    try:
        while pending:
            ready = wait(list(pending))
            for receiver in [one for one in pending if one in ready]:
                row = _receive(receiver, pending[receiver])
                if row is None:
                    del pending[receiver]
                else:
                    yield row
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _hold(sender: Connection, path: Path, dtype: Precision, inputs: Suite, seed: int) -> None:
    with closing(sender):
        for row in selftest(Checkpoint.open(path), dtypes=[dtype], inputs=inputs, seed=seed):
            sender.send(row)
        sender.send(None)


def _receive(receiver: Connection, dtype: Precision) -> Row | None:
    try:
        row: Row | None = receiver.recv()
    except EOFError:
        raise RuntimeError(f"the selftest in {dtype} ended before it was done; see above what it said") from None
    return row
