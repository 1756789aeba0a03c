"""The model on meshes of eight simulated devices against the same model on one.

`test_eight_devices_agree_with_one` runs some multidevice tests in a process that has eight devices.
"""

import json
import math
import os
import subprocess
import sys
from functools import cache
from inspect import unwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convert import Checkpoint
from flax_mixtral import ConfigError, Mixtral, MixtralConfig, causal_lm_loss, generate
from flax_mixtral.arrays import arrays_of
from flax_mixtral.experts import parallel
from flax_mixtral.sharding import batch_spec, partition_specs
from parity.metrics import Precision
from parity.trace import Array
from parity.verdict import MARGIN_LIMIT
from tests.checkpoints import write_checkpoint
from tests.flax_mixtral.meshes import MESHES, bytes_read, mesh_of
from tests.flax_mixtral.models import Exact, by_path, exact_answer, margin_of
from tests.network import free_address
from tests.rerun import rerun

SIZES: dict[str, Any] = {
    "vocab_size": 88,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 6,
    "num_local_experts": 24,
    "num_hidden_layers": 2,
    "router_aux_loss_coef": 0.0,
}
IDS = np.random.default_rng(3).integers(0, 88, (8, 5))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mesh") / "hf"
    write_checkpoint(path, **SIZES)
    return path


def run(model: Mixtral, ids_BT: jax.Array) -> tuple[jax.Array, Any]:
    """Give the logits and the gradient of the loss by every parameter."""

    def loss(model: Mixtral) -> tuple[jax.Array, jax.Array]:
        logits_BTV = model(ids_BT).logits
        assert logits_BTV is not None
        return causal_lm_loss(logits_BTV, ids_BT), logits_BTV

    gradients, logits_BTV = jax.grad(loss, has_aux=True)(model)
    return logits_BTV, nnx.state(gradients)


@cache
def on_one(path: Path, dtype: Precision) -> tuple[Array, dict[str, Array], Exact]:
    """Give logits and gradients of one device, and the exact ones."""
    model = Mixtral.from_pretrained(path, dtype=jnp.dtype(dtype), experts="dense")
    logits_BTV, gradients = jax.jit(run)(model, jnp.asarray(IDS))
    return np.asarray(logits_BTV), by_path(gradients), exact_answer(model, IDS)


@pytest.mark.multidevice
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MESHES)
def test_logits_and_gradients_are_those_of_one_device(checkpoint: Path, name: str, kind: AxisType) -> None:
    assert_those_of_one_device(checkpoint, mesh_of(name, kind))


@pytest.mark.multidevice
@pytest.mark.parametrize("own", ["blocks", "ragged"])
def test_skipping_experts_on_a_mesh_gives_the_same(checkpoint: Path, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "fastest", lambda elements: own)
    assert_those_of_one_device(checkpoint, mesh_of("2x2x2"))


def assert_those_of_one_device(checkpoint: Path, mesh: jax.sharding.Mesh) -> None:
    with jax.set_mesh(mesh):
        model = Mixtral.from_pretrained(checkpoint, mesh=mesh)
        ids_BT = jax.device_put(jnp.asarray(IDS), NamedSharding(mesh, batch_spec(mesh)))
        # A function of its own: JAX would find what it has compiled for `run` with other experts.
        logits_BTV, gradients = jax.jit(lambda model, ids_BT: run(model, ids_BT))(model, ids_BT)
    plain_BTV, plain, exact = on_one(checkpoint, "float32")
    margins = {"logits": margin_of(plain_BTV, np.asarray(logits_BTV), exact.logits, "float32").value}
    for path, gradient in by_path(gradients).items():
        margins[path] = margin_of(plain[path], gradient, exact.gradients[path], "float32").value
    assert margins.keys() == {"logits", *plain}
    assert max(margins.values()) <= MARGIN_LIMIT["float32"], margins


@pytest.mark.multidevice
def test_an_explicit_mesh_types_what_the_model_gives(checkpoint: Path) -> None:
    mesh = mesh_of("2x2x2", AxisType.Explicit)
    with jax.set_mesh(mesh):
        model: Any = Mixtral.from_pretrained(checkpoint, mesh=mesh)
        output = jax.jit(lambda model, ids_BT: model(ids_BT, attention_mask=jnp.ones_like(ids_BT)))(model, IDS)
        assert output.logits.sharding.spec == PartitionSpec("fsdp", None, None)
        assert output.aux_loss.sharding.spec == PartitionSpec()
        one_row = jax.jit(lambda model, ids_BT: model(ids_BT).logits)(model, IDS[:1])
        assert one_row.sharding.spec == PartitionSpec(None, None, None)
        undecorated: Any = unwrap(Mixtral.__call__)
        # Without the decorator JAX asks of every operation how its result is cut; its error type is not public.
        with pytest.raises(Exception, match="out sharding could not be resolved unambiguously"):
            jax.jit(undecorated)(model, IDS)


@pytest.mark.multidevice
def test_both_kinds_of_mesh_generate_the_tokens_of_one_device(checkpoint: Path) -> None:
    expected = generate(Mixtral.from_pretrained(checkpoint), IDS, 3)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of("2x2x2", kind)
        with jax.set_mesh(mesh):
            np.testing.assert_array_equal(generate(Mixtral.from_pretrained(checkpoint, mesh=mesh), IDS, 3), expected)


@pytest.mark.multidevice
@pytest.mark.parametrize("layout", ["hf-legacy", "hf-fused"])
@pytest.mark.parametrize("name", MESHES)
def test_each_byte_is_read_once_and_each_device_holds_its_share(name: str, layout: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", layout=layout, **SIZES)
    with bytes_read() as read:
        arrays = arrays_of(Mixtral.from_pretrained(tmp_path / "hf", mesh=mesh_of(name)))
    total = sum(array.nbytes for array in arrays.values())
    assert sum(read) == total  # this process has every device
    held = [0] * 8
    for array in arrays.values():
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert held == [sum(array.nbytes // cuts(path, MESHES[name]) for path, array in arrays.items())] * 8


def cuts(path: str, sizes: dict[str, int], devices: int = 8) -> int:
    """Say in how many parts a leaf is: norms are whole, a router lacks an axis for tensor, nothing is cut by data."""
    if path.endswith("norm.scale"):
        return 1
    whole = sizes.get("data", 1) * (sizes.get("tensor", 1) if "router" in path else 1)
    return devices // whole


@pytest.mark.multidevice
def test_parts_are_those_of_the_whole(checkpoint: Path) -> None:
    view = Checkpoint.open(checkpoint).view("flax")
    for name, array in arrays_of(Mixtral.from_pretrained(checkpoint, mesh=mesh_of("2x2x2"))).items():
        np.testing.assert_array_equal(array, view[name], name)


@pytest.mark.multidevice
def test_bfloat16_logits_are_within_noise(checkpoint: Path) -> None:
    mesh = mesh_of("2x2x2")
    with jax.set_mesh(mesh):
        model = Mixtral.from_pretrained(checkpoint, mesh=mesh, dtype=jnp.bfloat16)
        logits_BTV = jax.jit(run)(model, jnp.asarray(IDS))[0]
    plain_BTV, _, exact = on_one(checkpoint, "bfloat16")
    found = margin_of(plain_BTV, np.asarray(logits_BTV), exact.logits, "bfloat16")
    assert found.value <= MARGIN_LIMIT["bfloat16"], found


@pytest.mark.multidevice
@pytest.mark.parametrize("cuts_text", ["expert=2", "expert=2,tensor=2", "fsdp=2,expert=2"])
def test_processes_read_their_own_bytes_and_give_the_logits_of_one(checkpoint: Path, cuts_text: str) -> None:
    sizes = {name: int(size) for name, size in (part.split("=") for part in cuts_text.split(","))}
    command = [sys.executable, "-m", "tests.flax_mixtral.mesh_worker", str(checkpoint), free_address()]
    count = math.prod(sizes.values())
    environment = {**os.environ, "XLA_FLAGS": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = [subprocess.Popen([*command, str(number), cuts_text], **pipes) for number in range(count)]
    try:
        printed = [worker.communicate(timeout=200)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    found = [json.loads(next(line for line in text.splitlines() if line.startswith("{"))) for text in printed]
    view = Checkpoint.open(checkpoint).view("flax")
    own = sum(array.nbytes // cuts(path, sizes, count) for path, array in view.items())
    assert [(one["read"], one["held"]) for one in found] == [(own, own)] * count
    plain_BTV, _, exact = on_one(checkpoint, "float32")
    logits_BTV = np.array(found[0]["logits"], np.float32)
    assert margin_of(plain_BTV, logits_BTV, exact.logits, "float32").value <= MARGIN_LIMIT["float32"]


# --- what needs one device only -------------------------------------------------------------------------------------


def test_eight_devices_agree_with_one() -> None:
    """One mesh in the default run; `pytest -m multidevice` with the flags below runs them all."""
    files = [__file__, str(Path(__file__).parent / "experts" / "test_parallel.py")]
    one = "2x2x2-AxisType.Auto or 2x2x2-hf-legacy or 2x2x2-blocks"
    devices = "--xla_force_host_platform_device_count=8"
    rerun("-m", "multidevice", *files, "-k", one, expected=3, XLA_FLAGS=devices)


def test_specs_follow_the_axis_letters() -> None:
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("fsdp", "expert", "tensor"), (AxisType.Auto,) * 3)
    specs = partition_specs(MixtralConfig(**SIZES), mesh)
    assert specs["model.layers.1.moe.experts.down"] == PartitionSpec("expert", "tensor", "fsdp")
    assert specs["model.layers.0.attention.o.kernel"] == PartitionSpec("tensor", None, ("fsdp", "expert"))
    assert specs["model.layers.0.moe.router.kernel"] == PartitionSpec("fsdp", "expert")
    assert specs["model.embed_tokens.embedding"] == PartitionSpec("tensor", ("fsdp", "expert"))
    assert specs["model.final_norm.scale"] == PartitionSpec(None)


def test_a_mesh_that_does_not_fit_is_refused_with_every_reason() -> None:
    mesh = jax.sharding.AbstractMesh((7, 2), ("expert", "model"), (AxisType.Auto,) * 2)
    with pytest.raises(ConfigError, match="does not fit the mesh") as refused:
        partition_specs(MixtralConfig(**SIZES), mesh)
    assert 'mesh axis "model": expected one of data, expert, fsdp, tensor' in str(refused.value)
    assert "moe.experts.up: axis E of size 24 does not divide into 7 parts" in str(refused.value)


def test_parallel_experts_need_a_mesh(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", **SIZES)
    model = Mixtral.from_pretrained(tmp_path / "hf", experts="parallel")
    with pytest.raises(ValueError, match=r"call the model within `with jax\.set_mesh"):
        jax.eval_shape(model, IDS)
