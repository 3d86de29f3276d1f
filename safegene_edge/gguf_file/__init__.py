"""GGUF files and ggml's tensor types.

reader   metadata and tensors, every size checked against the file
writer   a new file from arrays
values   metadata values as bytes, each in its type
rewrite  a file laid out anew, untouched parts copied byte for byte
kernels  ggml's own quantise and dequantise
"""

from __future__ import annotations

from .reader import MAGIC as MAGIC
from .reader import ArrayValue as ArrayValue
from .reader import GGUFFile as GGUFFile
from .reader import TensorInfo as TensorInfo
from .values import Scalar as Scalar
from .values import Value as Value
from .writer import write_gguf as write_gguf

__all__ = ["MAGIC", "ArrayValue", "GGUFFile", "Scalar", "TensorInfo", "Value", "write_gguf"]
