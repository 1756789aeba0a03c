"""How far a finetuning run on a mesh parts from one on a single device, and why; prints figures of docs/scaling.md.

    python -m benchmarks.finetune [--mesh fsdp=2,expert=2] [--rate 1e-3] [--steps 60]

Both take the same steps of examples/finetune.py. Before each step the two sets of parameters are run on its batch, on
one device: by themselves, and those of the mesh once more with the experts that the single device's parameters choose.
If the losses part where tokens change experts, and with the same experts do not, the router's flips are the cause. A
flip is a rounding where the single device's logits of the two experts are as close as the two runs' logits are.
"""

import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from examples.finetune import WEIGHT_DECAY, batch_of, make_mesh, training_step
from flax_mixtral import Mixtral, causal_lm_loss
from flax_mixtral.arrays import Mould, arrays_of
from flax_mixtral.decoder import context_of
from flax_mixtral.sharding import batch_spec
from scripts.make_checkpoint import write_checkpoint

SHAPE_BT = (4, 16)
SIZES: dict[str, Any] = {
    "vocab_size": 88,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "num_local_experts": 12,
    "num_hidden_layers": 2,
}

Arrays = dict[str, np.ndarray[Any, Any]]


def train(source: Path, mesh_text: str, rate: float, steps: int) -> list[Arrays]:
    """Take the steps; give the parameters before each."""
    mesh, found = make_mesh(mesh_text), []
    with jax.set_mesh(mesh):
        model = Mixtral.from_pretrained(source, mesh=mesh)
        graphdef, params = nnx.split(model)
        optimizer = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
        moments, step = jax.jit(optimizer.init)(params), training_step(graphdef, optimizer)
        for number in range(steps):
            found.append({path: np.array(array) for path, array in arrays_of(nnx.merge(graphdef, params)).items()})
            tokens_BT = batch_of(number, SHAPE_BT, SIZES["vocab_size"])
            ids_BT = jax.device_put(tokens_BT, NamedSharding(mesh, batch_spec(mesh)))
            params, moments, _ = step(params, moments, ids_BT)
    return found


@jax.jit
def run(
    model: Mixtral, ids_BT: jax.Array, routing: tuple[jax.Array, ...] | None = None
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Give the loss, and the router's logits and own choices of every layer."""
    x_BTD = model.model.embed_tokens(ids_BT)
    context = context_of(model.config, SHAPE_BT, None, None, x_BTD.dtype)
    logits, chosen = [], []
    for layer, block in enumerate(model.model.layers):
        trace = block(x_BTD, context, None if routing is None else routing[layer])
        x_BTD = trace.resid_out
        logits.append(trace.router_logits)
        chosen.append(jnp.sort(trace.router_ids))
    return causal_lm_loss(model.head(model.model.final_norm(x_BTD), ids_BT), ids_BT), logits, chosen


class Parted(NamedTuple):
    """How two runs stand before one step.

    Args:
        rates: largest difference of a parameter, in learning rates: what AdamW moves one by in a step.
        free: relative difference of the losses.
        forced: the same with the experts of one run in both.
        flips: tokens that go to other experts, over all layers.
        margin: the largest of their logit margins, over the difference of the two runs' logits at that token.
    """

    rates: float
    free: float
    forced: float
    flips: int
    margin: float


def compare(one: Mixtral, other: Mixtral, ids_BT: jax.Array, rates: float) -> Parted:
    loss, logits, chosen = run(one, ids_BT)
    other_loss, _, _ = run(other, ids_BT)
    # Router by router on the same experts before it: else one flip moves every router after it.
    forced_loss, forced_logits, forced_chosen = run(other, ids_BT, tuple(chosen))
    flips, margin = 0, 0.0
    for layer, (ids_MA, other_MA) in enumerate(zip(chosen, forced_chosen, strict=True)):
        flipped_M = np.asarray(ids_MA != other_MA).any(axis=1)
        ranked_ME = np.sort(np.asarray(logits[layer], np.float64), axis=1)[:, ::-1]
        A = ids_MA.shape[1]
        apart_M = np.abs(np.asarray(logits[layer] - forced_logits[layer])).max(axis=1)
        margins_M = (ranked_ME[:, A - 1] - ranked_ME[:, A]) / np.maximum(apart_M, 1e-30)
        flips += int(flipped_M.sum())
        margin = max(margin, float(margins_M[flipped_M].max(initial=0)))
    relative = [abs(float(found) / float(loss) - 1) for found in (other_loss, forced_loss)]
    return Parted(rates, relative[0], relative[1], flips, margin)


@click.command()
@click.option("--mesh", default="fsdp=2,expert=2", show_default=True)
@click.option("--rate", default=1e-3, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--spread", default=0.3, show_default=True, help="Standard deviation of the initial parameters.")
def main(mesh: str, rate: float, steps: int, spread: float) -> None:
    """Train twice and compare step by step."""
    devices = math.prod(int(part.split("=")[1]) for part in mesh.split(","))
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        write_checkpoint(source, **SIZES, initializer_range=spread)
        runs = [train(source, text, rate, steps) for text in ("", mesh)]
        config = Mixtral.from_pretrained(source).config
    mould = Mould(lambda rngs: Mixtral(config, rngs=rngs, experts="dense"))
    parted = []
    print("| step | parameters apart, in rates | losses apart | with the same experts | tokens flipped | margin |")
    print("|---|---|---|---|---|---|")
    for number, (one, other) in enumerate(zip(*runs, strict=True)):
        ids_BT = jnp.asarray(batch_of(number, SHAPE_BT, SIZES["vocab_size"]))
        rates = max(float(np.abs(array - other[path]).max()) for path, array in one.items()) / rate
        found = compare(mould.fill(one), mould.fill(other), ids_BT, rates)
        parted.append(found)
        if found.flips or not any(before.flips for before in parted[:-1]):
            figures = f"{found.rates:.1e} | {found.free:.1e} | {found.forced:.1e} | {found.flips} | {found.margin:.2f}"
            print(f"| {number} | {figures} |", flush=True)
    without, with_flips = ([one for one in parted if bool(one.flips) == flipped] for flipped in (False, True))
    apart = max((one.free for one in without), default=0)
    print(f"\n{len(without)} steps without a flip: losses apart by {apart:.1e} at most.")
    if with_flips:
        free, forced = (max(getattr(p, name) for p in with_flips) for name in ("free", "forced"))
        print(f"{len(with_flips)} with flips: by {free:.1e} at most, with the same experts by {forced:.1e}.")
        print(f"Largest margin over the difference of the logits: {max(p.margin for p in with_flips):.2f} (at most 2).")


if __name__ == "__main__":
    main()
