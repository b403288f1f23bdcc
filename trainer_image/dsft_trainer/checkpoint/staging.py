"""Copies of live state in host memory, taken at a step boundary and written to files later.

A snapshot is what `torch.save` would have written at that moment: everything but tensors goes through pickle, so an object
that training changes (a loss scaler, a scheduler) is frozen too, and each tensor is copied once, however often it occurs. The
copies live in buffers that the next snapshot uses again: memory is touched for the first time once per run, and pinned on a
GPU, where the copies of all tensors overlap.
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Buffers:
    """Host memory of one rank's snapshots: the tensors of the one before are overwritten by the next."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype, bool], list[torch.Tensor]] = {}
        self._taken: list[torch.Tensor] = []

    def reuse(self) -> None:
        """Declare that nobody needs the copies made so far."""
        for buffer in self._taken:
            self._free.setdefault(_kind(buffer, pinned=buffer.is_pinned()), []).append(buffer)
        self._taken = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, complete after `finish`."""
        on_gpu = tensor.device.type == "cuda"
        free = self._free.get(_kind(tensor, pinned=on_gpu))
        buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._taken.append(buffer)
        buffer.copy_(tensor.detach(), non_blocking=on_gpu)
        return buffer

    def finish(self) -> None:
        """Wait for the copies, and let go of buffers that no tensor fits any more."""
        self._free = {}
        if any(buffer.is_pinned() for buffer in self._taken):
            torch.cuda.synchronize()


def _kind(tensor: torch.Tensor, *, pinned: bool) -> tuple[torch.Size, torch.dtype, bool]:
    return (tensor.shape, tensor.dtype, pinned)


@dataclass(frozen=True)
class Snapshot:
    """One object as it was: its pickle, and the tensors that it refers to by number."""

    structure: bytes
    tensors: tuple[torch.Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @staticmethod
    def of(state: Any, buffers: Buffers) -> "Snapshot":
        """Take it; its tensors are whole after `buffers.finish()`."""
        structure = io.BytesIO()
        pickler = _Pickler(structure, buffers)
        pickler.dump(state)
        return Snapshot(structure.getvalue(), tuple(pickler.copies))

    def write(self, path: Path) -> None:
        """Write it as `torch.save` writes the object."""
        unpickler = _Unpickler(io.BytesIO(self.structure), self.tensors)
        torch.save(unpickler.load(), path)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, buffers: Buffers) -> None:
        super().__init__(stream)
        self.copies: list[torch.Tensor] = []
        # The tensors are held, so that no other one can get the id of one that is gone.
        self._seen: dict[int, tuple[int, torch.Tensor]] = {}
        self._buffers = buffers

    def persistent_id(self, obj: Any) -> tuple[int, bool, bool] | None:
        """Tensors are copied and referred to by number, with whether it is a parameter and wants a gradient."""
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._seen:
            self._seen[id(obj)] = (len(self.copies), obj)
            self.copies.append(self._buffers.copy(obj))
        return (self._seen[id(obj)][0], isinstance(obj, torch.nn.Parameter), obj.requires_grad)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, pid: tuple[int, bool, bool]) -> torch.Tensor:
        number, is_parameter, wants_gradient = pid
        tensor = self._tensors[number].detach()
        return torch.nn.Parameter(tensor, wants_gradient) if is_parameter else tensor.requires_grad_(wants_gradient)


@dataclass(frozen=True)
class StagedFiles:
    """The files of one rank's checkpoint, in memory. May be written more than once."""

    files: Mapping[str, Snapshot]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(snapshot.size for snapshot in self.files.values())

    def write(self, folder: Path) -> None:
        """Write all files below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, snapshot in self.files.items():
            snapshot.write(folder / name)
