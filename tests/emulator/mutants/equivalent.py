"""Mutants that compute what the sources compute, and why. The file is long because it is one table,
whose arguments serve several kernels."""

from dataclasses import dataclass

from .sites import Mutant


@dataclass(frozen=True)
class Equivalent:
    """Mutants with one argument.

    Attributes:
        argument: one sentence.
        file: in csrc/cuda, or what their names begin with.
        before: the text that is replaced.
        afters: what it is replaced by; empty: whatever it is.
        source: what the line of it has.
        ordinal: which of several that look the same; 0: all.
    """

    argument: str
    file: str
    before: str
    afters: tuple[str, ...] = ()
    source: str = ""
    ordinal: int = 0

    def is_of(self, mutant: Mutant) -> bool:
        return (
            mutant.file.startswith(self.file)
            and mutant.before == self.before
            and (not self.afters or mutant.after in self.afters)
            and self.source in mutant.source
            and self.ordinal in (0, mutant.ordinal)
        )


def argument_of(mutant: Mutant) -> str | None:
    """Why the mutant is equivalent, or None."""
    return next((e.argument for e in EQUIVALENT if e.is_of(mutant)), None)


_MORE_TILES = (
    "More tiles are walked over than some query sees; what is not seen is masked score by score, "
    "so they add nothing."
)
_MORE_TILES_DELTA = (
    "More tiles than some query sees add nothing; where one becomes two, delta is summed over out "
    "and dout instead of p and dp, the same sum but for rounding."
)
_STRICTER_WHOLE = (
    "The end is only too large: tiles count as cut that are whole, and are masked score by score "
    "though nothing is masked."
)
_TWICE = (
    "Both launches compute the sequence: the later one, to which it belongs, overwrites what the "
    "earlier one wrote, or the same is computed twice."
)
_NO_ROWS = "A block behind the last row copies zeros, and no row of it is stored."
_SAME_GROUP = (
    "Rows i and i ^ 8 share the keys of dropout; which of the two it is is decided later, by the "
    "multiplier that kept_scores sets."
)
_BROADCAST = "Where a bias is broadcast over it, a block's own index is 0 and there is one."
_OWN_SCORES = (
    "A key's row of the tile only enters the key's own scores, and these are chosen 0 where it is "
    "padding."
)
_MASKED_ANYWAY = "Where every score is masked one by one, a tile that is whole keeps them all."
_CHOSEN_ZERO = (
    "Nothing is seen there, so p is 0, by choice or as exp2(-Inf); where p is 0 ds is chosen 0, "
    "whatever dp, lse or delta hold."
)
_NOT_STORED = "A row behind the last one is stored nowhere, and its products reach no other row."
_CLEARED = "A tile is looked through without need: no row of it that counts is cleared."

_EMPTY_LSE = "The greatest score of an empty row is -Inf, and so is what is added to it."
_NOBODY_READS = "A tile of q comes that nobody reads: there are no keys to multiply it with."
_ANOTHER_ORDER = "A block takes another's tile of the round: each tile still has a block."

_NAN_STAYS = "y is NaN where x is, through exp2 and the reciprocal."
_EITHER_WAY = "At equality both sides of the choice are the same."
_NO_KEYS_LEFT = "The loop inside has no keys left and ends at once."
_SKIPPED = "What is loaded is skipped below: there is no key, or the segment is not stored."

_ONE_BY_ONE = "A shortcut: the columns are looked at one by one, and none is past the end."
_STORES_NOTHING = "store_vector stores nothing in columns that do not exist."

_QUERIES, _KEYS, _BIAS = (f"sm80/attention_bwd_{x}.cuh" for x in ("queries", "keys", "bias"))
_FWD, _SCORE = "sm80/attention_fwd.cuh", "attention_score.cuh"
_GRADIENT = "attention_gradient.cuh"
_KERNELS, _BACKWARD = "sm80/attention", "sm80/attention_bwd"
_HOPPER_BACKWARD = "sm90/attention_bwd"
_HOPPER_QUERIES, _HOPPER_KEYS, _HOPPER_SHORT = (
    f"sm90/attention_bwd_{x}.cuh" for x in ("queries", "keys", "short")
)
_PIPELINE = "sm90/pipeline.cuh"
_HOPPER_FWD, _SCHEDULE, _SOFTMAX = (
    f"sm90/attention_{x}.cuh" for x in ("fwd", "schedule", "softmax")
)
_ROW, _TABLES = "sm80/layer_norm_row.cuh", "sm80/embedding_layer_norm_tables.cuh"
_FAR_AWAY = "A side that is 2^30 from the diagonal is as open as one that is 2^30 from 0."


def _one(argument: str, file: str, before: str, *afters: str, source: str = "") -> Equivalent:
    return Equivalent(argument, file, before, afters, source)


EQUIVALENT: tuple[Equivalent, ...] = (
    *(
        _one(
            _MASKED_ANYWAY,
            f"{folder}/attention_bwd_keys",
            "first_q + kQueries <= s.len_q",
            "first_q + kQueries < s.len_q",
        )
        for folder in ("sm80", "sm90")
    ),
    # Which tiles are walked over.
    _one(_STRICTER_WHOLE, _BIAS, "first_q + Tile::kRows < s.len_q"),
    _one(
        _MORE_TILES_DELTA,
        _SCORE,
        "first_q + kRows < s.len_q",
        "first_q + kRows + 1 < s.len_q",
        "false",
    ),
    _one(_MORE_TILES_DELTA, _SCORE, "first_q + s.low > 0", "false"),
    _one(
        _MORE_TILES_DELTA,
        _SCORE,
        "end_q + s.high < s.len_k",
        "end_q + s.high + 1 < s.len_k",
        "false",
    ),
    _one(
        _EITHER_WAY,
        _SCORE,
        "i + s.high < s.len_k",
        "i + s.high + 1 < s.len_k",
        source="const int last",
    ),
    _one(_MORE_TILES_DELTA, _SCORE, "end_key > first_key", "true", "end_key >= first_key"),
    _one(_STRICTER_WHOLE, _KEYS, "first_k + Tile::kRows < s.len_k"),
    _one(_STRICTER_WHOLE, _KEYS, "first_q + kQueries < s.len_q"),
    _one(_MORE_TILES, _QUERIES, "first_tile < end_tile", "true", "first_tile <= end_tile"),
    _one(_MORE_TILES, _KEYS, "first_k - s.high < 0", "first_k - s.high + 1 < 0"),
    _one(_MORE_TILES, _KEYS, "last_query > first_query", "true", "last_query >= first_query"),
    _one(_MORE_TILES, _BIAS, "first_q >= s.len_q"),
    _one(_MORE_TILES, _BIAS, "first_k >= s.len_k"),
    _one(_MORE_TILES, _BIAS, "first_k > end_q - 1 + s.high"),
    _one(_MORE_TILES, _BIAS, "first_k + kKeys - 1 < first_q + s.low"),
    _one(_NO_ROWS, _FWD, "first_q >= end_q"),
    _one(_NO_ROWS, _KEYS, "first_k >= s.len_k", "first_k > s.len_k"),
    _one(
        _TWICE,
        _BACKWARD,
        "s.len_k < a.least_keys",
        "false",
        "s.len_k + 1 < a.least_keys",
    ),
    _one(_TWICE, _KEYS, "s.len_k > a.most_keys", "false"),
    # Masks that others make up for.
    _one(_MASKED_ANYWAY, _SCORE, "end_k <= s.len_k", "end_k < s.len_k"),
    _one(
        _MASKED_ANYWAY,
        _SCORE,
        "first_k >= end_q - 1 + s.low",
        "first_k > end_q - 1 + s.low",
    ),
    _one(
        _MASKED_ANYWAY,
        _SCORE,
        "end_k - 1 <= first_q + s.high",
        "end_k - 1 < first_q + s.high",
    ),
    *(
        _one(_MASKED_ANYWAY, _KERNELS, f"sees_all(s, kept, {given})", "false")
        for given in (
            "first_q, end_q, first_k, first_k + kKeys",
            "first_q, end_q, first_k, first_k + Tile::kRows",
        )
    ),
    Equivalent(_OWN_SCORES, _BIAS, "kept", ("nullptr",)),
    Equivalent(_OWN_SCORES, _FWD, "kept", ("nullptr",), ordinal=1),
    Equivalent(_OWN_SCORES, _QUERIES, "kept", ("nullptr",), ordinal=2),
    Equivalent(_OWN_SCORES, _KEYS, "kept", ("nullptr",), ordinal=2),
    _one(_CHOSEN_ZERO, _GRADIENT, "row_lse != -kInfinity", "true"),
    _one(_CHOSEN_ZERO, _GRADIENT, "lse[half] != kInfinity", "true"),
    _one(_CHOSEN_ZERO, _GRADIENT, "score != -kInfinity", "true"),
    Equivalent(
        "Without options ds only enters its own query's dq, which is NaN where delta is.",
        _GRADIENT,
        "!whole",
        ("false",),
        source="if (kGeneral || !whole) {",
    ),
    Equivalent(
        "Where every score counts a p of 0 has underflowed, and its ds is 0 unless dout is NaN.",
        _GRADIENT,
        "chooses",
        ("true",),
    ),
    Equivalent("Otherwise the sums are 0, or nobody reads them.", _GRADIENT, "all_keys", ("true",)),
    *(
        Equivalent(
            "delta is then summed over out and dout instead of p and dp, the same sum but for "
            "rounding; rows of one key are kept from that on their own.",
            f"{folder}/attention_bwd_queries.cuh",
            f"{own}end_tile - {own}first_tile == 1",
            ("false",),
        )
        for folder, own in (("sm80", ""), ("sm90", "own."))
    ),
    _one(_CHOSEN_ZERO, _KEYS, "s.high < 0", "s.high <= 0"),
    _one(_NOT_STORED, _QUERIES, "i < s.len_q", "true", "i <= s.len_q", source="rows[r].set("),
    _one(
        "The last query is read where it is, or in its place.",
        _QUERIES,
        "i < s.len_q",
        "i + 1 < s.len_q",
        source="const int inside",
    ),
    _one("One wait and one barrier more.", _QUERIES, "tile > first_tile"),
    # Options.
    Equivalent(
        "Sums over the keys that nobody reads.",
        _BIAS,
        "sum_k",
        ("true",),
        "if (sum_k) {",
        ordinal=1,
    ),
    _one(_BROADCAST, _BIAS, "a.bias_sizes[0] == 1", "false", source="int first_sequence"),
    _one(_BROADCAST, _BIAS, "a.bias_sizes[1] == 1", "false", source="int first_head"),
    *(
        _one(_FAR_AWAY, _SCORE, f"a.window_{side} == kNoWindow", "false")
        for side in ("left", "right")
    ),
    *(
        _one(_SAME_GROUP, _KERNELS, row, f"{row} ^ 8u")
        for row in (
            "static_cast<uint32_t>(first_q + row + g)",
            "static_cast<uint32_t>(i)",
            "static_cast<uint32_t>(first_q + row + 16 * r + g)",
        )
    ),
    _one("Held anew from the same tile.", _KEYS, "step == 0", "true"),
    _one(_EMPTY_LSE, _FWD, "total == 0.0f", "false", source="lse[i]"),
    # Hopper.
    _one(
        "A ring of one stage for whoever counts through it.",
        _PIPELINE,
        "++index == kStages",
        "true",
    ),
    _one("All lanes have the value.", _PIPELINE, "0", "(0) ^ 1"),
    _one(
        "All chunks of the row are cleared, one after the other.",
        _PIPELINE,
        "chunk_offset<Tile, kRows>(row, at % kChunks)",
        "chunk_offset<Tile, kRows>(row, (at % kChunks) ^ 1)",
    ),
    Equivalent(
        "Between two uses of a tile the warp meets at another barrier, too.",
        "sm90/attention_tile.cuh",
        "ptx::warp_barrier();",
        ordinal=1,
    ),
    # Hopper, backward.
    _one(
        "n and its end are even.",
        _HOPPER_KEYS,
        "n < (piece + 1) * kPieceTiles",
        "n + 1 < (piece + 1) * kPieceTiles",
    ),
    _one(_MORE_TILES, _HOPPER_KEYS, "own.first_k + Tile::kRows < s.len_k"),
    _one(_MORE_TILES, _HOPPER_KEYS, "own.first_k - s.high < 0", "own.first_k - s.high + 1 < 0"),
    _one(
        _MORE_TILES, _HOPPER_KEYS, "last_query > first_query", "true", "last_query >= first_query"
    ),
    _one(
        _STRICTER_WHOLE,
        _HOPPER_KEYS,
        "first_q + kQueries < s.len_q",
        "false",
        "first_q + kQueries + 1 < s.len_q",
    ),
    _one(_CLEARED, _HOPPER_KEYS, "s.high < 0", "s.high <= 0"),
    _one(_CLEARED, _HOPPER_KEYS, "a.cu_seqlens_q != nullptr", "true", source="some_see_nothing"),
    _one(
        _CLEARED,
        _HOPPER_KEYS,
        "first_q + kQueries > s.len_q",
        "true",
        "first_q + kQueries >= s.len_q",
    ),
    _one(_CHOSEN_ZERO, _HOPPER_KEYS, "fact.lse[n] != kInfinity", "true"),
    _one(_SAME_GROUP, _HOPPER_KEYS, "static_cast<uint32_t>(i)", "static_cast<uint32_t>(i) ^ 8u"),
    _one(
        _SAME_GROUP,
        _HOPPER_QUERIES,
        "static_cast<uint32_t>(first_row + g)",
        "static_cast<uint32_t>(first_row + g) ^ 8u",
    ),
    _one(
        _TWICE,
        _HOPPER_BACKWARD,
        "s.len_k < a.least_keys",
        "false",
        "s.len_k + 1 < a.least_keys",
    ),
    _one(_TWICE, _HOPPER_KEYS, "s.len_k > a.most_keys", "false"),
    _one(
        "A block behind the last key sees nothing and stores nothing.",
        _HOPPER_KEYS,
        "block * Tile::kRows >= s.len_k",
        "block * Tile::kRows > s.len_k",
    ),
    _one(
        "The last query is read where it is, or in its place.",
        _HOPPER_QUERIES,
        "i < s.len_q",
        "i + 1 < s.len_q",
        source="const int inside",
    ),
    _one(
        _NOT_STORED, _HOPPER_QUERIES, "i < s.len_q", "true", "i <= s.len_q", source="rows.set(half"
    ),
    *(
        _one(_MASKED_ANYWAY, _HOPPER_BACKWARD, f"sees_all({given})", "false")
        for given in (
            "s, kept, own.first_q, own.end_q, first_k, first_k + kKeys",
            "s, own.kept, first_q, end_q, own.first_k, own.first_k + Tile::kRows",
        )
    ),
    _one(
        "A warp overwrites rows of q that its own share of the products alone reads, and it has "
        "waited for these.",
        _HOPPER_QUERIES,
        "ptx::named_barrier_sync(kConsumersBarrier, 128 * Tile::kWarpgroups);",
    ),
    _one(_TWICE, _HOPPER_SHORT, "s.len_k <= a.most_keys", "true"),
    _one("No call has a length below 0.", _HOPPER_SHORT, "s.len_k >= 0", "true"),
    _one(_TWICE, _HOPPER_SHORT, "a.seqlen_k <= Tile::kRows", "true"),
    _one(_CLEARED, _HOPPER_SHORT, "s.high < 0", "s.high <= 0"),
    _one(_CLEARED, _HOPPER_SHORT, "a.cu_seqlens_q != nullptr", "true", source="first_q"),
    _one(
        _CLEARED,
        _HOPPER_SHORT,
        "first_q + Tile::kRows > s.len_q",
        "true",
        "first_q + Tile::kRows >= s.len_q",
    ),
    _one(
        _SAME_GROUP,
        _HOPPER_SHORT,
        "static_cast<uint32_t>(first_row + g)",
        "static_cast<uint32_t>(first_row + g) ^ 8u",
    ),
    _one(
        "The last query is read where it is, or in its place.",
        _HOPPER_SHORT,
        "i < s.len_q",
        "i + 1 < s.len_q",
        source="const int inside",
    ),
    _one(
        "A tile with rows behind the last query is not whole: their scores are chosen 0.",
        _HOPPER_SHORT,
        "i < s.len_q",
        "true",
        "i <= s.len_q",
        source="rows.set(half",
    ),
    _one(
        _MASKED_ANYWAY,
        _HOPPER_SHORT,
        "step.first_q + Tile::kRows <= s.len_q",
        "step.first_q + Tile::kRows < s.len_q",
    ),
    _one(
        _MASKED_ANYWAY,
        _HOPPER_SHORT,
        "sees_all(s, kept, step.first_q, step.first_q + Tile::kRows, 0, kKeys)",
        "false",
    ),
    # Hopper, forward.
    _one(_CLEARED, _PIPELINE, "end_k > len_k", "true", "end_k >= len_k"),
    _one(
        "A round of no lengths more.",
        "sm90/sequence_order.cuh",
        "first < a.batch",
        "first <= a.batch",
    ),
    Equivalent(
        "Every lane asks for the tensor maps.",
        _HOPPER_FWD,
        "ptx::elect_one()",
        ("true",),
        ordinal=1,
    ),
    *(
        _one(_NOBODY_READS, _HOPPER_FWD, before, "true", *others)
        for before, *others in (
            ("queries.first_tile < queries.end_tile", "queries.first_tile <= queries.end_tile"),
            ("any",),
        )
    ),
    _one("The loop over no tiles ends at once.", _HOPPER_FWD, "!any", "false"),
    _one(_EMPTY_LSE, _HOPPER_FWD, "total == 0.0f", "false", source="lse[i]"),
    _one("Where no row has grown all factors are 1.", _HOPPER_FWD, "rows.corrected", "true"),
    _one(_ANOTHER_ORDER, _SCHEDULE, "round % 2 == 0"),
    _one(
        "Then no pairs are left, and the next return is taken.",
        _SCHEDULE,
        "first >= all",
        "false",
        "first > all",
    ),
    _one(_EITHER_WAY, _SCHEDULE, "first + pairs_ < all", "first + pairs_ <= all"),
    _one(
        "More tiles of queries: those behind a sequence's last one hold no rows.",
        _SCHEDULE,
        "index < a_.batch",
        "false",
        "index + 1 < a_.batch",
    ),
    _one("Comparing as floats finds the greatest score of any sign.", _SOFTMAX, "most < 0", "true"),
    _one(
        "Comparing as floats finds the greatest score of any sign.",
        _SOFTMAX,
        "most < 0",
        "most <= 0",
    ),
    _one(
        "Each lane multiplies its own rows; that lanes of a warp part before an aligned wait is "
        "what the emulator does not see.",
        _SOFTMAX,
        "ptx::vote_any(grown)",
        "grown",
    ),
    _one(
        "As a word -1 is NaN, and all of a row that has one becomes NaN.",
        _SOFTMAX,
        "most < 0",
        "most + 1 < 0",
    ),
    *(
        _one("Below tile 0 there is none.", _SOFTMAX, before, "true", f"{before[:-3]}>= 0")
        for before in ("low > 0", "end > 0")
    ),
    _one(
        "Before key 0 there is none.",
        _SOFTMAX,
        "i + queries_.s.low > 0",
        "true",
        "i + queries_.s.low >= 0",
    ),
    _one(
        _SAME_GROUP,
        _SOFTMAX,
        "static_cast<uint32_t>(first_row_ + lane_index() / 4)",
        "static_cast<uint32_t>(first_row_ + lane_index() / 4) ^ 8u",
    ),
    _one(_MASKED_ANYWAY, _SOFTMAX, "tile >= first_whole_", "tile > first_whole_"),
    _one(
        _EITHER_WAY,
        _SOFTMAX,
        "i + queries_.s.high < queries_.s.len_k",
        "i + queries_.s.high + 1 < queries_.s.len_k",
    ),
    _one(_EITHER_WAY, _SOFTMAX, "end > low", "end >= low"),
    # Functions.
    _one(
        "Only rounding: the logarithm of 1 is 6e-8 instead of 0, far below what 16-bit scores err.",
        _SCORE,
        "f.value > 1.41421356f",
    ),
    _one(_EITHER_WAY, _SCORE, "x < 0.0f", "x <= 0.0f"),
    _one(_NAN_STAYS, _SCORE, "x != x", "false", source="-y"),
    # LayerNorm and embeddings.
    _one(_ONE_BY_ONE, _ROW, "column + kVector <= cols"),
    _one("The elements of a vector one by one.", _ROW, "aligned", "false"),
    *(
        _one(
            "With threshold 0 nobody reads the keys.",
            f"sm80/{op}_bwd.cuh",
            "drops",
            "true",
            source="hidden_row",
        )
        for op in ("layer_norm", "embedding_layer_norm")
    ),
    _one(_EITHER_WAY, _ROW, "variance < 0.0f", "variance <= 0.0f"),
    _one(_EITHER_WAY, "sm80/embedding_layer_norm_row.cuh", "id < 0", "id <= 0"),
    _one(_EITHER_WAY, "sm80/embedding_layer_norm_row.cuh", "id < size", "id + 1 < size"),
    _one(_NO_KEYS_LEFT, _TABLES, "start < last", "start <= last"),
    _one(_NO_KEYS_LEFT, _TABLES, "start + batch < last", "start + batch <= last"),
    _one(_SKIPPED, _TABLES, "key[u] != a.padding_row", "true", source="wanted"),
    _one(_SKIPPED, _TABLES, "key[u] >= 0", "true", source="wanted"),
    _one(_SKIPPED, _TABLES, "wanted", "true"),
    _one(_STORES_NOTHING, _TABLES, "column < a.cols", "column <= a.cols", source="for ("),
    _one(_STORES_NOTHING, _TABLES, "!inside", "false"),
)
