"""The processor that something was measured on."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Final

_ISA: Final = re.compile(
    r"avx2|avx512f|avx512bw|avx512_?vnni|avx_?vnni\w*|avx512_bf16|amx_\w+|fma|asimd\w*|i8mm|sve2?"
)
"""The instructions that decide how fast integers are multiplied, as Linux names them."""


def processor() -> dict[str, object]:
    """Its name as ``cpu`` and its instructions that matter as ``isa``; of Linux, else the name."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    name = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", told, re.MULTILINE)
    return {
        "cpu": name.group(1).strip() if name else platform.processor() or platform.machine(),
        "isa": sorted(flag for flag in flags.group(1).split() if _ISA.fullmatch(flag))
        if flags
        else [],
    }
