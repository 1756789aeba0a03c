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

__all__ = ["axis_sizes"]


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
