"""What Mixtral 8x22B needs on named accelerators: planned from the axis letters, checked against XLA's own counts.

    python -m benchmarks.scaling

Nothing of the model's size is allocated: the forward is compiled for as many simulated devices as the plan has, with
blocks of the real shapes, and the compiled program says what each device holds and what is sent between them. Prints
the table of docs/scaling.md, and exits 1 where plan and program differ.
"""

import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from flax_mixtral import Mixtral, MixtralConfig, init_cache
from flax_mixtral.sharding import batch_spec, partition_specs
from flax_mixtral.tree import slots

MOST_DEVICES = 32
GIGA = 1e9
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "u32": 4}
COLLECTIVE = re.compile(
    r"= (\(?[a-z0-9]+\[.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Plan:
    """Accelerators, how many of them a host has, and the mesh over all."""

    accelerator: str
    memory: float
    per_host: int
    mesh: dict[str, int]


PLANS = (
    Plan("8 x H100 80 GB", 80 * GIGA, 8, {"expert": 8, "tensor": 1}),
    Plan("8 x H100 80 GB", 80 * GIGA, 8, {"expert": 2, "tensor": 4}),
    Plan("8 x TPU v5p 95 GB", 95 * GIGA, 4, {"expert": 8}),
    Plan("32 x TPU v5e 16 GB", 16 * GIGA, 8, {"expert": 8, "tensor": 4}),
    Plan("32 x A100 40 GB", 40 * GIGA, 8, {"fsdp": 4, "expert": 8}),
)
SHAPE_BT = (32, 128)


def config_of(layers: int) -> MixtralConfig:
    """Mixtral 8x22B, but for the layers."""
    return MixtralConfig(
        vocab_size=32000,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=layers,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
    )


LAYERS = 56


def mesh_of(plan: Plan) -> Mesh:
    count = math.prod(plan.mesh.values())
    kinds = (AxisType.Auto,) * len(plan.mesh)
    return jax.make_mesh(tuple(plan.mesh.values()), tuple(plan.mesh), axis_types=kinds, devices=jax.devices()[:count])


def held_bytes(config: MixtralConfig, mesh: Mesh) -> int:
    """Plan what one device holds, in bfloat16, from the specs alone."""
    specs = partition_specs(config, mesh)
    total = 0
    for slot in slots(config):
        names = [name for part in specs[slot.path] for name in ([part] if isinstance(part, str) else part or ())]
        total += 2 * math.prod(slot.shape) // math.prod(mesh.shape[name] for name in names)
    return total


def read_bytes(config: MixtralConfig, mesh: Mesh, per_host: int) -> int:
    """Count what the first host reads: the different parts that its devices hold."""
    specs, own, total = partition_specs(config, mesh), set(mesh.devices.flat[:per_host].tolist()), 0
    for slot in slots(config):
        places = NamedSharding(mesh, specs[slot.path]).devices_indices_map(slot.shape)
        parts = {str(index): index for device, index in places.items() if device in own}
        for index in parts.values():
            lengths = [len(range(*one.indices(size))) for one, size in zip(index, slot.shape, strict=True)]
            total += 2 * math.prod(lengths)
    return total


def compiled(config: MixtralConfig, mesh: Mesh) -> Any:
    """Compile the forward of one batch without any array."""
    specs = partition_specs(config, mesh)
    model = nnx.eval_shape(lambda: Mixtral(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), experts="parallel"))
    graphdef, state = nnx.split(model)
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        sharding = NamedSharding(mesh, specs[".".join(map(str, path))])
        leaves.append((path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))))
    ids_BT = jax.ShapeDtypeStruct(SHAPE_BT, jnp.int32, sharding=NamedSharding(mesh, batch_spec(mesh)))
    with jax.set_mesh(mesh):
        forward = jax.jit(lambda state, ids_BT: nnx.merge(graphdef, state)(ids_BT).logits)
        return forward.lower(nnx.from_flat_state(leaves), ids_BT).compile()


def sent_bytes(program: Any) -> dict[str, int]:
    """Add up the results of every collective of the program of one device, by kind."""
    sent: dict[str, int] = {}
    for shapes, kind in COLLECTIVE.findall(program.as_text()):
        for dtype, dims in SHAPE.findall(shapes):
            size = BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)
            sent[kind] = sent.get(kind, 0) + size
    return sent


def cache_bytes(tokens: int) -> int:
    """Give the key/value cache of one row, in bfloat16."""
    cache = jax.eval_shape(lambda: init_cache(config_of(LAYERS), 1, tokens, jnp.dtype(jnp.bfloat16)))
    return sum(2 * math.prod(array.shape) for array in (*cache.k_BSKH, *cache.v_BSKH))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MOST_DEVICES)
    wrong = []
    print("| devices | mesh | held by each | of its memory | read by a host | sent a layer | experts' psum of that |")
    print("|---|---|---|---|---|---|---|")
    for plan in PLANS:
        mesh = mesh_of(plan)
        one, two = (compiled(config_of(layers), mesh) for layers in (1, 2))
        ids_bytes = 4 * math.prod(SHAPE_BT) // math.prod(plan.mesh.get(name, 1) for name in ("data", "fsdp"))
        for layers, program in ((1, one), (2, two)):
            planned = held_bytes(config_of(layers), mesh) + ids_bytes
            counted = program.memory_analysis().argument_size_in_bytes
            if planned != counted:
                wrong.append(f"{plan}: {layers} layers: {planned} bytes planned, {counted} compiled")
        before, after = sent_bytes(one), sent_bytes(two)
        a_layer = {kind: after[kind] - before.get(kind, 0) for kind in after}
        psum = 4 * math.prod(SHAPE_BT) * 6144 // plan.mesh.get("fsdp", 1)
        if a_layer.get("all-reduce", 0) < psum:
            wrong.append(f"{plan}: a psum of {psum} bytes is planned for each block, the program has {a_layer}")
        held, read = held_bytes(config_of(LAYERS), mesh), read_bytes(config_of(LAYERS), mesh, plan.per_host)
        if held > plan.memory:
            wrong.append(f"{plan}: holds {held} bytes")
        cut = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
        sent = sum(a_layer.values()) / GIGA
        print(
            f"| {plan.accelerator} | {cut} | {held / GIGA:.1f} GB | {held / plan.memory:.0%} | {read / GIGA:.1f} GB | "
            f"{sent:.2f} GB | {psum / GIGA:.2f} GB |",
            flush=True,
        )
    print(f"\nA key/value cache of 32,768 tokens: {cache_bytes(32768) / GIGA:.2f} GB a row, over all tensor devices.")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
