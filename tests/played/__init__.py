"""A CUDA device that is played on the CPU with real values, so that the code for GPUs runs where there is none.

After :func:`install`, ``torch.device("cuda", i)`` works on a CPU build of torch, in this process:

* Its tensors are plain ``torch.Tensor`` objects of the CUDA dispatch key over host memory, so types, storages, views,
  versions, parameters and ``data_ptr()`` behave as on a GPU.
* Every operator without a kernel for CUDA comes to one Python function, which checks devices and generators as CUDA
  does, runs the CPU's kernel on the same memory, and records operators at which the host would wait.
* It counts the memory of each device, and refuses more than a limit with ``torch.OutOfMemoryError``.

It is not a model of speed. It cannot show kernels or dtypes that CUDA lacks, rounding on a GPU, fragmented memory, or
races between streams, as everything happens in order.
"""

from .installed import install
from .record import RECORD, Memory, Record, Wait
from .tags import on_device, on_host

__all__ = ["RECORD", "Memory", "Record", "Wait", "install", "on_device", "on_host"]
