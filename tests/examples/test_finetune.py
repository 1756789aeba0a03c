"""The example on a mesh, against torch step by step, across processes, and after one of them was killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from convert import Checkpoint
from examples.finetune import WEIGHT_DECAY, batch_of
from parity.gradients import training_labels
from parity.metrics import UNIT_ROUNDOFF, margin
from parity.oracle.model import Oracle
from parity.trace import Array, Batch
from parity.verdict import MARGIN_LIMIT
from tests.checkpoints import write_checkpoint
from tests.network import free_address

ROOT = Path(__file__).parents[2]
STEPS, SHAPE_BT, RATE = 4, (4, 16), 1e-3
SIZES: dict[str, Any] = {
    "vocab_size": 88,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "num_local_experts": 12,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}


def start(source: Path, out: Path, *options: str, devices: int = 1, steps: int = STEPS) -> subprocess.Popen[str]:
    command = [sys.executable, "examples/finetune.py", str(source), str(out), "--steps", str(steps), "--every", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process: subprocess.Popen[str] = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, **pipes)
    STARTED.append(process)
    return process


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _ends_all_that_it_started() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().kill()


def losses(process: subprocess.Popen[str]) -> list[float]:
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    return [json.loads(line)["loss"] for line in printed.splitlines() if line.startswith("{")]


def start_all(
    source: Path, out: Path, mesh: str, processes: int, *options: str, steps: int = STEPS
) -> list[subprocess.Popen[str]]:
    shared = ["--mesh", mesh, "--coordinator", free_address(), "--processes", str(processes), *options]
    return [start(source, out, *shared, "--process", str(number), steps=steps) for number in range(processes)]


def tensors(out: Path) -> dict[str, Array]:
    return load_file(out / "hf" / "model.safetensors")


def exact_losses(source: Path) -> Array:
    """Train in float64 with the oracle's gradients and AdamW as its paper has it."""
    checkpoint = Checkpoint.open(source)
    weights = {name: np.asarray(array, np.float64) for name, array in checkpoint.view("hf-legacy").items()}
    first = {name: np.zeros_like(array) for name, array in weights.items()}
    second = {name: np.zeros_like(array) for name, array in weights.items()}
    found = []
    for step in range(STEPS):
        batch = Batch("step", batch_of(step, SHAPE_BT, SIZES["vocab_size"]))
        config = checkpoint.config
        result = Oracle(config, weights).gradients(batch, training_labels(batch))
        found.append(float(result.losses.loss))
        gradients = Checkpoint.of_arrays(config, result.parameters).view("hf-legacy")
        for name, weight in weights.items():
            first[name] = 0.9 * first[name] + 0.1 * gradients[name]
            second[name] = 0.999 * second[name] + 0.001 * gradients[name] ** 2
            mean, spread = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            weights[name] = weight * (1 - RATE * WEIGHT_DECAY) - RATE * mean / (np.sqrt(spread) + 1e-8)
    return np.array(found)[:, None]


def torch_losses(model: transformers.PreTrainedModel) -> Array:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    found = []
    for step in range(STEPS):
        ids = torch.from_numpy(batch_of(step, SHAPE_BT, SIZES["vocab_size"]))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return np.array(found)[:, None]


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [
        ("", 1),
        pytest.param("data=2,expert=2,tensor=2", 8, marks=pytest.mark.multidevice),
        pytest.param("fsdp=4,expert=2", 8, marks=pytest.mark.multidevice),
    ],
)
def test_the_loss_curve_is_as_close_to_the_exact_one_as_torchs(tmp_path: Path, mesh: str, devices: int) -> None:
    # Without the balance of the experts, which transformers adds to the loss on request only.
    model = write_checkpoint(tmp_path / "hf", router_aux_loss_coef=0.0, **SIZES)
    flax = np.array(losses(start(tmp_path / "hf", tmp_path / "out", "--mesh", mesh, devices=devices)))[:, None]
    exact = exact_losses(tmp_path / "hf")
    torch_curve = torch_losses(model.train())
    assert flax.shape == exact.shape
    found = [
        margin(torch_curve[step : step + 1], flax[step : step + 1], exact[step : step + 1], UNIT_ROUNDOFF["float32"])
        for step in range(STEPS)
    ]
    assert max(step.value for step in found) <= MARGIN_LIMIT["float32"], found
    exported = type(model).from_pretrained(tmp_path / "out" / "hf")
    for (name, ours), theirs in zip(exported.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2 * RATE * STEPS, rtol=0, msg=name)


@pytest.mark.multidevice
@pytest.mark.parametrize(("mesh", "processes"), [("expert=2", 2), ("fsdp=2,expert=2", 4), ("data=2,tensor=2", 4)])
def test_several_processes_take_the_steps_of_one(tmp_path: Path, mesh: str, processes: int) -> None:
    write_checkpoint(tmp_path / "hf", **SIZES)
    # Slowly: Adam makes a whole step of a gradient's last bits, and a token between two experts may then change sides.
    slow = ("--rate", "1e-6")
    alone = losses(start(tmp_path / "hf", tmp_path / "alone", *slow))
    shared = finish(start_all(tmp_path / "hf", tmp_path / "shared", mesh, processes, *slow))
    np.testing.assert_allclose(shared, alone, rtol=1e-5)


@pytest.mark.multidevice
@pytest.mark.parametrize(("mesh", "processes"), [("expert=2", 2), ("fsdp=2,expert=2", 4)])
def test_a_killed_process_is_noticed_and_the_resumed_run_ends_with_the_same_model(
    tmp_path: Path, mesh: str, processes: int
) -> None:
    write_checkpoint(tmp_path / "hf", **SIZES)
    out = tmp_path / "killed"
    running = start_all(tmp_path / "hf", out, mesh, processes, steps=10_000)
    last = wait_for_step(running[0], 4)
    running[-1].send_signal(signal.SIGKILL)
    for survivor in running[:-1]:
        printed, complaints = survivor.communicate(timeout=60)  # heartbeats stop for 10 s
        assert survivor.returncode in (5, -signal.SIGABRT), complaints  # JAX's own watchdog aborts
        assert "another process was lost" in complaints or "another task died" in complaints
        last = max([last, *steps_of(printed.splitlines())])
    assert not (out / "hf").exists()

    steps = last + 3
    resumed = finish(start_all(tmp_path / "hf", out, mesh, processes, "--resume", steps=steps))
    assert 0 < len(resumed) < steps, "it began anew"
    whole = finish(start_all(tmp_path / "hf", tmp_path / "whole", mesh, processes, steps=steps))
    assert resumed == whole[-len(resumed) :]
    for name, tensor in tensors(tmp_path / "whole").items():
        np.testing.assert_array_equal(tensors(out)[name], tensor, name)


def wait_for_step(process: subprocess.Popen[str], step: int) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if step in steps_of([line]):
            return step
    raise AssertionError(f"it ended before step {step}")


def steps_of(lines: list[str]) -> list[int]:
    """Read what process 0 prints; Gloo prints lines of its own."""
    return [int(json.loads(line)["step"]) for line in lines if line.startswith("{")]


def finish(processes: list[subprocess.Popen[str]]) -> list[float]:
    found = losses(processes[0])
    for process in processes[1:]:
        process.communicate(timeout=60)
        assert process.returncode == 0
    return found
