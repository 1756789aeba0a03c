"""Damage to checkpoints: bytes flipped, cut, doubled and replaced where headers, indexes and pickles are."""

import json
import random
import zipfile
from io import BytesIO
from typing import Any

__all__ = ["damage", "damage_json", "damage_zip"]

NUMBERS = (0, 1, -1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, True, None)
NAMES = ("../outside", "/etc/passwd", "", "..", "\0", "\x1b[2J", "\ud800", "x" * 5000, "a/b", "lm_head.weight")
VALUES: tuple[Any, ...] = (*NUMBERS, *NAMES, [], {}, [[]], {"a": {}}, "F4", "BF16", [0, 8])


def damage(data: bytes, rng: random.Random, within: int) -> bytes:
    """Change some of the first `within` bytes."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(within, max(len(raw), 1)))
        kind = rng.randrange(5)
        if kind == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del raw[at : at + rng.choice((1, 4, 50))]
        elif kind == 2:
            raw[at:at] = raw[at : at + rng.choice((1, 8, 100))]
        elif kind == 3:
            raw[at : at + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
        else:
            raw[at : at + 4] = bytes(rng.randrange(256) for _ in range(4))
    return bytes(raw)


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """Replace, drop, double or rename something inside a JSON object."""
    value = json.loads(text)
    node: Any = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
            node = node[key]
            continue
        kind = rng.randrange(4)
        if kind == 0 or isinstance(node, list):
            node[key] = rng.choice(VALUES)
        elif kind == 1:
            del node[key]
        elif kind == 2:
            node[rng.choice(NAMES)] = node.pop(key)
        else:
            node[rng.choice(keys)] = node[key]
        return json.dumps(value).encode()


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """Change a file of torch.save inside its pickle, keeping the zip whole."""
    source, target = zipfile.ZipFile(BytesIO(data)), BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            member = source.read(name)
            if name.endswith("data.pkl"):
                member = damage(member, rng, len(member))
            archive.writestr(name, member)
    return target.getvalue()
