"""A judge that does not judge twice: most of what a trial compares is what the trial before compared."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from parity.judging import Judge, Traces
from parity.stream import Compared
from parity.trace import Batch
from parity.verdict import Finding, Mode

__all__ = ["JudgedOnce"]

Key = tuple[str, int | None, Mode, str, bool]


@dataclass(frozen=True, slots=True)
class JudgedOnce(Judge):
    """Gives its first findings again where it is given the very arrays of then, as `Remembering` sides give them.

    A finding follows from the arrays alone. They are compared by identity: equal arrays that were computed anew are
    judged anew.
    """

    known: dict[Key, tuple[Traces, list[Finding]]] = field(default_factory=dict)

    def block(self, layer: int, mode: Mode, batch: Batch, compared: Compared, *, settled: bool) -> Iterator[Finding]:
        """See `Judge.block`."""
        key: Key = ("block", layer, mode, batch.name, settled)
        findings = Judge.block(self, layer, mode, batch, compared, settled=settled)
        return self._once(key, compared.traces, findings)

    def operations(self, layer: int, batch: Batch, traces: Traces) -> Iterator[Finding]:
        """See `Judge.operations`."""
        key: Key = ("operations", layer, "operation", batch.name, True)
        return self._once(key, traces, Judge.operations(self, layer, batch, traces))

    def head(self, mode: Mode, batch: Batch, traces: Traces, *, settled: bool) -> Iterator[Finding]:
        """See `Judge.head`."""
        key: Key = ("head", None, mode, batch.name, settled)
        return self._once(key, traces, Judge.head(self, mode, batch, traces, settled=settled))

    def _once(self, key: Key, traces: Traces, judged: Iterator[Finding]) -> Iterator[Finding]:
        """Give what is known; `judged` judges as it is read."""
        known = self.known.get(key)
        if known is not None and _same(known[0], traces):
            return iter(known[1])
        findings = list(judged)
        self.known.setdefault(key, (traces, findings))
        return iter(findings)


def _same(known: Traces, given: Traces) -> bool:
    return all(
        one.rows.keys() == other.rows.keys()
        and all(one.rows[expert] is other.rows[expert] for expert in one.rows)
        and one.arrays.keys() == other.arrays.keys()
        and all(one.arrays[name] is other.arrays[name] for name in one.arrays)
        for one, other in zip(known, given, strict=True)
    )
