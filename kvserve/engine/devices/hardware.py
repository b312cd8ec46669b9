# SPDX-License-Identifier: Apache-2.0
"""What differs between a CPU and a GPU: kernels and staging.

The GPU's part imports Triton, which a CPU need not have.
"""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.devices.cpu import CPUDevice
from kvserve.engine.devices.cpu_converting import ConvertingCPUDevice
from kvserve.engine.devices.device import Device
from kvserve.engine.devices.staging import HostStaging, Staging
from kvserve.engine.spec import HeadPagedSpec
from kvserve.errors import UserError
from kvserve.kernels import native
from kvserve.kernels.page_formats import PageFormat, plain


def has_gpu() -> bool:
    """Tell whether pages lie on a GPU."""
    return not current_platform.is_cpu()


def uses_triton() -> bool:
    """Tell whose kernels run. Tests let Triton's interpreter run a GPU's on a CPU."""
    return has_gpu()


def takes_fp8() -> bool:
    """Tell whether kernels can write and read fp8 here: GPUs can since 8.9 (Ada)."""
    return not has_gpu() or current_platform.has_device_capability(89)


def attention_slot() -> AttentionBackendEnum:
    """Name the backend that ours stands in for while a model loads.

    vLLM's CPU platform asks for one backend alone; CUDA's takes any that is named.
    """
    if has_gpu():
        return AttentionBackendEnum.CUSTOM
    return AttentionBackendEnum.CPU_ATTN


def cpu_kernels(
    page_format: PageFormat | None,
    dtype: torch.dtype,
    group_size: int,
    head_size: int,
    page_size: int,
    gaps: bool = False,
) -> CPUDevice:
    """Make what writes and reads pages of a format, or of the model's ``dtype``.

    Args:
        gaps: rows may hide keys from their queries, which vLLM's kernel cannot.

    Raises:
        UserError: our kernels do not serve here, and must.
    """
    shape = dtype, group_size, head_size, page_size
    if gaps:
        _require_own_kernels(dtype, head_size, page_size)
    if page_format is None:
        kernels = CPUDevice(*shape)
        if kernels.supports_gaps or not gaps:
            return kernels
        # Pages are laid out for vLLM's kernel here, unless ours write them too.
        page_format = plain(dtype)
    return ConvertingCPUDevice(page_format, *shape)


def _require_own_kernels(dtype: torch.dtype, head_size: int, page_size: int) -> None:
    """Refuse what our kernels on CPUs do not take, and say what they ask for."""
    if native.can_attend(dtype, head_size, page_size):
        return
    if dtype == torch.float16:
        missing = "a model in another type than float16: give --dtype bfloat16"
    elif head_size % native.WIDTH_STEP:
        missing = f"heads of a multiple of {native.WIDTH_STEP} numbers, not {head_size}"
    else:
        missing = "a C++ compiler: install g++"
    raise UserError(
        "--policy: it keeps packed history, which only kernels of ours read, and they "
        f"need {missing}; or choose --policy retrieval"
    )


def kernels_and_staging(
    spec: HeadPagedSpec,
    page_format: PageFormat | None,
    dtype: torch.dtype,
    group_size: int,
    tables: PageTables,
    device: torch.device,
    gaps: bool = False,
) -> tuple[Device, Staging]:
    """Make what runs on the device, and what brings a step's rows there.

    Args:
        page_format: what pages hold; ``None``: the model's ``dtype``.
        group_size: query heads that share a KV head.
        tables: of the batch.
        gaps: whether ``RowShapes`` may have any.
    """
    if not uses_triton():
        shape = group_size, spec.head_size, spec.block_size
        kernels = cpu_kernels(page_format, dtype, *shape, gaps=gaps)
        return kernels, HostStaging(kernels)
    from kvserve.engine.devices.gpu import TritonDevice
    from kvserve.engine.devices.gpu_staging import DeviceStaging
    from kvserve.engine.devices.mirror import TableMirror

    on_gpu = TritonDevice(device, group_size, page_format)
    mirror = TableMirror(tables, device)
    return on_gpu, DeviceStaging(on_gpu, mirror, spec.block_size, gaps)
