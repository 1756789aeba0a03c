"""A judge that remembers must give nothing but what judging anew would give."""

from dataclasses import replace

import numpy as np

from parity.drawn import DEFAULT
from parity.recordings.detail import ALL
from parity.selftest.judged_once import JudgedOnce
from parity.trace import Array, Batch, Trace
from parity.verdict import Finding

CONFIG = replace(DEFAULT, vocab_size=23, hidden_size=7)
BATCH = Batch("five tokens", np.arange(5)[None])


def _judge(judge: JudgedOnce, torch: Trace, flax: Trace, exact: Trace) -> list[Finding]:
    return list(judge.head("local", BATCH, (torch, flax, exact), settled=True))


def _trace(arrays: dict[str, Array]) -> Trace:
    return Trace({name: array.astype(np.float32) for name, array in arrays.items()})


def test_findings_are_given_again_for_the_very_arrays_and_for_no_others() -> None:
    rng = np.random.default_rng(0)
    exact = {"final_norm": rng.standard_normal((1, 5, 7)), "logits": rng.standard_normal((1, 5, 23))}
    torch, flax = _trace(exact), _trace(exact)
    judge = JudgedOnce(CONFIG, "float32", ALL)
    first = _judge(judge, torch, flax, Trace(exact))

    again = _judge(judge, Trace(dict(torch.arrays)), Trace(dict(flax.arrays)), Trace(dict(exact)))
    assert all(one is other for one, other in zip(first, again, strict=True)), "traces are new, arrays are not"

    equal = _judge(judge, torch, _trace(exact), Trace(exact))
    assert equal == first
    assert not any(one is other for one, other in zip(first, equal, strict=True)), "equal arrays are judged anew"

    wrong = Trace({**flax.arrays, "logits": flax["logits"] + 1})
    assert [finding.point for finding in _judge(judge, torch, wrong, Trace(exact)) if finding.verdict == "fail"] == [
        "logits"
    ]
    missing = Trace({"final_norm": flax["final_norm"]})
    assert _judge(judge, torch, missing, Trace(exact)) != first
    assert _judge(judge, torch, flax, Trace(exact)) == first, "what came between is not what is known"
