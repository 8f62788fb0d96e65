"""Makes Triton's interpreter two to three times as fast, with the same results bit for bit.

A kernel's few hundred operations on tiles of 16 x 16 are small work for numpy; most of the time of
an interpreted kernel goes to what Triton does again at each of them and what is the same each time:

- before each call of a device function, all members of `triton.language` are listed, to replace
  those that build IR by those that compute;
- each tile's type checks the tile's shape and writes its own name;
- each tile wraps its shape in constexprs;
- each conversion makes the table of numpy's dtypes.

Here each of these is done once for each function, shape or dtype. This is the one place of the
tests that reaches into Triton's insides, seen to work with Triton 3.6 to 3.8;
tests/test_quick_interpreter.py compares with the interpreter as it is.
BERTKERN_PLAIN_INTERPRETER=1 leaves that as it is.
"""

import os
from typing import Any

from triton.language import core
from triton.runtime import interpreter

PLAIN = os.environ.get("BERTKERN_PLAIN_INTERPRETER") == "1"


def _replace_language_once() -> None:
    """The language's functions stay replaced once a function has been called."""
    replace, replaced = interpreter._patch_lang, set()

    def patch_lang(function: Any) -> interpreter._LangPatchScope:
        if function not in replaced:
            replace(function)
            replaced.add(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


def _remember_numpy_dtypes() -> None:
    look_up, known = interpreter._get_np_dtype, {}

    def get_np_dtype(type: core.dtype) -> Any:
        scalar = type.scalar
        if scalar.is_ptr():
            return look_up(scalar)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def _remember_shapes() -> None:
    """Of types, and of the tiles that have them."""
    new_type, types = core.block_type.__init__, {}
    new_tile, tiles = core.tensor.__init__, {}

    def type_init(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
        sizes = tuple([n.value if type(n) is core.constexpr else n for n in shape])
        if sizes not in types:
            new_type(self, element_ty, shape)
            types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = types[sizes]
        self.name = f"<{text}, {element_ty}>"

    def tile_init(self: core.tensor, handle: Any, type: core.dtype) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in tiles:
            new_tile(self, handle, type)
            tiles[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tiles[sizes]

    core.block_type.__init__ = type_init
    core.tensor.__init__ = tile_init


def install() -> None:
    """To be called once, before the first kernel runs."""
    if not PLAIN:
        _replace_language_once()
        _remember_numpy_dtypes()
        _remember_shapes()
