"""The compiled CPU kernel: `sampled_product.cpp`, which the machine's C++ compiler builds on first use.

Every process that trains builds it in a temporary folder, in well under a second. So no file remains, and no process
loads a kernel that was built for another processor. Without a compiler, PyTorch alone computes the product.
"""

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from peft_fps.sparse.kernels.switches import is_switched_on
from peft_fps.sparse.structure import Structure


logger = logging.getLogger(__name__)

SWITCH = "PEFT_FPS_CPU_KERNEL"
SOURCE = Path(__file__).with_name("sampled_product.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
FUNCTIONS = {torch.float32: "sampled_product_float32", torch.bfloat16: "sampled_product_bfloat16"}
ARGUMENTS = [*(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64) * 2, *(ctypes.c_void_p,) * 5, *(ctypes.c_int64,) * 2]


def fits(grad_output: Tensor, inputs: Tensor, structure: Structure) -> bool:
    """Whether the kernel takes these operands, is switched on, and could be built; arguments as `sampled_product`."""
    return (
        grad_output.device.type == "cpu"
        and grad_output.dtype in FUNCTIONS
        and inputs.dtype == grad_output.dtype
        and structure.row_starts.dtype == torch.int32
        and is_switched_on(SWITCH)
        and library() is not None
    )


@cache
def library() -> ctypes.CDLL | None:
    """Build and load the kernel, once per process.

    The compiler is `CXX` of the environment, or else the first of c++, g++ and clang++.

    Returns:
        The kernel, or None if it cannot be built. The log says why, at level DEBUG.
    """
    installed = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ([installed] if installed else [])
        if not compiler:
            raise FileNotFoundError("no C++ compiler found")
        with tempfile.TemporaryDirectory(prefix="peft_fps_") as folder:
            built = Path(folder) / "sampled_product.so"
            command = [*compiler, *FLAGS, "-o", str(built), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            loaded = ctypes.CDLL(str(built))
            for name in FUNCTIONS.values():
                function = getattr(loaded, name)
                function.argtypes, function.restype = ARGUMENTS, None
    except (OSError, ValueError, subprocess.SubprocessError, AttributeError) as error:  # ValueError: of shlex
        logger.debug("the CPU kernel could not be built, gradients are computed by PyTorch alone: %s", error)
        return None
    return loaded


def sampled_product(grad_output: Tensor, inputs: Tensor, structure: Structure) -> tuple[Tensor, Tensor]:
    """Return `(grad_outputᵀ @ inputs)` at the selected entries, and the sums of `grad_output` over the tokens.

    Args:
        grad_output: `(tokens, neurons)` float32 or bfloat16.
        inputs: in the same dtype; `(tokens, used)`, the columns `structure.union`, or `(tokens, inputs)`, all columns.
        structure: where the selected entries lie.

    Returns:
        `(nnz,)` and `(neurons,)`, both summed in float32.
    """
    loaded = library()
    assert loaded is not None
    grad_output, inputs = _with_unit_stride(grad_output), _with_unit_stride(inputs)
    tokens, neurons = grad_output.shape
    used = structure.union.numel()
    result = torch.empty(structure.positions.numel(), dtype=torch.float32, device="cpu")
    sums = torch.empty(neurons, dtype=torch.float32, device="cpu")
    getattr(loaded, FUNCTIONS[grad_output.dtype])(
        grad_output.data_ptr(),
        grad_output.stride(0),
        neurons,
        inputs.data_ptr(),
        inputs.stride(0),
        used,
        None if inputs.shape[1] == used else structure.union.data_ptr(),
        structure.row_starts.data_ptr(),
        structure.union_positions.data_ptr(),
        result.data_ptr(),
        sums.data_ptr(),
        tokens,
        max(min(torch.get_num_threads(), tokens // 64), 1),
    )
    return result, sums


def _with_unit_stride(matrix: Tensor) -> Tensor:
    """Return the matrix itself if the elements of a row are adjacent, else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
