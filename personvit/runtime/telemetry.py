"""Power, memory, clocks and temperature of a GPU, read through NVML; quietly absent where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class GpuSample:
    """One reading of a GPU. A value that the device does not report is None."""

    power_w: float | None
    """Watts."""
    power_limit_w: float | None
    """Watts."""
    memory_used_mib: float | None
    """MiB in use by all processes."""
    memory_total_mib: float | None
    """MiB."""
    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    temperature_c: float | None
    """Degrees Celsius."""
    utilization: float | None
    """Share of the last sample period in which a kernel ran, 0 to 1."""

    def as_row(self) -> dict[str, float]:
        """The values that are known, by name, for a metrics row."""
        return {f"gpu_{name}": float(value) for name, value in vars(self).items() if value is not None}


class GpuTelemetry:
    """Reads one GPU.

    Args:
        device: index as torch counts it (CUDA_VISIBLE_DEVICES applied).
    """

    def __init__(self, device: int = 0) -> None:
        self.reason: str | None = None
        """Why there is nothing to read; None if there is."""
        self._handle: Any = None
        try:
            import pynvml

            self._nvml = pynvml
            pynvml.nvmlInit()
            if not torch.cuda.is_available():
                self.reason = "no CUDA device is visible to torch"
                return
            # NVML counts all GPUs of the machine, torch the visible ones: the UUID is what both agree on.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except ImportError:
            self.reason = "the package nvidia-ml-py is not installed"
        except Exception as error:  # NVML's errors are made at run time, one class per code
            self.reason = str(error)

    def sample(self) -> GpuSample | None:
        """One reading, in well under a millisecond; None where there is nothing to read (see `reason`)."""
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        utilization = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        return GpuSample(
            power_w=_scaled(self._ask(nvml.nvmlDeviceGetPowerUsage, handle), 1e-3),
            power_limit_w=_scaled(self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle), 1e-3),
            memory_used_mib=None if memory is None else memory.used / MIB,
            memory_total_mib=None if memory is None else memory.total / MIB,
            sm_clock_mhz=_scaled(self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM), 1),
            memory_clock_mhz=_scaled(self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM), 1),
            temperature_c=_scaled(self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU), 1),
            utilization=None if utilization is None else utilization.gpu / 100,
        )

    def _ask(self, query: Any, *args: Any) -> Any:
        try:
            return query(*args)
        except self._nvml.NVMLError:
            return None  # virtual and integrated GPUs do not report everything


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
