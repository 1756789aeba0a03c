"""Finetune a Mixtral on a device mesh, in one process or several, and export it to Hugging Face.

    python examples/finetune.py path/to/mixtral build/tuned --mesh fsdp=2,expert=2 --steps 20

Batches are random tokens drawn from the step's number: what is shown is the way, not a data set. Parameters, optimizer
and step are checkpointed with Orbax, so that a run that was killed goes on with --resume and ends with the same model.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from numpy.typing import NDArray

import convert
from flax_mixtral import Mixtral, causal_lm_loss
from flax_mixtral.arrays import arrays_of
from flax_mixtral.sharding import batch_spec

WEIGHT_DECAY = 0.01  # torch's default in AdamW

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any, jax.Array]]


def batch_of(step: int, shape_BT: tuple[int, int], vocabulary: int) -> NDArray[np.int64]:
    """Draw the tokens of a step; every process, and torch in the test, draws the same."""
    return np.random.default_rng(step).integers(0, vocabulary, shape_BT)


def training_step(graphdef: Any, optimizer: optax.GradientTransformation) -> Step:
    def loss(params: Any, ids_BT: jax.Array) -> jax.Array:
        logits_BTV = nnx.merge(graphdef, params)(ids_BT).logits
        return causal_lm_loss(logits_BTV, ids_BT)

    def step(params: Any, moments: Any, ids_BT: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, ids_BT)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    return jax.jit(step, donate_argnums=(0, 1))


def make_mesh(text: str) -> Mesh:
    """Read "fsdp=2,expert=2"; without a mesh axis, the model is whole on one device."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(",") if part)}
    sizes = sizes or {"data": 1}
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def export(model: Mixtral, out: Path) -> None:
    """Write the model as Flax and as Hugging Face have it; the parts of all processes are gathered for that."""
    arrays = {path: _whole(array) for path, array in arrays_of(model).items()}
    if jax.process_index() == 0:
        convert.save(out / "flax", arrays, model.config)
        convert.convert(out / "flax", out / "hf", to="hf-legacy")


def _whole(array: jax.Array) -> NDArray[Any]:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def train(
    source: Path, out: Path, mesh: Mesh, steps: int, shape_BT: tuple[int, int], rate: float, every: int, resume: bool
) -> list[float]:
    """Train and export; return the loss before each step that this call took."""
    model = Mixtral.from_pretrained(source, mesh=mesh)
    graphdef, params = nnx.split(model)
    optimizer = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
    # Jitted, so that the moments are on the mesh as their parameters are, and the step's number everywhere.
    moments = jax.jit(optimizer.init)(params)
    manager = ocp.CheckpointManager((out / "state").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1))
    first = 0
    if resume and (latest := manager.latest_step()) is not None:
        first = latest
        leaves, tree = jax.tree.flatten((params, moments))
        wanted = [ocp.utils.to_shape_dtype_struct(leaf) for leaf in leaves]
        params, moments = jax.tree.unflatten(tree, manager.restore(first, args=ocp.args.StandardRestore(wanted)))
    step, losses = training_step(graphdef, optimizer), []
    for number in range(first, steps):
        tokens_BT = batch_of(number, shape_BT, model.config.vocab_size)
        sharding = NamedSharding(mesh, batch_spec(mesh))
        ids_BT = jax.make_array_from_callback(shape_BT, sharding, tokens_BT.__getitem__)
        params, moments, loss = step(params, moments, ids_BT)
        losses.append(float(loss))
        report(number, losses[-1])
        if (number + 1) % every == 0:
            manager.save(number + 1, args=ocp.args.StandardSave(jax.tree.leaves((params, moments))))
            manager.wait_until_finished()
    manager.close()
    export(nnx.merge(graphdef, params), out)
    return losses


def report(step: int, loss: float) -> None:
    if jax.process_index() == 0:
        click.echo(json.dumps({"step": step, "loss": loss}))


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--mesh", default="", help="Sizes of mesh axes, as fsdp=2,expert=2.")
@click.option("--steps", default=20, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=16, show_default=True)
@click.option("--rate", default=1e-3, show_default=True, help="Learning rate of AdamW.")
@click.option("--every", default=5, show_default=True, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUT.")
@click.option("--coordinator", help="host:port of process 0, where there are several processes.")
@click.option("--process", default=0, show_default=True)
@click.option("--processes", default=1, show_default=True)
def main(
    source: Path,
    out: Path,
    mesh: str,
    steps: int,
    batch: int,
    length: int,
    rate: float,
    every: int,
    resume: bool,
    coordinator: str | None,
    process: int,
    processes: int,
) -> None:
    """Finetune SOURCE and write OUT/flax and OUT/hf."""
    if coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=10)
    try:
        devices = make_mesh(mesh)
        with jax.set_mesh(devices):
            train(source, out, devices, steps, (batch, length), rate, every, resume)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not any(sign in str(error) for sign in ("Gloo", "CoordinationService")):
            raise
        click.echo(f"process {process}: another process was lost ({error}); start all again with --resume", err=True)
        sys.stderr.flush()
        os._exit(5)  # a normal exit waits for the lost process


if __name__ == "__main__":
    main()
