"""Random choices of one fuzz case, all of them functions of (op, case number).

A case's structure (sizes, options, layouts) is drawn from `random`, its values from `generator`:
the same number with another `attempt` is the same structure with other values.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
POISON = (math.nan, math.inf, -math.inf)
# Around the tiles of the interpreter (16 and 32), where tails begin and end.
EDGES = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65)
CUDA_EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193)
CHUNK = 8  # elements that CUDA attention copies at a time: rows start on multiples of it


def poison_like(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """NaN, Inf and -Inf by turns."""
    return torch.tensor(POISON).to(dtype)[torch.arange(math.prod(shape)) % 3].reshape(tuple(shape))


class Draw:
    """The dice of one case.

    With `cuda`, attention's inputs are such as the CUDA kernels take: 16-bit, rows on 16 bytes.
    """

    def __init__(
        self, op: str, number: int, device: str, attempt: int = 0, cuda: bool = False
    ) -> None:
        self.cuda = cuda
        self.edges = CUDA_EDGES if cuda else EDGES
        self.random = random.Random(f"{op} {number}")
        seed = random.Random(f"{op} {number} values {attempt}").getrandbits(62)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, *options: T) -> T:
        return self.random.choice(options)

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def size(self, most: int, least: int = 0) -> int:
        """A length: the edges of tiles as often as any other."""
        if self.chance(0.5):
            return self.random.choice([e for e in self.edges if least <= e <= most])
        return self.between(least, most)

    def dropout_p(self) -> float:
        """Common rates, 1 (everything dropped), and any multiple of 1/65536 and what lies
        between."""
        p = self.pick(0.1, 0.1, 0.5, 1.0, None, None)
        return self.random.random() if p is None else p

    def seed(self) -> torch.Tensor:
        """A dropout seed: any int64."""
        value = self.pick(0, -1, self.random.getrandbits(63), -self.random.getrandbits(63))
        return torch.tensor([value], dtype=torch.int64, device=self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def attention_dtype(self) -> torch.dtype:
        return self.pick(FP16, BF16) if self.cuda else self.pick(FP32, FP16)

    def place(
        self, values: torch.Tensor, dtype: torch.dtype, plain: float = 0.4, chunk: int = 1
    ) -> torch.Tensor:
        """`values` in a layout of any strides; what lies between and around them is NaN and Inf.

        Args:
            plain: the odds of a contiguous tensor.
            chunk: where more than 1, the last dimension stays last and each row starts on a
                multiple of so many elements.
        """
        values = values.to(dtype)
        if self.chance(plain):
            return values.to(self.device).clone(memory_format=torch.contiguous_format)
        dims = list(range(values.dim()))
        order = dims if self.chance(0.6) else self.random.sample(dims, len(dims))
        step = [2 if self.chance(0.1) else 1 for _ in dims]
        before, after = ([self.pick(0, 0, 1, 3) for _ in dims] for _ in range(2))
        if chunk > 1:
            order = [d for d in order if d != dims[-1]] + dims[-1:]
            step[-1], before[-1], after[-1] = 1, chunk * before[-1], chunk * after[-1]
        size = [before[d] + values.shape[d] * step[d] + after[d] for d in order]
        memory = poison_like(size, dtype).to(self.device)
        view = memory.permute([order.index(d) for d in dims]) if dims else memory
        inside = tuple(
            slice(before[d], before[d] + values.shape[d] * step[d], step[d]) for d in dims
        )
        view = view[inside]
        view.copy_(values)
        return view

    def tensor(self, *shape: int, dtype: torch.dtype, plain: float = 0.4) -> torch.Tensor:
        """Normal values in any layout."""
        return self.place(self.normal(*shape), dtype, plain, CHUNK if self.cuda else 1)
