"""Cases of attention in its layouts: attention, attention_varlen, scaled_dot_product_attention,
attention_decode.

Legend in softmax.py. Tiles of the interpreter are 16 to 32 queries by 16 to 32 keys; with all keys
in one tile other kernels are chosen than for many.

The file is long because the four share how sizes, options, biases and neighbours are drawn.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

import bertkern

from .case import BACKEND, Case, Tensors, repeats, same_bits
from .draw import CHUNK, FP32, Draw, poison_like
from .rows import wanted_leaves
from .softmax import Options, one_sequence

MOST_TILES = 60  # of 16 x 16 scores, over all heads of all sequences: the interpreter is slow
MOST_CUDA_TILES = 400

Cut = Callable[[str, torch.Tensor, int], torch.Tensor]  # (name, tensor, b) -> sequence b's rows


def _head_dim(draw: Draw) -> int:
    """Mostly small; padded to a power of two, or not."""
    if draw.cuda:
        return CHUNK * draw.pick(draw.between(1, 4), 4, 8, 12, draw.between(1, 16))
    return draw.pick(
        draw.between(1, 20),
        draw.pick(8, 16, 20, 24, 32),
        draw.between(1, 64),
        draw.pick(64, 80, 96, 128, 256, draw.between(65, 256)),
    )


def _heads(draw: Draw) -> tuple[int, int]:
    """(H, Hk)."""
    heads_k = draw.pick(1, 1, 2, 3)
    return heads_k * draw.pick(1, 1, 1, 2, 3), heads_k


def _lengths(draw: Draw) -> tuple[int, int]:
    """(queries, keys); often equal, often all keys within one tile."""
    most = 200 if draw.cuda else 90  # CUDA's tiles have 128 rows
    queries, keys = draw.size(most), draw.pick(draw.size(most), draw.size(most), draw.size(33))
    return (keys, keys) if draw.chance(0.4) else (queries, keys)


def _tiles(queries: int, keys: int) -> int:
    return max(1, -(-queries // 16)) * max(1, -(-keys // 16))


def _most_tiles(draw: Draw) -> int:
    return MOST_CUDA_TILES if draw.cuda else MOST_TILES


def _options(draw: Draw, dim: int, longest: int) -> Options:
    """Each option at random."""
    scale = dim**-0.5
    # A kernel's backward has p = exp(s - lse), which errs by the rounding of lse, eps |lse|, where
    # torch keeps p itself: with scores of deviation 4 its dv in fp32 is 4 times as far off.
    options = Options(draw.pick(scale, scale, scale, 0.5 * scale, -scale, 1.5 * scale, 0.0))
    options.causal = draw.chance(0.35)
    if draw.chance(0.3):
        left, right = (
            -1 if draw.chance(0.25) else draw.pick(0, 1, draw.size(longest + 2)) for _ in range(2)
        )
        options.window = (left, right)
    if draw.chance(0.2):
        options.softcap = draw.pick(0.7, 2.0, 30.0)
    if draw.chance(0.4):
        options.dropout_p, options.seed = draw.dropout_p(), draw.seed()
        options.offset = draw.pick(0, 0, draw.between(1, 1000))
    return options


def _bias(
    draw: Draw, shape: tuple[int, ...], seen: torch.Tensor, dtype: torch.dtype, free: int
) -> torch.Tensor:
    """A bias that broadcasts to `shape` [..., Sq, Sk]: float (some of it -inf), or bool.

    Args:
        seen: of that shape, which scores exist; a float that no score reads may be NaN.
        free: so many of the first dimensions may be 1.
    """
    kept = [1 if d < free and draw.chance(0.4) else n for d, n in enumerate(shape)]
    if draw.chance(0.3):
        return draw.place(draw.normal(*kept) > draw.pick(-1.5, 0.0), torch.bool)
    bias = draw.normal(*kept)
    if draw.chance(0.3):
        bias[draw.normal(*kept) > 1.0] = -math.inf
    if draw.chance(0.5):
        read = seen
        for d, (n, m) in enumerate(zip(kept, shape, strict=True)):
            read = read if n == m else read.any(d, keepdim=True)
        bias[~read.expand(kept)] = math.nan
    return draw.place(bias, draw.pick(dtype, FP32))


def _cotangents(draw: Draw, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    """Gradients of out and lse, or of one of them."""
    names = draw.pick(["out"], ["out"], ["out", "lse"], ["out", "lse"], ["out", "lse"], ["lse"])
    return {
        name: draw.tensor(*shapes[name], dtype=dtype if name == "out" else FP32) for name in names
    }


def _describe(leaves: Tensors, mask: torch.Tensor | None) -> str:
    given = {"mask": mask, **leaves}
    return ", ".join(
        f"{name} {str(t.dtype)[6:]} {list(t.shape)} strides {list(t.stride())}"
        for name, t in given.items()
        if t is not None
    )


def _by_head(t: torch.Tensor) -> torch.Tensor:
    """[..., S, H, D] -> matrices of the heads."""
    return t.transpose(-3, -2)


def _matrices(pieces: Callable[[str, torch.Tensor], list[torch.Tensor]]) -> dict:
    """How results are seen as matrices whose rows are queries or keys."""
    views = {
        name: lambda t, name=name: [_by_head(piece) for piece in pieces(name, t)]
        for name in ("out", "q", "k", "v")
    }
    lse = {"lse": lambda t: [piece[..., None] for piece in pieces("lse", t)]}
    return views | lse | {"bias": lambda t: [t]}


def _cancels(leaves: Tensors, options: Options, *seen: torch.Tensor) -> dict[str, float]:
    """The gradient of a score is p (dp - delta). Over the keys these add up to 0 (or dlse); with
    one key each is 0, and so are the gradients of q and k, its sums times k and q (4: hardly
    exceeded)."""
    if all(bool((s.sum(-1) <= 1).all()) for s in seen):
        return {"bias": 1.0, "q": 4 * abs(options.scale), "k": 4 * abs(options.scale)}
    return {"bias": 1.0} if "bias" in leaves and leaves["bias"].shape[-1] == 1 else {}


def _properties(draw: Draw, case: Case, cut: Cut, batch: int, alone: dict[str, Callable]) -> None:
    """Properties of sequences that must not feel each other.

    Args:
        alone: name of a way -> function of b -> (keys of b that count, function of its q, k, v
            [S, H, D] -> out [S, H, D], lse [H, S]), which computes sequence b without the others.
    """
    repeats(draw, case)
    if BACKEND == "reference":  # torch's products choose their order by the batch
        return
    results = [*case.cotangents, *(f"d {n}" for n in case.wanted - {"bias"})]
    if draw.chance(0.6):
        b, way = draw.between(0, batch - 1), draw.random.choice(sorted(alone))
        keys, function = alone[way](b)

        def piece(name: str, t: torch.Tensor) -> torch.Tensor:
            rows = cut(name.removeprefix("d "), t, b)
            return rows[:keys] if name.removeprefix("d ") in ("k", "v") else rows

        def on_its_own(got: Tensors) -> None:
            one = case.run_op(
                leaves={n: piece(n, t) for n, t in case.leaves.items() if n != "bias"},
                call=function,
                cotangents={n: piece(n, t) for n, t in case.cotangents.items()},
            )
            same_bits(one, {n: piece(n, got[n]) for n in results if n in one})

        case.properties[f"sequence {b} alone by {way}"] = on_its_own
    if batch > 1 and draw.chance(0.5):
        bad = draw.between(0, batch - 1)

        def poisoned(got: Tensors) -> None:
            leaves = {n: t.detach().clone() for n, t in case.leaves.items()}
            for name in ("q", "k", "v"):
                cut(name, leaves[name], bad).fill_(math.nan)
            dirty = case.run_op(leaves=leaves)
            for b in set(range(batch)) - {bad}:
                one, two = (
                    {n: cut(n.removeprefix("d "), r[n], b) for n in results} for r in (got, dirty)
                )
                same_bits(one, two)

        case.properties[f"NaN in sequence {bad} stays there"] = poisoned


def attention(draw: Draw) -> Case:
    dtype, dim = draw.attention_dtype(), _head_dim(draw)
    (heads, heads_k), (queries, keys) = _heads(draw), _lengths(draw)
    batch = max(1, min(draw.between(1, 3), _most_tiles(draw) // (heads * _tiles(queries, keys))))
    options = _options(draw, dim, max(queries, keys))
    leaves = {
        "q": draw.tensor(batch, queries, heads, dim, dtype=dtype),
        "k": draw.tensor(batch, keys, heads_k, dim, dtype=dtype),
        "v": draw.tensor(batch, keys, heads_k, dim, dtype=dtype),
    }
    masks: Tensors = {}
    exists = torch.ones(batch, keys, dtype=torch.bool)  # padding is False
    lengths = [keys] * batch
    if draw.chance(0.35):
        lengths = [draw.size(keys) for _ in range(batch)]
        masks["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=draw.device)
        exists &= torch.arange(keys) < torch.tensor(lengths)[:, None]
    if draw.chance(0.35):
        holes = draw.normal(batch, keys) > draw.pick(-1.5, 0.0)
        if draw.chance(0.5):  # left padding
            holes = torch.arange(keys) >= torch.tensor([[draw.size(keys)] for _ in range(batch)])
        masks["key_padding_mask"] = draw.place(holes, torch.bool)
        exists &= holes
    for name in ("k", "v"):  # padding holds anything
        padding = (~exists).to(draw.device)
        leaves[name][padding] = poison_like(leaves[name][padding].shape, dtype).to(draw.device)
    shape = (batch, heads, queries, keys)
    mask = None
    if draw.chance(0.45):
        seen = (options.seen(queries, keys) & exists[:, None, None]).expand(shape)
        bias = _bias(draw, shape, seen, dtype, 4)
        while bias.shape[0] == 1 and bias.dim() > 2 and draw.chance(0.4):
            bias = bias[0]  # fewer dimensions broadcast too
        mask = bias if bias.dtype == torch.bool else None
        leaves |= {} if mask is not None else {"bias": bias}
    bias_of = lambda t: t.get("bias", mask)  # noqa: E731

    def call(t: Tensors) -> Tensors:
        keywords = options.keywords() | masks
        if bias_of(t) is not None:
            keywords["bias"] = bias_of(t)
        out, lse = bertkern.attention(t["q"], t["k"], t["v"], return_lse=True, **keywords)
        return {"out": out, "lse": lse}

    def plain(t: Tensors) -> Tensors:
        full = bias_of(t)
        full = None if full is None else full.cpu().expand(shape)
        results = [
            one_sequence(
                t["q"][b],
                t["k"][b],
                t["v"][b],
                None if full is None else full[b],
                options.seen(queries, keys),
                exists[b].nonzero()[:, 0],
                options.keep(b, heads, queries, keys),
                options,
            )
            for b in range(batch)
        ]
        return dict(zip(("out", "lse"), map(torch.stack, zip(*results, strict=True)), strict=True))

    shapes = {"out": (batch, queries, heads, dim), "lse": (batch, heads, queries)}
    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        call,
        plain,
        _cotangents(draw, shapes, dtype),
        dtype,
        f"attention B {batch} Sq {queries} Sk {keys} H {heads} Hk {heads_k} D {dim} {dtype} "
        f"{options} {masks} {_describe(leaves, mask)}",
        matrices=_matrices(lambda name, t: list(t)),
        cancels=_cancels(leaves, options, options.seen(queries, keys)),
    )

    def by_attention(b: int) -> tuple[int, Callable]:
        part = {name: m[b : b + 1] for name, m in masks.items()}
        return keys, _batch_of_one(case, options, b, bias_of, part, shape)

    def by_varlen(b: int) -> tuple[int, Callable]:
        return lengths[b], _packed_one(case, options, b, bias_of, queries, lengths[b], shape)

    alone = {"attention": by_attention}
    # Causal and window are aligned to the whole matrix here, to the sequence's own keys there.
    if "key_padding_mask" not in masks and not options.causal and options.window == (-1, -1):
        alone["attention_varlen"] = by_varlen
    _properties(draw, case, lambda name, t, b: t[b], batch, alone)
    return case


def _own_bias(bias, b: int, shape: tuple[int, ...], queries: int, keys: int) -> dict:
    """Sequence b's part of a bias that broadcasts to `shape`, as a keyword."""
    if bias is None:
        return {}
    return {"bias": bias.detach().expand(shape)[b : b + 1, :, :queries, :keys]}


def _batch_of_one(case, options, b, bias_of, masks, shape) -> Callable[[Tensors], Tensors]:
    def function(t: Tensors) -> Tensors:
        q, k, v = (t[name][None] for name in "qkv")
        keywords = options.keywords() | masks | {"sequence_offset": options.offset + b}
        keywords |= _own_bias(bias_of(case.leaves), b, shape, q.shape[1], k.shape[1])
        out, lse = bertkern.attention(q, k, v, return_lse=True, **keywords)
        return {"out": out[0], "lse": lse[0]}

    return function


def _packed_one(case, options, b, bias_of, queries, keys, shape) -> Callable[[Tensors], Tensors]:
    def function(t: Tensors) -> Tensors:
        keywords = options.keywords() | {"sequence_offset": options.offset + b}
        keywords |= _own_bias(bias_of(case.leaves), b, shape, queries, keys)
        q = t["q"]
        cu = [torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (queries, keys)]
        out, lse = bertkern.attention_varlen(
            q, t["k"], t["v"], *cu, queries, keys, return_lse=True, **keywords
        )
        return {"out": out, "lse": lse}

    return function


def attention_varlen(draw: Draw) -> Case:
    dtype, dim = draw.attention_dtype(), _head_dim(draw)
    heads, heads_k = _heads(draw)
    lengths: list[tuple[int, int]] = []
    tiles, equal = 0, draw.chance(0.5)
    for _ in range(draw.between(1, 4)):
        queries, keys = _lengths(draw)
        queries = keys if equal else queries
        tiles += heads * _tiles(queries, keys)
        if lengths and tiles > _most_tiles(draw):
            break
        lengths.append((queries, keys))
    batch = len(lengths)
    slack = [draw.pick(0, 0, 1, 40) for _ in range(2)]
    starts = [[sum(pair[x] for pair in lengths[:b]) for b in range(batch + 1)] for x in (0, 1)]
    longest = [max(pair[x] for pair in lengths) + draw.pick(0, 0, 5) for x in (0, 1)]
    total = [starts[x][-1] + slack[x] for x in (0, 1)]
    options = _options(draw, dim, max(longest))
    leaves = {
        "q": draw.tensor(total[0], heads, dim, dtype=dtype),
        "k": draw.tensor(total[1], heads_k, dim, dtype=dtype),
        "v": draw.tensor(total[1], heads_k, dim, dtype=dtype),
    }
    for name, t in leaves.items():  # tokens of a fixed budget that belong to no sequence
        t[starts[name != "q"][-1] :] = draw.pick(math.nan, math.inf, 0.0)
    cu = [torch.tensor(s, dtype=torch.int32, device=draw.device) for s in starts]
    shape = (batch, heads, *longest)
    mask = None
    if draw.chance(0.4):
        seen = torch.zeros(shape, dtype=torch.bool)
        for b, (queries, keys) in enumerate(lengths):
            seen[b, :, :queries, :keys] = options.seen(queries, keys)
        bias = _bias(draw, shape, seen, dtype, 2)
        mask = bias if bias.dtype == torch.bool else None
        leaves |= {} if mask is not None else {"bias": bias}
    bias_of = lambda t: t.get("bias", mask)  # noqa: E731

    def cut(name: str, t: torch.Tensor, b: int) -> torch.Tensor:
        side = int(name in ("k", "v"))
        rows = slice(starts[side][b], starts[side][b + 1] if b < batch else None)
        return t[:, rows] if name == "lse" else t[rows]

    def call(t: Tensors) -> Tensors:
        keywords = options.keywords()
        if bias_of(t) is not None:
            keywords["bias"] = bias_of(t)
        out, lse = bertkern.attention_varlen(
            t["q"], t["k"], t["v"], *cu, *longest, return_lse=True, **keywords
        )
        return {"out": out, "lse": lse}

    def plain(t: Tensors) -> Tensors:
        full = bias_of(t)
        full = None if full is None else full.cpu().expand(shape)
        results = [
            one_sequence(
                *(cut(name, t[name], b) for name in "qkv"),
                None if full is None else full[b, :, :queries, :keys],
                options.seen(queries, keys),
                torch.arange(keys),
                options.keep(b, heads, queries, keys),
                options,
            )
            for b, (queries, keys) in enumerate(lengths)
        ]
        outs, lses = (list(parts) for parts in zip(*results, strict=True))
        outs.append(outs[0].new_zeros(slack[0], heads, dim))
        lses.append(lses[0].new_full((heads, slack[0]), -math.inf))
        return {"out": torch.cat(outs), "lse": torch.cat(lses, 1)}

    cotangents = _cotangents(draw, {"out": (total[0], heads, dim), "lse": (heads, total[0])}, dtype)
    for name, cotangent in cotangents.items():
        cut(name, cotangent, batch).fill_(math.nan)
    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        call,
        plain,
        cotangents,
        dtype,
        f"attention_varlen lengths {lengths} of at most {longest} slack {slack} H {heads} "
        f"Hk {heads_k} D {dim} {dtype} {options} {_describe(leaves, mask)}",
        matrices=_matrices(lambda name, t: [cut(name, t, b) for b in range(batch + 1)]),
        cancels=_cancels(leaves, options, *(options.seen(*pair) for pair in lengths)),
    )
    alone = {
        "attention": lambda b: (
            lengths[b][1],
            _batch_of_one(case, options, b, bias_of, {}, shape),
        ),
        "attention_varlen": lambda b: (
            lengths[b][1],
            _packed_one(case, options, b, bias_of, *lengths[b], shape),
        ),
    }
    _properties(draw, case, cut, batch, alone)
    return case


def scaled_dot_product_attention(draw: Draw) -> Case:
    dtype, dim = draw.attention_dtype(), _head_dim(draw)
    gqa = draw.chance(0.3)
    heads, heads_k = _heads(draw) if gqa else (draw.between(1, 3),) * 2
    queries, keys = _lengths(draw)
    most = max(1, _most_tiles(draw) // (heads * _tiles(queries, keys)))
    lead = [(heads,), (min(2, most), heads), (min(3, most), heads), (1, min(2, most), heads)]
    leading = draw.random.choice(lead if gqa else [(), *lead])
    heads, heads_k = (heads, heads_k) if leading else (1, 1)
    options = _options(draw, dim, max(queries, keys))
    options.softcap, options.window, options.offset = 0.0, (-1, -1), 0

    def tensor(count: int, length: int) -> torch.Tensor:
        dims = [1 if not gqa and draw.chance(0.1) else n for n in leading[:-1]]
        if leading:
            dims.append(1 if not gqa and draw.chance(0.1) else count)
        return draw.tensor(*dims, length, dim, dtype=dtype)

    leaves = {"q": tensor(heads, queries), "k": tensor(heads_k, keys), "v": tensor(heads_k, keys)}
    leading = torch.broadcast_shapes(
        *((*t.shape[:-3], heads) if gqa else t.shape[:-2] for t in leaves.values())
    )
    heads = leading[-1] if leading else 1
    heads_k = heads_k if gqa else heads
    shape = (*leading, queries, keys)
    batch, mask = torch.Size(leading[:-1]).numel(), None
    if not options.causal and draw.chance(0.6):
        bias = _bias(draw, shape, torch.ones(shape, dtype=torch.bool), dtype, len(shape))
        while bias.dim() > 2 and bias.shape[0] == 1 and draw.chance(0.4):
            bias = bias[0]
        mask = bias if bias.dtype == torch.bool else None
        leaves |= {} if mask is not None else {"bias": bias}
    torch_seed = draw.between(0, 2**31)
    torch.manual_seed(torch_seed)  # the seed is drawn from torch's generator, in this way
    options.seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=draw.device)

    def call(t: Tensors) -> Tensors:
        torch.manual_seed(torch_seed)
        out = bertkern.scaled_dot_product_attention(
            t["q"],
            t["k"],
            t["v"],
            t.get("bias", mask),
            options.dropout_p,
            options.causal,
            scale=None if options.scale == dim**-0.5 else options.scale,
            enable_gqa=gqa,
        )
        return {"out": out}

    def plain(t: Tensors) -> Tensors:
        full = t.get("bias", mask)
        if full is not None:
            full = full.cpu().expand(shape).reshape(batch, heads, queries, keys)
        q, k, v = (
            t[name]
            .expand(*leading[:-1], *([n] if leading else []), *t[name].shape[-2:])
            .reshape(batch, n, *t[name].shape[-2:])
            .transpose(1, 2)
            for name, n in (("q", heads), ("k", heads_k), ("v", heads_k))
        )
        outs = [
            one_sequence(
                q[b],
                k[b],
                v[b],
                None if full is None else full[b],
                options.seen(queries, keys, top_left=True),
                torch.arange(keys),
                options.keep(b, heads, queries, keys),
                options,
            )[0]
            for b in range(batch)
        ]
        out = torch.stack(outs).transpose(1, 2)
        return {"out": out.reshape(*leading, queries, dim)}

    case = Case(
        leaves,
        wanted_leaves(draw, leaves),
        call,
        plain,
        {"out": draw.tensor(*leading, queries, dim, dtype=dtype)},
        dtype,
        f"scaled_dot_product_attention leading {leading} Sq {queries} Sk {keys} D {dim} {dtype} "
        f"gqa {gqa} {options} {_describe(leaves, mask)}",
        matrices={name: lambda t: [t] for name in ("out", "q", "k", "v", "bias")},
        cancels=_cancels(leaves, options, options.seen(queries, keys, top_left=True)),
    )

    def torch_agrees(got: Tensors) -> None:
        """That plain torch here means what torch means (torch's NaN and 0 in empty rows aside)."""
        q, k, v, bias = (
            None if t is None else t.cpu() if t.dtype == torch.bool else t.detach().cpu().double()
            for t in (*(leaves[name] for name in "qkv"), leaves.get("bias", mask))
        )
        # Its scores are q's and k's alone: a mask that broadcasts as v does would not fit them.
        q = q.expand(*leading, *q.shape[-2:])
        out = F.scaled_dot_product_attention(
            q, k, v, bias, 0.0, options.causal, scale=options.scale, enable_gqa=gqa
        )
        exact = case.run_plain(torch.float64)["out"]
        torch.testing.assert_close(exact, out.nan_to_num(0.0))

    # torch's own CPU kernel gives NaN for a causal call with a scale that is not positive.
    own_fault = options.causal and options.scale <= 0
    if not options.dropout_p and batch and keys and queries and not own_fault:
        case.properties["torch agrees"] = torch_agrees
    repeats(draw, case)
    return case


def attention_decode(draw: Draw) -> Case:
    """One query a sequence over a cache; the query stands at the last key of its sequence."""
    dtype, dim = draw.attention_dtype(), _head_dim(draw)
    heads, heads_k = _heads(draw)
    if draw.chance(0.1):
        heads = 17 * heads_k  # more than one block of query heads
    batch, room = draw.between(1, 4), draw.size(90)
    lengths = [draw.size(room) for _ in range(batch)]
    keys = [min(n, room) for n in lengths]
    if draw.chance(0.2):  # less than 0 counts as 0, more than the room as the room
        lengths[0], keys[0] = draw.pick((-3, 0), (room + 7, room))
    options = _options(draw, dim, room)
    options.causal, options.dropout_p, options.offset = False, 0.0, 0
    leaves = {
        "q": draw.tensor(batch, heads, dim, dtype=dtype),
        "k": draw.tensor(batch, room, heads_k, dim, dtype=dtype),
        "v": draw.tensor(batch, room, heads_k, dim, dtype=dtype),
    }
    for name in ("k", "v"):
        for b in range(batch):  # cache slack holds anything
            slack = leaves[name][b, keys[b] :]
            slack.copy_(poison_like(slack.shape, dtype))
    given = torch.tensor(lengths, dtype=torch.int32, device=draw.device)
    shape = (batch, heads, 1, room)
    left = options.window[0]
    seen = torch.zeros(batch, 1, room, dtype=torch.bool)
    for b, n in enumerate(keys):
        seen[b, :, max(0, n - 1 - left) if left >= 0 else 0 : n] = True
    mask = None
    if draw.chance(0.45):
        bias = _bias(draw, shape, seen[:, None].expand(shape), dtype, 4)
        mask = bias if bias.dtype == torch.bool else None
        leaves |= {} if mask is not None else {"bias": bias}
    bias_of = lambda t: t.get("bias", mask)  # noqa: E731

    def decode(t: Tensors, bias: torch.Tensor | None, lengths: torch.Tensor) -> Tensors:
        keywords = {"scale": options.scale, "softcap": options.softcap}
        if options.window != (-1, -1):
            keywords["window"] = options.window
        out, lse = bertkern.attention_decode(
            t["q"], t["k"], t["v"], lengths, bias=bias, return_lse=True, **keywords
        )
        return {"out": out, "lse": lse}

    def plain(t: Tensors) -> Tensors:
        full = bias_of(t)
        full = None if full is None else full.cpu().expand(shape)
        results = [
            one_sequence(
                t["q"][b][None],
                t["k"][b],
                t["v"][b],
                None if full is None else full[b],
                seen[b],
                torch.arange(keys[b]),
                None,
                options,
            )
            for b in range(batch)
        ]
        return {
            "out": torch.stack([out[0] for out, _ in results]),
            "lse": torch.stack([lse[:, 0] for _, lse in results]),
        }

    case = Case(
        leaves,
        wanted_leaves(draw, leaves) if draw.chance(0.3) else set(),
        lambda t: decode(t, bias_of(t), given),
        plain,
        _cotangents(draw, {"out": (batch, heads, dim), "lse": (batch, heads)}, dtype),
        dtype,
        f"attention_decode lengths {lengths} of {room} H {heads} Hk {heads_k} D {dim} {dtype} "
        f"{options} {_describe(leaves, mask)}",
        matrices={
            "q": lambda t: [t],
            "out": lambda t: [t],
            "k": lambda t: [_by_head(t)],
            "v": lambda t: [_by_head(t)],
            "bias": lambda t: [t],
        },
    )
    repeats(draw, case)
    if draw.chance(0.5) and BACKEND != "reference":
        b = draw.between(0, batch - 1)
        less = draw.between(keys[b], room)

        def alone(got: Tensors) -> None:
            part = {n: t[b : b + 1] for n, t in leaves.items() if n != "bias"}
            part |= {n: part[n][:, :less] for n in ("k", "v")}
            bias = bias_of(leaves)
            bias = None if bias is None else bias.expand(shape)[b : b + 1, ..., :less]
            length = given[b : b + 1].clamp(max=less)
            call = lambda t: decode(t, bias, length)  # noqa: E731
            one = case.run_op(leaves=part, call=call, cotangents={})
            same_bits(one, {n: got[n][b : b + 1] for n in ("out", "lse")})

        case.properties[f"sequence {b} alone in a cache of {less}"] = alone
    return case
