"""Every transform that the model is to go through, as a table: a name, and a function that runs the model under it.

`LOGITS` gives logits [B, T, V], `GRADIENTS` the gradient of `loss` by every parameter; each must be what the plain
model gives. Every row runs under the tests' own `jax.jit`. A new transform is one more function here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_mixtral import KVCache, Mixtral, causal_lm_loss, init_cache
from flax_mixtral.decoder import Context, DecoderBlock, context_of

__all__ = ["GRADIENTS", "LOGITS", "Row", "logits", "loss", "stacked"]

Row = Callable[[Mixtral, Mixtral, jax.Array], Any]
"""From the model, another one with other parameters (that no result may show), and ids [B, T]."""

LOGITS: dict[str, Row] = {}
GRADIENTS: dict[str, Row] = {}

MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


def logits(model: Mixtral, ids_BT: jax.Array) -> jax.Array:
    found = model(ids_BT).logits
    assert found is not None
    return found


def loss(model: Mixtral, ids_BT: jax.Array) -> jax.Array:
    """Give the cross entropy alone: unlike the balance of a batch, it is a mean over rows of equal length."""
    return causal_lm_loss(logits(model, ids_BT), ids_BT)


def stacked(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _row(table: dict[str, Row]) -> Callable[[Row], Row]:
    def add(row: Row) -> Row:
        table[row.__name__] = row
        return row

    return add


# --- the forward ----------------------------------------------------------------------------------------------------


@_row(LOGITS)
def jit_within_jit(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.jit(logits)(model, ids_BT)


@_row(LOGITS)
def nnx_jit(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return nnx.jit(logits)(model, ids_BT)


@_row(LOGITS)
def split_and_merge(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return logits(nnx.merge(*nnx.split(model)), ids_BT)


@_row(LOGITS)
def vmap_over_rows(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.vmap(lambda ids_T: logits(model, ids_T[None])[0])(ids_BT)


@_row(LOGITS)
def map_over_rows(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.lax.map(lambda ids_T: logits(model, ids_T[None])[0], ids_BT)


@_row(LOGITS)
def vmap_over_parameters(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.vmap(logits, in_axes=(0, None))(stacked(other, model), ids_BT)[1]


@_row(LOGITS)
def nnx_vmap_over_parameters(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return nnx.vmap(logits, in_axes=(0, None))(stacked(other, model), ids_BT)[1]


@_row(LOGITS)
def scan_over_layers(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    x_BTD, context = _start(model, ids_BT)

    def one_layer(x_BTD: jax.Array, block: DecoderBlock) -> tuple[jax.Array, None]:
        return block(x_BTD, context).resid_out, None

    return _end(model, ids_BT, jax.lax.scan(one_layer, x_BTD, stacked(*model.model.layers))[0])


@_row(LOGITS)
def nnx_scan_over_layers(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    x_BTD, context = _start(model, ids_BT)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def every_layer(x_BTD: jax.Array, block: DecoderBlock) -> jax.Array:
        return block(x_BTD, context).resid_out

    return _end(model, ids_BT, every_layer(x_BTD, stacked(*model.model.layers)))


@_row(LOGITS)
def switch_over_layers(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    x_BTD, context = _start(model, ids_BT)
    branches = [partial(lambda block, x_BTD: block(x_BTD, context).resid_out, block) for block in model.model.layers]
    x_BTD = jax.lax.fori_loop(0, 2, lambda layer, x_BTD: jax.lax.switch(layer, branches, x_BTD), x_BTD)
    return _end(model, ids_BT, x_BTD)


@_row(LOGITS)
def switch_over_models(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.lax.switch(_traced(1), [partial(logits, other), partial(logits, model)], ids_BT)


@_row(LOGITS)
def nnx_switch_around(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return nnx.switch(_traced(1), [_plus_one, logits], model, ids_BT)


@_row(LOGITS)
def cond_around(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.lax.cond(_traced(1) == 0, _plus_one, logits, model, ids_BT)


@_row(LOGITS)
def nnx_cond_around(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return nnx.cond(_traced(1) == 0, _plus_one, logits, model, ids_BT)


@_row(LOGITS)
def while_loop_around(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return _looped(jax.lax.while_loop, model, ids_BT)


@_row(LOGITS)
def nnx_while_loop_around(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return _looped(nnx.while_loop, model, ids_BT)


@_row(LOGITS)
def scan_over_time(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    step = partial(_one_token, model)
    return jax.lax.scan(step, _empty_cache(model, ids_BT), ids_BT.T[:, :, None])[1].swapaxes(0, 1)


@_row(LOGITS)
def while_loop_over_time(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    cache = _empty_cache(model, ids_BT)
    found_BTV = jnp.zeros((*ids_BT.shape, model.config.vocab_size), cache.k_BSKH[0].dtype)

    def step(carry: tuple[KVCache, jax.Array]) -> tuple[KVCache, jax.Array]:
        cache, found_BTV = carry
        t = cache.length
        after, logits_BV = _one_token(model, cache, jax.lax.dynamic_slice_in_dim(ids_BT, t, 1, axis=1))
        return after, jax.lax.dynamic_update_index_in_dim(found_BTV, logits_BV, t, axis=1)

    return jax.lax.while_loop(lambda carry: carry[0].length < ids_BT.shape[1], step, (cache, found_BTV))[1]


@_row(LOGITS)
def remat(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.checkpoint(logits)(model, ids_BT)


@_row(LOGITS)
def jvp(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    primal_BTV, _ = jax.jvp(lambda model: logits(model, ids_BT), (model,), (other,))
    return primal_BTV


@_row(LOGITS)
def checkified(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return checkify.checkify(logits, errors=checkify.all_checks)(model, ids_BT)[1]


@_row(LOGITS)
def shard_map_over_rows(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return jax.shard_map(logits, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))(model, ids_BT)


@_row(LOGITS)
def nnx_shard_map_over_rows(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return nnx.shard_map(logits, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))(model, ids_BT)


# --- its gradient ---------------------------------------------------------------------------------------------------


@_row(GRADIENTS)
def value_and_grad(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    return jax.value_and_grad(loss)(model, ids_BT)[1]


@_row(GRADIENTS)
def nnx_grad(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    return nnx.grad(loss)(model, ids_BT)


@_row(GRADIENTS)
def nnx_value_and_grad(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    return nnx.value_and_grad(loss)(model, ids_BT)[1]


@_row(GRADIENTS)
def grad_of_split_state(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    graphdef, state = nnx.split(model)
    return jax.grad(lambda state: loss(nnx.merge(graphdef, state), ids_BT))(state)


@_row(GRADIENTS)
def vjp(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    value, backwards = jax.vjp(lambda model: loss(model, ids_BT), model)
    return backwards(jnp.ones_like(value))[0]


@_row(GRADIENTS)
def grad_of_remat(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    return jax.grad(jax.checkpoint(loss))(model, ids_BT)


@_row(GRADIENTS)
def grad_of_nnx_remat_per_layer(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    def run(model: Mixtral) -> jax.Array:
        x_BTD, context = _start(model, ids_BT)
        for block in model.model.layers:
            x_BTD = nnx.remat(lambda block, x_BTD: block(x_BTD, context).resid_out)(block, x_BTD)
        return causal_lm_loss(_end(model, ids_BT, x_BTD), ids_BT)

    return jax.grad(run)(model)


@_row(GRADIENTS)
def grad_of_scan_over_layers(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    return jax.grad(lambda model: causal_lm_loss(scan_over_layers(model, other, ids_BT), ids_BT))(model)


@_row(GRADIENTS)
def grad_through_cond(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    def run(model: Mixtral) -> jax.Array:
        return jax.lax.cond(_traced(1) == 0, lambda model: jnp.zeros(()), lambda model: loss(model, ids_BT), model)

    return jax.grad(run)(model)


@_row(GRADIENTS)
def mean_of_vmapped_grads(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    return _mean_over_rows(jax.vmap(lambda ids_T: jax.grad(loss)(model, ids_T[None]))(ids_BT))


@_row(GRADIENTS)
def mean_of_scanned_grads(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    return _mean_over_rows(jax.lax.map(lambda ids_T: jax.grad(loss)(model, ids_T[None]), ids_BT))


@_row(GRADIENTS)
def grad_through_shard_map(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    def mean_loss(model: Mixtral, ids_BT: jax.Array) -> jax.Array:
        return jax.lax.pmean(loss(model, ids_BT), "data")

    return jax.grad(jax.shard_map(mean_loss, mesh=MESH, in_specs=(P(), P("data")), out_specs=P()))(model, ids_BT)


@_row(GRADIENTS)
def grad_inside_shard_map(model: Mixtral, other: Mixtral, ids_BT: jax.Array) -> Any:
    def mean_gradient(model: Mixtral, ids_BT: jax.Array) -> Any:
        # Parameters that all devices share have the sum of the devices' gradients.
        return jax.tree.map(lambda g: g / jax.lax.axis_size("data"), jax.grad(loss)(model, ids_BT))

    return jax.shard_map(mean_gradient, mesh=MESH, in_specs=(P(), P("data")), out_specs=P())(model, ids_BT)


# --- what the rows share --------------------------------------------------------------------------------------------


def _traced(number: int) -> jax.Array:
    """Give a number that no transform can know while it traces."""
    return jax.lax.optimization_barrier(jnp.array(number))


def _plus_one(model: Mixtral, ids_BT: jax.Array) -> jax.Array:
    return logits(model, ids_BT) + 1


def _start(model: Mixtral, ids_BT: jax.Array) -> tuple[jax.Array, Context]:
    x_BTD = model.model.embed_tokens(ids_BT)
    B, T = ids_BT.shape
    return x_BTD, context_of(model.config, (B, T), None, None, x_BTD.dtype)


def _end(model: Mixtral, ids_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
    return model.head(model.model.final_norm(x_BTD), ids_BT)


def _looped(while_loop: Any, model: Mixtral, ids_BT: jax.Array) -> jax.Array:
    empty_BTV = jnp.zeros_like(jax.eval_shape(logits, model, ids_BT))
    start = (model, empty_BTV, _traced(0))
    return while_loop(
        lambda carry: carry[2] < 2, lambda carry: (carry[0], logits(carry[0], ids_BT), carry[2] + 1), start
    )[1]


def _empty_cache(model: Mixtral, ids_BT: jax.Array) -> KVCache:
    B, T = ids_BT.shape
    return init_cache(model.config, B, T, model.model.embed_tokens.embedding[...].dtype)


def _one_token(model: Mixtral, cache: KVCache, ids_B1: jax.Array) -> tuple[KVCache, jax.Array]:
    output = model(ids_B1, cache=cache)
    assert output.cache is not None
    assert output.logits is not None
    return output.cache, output.logits[:, 0]


def _mean_over_rows(per_row: Any) -> Any:
    return jax.tree.map(lambda gradient_B: jnp.mean(gradient_B.astype(jnp.float32), axis=0), per_row)
