"""The whole selftest on several models, three seeds each.

    python -m benchmarks.courts [NAME-SEED ...]

Plants every fault and runs every control, in float32 and bfloat16, on the standard inputs: of the courts that are named
(`exact-ties-2`), or of all. Replaces their rows in benchmarks/measured/courts.csv and renders the table of
docs/tolerances.md from all rows. Ends with exit code 1 where a fault was missed, misplaced or too often not named, or
where a control was accused.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks import tables
from flax_mixtral.config import MixtralConfig
from parity.drawn import DEFAULT, draw
from parity.metrics import Precision
from parity.selftest.courts import hold_courts
from parity.selftest.trials import Alarm, Row, Trial, passed

COURTS: dict[str, tuple[MixtralConfig, bool]] = {
    "default": (DEFAULT, False),
    "twelve-layers": (replace(DEFAULT, num_hidden_layers=12, sliding_window=None), False),
    "sixteen-experts": (replace(DEFAULT, num_local_experts=16, num_experts_per_tok=4, head_dim=16), False),
    "exact-ties": (replace(DEFAULT, num_local_experts=6, num_experts_per_tok=3), True),
}
"""Configuration, and whether routers tie. The default has a window; sixteen experts go with a square query kernel."""

SEEDS = (0, 1, 2)
DTYPES: tuple[Precision, ...] = ("float32", "bfloat16")

COUNTS = ("planted", "found", "placed", "named", "controls", "accused")


def main(wanted: Sequence[str]) -> None:
    """Hold the courts, store their rows and render."""
    good = True
    for name, seed in product(COURTS, SEEDS):
        if wanted and f"{name}-{seed}" not in wanted:
            continue
        rows = hold(name, seed)
        good &= passed(rows)
        stored = [row for row in tables.load("courts") if (row["court"], row["seed"]) != (name, str(seed))]
        found = [*stored, *(count(name, seed, dtype, [row for row in rows if row.dtype == dtype]) for dtype in DTYPES)]
        found.sort(key=lambda row: (list(COURTS).index(str(row["court"])), int(row["seed"])))
        tables.store("courts", found)
    tables.put(tables.TOLERANCES, "courts", render(tables.load("courts")))
    sys.exit(0 if good else 1)


def hold(name: str, seed: int) -> list[Row]:
    """Run the selftest on one model."""
    config, tied_routers = COURTS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = draw(Path(folder) / "drawn", config, seed=seed, tied_routers=tied_routers)
        return list(hold_courts(path, dtypes=DTYPES, inputs="standard", seed=seed))


def count(name: str, seed: int, dtype: Precision, rows: Sequence[Row]) -> dict[str, str]:
    """Sum a court's rows of one dtype up."""
    trials = [row for row in rows if isinstance(row, Trial)]
    alarms = [row for row in rows if isinstance(row, Alarm)]
    worst = max(alarms, key=lambda row: row.margin)
    of_trials = {kind: sum(getattr(trial, kind) for trial in trials) for kind in ("found", "placed", "named")}
    counts = {"planted": len(trials), **of_trials, "controls": len(alarms)}
    counts["accused"] = sum(row.false_alarm for row in alarms)
    return {
        "court": name,
        "seed": str(seed),
        "dtype": dtype,
        **{kind: str(counts[kind]) for kind in COUNTS},
        "unnamed": " ".join(trial.slug for trial in trials if not trial.named),
        "margin": f"{worst.margin:.3g}",
        "control": worst.slug,
    }


def render(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay the table of docs/tolerances.md out."""
    headings = ["model", "seed", "dtype", "planted", "found", "placed", "named first", "not named first"]
    headings += ["controls", "accused", "worst control"]
    return tables.markdown(headings, map(_line, rows))


def _line(row: Mapping[str, str]) -> list[str]:
    unnamed = ", ".join(f"`{slug}`" for slug in row["unnamed"].split()) or "-"
    worst = f"{row['margin']} `{row['control']}`"
    found = [row[kind] for kind in ("planted", "found", "placed", "named")]
    return [row["court"], row["seed"], row["dtype"], *found, unnamed, row["controls"], row["accused"], worst]


if __name__ == "__main__":
    main(sys.argv[1:])
