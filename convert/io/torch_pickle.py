"""The pickle of torch.save, run as data: a table of opcodes, a few names that stand for tensors, and nothing else.

A pickle is a program; Python's own unpickler, even with a list of allowed names, can be made to take all memory or
time. Here nothing is imported or called, and what is not in the tables is refused by name.
Source: torch 2.13, _weights_only_unpickler.py. Imports the standard library, NumPy, ml_dtypes and convert's errors.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.errors import UnreadableCheckpoint

__all__ = ["StoredTensor", "read_state_dict"]

MAX_OPCODES = 400_000
"""A tensor takes some 30; the largest published Mixtral has 1,739 tensors."""

STORAGES: dict[str, np.dtype[Any]] = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}


class StoredTensor(NamedTuple):
    """A tensor as a view of a storage, which is a member of the zip."""

    dtype: np.dtype[Any]
    key: str
    storage_numel: int
    offset: int
    """In elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


class _Storage(NamedTuple):
    dtype: np.dtype[Any]
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Name:
    """A global of the pickle: "module name"."""

    text: str


class _Refused(Exception):  # becomes an UnreadableCheckpoint with the file's name
    """What is wrong with the pickle."""


def read_state_dict(data: bytes, where: str) -> dict[str, StoredTensor]:
    """Read a dictionary from names to tensors.

    Args:
        data: the pickle.
        where: opens the message of a failure.

    Raises:
        UnreadableCheckpoint: it is no pickle, or makes anything but tensors.
    """
    try:
        found = _Machine().run(data)
    except _Refused as error:
        raise UnreadableCheckpoint(f"{where}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        # pickletools raises several of these; the machine's own stack and memo the rest.
        raise UnreadableCheckpoint(f"{where}: corrupt pickle: {str(error)[:100]}") from error
    if not isinstance(found, dict):
        raise UnreadableCheckpoint(f"{where}: holds a {type(found).__name__}, expected a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not name.isprintable():
            raise UnreadableCheckpoint(f"{where}: key {str(name)[:80]!r} is no name of a tensor")
        if not isinstance(value, StoredTensor):
            raise UnreadableCheckpoint(
                f"{where}: {name[:200]!r} is a {type(value).__name__.strip('_').lower()}, expected a tensor; save the "
                "model's state_dict alone"
            )
    return found


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in OPCODES or count > MAX_OPCODES:
                raise _Refused(f"the pickle uses {opcode.name}, which no dictionary of tensors needs")
            OPCODES[opcode.name](self, argument)
        raise _Refused("the pickle has no end")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise _Refused("the pickle takes more from its stack than there is")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(type(key) in (str, int) for key in items[::2]):
            raise _Refused("the pickle fills something that is no dictionary with plain keys")
        target.update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Refused("the pickle appends to something that is no list")
        self.stack[-1].extend(items)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Refused("the pickle asks for a name that is no text")
        self.stack.append(_allowed(f"{module} {name}"))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or function.text not in CALLS or not isinstance(arguments, tuple):
            raise _Refused(f"the pickle calls {str(getattr(function, 'text', type(function).__name__))[:100]!r}")
        self.stack.append(CALLS[function.text](arguments))

    def persistent_load(self) -> None:
        kind, storage, key, _location, numel = self.stack.pop()
        dtype = STORAGES.get(storage.text)
        if kind != "storage" or dtype is None or not isinstance(key, str) or not _is_count(numel):
            raise _Refused("the pickle refers to something that is no storage")
        self.stack.append(_Storage(dtype, key, numel))

    def build(self) -> None:
        """Drop attributes of a state_dict (`_metadata`: versions of modules)."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _Refused("the pickle sets attributes of something that is no dictionary")


def _allowed(name: str) -> _Name:
    if name not in CALLS and name not in STORAGES:
        raise _Refused(f"the pickle asks for {name[:100]!r}, which is no tensor; nothing was run")
    return _Name(name)


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, strides = arguments[:4]
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(map(_is_count, numbers)) or len(shape) != len(strides):
        raise _Refused("the pickle builds a tensor from something else than a storage, shape and strides")
    if len(shape) > 32 or any(arguments[6:]):
        raise _Refused("a tensor has more dimensions than any, or is conjugated or negated lazily")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.numel or (math.prod(shape) and last >= storage.numel):
        raise _Refused(f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.numel} elements")
    return StoredTensor(storage.dtype, storage.key, storage.numel, offset, tuple(shape), tuple(strides))


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if not arguments or not isinstance(arguments[0], StoredTensor):
        raise _Refused("the pickle builds a parameter from something that is no tensor")
    return arguments[0]


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62


CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections OrderedDict": lambda arguments: {},
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}

OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, a: None),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), lambda m, a: m.stack.append(a)),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda m, a: m.stack.append(a)),
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "SETITEM": lambda m, a: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, a: m.set_items(m.since_mark()),
    "APPEND": lambda m, a: m.append([m.stack.pop()]),
    "APPENDS": lambda m, a: m.append(m.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, a: m.memo.update({a: m.stack[-1]})),
    "MEMOIZE": lambda m, a: m.memo.update({len(m.memo): m.stack[-1]}),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, a: m.stack.append(m.memo[a])),
    "GLOBAL": lambda m, a: m.stack.append(_allowed(a)),
    "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "BINPERSID": lambda m, a: m.persistent_load(),
    "REDUCE": lambda m, a: m.reduce(),
    "BUILD": lambda m, a: m.build(),
}
