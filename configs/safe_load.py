"""Checkpoints are read without running code: DCP's metadata and byte entries are unpickled by lists of what they hold.

PyTorch's distributed checkpoints (DCP) keep a pickle, `.metadata`, and pickled values beside the tensors. A pickle can
call any function when it is read, so a checkpoint from somebody else could run code. DCP has no option for that: its
reader's `pickle.load` is replaced by an unpickler that knows DCP's own classes alone, and its planner's `torch.load` by
one with `weights_only`, which knows tensors and plain values. configs/titan.py imports this before anything is read.
"""

import enum
import io
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from configs.errors import ConfigError

# What a `.metadata` file holds, by module and name.
CLASSES = {
    *((metadata.__name__, name) for name in metadata.__all__),
    (metadata.__name__, "_MEM_FORMAT_ENCODING"),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}
DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}


def _refused(name: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint's .metadata names {name}, which no checkpoint needs: it is not read, since it could run code. "
        "Use a checkpoint from a source that you trust"
    )


def _member(owner: Any, name: Any) -> enum.Enum:
    """What a call of `getattr` in a pickle is for: Python 3.11.0 to 3.11.3 writes members of enumerations so."""
    if isinstance(owner, enum.EnumMeta) and isinstance(name, str) and name in owner.__members__:
        return owner[name]
    raise _refused("builtins.getattr")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in CLASSES or (module == "torch" and name in DTYPES):
            return super().find_class(module, name)
        raise _refused(f"{module}.{name}")


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and their lists and dicts; raises pickle.UnpicklingError at anything that has a name."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Pickle:
    """The module `pickle` as DCP's reader and writer use it."""

    dump = staticmethod(pickle.dump)

    @staticmethod
    def load(file: IO[bytes]) -> Any:
        return _Unpickler(file).load()


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes` with plain values alone."""
    key = read_item.dest_index.fqn
    try:
        loaded = torch.load(value, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"the checkpoint's {key} holds more than tensors and plain values: it is not read, since it could run "
            "code. Use a checkpoint from a source that you trust"
        ) from error
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


filesystem.pickle = _Pickle  # type: ignore[attr-defined, assignment]
DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
