"""Ask the NVIDIA driver for its version, without torch and without starting CUDA."""

import ctypes


def cuda_driver_version(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """The newest CUDA version (major, minor) the driver supports; None where there is no driver.

    Source: CUDA driver API, cuDriverGetVersion (1000·major + 10·minor; callable before cuInit).
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    found = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(found)) != 0:
        return None
    return found.value // 1000, found.value % 1000 // 10
