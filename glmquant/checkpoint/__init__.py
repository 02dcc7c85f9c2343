"""Reading and writing checkpoint folders, one tensor's rows at a time."""

from .sink import ShardedSink, ShardLayout, TensorSink
from .source import TensorInfo, TensorSource, open_folder, torch_dtype

__all__ = [
    "ShardLayout",
    "ShardedSink",
    "TensorInfo",
    "TensorSink",
    "TensorSource",
    "open_folder",
    "torch_dtype",
]
