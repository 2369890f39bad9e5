"""SIGKILL at random times, which no process can answer to."""

import pathlib
import random
import signal
import time

from lwsam_bench.faults.compare import differences
from lwsam_bench.faults.trainer import rows_done, Trainer, unfinished
from lwsam_bench.support.errors import UserError
from lwsam_bench.support.rows import Row


# The share of the kills that come before the first step: while JAX starts, the data are
# read, a checkpoint is restored or a step compiles.
EARLY = 0.2


def kill(
    trainer: Trainer,
    out: pathlib.Path,
    reference: pathlib.Path,
    *,
    times: int,
    steps: int,
    seed: int = 0,
) -> Row:
    """Kill a run many times and let it go on; return what was lost.

    The moments are drawn: some before the first step, the others a while after one of
    so many steps spread over the run, so that each may meet a checkpoint being written.

    Args:
      trainer: Of the run.
      out: Where it is killed.
      reference: The same run, unbroken.
      times: How often.
      steps: Of the run.
      seed: Of what is drawn.
    """
    draw = random.Random(seed)
    late = times - round(EARLY * times)
    ends = sorted(draw.sample(range(1, int(0.95 * steps)), late))
    early = set(draw.sample(range(times), times - late))
    promised = repeated = torn = lost = 0
    for number in range(times):
        earlier = unfinished(out)
        run = trainer.start(out)
        if number in early:
            wait = draw.uniform(0, 1.5)
            moment = time.monotonic() + wait
            run.until(lambda at=moment: time.monotonic() > at)
        else:
            target = ends.pop(0)
            run.until(lambda at=target: rows_done(out) >= at)
            moment = time.monotonic() + draw.uniform(0, 0.1)
            run.until(lambda at=moment: time.monotonic() > at)
        before = run.saved
        ended = run.wait(signal.SIGKILL)
        if ended.code != -signal.SIGKILL:
            raise UserError(f"a run ended before it was killed: {ended.output}")
        if "going on" in ended.output:
            lost += max(0, promised - ended.began)
        promised = max(promised, before, ended.saved)
        repeated += max(0, ended.reached - promised)
        torn += bool(unfinished(out) - earlier)
    ended = trainer.run(out)
    if ended.code:
        raise UserError(f"a run that was killed does not go on: {ended.output}")
    lost += max(0, promised - ended.began)
    return {
        "fault": "killed",
        "how": f"SIGKILL at {times} random times, {torn} within a checkpoint",
        "restarts": times,
        "lost": lost,
        "repeated": repeated,
        "differences": differences(out, reference),
    }
