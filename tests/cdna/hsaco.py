"""A code object's bytes as the assembly that asm.py reads, through llvm-objdump."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.cdna.asm import Kernel, parse

TOOLS = ("llvm-objdump", *(f"llvm-objdump-{version}" for version in range(30, 18, -1)))
SYMBOL_TABLES = (2, 11)


@cache
def objdump() -> str | None:
    """An llvm-objdump that knows gfx950: from LLVM 19 on. Triton's wheels have none."""
    for tool in filter(shutil.which, TOOLS):
        version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
        if (found := re.search(r"LLVM version (\d+)", version)) and int(found[1]) >= 19:
            return tool
    return None


def disassemble(code: bytes, name: str, arch: str) -> Kernel:
    tool = objdump()
    assert tool is not None
    flags = ["--symbolize-operands", "--no-leading-addr", "--no-show-raw-insn", f"--mcpu={arch}"]
    with tempfile.NamedTemporaryFile(suffix=".hsaco") as file:
        Path(file.name).write_bytes(code)
        command = [tool, "-d", *flags, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"^(?:[0-9a-f]+ )?<([\w.$]+)>:", r"\1:", text, flags=re.M)
    directives = [f".amdhsa_{key} {value}" for key, value in descriptor(code, name).items()]
    return parse("\n".join([text, *directives]), name)


def descriptor(code: bytes, name: str) -> dict[str, int]:
    """The 64 bytes at `name`.kd, under the names of the assembler's directives."""
    at = _symbol(code, f"{name}.kd")
    lds, scratch, kernargs = struct.unpack_from("<III", code, at)
    rsrc3, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", code, at + 44)
    return {
        "group_segment_fixed_size": lds,
        "private_segment_fixed_size": scratch,
        "kernarg_size": kernargs,
        "next_free_vgpr": ((rsrc1 & 63) + 1) * 8,
        "accum_offset": ((rsrc3 & 63) + 1) * 4,
        "user_sgpr_count": rsrc2 >> 1 & 31,
        **{f"system_sgpr_workgroup_id_{axis}": rsrc2 >> 7 + k & 1 for k, axis in enumerate("xyz")},
        "user_sgpr_private_segment_buffer": properties & 1,
        "user_sgpr_dispatch_ptr": properties >> 1 & 1,
        "user_sgpr_queue_ptr": properties >> 2 & 1,
        "user_sgpr_kernarg_segment_ptr": properties >> 3 & 1,
        "user_sgpr_dispatch_id": properties >> 4 & 1,
        "user_sgpr_private_segment_size": properties >> 6 & 1,
        "user_sgpr_kernarg_preload_length": preload & 127,
        "user_sgpr_kernarg_preload_offset": preload >> 7,
    }


def _symbol(code: bytes, name: str) -> int:
    """Where in the file an ELF symbol's bytes are."""
    (start,) = struct.unpack_from("<Q", code, 0x28)
    size, count = struct.unpack_from("<HH", code, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, start + k * size) for k in range(count)]
    for section in sections:
        if section[1] not in SYMBOL_TABLES:
            continue
        names = sections[section[6]][4]
        for k in range(section[5] // section[9]):
            entry = struct.unpack_from("<IBBHQQ", code, section[4] + k * section[9])
            first = names + entry[0]
            if code[first : code.index(b"\0", first)].decode() == name:
                home = sections[entry[3]]
                return int(home[4] + entry[4] - home[3])
    raise KeyError(f"no symbol {name} in this code object")
