"""Kernels that lie in memory as Hugging Face stores them; run as `python -m benchmarks.layouts`.

Prints two Markdown tables: products with an expert's kernel by how it lies, and ways to bring one into order.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

from convert.memory import on_cache_line
from convert.transpose import contiguous
from flax_mixtral.projection import project

D, F = 1024, 3584
KERNELS = 6
"""Taken in turn, so that none is in a cache when its turn comes."""
ROUNDS = 3


@jax.jit
def product(x_RD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """Multiply as the model does."""
    return project("RD,DF->RF", x_RD, kernel_DF)


@jax.jit
def product_as_stored(x_RD: jax.Array, kernel_FD: jax.Array) -> jax.Array:
    """Multiply with a parameter of another shape than ours."""
    return project("RD,FD->RF", x_RD, kernel_FD)


def milliseconds(run: Callable[[int], object]) -> float:
    """Give what one call takes of all processors: the median over rounds, after one to compile and warm up."""
    found = []
    for turn in range(ROUNDS + 1):
        start = time.process_time()
        for kernel in range(KERNELS):
            jax.block_until_ready(run(kernel))
        if turn:
            found.append((time.process_time() - start) / KERNELS * 1e3)
    return statistics.median(found)


def in_layout(kernel_FD: npt.NDArray[Any]) -> jax.Array:
    """Give the kernel [D, F] as JAX sees the memory of its transpose."""
    bits_DF = jax.dlpack.from_dlpack(kernel_FD.view(np.uint16).T)  # the exchange does not know NumPy's bfloat16
    laid_out: jax.Array = jax.device_put(jax.lax.bitcast_convert_type(bits_DF, jnp.bfloat16), bits_DF.format)
    return laid_out


def products(rows: int, ways: list[tuple[Callable[..., jax.Array], list[jax.Array]]]) -> str:
    """Time a product in every way, and compare the ways' bits with the first's."""
    x_RD = jnp.asarray(np.random.default_rng(1).standard_normal((rows, D)), jnp.bfloat16)
    times = [milliseconds(lambda k, f=f, held=held: f(x_RD, held[k])) for f, held in ways]  # type: ignore[misc]
    first, *others = (np.asarray(f(x_RD, held[0])).view(np.uint16) for f, held in ways)
    equal = ["yes" if np.array_equal(first, other) else "no" for other in others]
    return (
        f"| {rows} | {times[0]:.2f} | "
        + " | ".join(f"{ms:.2f}, {same}" for ms, same in zip(times[1:], equal, strict=True))
        + " |"
    )


@click.command()
def main() -> None:
    """Compare layouts in bfloat16."""
    drawn = np.random.default_rng(0).standard_normal((KERNELS, F, D), np.float32) / 30
    stored = [on_cache_line(2 * F * D).view(ml_dtypes.bfloat16).reshape(F, D) for _ in drawn]
    for target, values in zip(stored, drawn, strict=True):
        target[...] = values
    as_stored = [jax.device_put(kernel_FD, may_alias=True) for kernel_FD in stored]
    laid_out = [in_layout(kernel_FD) for kernel_FD in stored]
    in_order = [jax.device_put(kernel_FD.T) for kernel_FD in stored]
    click.echo("CPU milliseconds of a product, and whether its bits are those of the first column\n")
    click.echo("| rows | in order | device layout | parameter [out, in] |\n|---|---|---|---|")
    for rows in (1, 8, 128):
        click.echo(products(rows, [(product, in_order), (product, laid_out), (product_as_stored, as_stored)]))
    x_RD = jnp.zeros((8, D), jnp.bfloat16)
    compiled = product.lower(x_RD, laid_out[0]).compile().as_text() or ""
    click.echo(f"\nThe compiled product with a device layout has {compiled.count(' copy(')} copy.")
    transpose = jax.jit(jnp.transpose)
    orders: dict[str, Callable[[int], object]] = {
        "np.ascontiguousarray": lambda k: np.ascontiguousarray(stored[k].T),
        "jitted transpose": lambda k: transpose(as_stored[k]),
        "tiles of NumPy's": lambda k: contiguous(stored[k].T, held_bytes),
        "jax.device_put": lambda k: jax.device_put(stored[k].T),
    }
    held_bytes = on_cache_line(2 * F * D)
    click.echo("\n| bringing into order | GB/s of one processor |\n|---|---|")
    for name, run in orders.items():
        click.echo(f"| {name} | {2 * F * D / 1e6 / milliseconds(run):.2f} |")


if __name__ == "__main__":
    main()
