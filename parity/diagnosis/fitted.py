"""Faults whose parameters are read off Flax's own points: a window, a permutation, missing tokens, noise.

A fit gives a change like any other; whether it explains the block is for the engine to judge. Imports NumPy and
parity's own.
"""

from collections.abc import Iterable
from itertools import combinations

import numpy as np

from parity.diagnosis.change import Change
from parity.diagnosis.faulty_math import dispatch_without
from parity.diagnosis.faulty_weights import reweighted
from parity.diagnosis.replay import Block, compute
from parity.oracle import operations as exact
from parity.trace import Array

__all__ = ["any_head", "dropped_tokens", "jitter", "permuted_experts", "skipped_expert", "window"]

EXACTLY = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative error below which a fit counts as met: some hundred roundings of float32, some ten of bfloat16."""

PROBED_ROWS = 8
"""Tokens by which an expert is recognised."""

MOST_CHOSEN = 6
"""Beyond so many experts a token, its missing ones are not searched for: there are 2**A sets."""

NOISE = (1e-5, 0.5)
"""Standard deviations that a jitter may have: below is rounding, above is no jitter."""

MOST_SCATTER = 1.5
"""How much more than chi^2 the squares of a jitter may scatter over tokens."""

MOST_MEAN = 4.5
"""Standard errors that the mean of a jitter's effect on an expert may be off zero."""


def window(block: Block) -> int | None:
    """Find the first query whose context is wrong: the window, counted in keys from its row's first real one."""
    if (pair := _pair(block, "attn_context")) is None:
        return None
    observed_BTNH, right_BTNH = pair
    error_BT = _rms(observed_BTNH - right_BTNH, (2, 3)) / _rms(right_BTNH, (2, 3))
    wrong_BT = block.batch.real_BT & ~(error_BT < EXACTLY[block.dtype])
    found = [
        int(wrong_T.argmax() - real_T.argmax())
        for wrong_T, real_T in zip(wrong_BT, block.batch.real_BT, strict=True)
        if wrong_T.any()
    ]
    return min(found, default=None)


def permuted_experts(block: Block) -> Iterable[Change]:
    """Recognise each expert, and each of the router's columns, among all of them."""
    order = [_recognised(block, expert) for expert in range(block.config.num_local_experts)]
    if order != sorted(order) and sorted(order) == list(range(len(order))):
        numbers = {f"experts.{expert}.": f"experts.{source}." for expert, source in enumerate(order)}

        def give(block: Block, name: str) -> Array:
            own = next((part for part in numbers if part in name), None)
            return block.weights[name if own is None else name.replace(own, numbers[own])]

        at = ("expert.gate", "expert.up", "expert.down", "moe_out")
        yield Change(f"experts in the order {order}", block=reweighted(give), at=at)
    if (pair := _pair(block, "router_logits")) is None:
        return
    observed_ME, right_ME = (x_ME[block.batch.real_M] for x_ME in pair)
    distances_EE = _rms(observed_ME[:, :, None] - right_ME[:, None, :], 0)
    order = [int(source) for source in distances_EE.argmin(axis=1)]
    if order != sorted(order) and sorted(order) == list(range(len(order))):
        yield Change(
            f"the router's rows in the order {order}",
            {"project": lambda x, kernel: exact.project(x, kernel[order])},
            at=("router_logits",),
        )


def _recognised(block: Block, expert: int) -> int:
    """Say whose gate projection gives an expert's recorded output."""
    pair = _pair(block, f"expert.{expert}.gate")
    if pair is None or len(pair[0]) == 0:
        return expert
    x_RD = block.states_MD()[block.observed.rows[expert][:PROBED_ROWS]]
    gate_RF = pair[0][:PROBED_ROWS]
    distances = [
        _rms(exact.project(x_RD, block.weight(f"block_sparse_moe.experts.{source}.w1")) - gate_RF, None)
        for source in range(block.config.num_local_experts)
    ]
    return int(np.argmin(distances))


def skipped_expert(block: Block) -> Iterable[Change]:
    """Leave every token of some experts out of the sum."""
    used_ME, missing_ME = _missing(block)
    # A contribution as small as the rounding is not seen to be missing, so most of an expert's are asked for, not all.
    mostly_E = 2 * missing_ME.sum(axis=0) > used_ME.sum(axis=0)
    experts = [int(expert) for expert in np.flatnonzero(mostly_E)]
    if experts and np.array_equal(missing_ME, missing_ME & mostly_E):
        without_ME = np.broadcast_to(mostly_E, used_ME.shape)
        tokens = int((used_ME & mostly_E).sum())
        yield Change(
            f"no token of expert {', '.join(map(str, experts))} in the sum ({tokens} tokens)",
            {"dispatch": dispatch_without(without_ME)},
        )


def dropped_tokens(block: Block) -> Iterable[Change]:
    """Leave some tokens of some experts out of the sum."""
    used_ME, missing_ME = _missing(block)
    whole_E = missing_ME.any(axis=0) & ~(used_ME & ~missing_ME).any(axis=0)
    if missing_ME.any() and not np.array_equal(missing_ME, missing_ME & whole_E):
        most = int((used_ME & ~missing_ME).sum(axis=0)[missing_ME.any(axis=0)].max())
        yield Change(
            f"{int(missing_ME.sum())} of {int(used_ME.sum())} contributions dropped, at experts "
            f"{[int(expert) for expert in np.flatnonzero(missing_ME.any(axis=0))]}, which kept at most {most} tokens",
            {"dispatch": dispatch_without(missing_ME)},
        )


def _missing(block: Block) -> tuple[Array, Array]:
    """Find which contributions of real tokens are missing from the sum: used and missing, [M, E] bool."""
    E, real_M, A = block.config.num_local_experts, block.batch.real_M, block.ids_MA.shape[1]
    used_ME = np.zeros((len(real_M), E), bool)
    np.put_along_axis(used_ME, block.ids_MA, True, axis=1)
    used_ME &= real_M[:, None]
    missing_ME = np.zeros_like(used_ME)
    pair = _pair(block, "moe_out")
    if A > MOST_CHOSEN or pair is None:
        return used_ME, missing_ME
    observed_MD, right_MD = (x.reshape(len(real_M), -1) for x in pair)
    lacking_MD = right_MD - observed_MD
    limit_M = EXACTLY[block.dtype] * _rms(right_MD, 1)
    wrong_M = real_M & (_rms(lacking_MD, 1) > limit_M)
    parts_MAD = _contributions(block)
    for token in np.flatnonzero(wrong_M):
        slots = _fewest(lacking_MD[token], parts_MAD[token], limit_M[token])
        missing_ME[token, block.ids_MA[token, slots]] = True
    return used_ME, missing_ME


def _fewest(lacking_D: Array, parts_AD: Array, limit: float) -> list[int]:
    """Give the smallest set of parts that sum up to what is lacking; none where no set does."""
    A = len(parts_AD)
    sets = (list(slots) for count in range(1, A + 1) for slots in combinations(range(A), count))
    return next((slots for slots in sets if _rms(lacking_D - parts_AD[slots].sum(axis=0), None) <= limit), [])


def _contributions(block: Block) -> Array:
    """Give each chosen expert's weighted output for real tokens: [M, A, D]."""
    weights_MA = block.fed("router_weights")
    parts_MAD = np.zeros((*block.ids_MA.shape, block.config.hidden_size))
    for expert in range(block.config.num_local_experts):
        recorded_R = block.inputs.rows[expert]
        rows_R, slots_R = np.nonzero(block.ids_MA == expert)
        kept_R = np.isin(rows_R, recorded_R)
        rows_R, slots_R = rows_R[kept_R], slots_R[kept_R]
        down_RD = block.fed(f"expert.{expert}.down")[np.searchsorted(recorded_R, rows_R)]
        parts_MAD[rows_R, slots_R] = weights_MA[rows_R, slots_R, None] * down_RD
    return parts_MAD


def jitter(block: Block) -> Iterable[Change]:
    """Recognise a router's input whose every element was multiplied by independent noise around 1.

    Such noise of variance s^2 gives token m a logit error of covariance s^2 W diag(x_m^2) W^T. Whitened by that, the
    errors must have one variance for all tokens, as chi^2 scatters, and no mean for any expert.
    """
    kernel_ED, x_MD = block.weight("block_sparse_moe.gate").astype(np.float64), block.states_MD()
    pair, real = _pair(block, "router_logits"), block.batch.real_M
    if pair is None or not np.isfinite(pair[0][real]).all():
        return
    # Experts with one row have one error: it is counted once.
    distinct_E = np.sort(np.unique(kernel_ED, axis=0, return_index=True)[1])
    kernel_ED, error_XE, x_XD = kernel_ED[distinct_E], (pair[0] - pair[1])[real][:, distinct_E], x_MD[real]
    covariance_XEE = np.einsum("ed,xd,fd->xef", kernel_ED, x_XD**2, kernel_ED, optimize=True)
    try:
        white_XE = np.linalg.solve(np.linalg.cholesky(covariance_XEE), error_XE[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        return  # rows that depend on one another: their errors do, too, and say nothing
    X, E = white_XE.shape
    size = float(_rms(white_XE, None))
    per_token_X = (white_XE**2).mean(axis=1) / max(size**2, 1e-300)
    scatter, mean = float(per_token_X.std() * (E / 2) ** 0.5), float(np.abs(white_XE.mean(axis=0)).max())
    if NOISE[0] < size < NOISE[1] and scatter < MOST_SCATTER and mean < MOST_MEAN * size / X**0.5:
        change_XD = x_XD * np.einsum(
            "ed,xd,xe->xd", kernel_ED, x_XD, np.linalg.solve(covariance_XEE, error_XE[:, :, None])[:, :, 0]
        )
        noisy_MD = x_MD.copy()
        noisy_MD[real] += change_XD
        yield Change(
            f"noise of standard deviation {size:.2g} on the router's input, of no fixed pattern (scatter over tokens "
            f"{scatter:.2f} of chi^2's; run it twice to be sure)",
            {"project": lambda x, kernel: exact.project(noisy_MD, kernel)},
            at=("router_logits",),
            covers=("router_logits", "expert.gate", "expert.up", "moe_out"),
        )


def any_head(block: Block) -> Iterable[Change]:
    """Fit the matrix that gives the logits, where there are twice as many tokens as it has rows."""
    logits, x_MD = block.observed.arrays.get("logits"), block.fed("final_norm").reshape(-1, block.config.hidden_size)
    if logits is None or logits.ndim != 3 or len(x_MD) < 2 * x_MD.shape[1]:
        return  # too few tokens to tell another matrix from anything else
    logits_MV = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    if np.isfinite(logits_MV).all():
        fitted_DV = np.linalg.lstsq(x_MD, logits_MV, rcond=None)[0]
        detail = f"some other matrix as head, fitted with {x_MD.shape[1]} unknowns to {len(x_MD)} tokens"
        yield Change(detail, {"project": lambda x, kernel: x @ fitted_DV})


def _pair(block: Block, point: str) -> tuple[Array, Array] | None:
    """Give a point as observed and as it should be; None where it is missing or of another shape."""
    observed = block.observed.arrays.get(point)
    try:
        right = compute(block, point)
    except (KeyError, ValueError, IndexError):
        return None
    if observed is None or observed.shape != right.shape:
        return None
    return observed.astype(np.float64), right


def _rms(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    root: Array = np.sqrt(np.mean(np.square(x), axis=axis))
    return root
