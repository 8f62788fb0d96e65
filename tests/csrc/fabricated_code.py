"""Instructions for the tests of what reads machine code, in the form of cuobjdump."""

from csrc import cuda_binary


def line(address, text):
    return f"        /*{address:04x}*/                   {text} ;    /* 0x0000000800440947 */\n"


def code_of(*texts):
    """Instructions at 0x00, 0x10, 0x20 ..."""
    return cuda_binary.sass.instructions(
        "".join(line(16 * i, text) for i, text in enumerate(texts))
    )
