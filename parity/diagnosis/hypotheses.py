"""The faults that a replay tries, one row each: what is changed, at which points it shows, in which dtype it exists.

A row is added here and nowhere else: the engine, docs/diagnosing.md and the tests read the table. Parameters that a
fault leaves open are a few tried values, or are fitted in parity.diagnosis.fitted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity.diagnosis import faulty_math as faulty
from parity.diagnosis import faulty_weights as misplaced
from parity.diagnosis import fitted
from parity.diagnosis.change import Change
from parity.diagnosis.replay import Block, to_bfloat16
from parity.oracle import operations as exact
from parity.trace import Array

__all__ = ["HYPOTHESES", "Hypothesis"]

NORMS = ("input_norm", "post_attn_norm", "final_norm")
ROTATED = ("q_rot", "k_rot")
GATED = ("expert.gate", "expert.up")
EXPERTS = (*GATED, "expert.act", "expert.down")
KERNELS = ("q", "k", "v", "attn_out", "router_logits", *GATED, "expert.down", "moe_out")
PROJECTED = ("q", "k", "v", "attn_out", "router_logits", *GATED, "expert.down", "logits")
FLOAT32, BOTH = ("float32",), ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One fault of the catalogue as a replay tries it.

    Args:
        slug: its name in the catalogue.
        says: what it is and what distinguishes it.
        points: those that it touches; the first of them in the block is where it shows.
        changes: its forms, given the block.
        dtypes: those in which it exists.
        rounding: whether it loses precision only: then it need not come down to noise, but must be much nearer than
            the exact operation.
        last: tried only where nothing else explains the point, since its fit is a looser one.
    """

    slug: str
    says: str
    points: tuple[str, ...]
    changes: Callable[[Block], Iterable[Change]]
    dtypes: tuple[str, ...] = BOTH
    rounding: bool = False
    last: bool = False


Changes = Callable[[Block], Iterable[Change]]


def _always(*changes: Change) -> Changes:
    return lambda block: changes


def _op(field_name: str, detail: str, op: Callable[..., Any]) -> Change:
    return Change(detail, {field_name: op})


def _each(changes: Changes, *places: tuple[str, ...]) -> Changes:
    """Try each change at all places together and at each alone: a port may have one of two norms right."""

    def placed(block: Block) -> Iterable[Change]:
        for change in changes(block):
            yield change
            for at in places:
                yield replace(change, detail=f"{change.detail}, {at[0]} only", at=at)

    return placed


def _each_norm(changes: Changes) -> Changes:
    return _each(changes, *((name,) for name in NORMS[:2]))


def _configured(detail: str, **fields: Any) -> Change:
    return Change(detail, block=lambda block: replace(block, config=replace(block.config, **fields)))


def _eps(block: Block) -> Iterable[Change]:
    own = block.config.rms_norm_eps
    for eps in sorted({own / 10, own * 10, own / 100, 1e-5, 1e-6, 1e-8, 1e-12, 1e-30} - {own}):
        yield _configured(f"rms_norm_eps {eps:g} for {own:g}", rms_norm_eps=eps)


def _theta(block: Block) -> Iterable[Change]:
    rope = block.config.rope
    for theta in (1e4, 1e5, 5e5, 1e6, 1e7):
        if theta != rope.rope_theta:
            yield _configured(f"rope_theta {theta:g} for {rope.rope_theta:g}", rope=replace(rope, rope_theta=theta))


def _windows(block: Block) -> Iterable[Change]:
    window, T = block.config.sliding_window, block.batch.input_ids.shape[1]
    tried: set[int | None] = {4096} if window is None else {window - 1, window + 1, None}
    for other in (*tried, fitted.window(block)):
        if other != window and (other is None or 0 < other < T or window is not None):
            yield _op("visible", f"sliding window {other} for {window}", faulty.windowed(other))


def _scales(block: Block) -> Iterable[Change]:
    H, N, K = block.config.head_dim, block.config.num_attention_heads, block.config.num_key_value_heads
    constants = {"1/sqrt(N)": N**-0.5, "1/sqrt(K)": K**-0.5, "1/H, scaled twice": 1 / H, "1, not scaled": 1.0}
    constants |= {"sqrt(H)": H**0.5, "1/sqrt(D)": block.config.hidden_size**-0.5}
    for name, scale in constants.items():
        if scale != H**-0.5:
            yield _op("scores", f"scores times {name} = {scale:.4g} for {H**-0.5:.4g}", faulty.scaled_by(scale))


def _derived_head_dim(block: Block) -> Iterable[Change]:
    """Assume H = D/N, in the scale or in the rotary frequencies."""
    config = block.config
    H, assumed = config.head_dim, config.hidden_size // config.num_attention_heads
    if assumed in (0, H):
        return
    scale = faulty.scaled_by(assumed**-0.5)
    yield Change(f"scores over sqrt({assumed}) = sqrt(D/N) for sqrt({H})", {"scores": scale}, at=("attn_context",))
    yield replace(
        _op("frequencies", f"rotary exponents over {assumed} = D/N for {H}", faulty.frequencies_of(assumed)), at=ROTATED
    )


def _activations(block: Block) -> Iterable[Change]:
    for name in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh", "sigmoid", "linear"):
        if name != block.config.hidden_act:
            yield _op("activate", f"{name} for {block.config.hidden_act}", faulty.activated_by(name))


def _another_k(block: Block) -> Iterable[Change]:
    ids = block.observed.arrays.get("router_ids")
    if ids is None or ids.shape[-1] == block.config.num_experts_per_tok:
        return
    own, found = block.config.num_experts_per_tok, ids.shape[-1]
    yield _configured(f"top {found} for top {own}", num_experts_per_tok=found)


def _low_matmul(cast: Callable[[Array], Array], name: str) -> tuple[Change, Change]:
    project = {"project": faulty.project_rounded(cast)}
    attention = {"scores": faulty.scores_rounded(cast), "mix": faulty.mix_rounded(cast)}
    return (
        Change(f"factors of every product rounded to {name}", project | attention),
        Change(f"factors of every projection rounded to {name}", project, at=PROJECTED),
    )


HYPOTHESES = (
    # --- weights that are right in the file and wrong in use
    Hypothesis("w1-w3-swapped", "gate and up projections exchanged", (*GATED, "moe_out"), misplaced.gate_and_up),
    Hypothesis("k-v-swapped", "key and value projections exchanged", ("k", "v"), misplaced.key_and_value),
    Hypothesis("norms-swapped", "input and post-attention norm exchanged", NORMS[:2], misplaced.norms),
    Hypothesis("rope-rows-permuted", "q or k rows in another rotary order", ("q", "k"), misplaced.rope_rows),
    Hypothesis("kernel-not-transposed", "a square matrix used transposed", KERNELS, misplaced.not_transposed),
    Hypothesis(
        "experts-permuted",
        "experts in another order than the router's rows",
        (*EXPERTS, "router_logits", "moe_out"),
        fitted.permuted_experts,
    ),
    Hypothesis(
        "layers-sorted-as-strings",
        "the layer that stands here when numbers are sorted as text",
        (*NORMS[:2], *KERNELS),
        misplaced.layer_by_string,
    ),
    # --- norms and residuals
    Hypothesis("norm-eps", "another eps: the gain depends on the token's size", NORMS, _each_norm(_eps)),
    Hypothesis(
        "norm-plus-one",
        "scaled by 1 + w: one ratio per channel",
        NORMS,
        _each_norm(_always(_op("norm", "scale 1 + w", faulty.norm_plus_one))),
    ),
    Hypothesis(
        "norm-cast-order",
        "weight applied before the cast down",
        NORMS,
        _each_norm(_always(_op("norm", "one cast, after the weight", faulty.norm_cast_last))),
        dtypes=("bfloat16",),
        rounding=True,
    ),
    Hypothesis(
        "norm-not-upcast",
        "mean square in bfloat16",
        NORMS,
        _each_norm(
            _always(
                _op("norm", "every step in bfloat16", faulty.norm_in_bfloat16),
                _op("norm", "mean and root in bfloat16", faulty.norm_mean_in_bfloat16),
            )
        ),
        dtypes=("bfloat16",),
        rounding=True,
    ),
    Hypothesis(
        "residual-from-normed",
        "residual taken after the norm",
        ("resid_mid", "resid_out"),
        _each(
            _always(_op("residual", "branch added to its own input", faulty.residual_from_normed)),
            ("resid_mid",),
            ("resid_out",),
        ),
    ),
    Hypothesis("hidden-state-after-norm", "final norm inside the last block", ("resid_out",), misplaced.normed_output),
    # --- rope and attention
    Hypothesis(
        "rope-interleaved",
        "adjacent lanes turned together; position 0 exact",
        ROTATED,
        _each(_always(_op("rotate", "lanes 2p and 2p+1 paired", faulty.rotate_neighbours)), ("q_rot",), ("k_rot",)),
    ),
    Hypothesis("rope-theta", "another base: grows with position", ROTATED, _theta),
    Hypothesis(
        "rope-freq-low-precision",
        "inverse frequencies rounded: grows with position",
        ROTATED,
        _always(
            _op("frequencies", "frequencies in bfloat16", faulty.rounded_frequencies(faulty.BFLOAT16)),
            _op("frequencies", "frequencies in float16", faulty.rounded_frequencies(np.float16)),
            _op("tables", "frequencies and angles in bfloat16", faulty.rounded_angles),
        ),
        rounding=True,
    ),
    Hypothesis(
        "padding-positions",
        "positions count the left padding: an offset per row",
        ROTATED,
        _always(_op("positions", "position = index in the row", faulty.indices)),
    ),
    Hypothesis(
        "cache-position",
        "every position off by one",
        ROTATED,
        _always(
            _op("positions", "positions one too high", faulty.shifted_positions(1)),
            _op("positions", "positions one too low", faulty.shifted_positions(-1)),
        ),
    ),
    Hypothesis("window-off-by-one", "another sliding window: late rows only", ("attn_context",), _windows),
    Hypothesis(
        "causal-mask-missing",
        "keys of the future visible: the last row exact",
        ("attn_context",),
        _always(
            _op("visible", "future keys visible, padding hidden", faulty.every_key),
            _op("visible", "future keys and padding visible", faulty.every_key_and_padding),
        ),
    ),
    Hypothesis(
        "masked-row-nan",
        "a query that sees nothing gives NaN",
        ("attn_context",),
        _always(_op("attention_softmax", "softmax of a row of -inf", faulty.softmax_of_minus_infinity)),
    ),
    Hypothesis(
        "kv-heads-tiled",
        "key/value heads tiled instead of repeated: some heads match",
        ("attn_context",),
        _always(_op("repeat", "query head n reads key/value head n mod K", faulty.tile_heads)),
    ),
    Hypothesis("attention-scale", "scores a constant times the right ones", ("attn_context",), _scales),
    Hypothesis("head-dim-ignored", "H taken for D/N", (*ROTATED, "attn_context"), _derived_head_dim),
    Hypothesis(
        "softmax-low-precision",
        "attention's softmax in bfloat16",
        ("attn_probs", "attn_context"),
        _always(
            _op("attention_softmax", "every step in bfloat16", faulty.softmax_in_bfloat16),
            _op("attention_softmax", "every step but the sum in bfloat16", faulty.softmax_with_wide_sum),
            _op("attention_softmax", "scores and weights in bfloat16", faulty.softmax_from_bfloat16),
        ),
        rounding=True,
    ),
    # --- mixture of experts
    Hypothesis(
        "router-not-renormalised",
        "weights not divided by their sum",
        ("router_weights",),
        _always(_op("weigh", "probabilities as weights", faulty.weigh_not_renormalised)),
    ),
    Hypothesis(
        "router-raw-logits",
        "logits as weights: below 0 or above 1",
        ("router_weights",),
        _always(
            _op("weigh", "logits as weights", faulty.weigh_raw_logits),
            _op("weigh", "logits over their sum as weights", faulty.weigh_logit_share),
        ),
    ),
    Hypothesis(
        "router-low-precision",
        "the router's product in bfloat16, no other",
        ("router_logits",),
        _always(
            _op("project", "router's factors and product in bfloat16", faulty.project_in_bfloat16),
            _op("project", "router's factors in bfloat16", faulty.project_rounded(to_bfloat16)),
            _op("project", "router's logits rounded to bfloat16", lambda x, w: to_bfloat16(x @ w.astype(x.dtype).T)),
        ),
        dtypes=FLOAT32,
        rounding=True,
    ),
    Hypothesis(
        "router-probs-rounded",
        "probabilities in bfloat16 before top-k: ties",
        ("router_probs", "router_ids", "router_weights"),
        _always(
            Change(
                "probabilities rounded to bfloat16",
                {"router_softmax": lambda logits_ME: to_bfloat16(exact.softmax(logits_ME))},
                at=("router_probs",),
            ),
            Change(
                "top-k of probabilities rounded to bfloat16",
                {"choose": faulty.choose_rounded, "weigh": faulty.weigh_rounded},
                at=("router_ids", "router_weights"),
            ),
        ),
        rounding=True,
    ),
    Hypothesis(
        "router-tie-break",
        "another order among exact ties",
        ("router_ids",),
        _always(_op("choose", "the highest index wins", faulty.choose_highest)),
    ),
    Hypothesis("top-k-wrong", "another number of experts", ("router_ids",), _another_k),
    Hypothesis(
        "ids-weights-unpaired",
        "weights attached to the wrong expert of the set",
        ("router_weights", "moe_out"),
        _always(
            *(
                Change(detail, {"weigh": op}, at=("router_weights",))
                for detail, op in (
                    ("weights in the opposite order", faulty.weigh_reversed),
                    ("weights one place on", faulty.weigh_rolled),
                    ("weights in falling order, ids in another", faulty.weigh_falling),
                )
            ),
            *(
                Change(detail, {"dispatch": faulty.dispatch_other_weight(turn)}, at=("moe_out",))
                for detail, turn in (
                    ("weights in the opposite order at the experts", lambda weights_MA: weights_MA[:, ::-1]),
                    ("weights one place on at the experts", lambda weights_MA: np.roll(weights_MA, 1, axis=1)),
                )
            ),
        ),
    ),
    Hypothesis(
        "combine-low-precision",
        "the experts' sum in bfloat16",
        ("moe_out",),
        _always(
            _op("combine", "weights, products and sum in bfloat16", faulty.combine_in_bfloat16),
            _op("combine", "products and sum in bfloat16", faulty.combine_rounded_products),
            _op("combine", "sum in bfloat16", faulty.combine_rounded_sum),
            _op("combine", "weights in bfloat16", faulty.combine_rounded_weights),
        ),
        rounding=True,
    ),
    Hypothesis("expert-skipped", "one expert has no part in the sum", ("moe_out",), fitted.skipped_expert),
    Hypothesis("capacity-drop", "some experts lack some tokens in the sum", ("moe_out",), fitted.dropped_tokens),
    Hypothesis(
        "weight-before-expert",
        "routing weight multiplied into the expert's input",
        (*GATED, "moe_out"),
        _always(
            _op("dispatch", "input scaled instead of output", faulty.dispatch_weighted_input),
            _op("dispatch", "input and output scaled", faulty.dispatch_weighted_twice),
        ),
    ),
    Hypothesis("activation-wrong", "another activation", ("expert.act", "moe_out"), _activations),
    # --- everywhere
    Hypothesis(
        "matmul-low-precision",
        "every product's factors rounded; gone at the highest precision",
        ("q", "k", "v", "attn_context", *PROJECTED[3:]),
        _always(*_low_matmul(to_bfloat16, "bfloat16"), *_low_matmul(faulty.to_tf32, "ten bits")),
        dtypes=FLOAT32,
        rounding=True,
    ),
    Hypothesis("jitter-on", "the router's input multiplied by noise", ("router_logits",), fitted.jitter, last=True),
    # --- the head
    Hypothesis(
        "final-norm-missing",
        "no final norm",
        ("final_norm",),
        _always(
            _op("norm", "final norm left out", lambda x_BTD, scale_D, eps: x_BTD),
            _op(
                "norm",
                "final norm without its weight",
                lambda x_BTD, scale_D, eps: exact.rms_norm(x_BTD, np.ones(1), eps),
            ),
        ),
    ),
    Hypothesis("lm-head-wrong", "head wrongly tied", ("logits",), misplaced.tied_head),
    Hypothesis("lm-head-wrong", "some other matrix as head", ("logits",), fitted.any_head, last=True),
    Hypothesis("vocab-rows-shifted", "rows of the head off by one", ("logits",), misplaced.shifted_head),
)
