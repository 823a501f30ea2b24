"""The flat binary: a file without any header, copied as it is to one place in guest memory.

What `objcopy -O binary` or `nasm -f bin` writes. Nothing in such a file tells its mode or its
addresses, so they come from `--mode`, `--load` and `--entry`. The defaults: long mode, loaded at
1 MiB as kernels are (below it lie a PC's own structures); in real mode 0x7C00, where a PC's
firmware puts a boot sector; and the first byte is the entry point.
"""

from __future__ import annotations

from pyvmm.boot.image import Image, ImageError, LoadOptions, Mode, Segment, check_entry

LOAD_GPA = {Mode.REAL: 0x7C00, Mode.PROTECTED: 0x100000, Mode.LONG: 0x100000}


def recognise(contents: bytes) -> bool:
    """Anything can be a flat binary, so this protocol is asked last."""
    return True


def load(name: str, contents: bytes, options: LoadOptions) -> Image:
    """The image of a flat binary. Raises ImageError when it does not fit where it is to go."""
    mode = Mode.LONG if options.mode is None else options.mode
    load_gpa = LOAD_GPA[mode] if options.load is None else options.load
    entry = load_gpa if options.entry is None else options.entry
    end_gpa = load_gpa + len(contents)
    if load_gpa < 0 or end_gpa > mode.reach_bytes:
        raise ImageError(
            f"{name}: {len(contents)} bytes loaded at {load_gpa:#x} do not fit below "
            f"{mode.reach_bytes:#x}, which is what {mode.value} mode can address at first; "
            "choose another --load or --mode"
        )
    image = Image(name, "flat binary", mode, entry, (Segment(load_gpa, contents, len(contents)),))
    check_entry(image)
    return image
