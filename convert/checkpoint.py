"""A checkpoint on disk, opened from its headers, and its views: the same weights as any layout has them.

Imports the standard library, NumPy, convert's tables and reader, and flax_mixtral.config.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.casting import rounded
from convert.diagnose import explain
from convert.errors import ConfigError, TensorMismatch
from convert.io.files import WeightFiles, find_weights, inside
from convert.io.json_strict import read_object
from convert.io.safetensors import Header, as_bits
from convert.layouts import LAYOUTS
from convert.memory import on_cache_line
from convert.mistral_params import read_params
from convert.recognise import Recognised, recognise
from convert.rules import Region, TensorSpec
from convert.transpose import contiguous
from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import MixtralConfig

__all__ = ["Checkpoint", "View"]

MOST_EXPERTS = 65536
"""In all layers together; the largest Mixtral has 448."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are known to fit its configuration; nothing but headers has been read."""

    path: Path
    config: MixtralConfig
    raw_config: dict[str, Any]
    """config.json as it is, or what a params.json says in its words."""
    files: WeightFiles
    contents: Recognised

    @classmethod
    def open(cls, path: str | Path, rope_theta: float | None = None) -> "Checkpoint":
        """Open a directory with config.json (or Mistral's params.json) and weights of any layout, or of several.

        Args:
            path: the directory.
            rope_theta: what a params.json without one leaves open.

        Raises:
            UnreadableCheckpoint: a file is missing, truncated or corrupt.
            ConfigError: config.json cannot be honoured.
            TensorMismatch: tensors are missing, unexpected, misshaped or there twice; the message lists all.
        """
        path = Path(path)
        raw_config = _raw_config(path, rope_theta)
        config = MixtralConfig.from_hf(raw_config)
        files = find_weights(path)
        _check_counts(config, len(files.headers), path)
        contents, wrong = recognise(config, files.headers)
        if wrong:
            raise TensorMismatch(explain(config, wrong, files.headers, str(path)))
        checkpoint = cls(path, config, raw_config, files, contents)
        checkpoint._check_tied_copies()
        return checkpoint

    @classmethod
    def of_arrays(cls, config: MixtralConfig, arrays: Mapping[str, NDArray[Any]], what: str = "arrays") -> "Checkpoint":
        """See arrays in memory as a checkpoint: weights, or anything else that has one value for each of them.

        Args:
            config: the model that they belong to.
            arrays: by the names, and in the shapes, of any layout or of several.
            what: how an error calls them.

        Raises:
            TensorMismatch: as `open`.
        """
        files = WeightFiles.of_arrays(arrays)
        contents, wrong = recognise(config, files.headers)
        if wrong:
            raise TensorMismatch(explain(config, wrong, files.headers, what))
        return cls(Path(what), config, config.to_hf(), files, contents)

    @property
    def layout(self) -> str:
        """The layout of all tensors, or "mixed"."""
        return next(iter(self.contents.layouts), "mixed")

    @property
    def headers(self) -> Mapping[str, Header]:
        """Dtype and shape of every tensor as stored."""
        return self.files.headers

    @property
    def notes(self) -> tuple[str, ...]:
        """What is in the files and is left out of every view, and why."""
        tied = (
            f"{name} has the same bytes as the embedding, which tie_word_embeddings makes the head: left out"
            for name in self.contents.tied_copies
        )
        buffers = (f"{name} is no parameter, config.json gives it: left out" for name in self.contents.buffers)
        copies = (f"{name}: another copy of the weights, left out" for name in self.files.passed_over)
        return (*tied, *buffers, *copies)

    def view(self, layout: str) -> "View":
        """See the checkpoint in a layout: "flax", "hf-legacy", "hf-fused", "mistral" or "mistral-stacked".

        Raises:
            ValueError: there is no such layout.
            TensorMismatch: the layout has no place for some of the parameters.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"no layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
        if lacking := LAYOUTS[layout].lacks(self.config):
            raise TensorMismatch(f"{self.path}: the layout {layout} has no place for {', '.join(lacking[:8])}")
        return View(self, layout)

    def stored(self, name: str) -> NDArray[Any]:
        """Give a tensor as it is stored: a read-only view of the mapped file."""
        return self.files.reader(name)[name]

    def will_need(self, array: NDArray[Any]) -> None:
        """Have the system read ahead what an array shows, if it is a view of a file."""
        for reader in self.files.readers.values():
            reader.will_need(array)

    def release(self, array: NDArray[Any]) -> None:
        """Give back the memory that an array shows, if it is a view of a file."""
        for reader in self.files.readers.values():
            reader.release(array)

    def _check_tied_copies(self) -> None:
        sizes = axis_sizes(self.config)
        for name, spec in self.contents.tied_copies.items():
            head_DV = spec.pattern.apply(self.stored(name), sizes)
            tied, place = self.contents.atoms[next(atom for atom in self.contents.atoms if "embed_tokens" in atom.path)]
            embedding_VD = place.pattern.apply(self.stored(tied), sizes)
            if head_DV.dtype != embedding_VD.dtype or not np.array_equal(as_bits(head_DV.T), as_bits(embedding_VD)):
                raise TensorMismatch(
                    f"{self.path}: config.json ties the head to the embedding, but {name} differs from {tied}\n"
                    "  likely cause: tie_word_embeddings should be false"
                )


def _raw_config(path: Path, rope_theta: float | None) -> dict[str, Any]:
    if not (path / "config.json").exists() and (path / "params.json").exists():
        return read_params(read_object(inside(path, "params.json")), rope_theta)
    if rope_theta is not None:
        raise ConfigError(f"{path}: rope_theta can be given where params.json is all there is; config.json has its own")
    return read_object(inside(path, "config.json"))


def _check_counts(config: MixtralConfig, tensors: int, path: Path) -> None:
    """Refuse counts that cannot be true before anything is listed by them."""
    layers, experts = config.num_hidden_layers, config.num_local_experts
    if layers > tensors or layers * experts > MOST_EXPERTS:
        raise TensorMismatch(
            f"{path}: config.json says num_hidden_layers = {layers} and num_local_experts = {experts}; the "
            f"checkpoint has {tensors} tensors, and at most {MOST_EXPERTS:,} experts in all layers are understood"
        )


@dataclass(frozen=True)
class View(Mapping[str, NDArray[Any]]):
    """A checkpoint in one layout: a mapping from tensor names to arrays, each read and rearranged on access."""

    checkpoint: Checkpoint
    layout: str

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor's name, shape and regions, in order."""
        return LAYOUTS[self.layout].tensors(self.checkpoint.config)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return axis_sizes(self.checkpoint.config)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape."""
        return self.specs[name].shape

    def sources(self, name: str) -> dict[str, np.dtype[Any]]:
        """Give the stored tensors that a tensor is made of, with their dtypes."""
        stored = (self.checkpoint.contents.atoms[region.atom][0] for region in self.specs[name].regions)
        return {source: self.checkpoint.headers[source].dtype for source in stored}

    def dtype(self, name: str) -> np.dtype[Any]:
        """Give a tensor's dtype.

        Raises:
            TensorMismatch: it is made of tensors of several dtypes, and no dtype holds them as they are.
        """
        dtypes = {dtype: source for source, dtype in self.sources(name).items()}
        if len(dtypes) > 1:
            parts = ", ".join(f"{source} is {dtype}" for dtype, source in dtypes.items())
            raise TensorMismatch(f"{name} is made of tensors of different dtypes: {parts}; ask for a cast with a dtype")
        return next(iter(dtypes))

    def pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """Give a tensor as the parts that follow each other in it, one expert's at a time where it is stacked."""
        for region in self.specs[name].regions:
            piece = self._piece(region)
            self.checkpoint.will_need(piece)
            yield piece

    def release(self, name: str, piece: NDArray[Any] | None = None) -> None:
        """Give back the memory of the files' pages that a piece of a tensor shows, or all that it is made of."""
        if piece is not None:
            self.checkpoint.release(piece)
            return
        for source in self.sources(name):
            self.checkpoint.release(self.checkpoint.stored(source))

    def mapped(self, name: str) -> NDArray[Any] | None:
        """Give a tensor as a view of its file, its axes in any order; None where it is put together from several."""
        spec = self.specs[name]
        if self.checkpoint.contents.specs.get(name) == spec:
            return self.checkpoint.stored(name)
        if len(spec.regions) == 1:
            return self._piece(spec.regions[0]).reshape(spec.shape)  # one expert alone comes without its axis
        return None

    def __getitem__(self, name: str) -> NDArray[Any]:
        mapped = self.mapped(name)
        if mapped is not None:
            return mapped
        whole = np.empty(self.shape(name), self.dtype(name))
        flat, start = whole.reshape(-1), 0
        for piece in self.pieces(name):
            contiguous(piece, flat[start : start + piece.size].view(np.uint8))
            start += piece.size
        return whole

    @contextmanager
    def part(
        self, name: str, index: tuple[slice, ...] = (), dtype: np.dtype[Any] | None = None
    ) -> Iterator[NDArray[Any]]:
        """Give a slice of a tensor of the flax layout for as long as the context lasts.

        It is a view of the file, its axes in any order of memory, where that has it in one piece, and else put together
        on a cache line. The file's pages that it was made of are given back.

        Args:
            name: the tensor.
            index: one slice for each of the first axes; of a stacked tensor, only the experts in the slice are read.
            dtype: to cast to; None to leave every value as it is.
        """
        shown = self._shown(name, index)
        if len(shown) > 1:
            yield _joined(
                (piece for one in shown for piece in self._read(one, dtype)), shown, dtype or self.dtype(name)
            )
        else:
            yield from self._read(shown[0], dtype)

    def _shown(self, name: str, index: tuple[slice, ...]) -> list[NDArray[Any]]:
        """Give a slice as views of the files that follow each other along the first axis."""
        mapped = self.mapped(name)
        if mapped is not None:
            return [mapped[index]]
        regions = self.specs[name].regions
        assert len(regions) == self.shape(name)[0], f"{name} is not stacked along its first axis"
        experts, rest = (index[0], index[1:]) if index else (slice(None), ())
        return [self._piece(region)[rest][None] for region in regions[experts]]

    def _read(self, shown: NDArray[Any], dtype: np.dtype[Any] | None) -> Iterator[NDArray[Any]]:
        self.checkpoint.will_need(shown)
        try:
            yield shown if dtype is None else rounded(shown, dtype)
        finally:
            self.checkpoint.release(shown)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _piece(self, region: Region) -> NDArray[Any]:
        source, place = self.checkpoint.contents.atoms[region.atom]
        stored = self.checkpoint.stored(source)
        leaf = place.pattern.apply(stored, self._sizes, place.fixed)
        piece: NDArray[Any] = region.restore.apply(leaf, self._sizes)
        return piece


def _joined(pieces: Iterable[NDArray[Any]], like: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Put pieces that follow each other along the first axis into one array, which begins on a cache line."""
    shape = (sum(map(len, like)), *like[0].shape[1:])
    whole, start = on_cache_line(math.prod(shape) * dtype.itemsize), 0
    for piece in pieces:
        contiguous(piece, whole[start : start + piece.nbytes])
        start += piece.nbytes
    return whole.view(dtype).reshape(shape)
