"""The one key of axis letters: argument suffixes, einsum strings, weight patterns and sharding use it.

    B  batch                     N  query heads            F  expert hidden
    T  query positions           K  key/value heads        E  experts
    S  key positions             G  query heads per        A  experts per token
    M  tokens, B*T                  key/value head, N/K    V  vocabulary
    D  model                     H  head dim               C  classes of a head
    L  layers                    P  rotary pairs, H/2

An array called `probs_ME` has axes (tokens, experts). Parameter paths carry no suffix.
Imports the standard library only.
"""

from flax_mixtral.config import MixtralConfig

__all__ = ["MESH_AXES", "TOKEN_AXES", "axis_sizes"]

MESH_AXES: dict[str, tuple[str, ...]] = {
    "E": ("expert",),
    "D": ("fsdp", "expert"),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
}
"""The axes of a device mesh that each axis of a parameter is cut along, where the mesh has them.

A mesh axis cuts one axis of a parameter only, the first in its row: D is cut along "expert" where there is no E. Only
tokens are cut along "data".
"""

TOKEN_AXES = ("data", "fsdp")
"""The axes of a device mesh that rows of a batch are cut along."""


def axis_sizes(config: MixtralConfig) -> dict[str, int]:
    """Give the size of every axis that a configuration fixes (not B, T, S, M)."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "L": config.num_hidden_layers,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "G": config.num_attention_heads // config.num_key_value_heads,
        "H": config.head_dim,
        "P": config.head_dim // 2,
        "E": config.num_local_experts,
        "A": config.num_experts_per_tok,
        "C": config.num_labels,
    }
