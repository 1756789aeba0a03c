"""One of several processes that run a model together: prints what it read and holds, and the first one the logits.

python -m tests.flax_mixtral.mesh_worker CHECKPOINT host:port PROCESS expert=2,tensor=2
"""

import json
import math
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from flax_mixtral import Mixtral
from flax_mixtral.arrays import arrays_of
from tests.flax_mixtral.meshes import bytes_read


def main(checkpoint: str, coordinator: str, process: int, cuts: str) -> None:
    sizes = {name: int(size) for name, size in (part.split("=") for part in cuts.split(","))}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, math.prod(sizes.values()), process)
    from tests.flax_mixtral.test_mesh import IDS  # not before: it imports arrays of JAX's, and with them a backend

    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with jax.set_mesh(mesh), bytes_read() as read:
        model = Mixtral.from_pretrained(checkpoint, mesh=mesh)
        logits_BTV = multihost_utils.process_allgather(jax.jit(lambda m, i: m(i).logits)(model, IDS), tiled=True)
    shards = [shard.data.nbytes for array in arrays_of(model).values() for shard in array.addressable_shards]
    # Of the first process alone: the others' pipes are read when it has ended, and do not hold as much.
    logits = np.asarray(logits_BTV).tolist() if process == 0 else []
    print(json.dumps({"read": sum(read), "held": sum(shards), "logits": logits}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
