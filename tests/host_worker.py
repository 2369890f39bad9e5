"""One of several processes that train together; started by test_many_hosts.py.

Arguments: number of the process, number of processes, port, cases. Prints one line of
JSON for each result.
"""

import json
import os
import sys


PROCESS, PROCESSES, PORT = map(int, sys.argv[1:4])
LOCAL = 4 // PROCESSES
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={LOCAL}"

import jax  # noqa: E402


jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(
    f"127.0.0.1:{PORT}",
    num_processes=PROCESSES,
    process_id=PROCESS,
    initialization_timeout=120,
)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402

import lwsam_jax as lwsam  # noqa: E402
from host_task import BATCHES, KEY_SEED, loss_fn, PARAMS, share  # noqa: E402


MESH = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def say(**result):
    print(json.dumps({"case": now, **result}), flush=True)


def make(**options):
    method = lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7)
    optimizer = optax.sgd(0.1, momentum=0.9)
    return lwsam.TrainStep(loss_fn, optimizer, method, MESH, **options)


def own(batch):
    return share(batch, PROCESS, PROCESSES)


def as_global(batch):
    cut = NamedSharding(MESH, P("data"))
    return {
        name: jax.make_array_from_process_local_data(cut, x)
        for name, x in own(batch).items()
    }


def start(step, key):
    return step.init(PARAMS, {}, own(BATCHES[0]), key=key, constants=(np.ones(3),))


def train(feed, key, **options):
    step = make(**options)
    state = start(step, key)
    for batch in BATCHES:
        state, info = step(state, feed(batch), np.ones(3))
        say(
            value=float(info.value),
            mask=np.asarray(info.mask).tolist(),
            rows=int(info.metrics["rows"]),
        )
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(MESH, P()))(state.params)
    say(
        params={k: np.asarray(v).tolist() for k, v in whole.items()},
        executables=[list(cover.names) for cover in step.executables],
    )


def numpy_shares():
    train(own, jax.random.key(KEY_SEED))


def global_arrays():
    train(as_global, jax.random.PRNGKey(KEY_SEED))


def local_arrays():
    train(lambda b: jax.tree.map(jnp.asarray, own(b)), jax.random.key(KEY_SEED))


def fully_sharded():
    cut = NamedSharding(MESH, P("data"))
    place = lambda x: jax.make_array_from_callback(x.shape, cut, lambda at: x[at])
    step = make()
    params = jax.tree.map(place, PARAMS)
    key, constants = jax.random.key(KEY_SEED), (np.ones(3),)
    state = step.init(params, {}, own(BATCHES[0]), key=key, constants=constants)
    for batch in BATCHES:
        state, info = step(state, own(batch), *constants)
        say(value=float(info.value), cut=state.params["out"].sharding == cut)


def refreshed():
    """The model state once more, forward only, each process on its share."""
    step = make()
    state = start(step, jax.random.key(KEY_SEED))
    again = step.refresh(state, map(own, BATCHES), constants=(np.ones(3),))
    state, info = step(again, own(BATCHES[0]), np.ones(3))
    say(value=float(info.value))


def raises(run):
    try:
        run()
    except ValueError as error:
        say(error=str(error))
    else:
        say(error="")


def other_batch():
    """In the second step one process has fewer rows, then rows that do not divide."""
    step = make()
    state, _ = step(start(step, jax.random.key(KEY_SEED)), own(BATCHES[0]), np.ones(3))
    for rows in (LOCAL, 1 if LOCAL > 1 else 0):
        less = {k: v[:rows] for k, v in own(BATCHES[1]).items()}
        batch = less if PROCESS == 1 else own(BATCHES[1])
        raises(lambda batch=batch: step(state, batch, np.ones(3)))
    state, info = step(state, own(BATCHES[1]), np.ones(3))  # and it goes on
    say(value=float(info.value))


def other_parameters():
    """Drawn with another seed in one process, or its key is another one."""
    step = make()
    one = {**PARAMS, "out": PARAMS["out"] + (PROCESS == 1)}
    key, constants = jax.random.key(KEY_SEED), (np.ones(3),)
    raises(lambda: step.init(one, {}, own(BATCHES[0]), key=key, constants=constants))
    raises(lambda: start(step, jax.random.key(PROCESS)))
    odd = {name: x[:7] for name, x in BATCHES[0].items()}  # it alone does not divide
    batch = odd if PROCESS == 1 else own(BATCHES[0])
    raises(lambda: step.init(PARAMS, {}, batch, key=key, constants=constants))


def other_selection():
    """One process restored another state: its mask is another one."""
    step = make()
    state = start(step, jax.random.key(KEY_SEED))
    mask = np.array([PROCESS == 1, PROCESS != 1])
    here = NamedSharding(MESH, P())
    wrong = jax.make_array_from_callback((2,), here, lambda at: mask[at])
    state = state._replace(method_state=state.method_state._replace(mask=wrong))
    raises(lambda: step(state, own(BATCHES[0]), np.ones(3)))


def alone():
    """A mesh of one process's own devices: it asks nobody."""
    if PROCESS == 0:
        mesh = jax.make_mesh(
            (LOCAL,), ("data",), (AxisType.Auto,), devices=jax.local_devices()
        )
        method = lwsam.LayerwiseSAM(k=1, rho=0.3, alpha=0.7)
        optimizer = optax.sgd(0.1, momentum=0.9)
        step = lwsam.TrainStep(loss_fn, optimizer, method, mesh)
        state, constants = start(step, jax.random.key(KEY_SEED)), (np.ones(3),)
        _, info = step(state, BATCHES[0], *constants)
        say(value=float(info.value))


def pmap():
    raises(lambda: lwsam.TrainStep(loss_fn, optax.sgd(0.1), lwsam.sam(0.1), "pmap"))


for now in sys.argv[4:]:
    globals()[now]()
now = "end"
say()
