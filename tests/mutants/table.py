"""The mutants: one fault each, as exact source text of `kernels/` and what replaces it.

A text must be found exactly `times` times in its file, so that a kernel that changes takes its
mutants with it. The file is long because it is one table.
"""

from dataclasses import dataclass

FUZZ = "tests/fuzz/test_{}.py"


@dataclass(frozen=True)
class Mutant:
    """One wrong variant of a kernel.

    Attributes:
        name: the fault.
        file: in `kernels/`.
        suffers: what a user would suffer from it.
        edits: (text, replacement) pairs.
        fuzz: the ops whose fuzz cases run.
        tests: the test files that must fail.
        times: how often each text stands in the file.
    """

    name: str
    file: str
    suffers: str
    edits: tuple[tuple[str, str], ...]
    fuzz: tuple[str, ...]
    tests: tuple[str, ...]
    times: int = 1


def _of(file: str, fuzz: tuple[str, ...], *tests: str):
    """A maker of mutants of one file, with the tests that are theirs."""

    def make(name: str, suffers: str, *edits: tuple[str, str], times: int = 1) -> Mutant:
        return Mutant(name, file, suffers, edits, fuzz, tests, times)

    return make


_rows, _products, _attention = (FUZZ.format(name) for name in ("rows", "products", "attention"))
_ATTENTION_OPS = ("attention", "attention_varlen", "scaled_dot_product_attention")

_dropout = _of("dropout.py", ("dropout",), _rows, "tests/kernels/test_dropout.py")
_norm = _of(
    "layer_norm.py",
    ("layer_norm", "dropout_add_layer_norm"),
    _rows,
    "tests/kernels/test_layer_norm.py",
)
_embedding = _of("embedding_layer_norm.py", ("embedding_layer_norm",), _rows)
_linear = _of("linear.py", ("linear",), _products)
_ffn = _of("ffn.py", ("ffn",), _products)
_loss = _of("linear_cross_entropy.py", ("linear_cross_entropy",), _products)
_tile = _of("attention_tile.py", _ATTENTION_OPS, _attention)
_fwd = _of("attention_fwd.py", _ATTENTION_OPS, _attention)
_dq = _of("attention_bwd_dq.py", _ATTENTION_OPS, _attention)
_dkdv = _of("attention_bwd_dkdv.py", _ATTENTION_OPS, _attention)
_dbias = _of("attention_bwd_dbias.py", _ATTENTION_OPS, _attention)
_call = _of("attention.py", _ATTENTION_OPS, _attention)
_decode = _of("attention_decode.py", ("attention_decode",), _attention)

MUTANTS = (
    # Dropout.
    _dropout(
        "dropout scale off by 1/65536",
        "every kept value a little too large, at every layer",
        ("return threshold, RESOLUTION / kept", "return threshold, (RESOLUTION + 1) / kept"),
    ),
    _dropout(
        "dropout threshold off by one",
        "a mask that differs from the other backends' in one element of 65536",
        ("bits.to(tl.int32) >= threshold", "bits.to(tl.int32) > threshold"),
    ),
    _dropout(
        "dropout rows 8 apart share a mask",
        "correlated masks, and other ones than on the other backends",
        ("tl.where((rows & 8) != 0, _MUL_HIGH_ROW, _MUL_LOW_ROW)", "_MUL_LOW_ROW"),
    ),
    _dropout(
        "dropout multiplies instead of choosing",
        "a NaN that was dropped comes back",
        (
            "y = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0)",
            "y = x.to(tl.float32) * tl.where(keep, keep_scale, 0.0)",
        ),
    ),
    _dropout(
        "dropout rows not renamed",
        "packed and padded batches drop other elements",
        ("    if DROPOUT_ROWS:", "    if False:"),
    ),
    _dropout(
        "dropout seed's high half ignored",
        "seeds that share their low 32 bits share their masks",
        ("high = (seed >> 32).to(tl.uint32)", "high = (seed & 0).to(tl.uint32)"),
    ),
    # LayerNorm.
    _norm(
        "variance uncentred",
        "rows with a mean beside a small deviation lose their digits",
        (
            "tl.sum(centred_RC, 1), tl.sum(centred_RC * centred_RC, 1), cols_total, eps",
            "tl.sum(centred_RC, 1), tl.sum(x_RC * x_RC, 1) - cols_total * mean_R * mean_R,"
            " cols_total, eps",
        ),
    ),
    _norm(
        "variance counts the columns past the end",
        "every width that is no power of two is normalised by a wrong deviation",
        (
            "    # Columns past the end hold 0, whose deviation is -mean: they must not enter the "
            "variance.\n    centred_RC = tl.where(in_row[None, :], x_RC - mean_R[:, None], 0.0)",
            "    centred_RC = x_RC - mean_R[:, None]",
        ),
    ),
    _norm(
        "eps outside the root",
        "rows of small deviation come out too small",
        (
            "1 / tl.sqrt_rn(tl.where(var_R < 0, 0.0, var_R) + eps)",
            "1 / (tl.sqrt_rn(tl.where(var_R < 0, 0.0, var_R)) + eps)",
        ),
    ),
    _norm(
        "statistics in fp16",
        "three digits of every activation, and overflow of large rows",
        (
            "var_R = square_R / cols_total - left_R * left_R",
            "var_R = (square_R / cols_total - left_R * left_R).to(tl.float16).to(tl.float32)",
        ),
    ),
    _norm(
        "mean not taken off again",
        "rows of one value, or with a large mean, are normalised rounding noise",
        ("left_R = left_R / cols_total", "left_R = left_R * 0"),
    ),
    _norm(
        "wide rows: mean not taken off again",
        "wide rows with a large mean keep the rounding of the mean",
        ("((x_RC - mean_R[:, None]) - left_R[:, None])", "(x_RC - mean_R[:, None])"),
    ),
    _norm(
        "wide rows: the last piece counts as a whole one",
        "every width that is no multiple of the piece is normalised by a wrong deviation",
        (
            "            centred_RC = tl.where(in_row[None, :], x_RC - mean_R[:, None], 0.0)\n"
            "            sum_RC",
            "            centred_RC = x_RC - mean_R[:, None]\n            sum_RC",
        ),
    ),
    _norm(
        "wide rows: the last piece is not normalised",
        "the last columns of wide rows are whatever was in memory",
        (
            "        for start in range(0, cols_total, BLOCK_C):\n"
            "            piece = start + cols\n"
            "            in_row = piece < cols_total\n"
            "            inside = in_col[:, None] & in_row[None, :]\n"
            "            x_RC = load_tile(source_ptr",
            "        for start in range(0, cols_total - cols_total % BLOCK_C, BLOCK_C):\n"
            "            piece = start + cols\n"
            "            in_row = piece < cols_total\n"
            "            inside = in_col[:, None] & in_row[None, :]\n"
            "            x_RC = load_tile(source_ptr",
        ),
    ),
    _norm(
        "one row of 16 scaled by 0.97",
        "some tokens a little too small, which no loss curve shows",
        (
            "y_RC = affine(xhat_RC, weight_ptr, bias_ptr, cols, in_row, WEIGHT, BIAS)",
            "y_RC = affine(xhat_RC, weight_ptr, bias_ptr, cols, in_row, WEIGHT, BIAS)\n"
            "        y_RC = y_RC * tl.where(rows % 16 == 15, 0.97, 1.0)[:, None]",
        ),
    ),
    _norm(
        "weight gradient of the weighted gradient",
        "the weight is trained in a wrong direction",
        ("dweight_RC += dy_RC * xhat_RC", "dweight_RC += g_RC * xhat_RC"),
    ),
    _norm(
        "gradient through the deviation missing",
        "the input gradient keeps what normalisation takes away",
        (
            "dx_RC = (g_RC - mean_g_R[:, None] - xhat_RC * mean_gx_R[:, None]) * rstd_R[:, None]",
            "dx_RC = (g_RC - mean_g_R[:, None]) * rstd_R[:, None]",
        ),
        times=2,
    ),
    _norm(
        "layer norm's backward drops nothing",
        "dropped activations receive a gradient",
        (
            "dx_RC = tl.where(keep, dx_RC * keep_scale, 0.0)",
            "dx_RC = dx_RC * keep_scale",
        ),
    ),
    _norm(
        "gradient of the sum forgotten",
        "pre-norm models train without their residual stream",
        ("        dx_RC += load_tile(dz_ptr", "        load_tile(dz_ptr"),
    ),
    _norm(
        "last rows missing in the backward",
        "batches that are no multiple of the tile lose the gradient of their last tokens",
        (
            "range(pid, tl.cdiv(rows_total, BLOCK_R), partials)",
            "range(pid, rows_total // BLOCK_R, partials)",
        ),
        times=2,
    ),
    # Embeddings.
    _embedding(
        "embedding's backward drops nothing",
        "dropped activations receive a gradient",
        (
            "    dy_RC = _dropped(dy_RC, seed_ptr, dropout_rows_ptr, tokens, tokens_total, cols, "
            "threshold,\n                     keep_scale, DROPOUT, DROPOUT_ROWS)",
            "    dy_RC = _dropped(dy_RC, seed_ptr, dropout_rows_ptr, tokens, tokens_total, cols, "
            "threshold,\n                     keep_scale, False, DROPOUT_ROWS)",
        ),
    ),
    _embedding(
        "second type's gradient of the first",
        "the segment embedding is not trained",
        ("_of_type(dz_RC, type_R, in_col, 1)", "_of_type(dz_RC, type_R, in_col, 0)"),
    ),
    _embedding(
        "padding_idx trained",
        "the padding embedding moves away from what it was",
        (
            "dword = _table_gradient(dz, ids, word, padding_idx)",
            "dword = _table_gradient(dz, ids, word)",
        ),
    ),
    _embedding(
        "positions shifted by one",
        "every token reads its neighbour's position",
        (
            "position_R = tl.load(position_ids_ptr + tokens, mask=in_col, other=0).to(tl.int64)",
            "position_R = tl.load(position_ids_ptr + tokens, mask=in_col, other=0).to(tl.int64)\n"
            "    position_R = tl.maximum(position_R - 1, 0)",
        ),
    ),
    # Matrix products.
    _linear(
        "tanh-GELU instead of erf-GELU",
        "every checkpoint trained with erf-GELU answers a little differently",
        ('    if ACTIVATION == "gelu":', '    if ACTIVATION == "no activation":'),
        (
            '    elif ACTIVATION == "gelu_tanh":',
            '    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "gelu":',
        ),
    ),
    _linear(
        "GELU's derivative without its second term",
        "the gradient is off by up to a half",
        ("(cumulative + z * (_INV_SQRT_2PI * tl.exp(-0.5 * z * z)))", "cumulative"),
    ),
    _linear(
        "ReLU without derivative",
        "dead units receive a gradient",
        ("g = tl.where(z <= 0, 0.0, g)", "g = g"),
    ),
    _linear(
        "tail of the sum loaded without mask",
        "columns of a neighbouring tensor enter the product",
        ("        return tl.load(ptrs, mask=mask, other=0.0)\n", "        return tl.load(ptrs)\n"),
    ),
    _linear(
        "bias gradient of the last tile only",
        "the bias is trained on the last tokens of a batch",
        ("db_MN += dz_MN.to(tl.float32)", "db_MN = dz_MN.to(tl.float32)"),
    ),
    _linear(
        "linear's backward drops nothing",
        "dropped outputs receive a gradient",
        (
            "dz = tl.where(keep, dz.to(tl.float32) * keep_scale, 0.0)",
            "dz = dz.to(tl.float32) * keep_scale",
        ),
    ),
    _linear(
        "linear's backward without dropout's scale",
        "gradients too small by the keep rate",
        (
            "dz = tl.where(keep, dz.to(tl.float32) * keep_scale, 0.0)",
            "dz = tl.where(keep, dz.to(tl.float32), 0.0)",
        ),
    ),
    _linear(
        "partial sums of the product in fp16",
        "long products lose digits",
        (
            "        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision=PRECISION)\n",
            "        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision=PRECISION)\n"
            "        acc_MN = acc_MN.to(tl.float16).to(tl.float32)\n",
        ),
    ),
    _linear(
        "bias not added",
        "a layer without its bias",
        (
            "z_MN += tl.load(b_ptr + cols, mask=cols < outs, other=0.0).to(tl.float32)[None, :]",
            "z_MN += 0.0",
        ),
    ),
    _ffn(
        "second weight's gradient against the pre-activation",
        "the second layer is trained on what was before the activation",
        ("dw2, db2 = bwd_weight(dy, h, w2", "dw2, db2 = bwd_weight(dy, z, w2"),
    ),
    _ffn(
        "second weight's gradient drops nothing",
        "dropped outputs train the second layer",
        (
            'bwd_weight(dy, h, w2, b2, None, "", *dropout)',
            'bwd_weight(dy, h, w2, b2, None, "", 0.0, None, None)',
        ),
    ),
    # Cross-entropy.
    _loss(
        "ignored rows have a gradient",
        "padding is trained on",
        ("dz_MN = tl.where(kept[:, None], dz_MN, 0.0)", "dz_MN = dz_MN"),
    ),
    _loss(
        "smoothing over one class too many",
        "gradients that do not belong to the loss",
        ("label_smoothing / classes,", "label_smoothing / (classes + 1),"),
    ),
    _loss(
        "sum not rescaled to a new maximum",
        "a loss too large wherever the largest logit comes late",
        ("s = s * tl.exp(m - finite_m) + tl.sum(e_MN, 1)", "s = s + tl.sum(e_MN, 1)"),
    ),
    _loss(
        "input gradient of the last chunk of classes only",
        "the encoder is trained by the last words of the vocabulary",
        ("ADD=first > 0", "ADD=False"),
    ),
    _loss(
        "classes past the end counted",
        "a loss too large at every vocabulary that is no multiple of the tile",
        (
            "e_MN = tl.where(inside, tl.exp(z_MN - finite_m[:, None]), 0.0)",
            "e_MN = tl.exp(z_MN - finite_m[:, None])",
        ),
    ),
    # Attention: which keys.
    _tile(
        "causal mask one too few",
        "no token sees itself",
        ("inside & (cols <= rows + high)", "inside & (cols < rows + high)"),
    ),
    _tile(
        "causal mask one too many",
        "every token sees the next one: training looks perfect, generation fails",
        ("inside & (cols <= rows + high)", "inside & (cols <= rows + high + 1)"),
    ),
    _tile(
        "window one too few",
        "a window narrower than asked for",
        ("inside & (cols >= rows + low)", "inside & (cols > rows + low)"),
    ),
    _tile(
        "key length one too many",
        "one key of padding, NaN perhaps, in every short sequence",
        (
            "len_k = tl.load(key_lengths_ptr + b).to(tl.int32)",
            "len_k = tl.minimum(tl.load(key_lengths_ptr + b).to(tl.int32) + 1, seqlen_k)",
        ),
    ),
    _tile(
        "key length one too few",
        "the last word of every padded sentence is not read",
        (
            "len_k = tl.load(key_lengths_ptr + b).to(tl.int32)",
            "len_k = tl.maximum(tl.load(key_lengths_ptr + b).to(tl.int32) - 1, 0)",
        ),
    ),
    _tile(
        "neighbour's last key leaks",
        "packed sequences see each other",
        (
            "start_k = tl.load(cu_seqlens_k_ptr + b).to(tl.int64)",
            "start_k = tl.load(cu_seqlens_k_ptr + b).to(tl.int64) - tl.where(b > 0, 1, 0)",
        ),
    ),
    _tile(
        "first key row one early",  # one late would write past the end of dk, and crash
        "packed sequences see each other",
        (
            "    return start_q, start_k, len_q, len_k",
            "    return start_q, tl.maximum(start_k - 1, 0), len_q, len_k",
        ),
    ),
    _tile(
        "holes in the padding mask ignored",
        "left padding is attended to",
        (
            "    inside = (cols >= first) & (cols < end)\n    if KEY_PADDING:",
            "    inside = (cols >= first) & (cols < end)\n    if False:",
        ),
    ),
    _tile(
        "diagonal moved by key lengths",
        "causal attention of padded batches is misaligned",
        (
            "diagonal = len_k - len_q if VARLEN else seqlen_k - seqlen_q",
            "diagonal = len_k - len_q",
        ),
    ),
    _tile(
        "causal aligned to the top left",
        "chunked generation sees too little",
        ("    if ALIGN == 1:", "    if ALIGN == 2:"),
    ),
    _tile(
        "rows past the end loaded without mask",
        "NaN of padding and neighbours reaches every result",
        ("    mask = inside[:, None]\n", "    mask = (rows >= 0)[:, None]\n"),
    ),
    _tile(
        "slack zeroed in its first rows only",
        "tokens of a fixed budget hold whatever was in memory",
        ("    while start < end:\n", "    if start < end:\n"),
    ),
    _tile(
        "softcap without its factor",
        "scores between -1 and 1",
        ("x = t * softcap", "x = t"),
    ),
    _fwd(
        "block of the diagonal not masked",
        "queries see up to a tile of later keys",
        (
            "        whole = whole // BLOCK_N * BLOCK_N",
            "        whole = tl.cdiv(whole, BLOCK_N) * BLOCK_N",
        ),
    ),
    _fwd(
        "window's first block skipped",
        "a window that ends at a tile's border",
        (
            "first_block = keys_start // BLOCK_N * BLOCK_N",
            "first_block = tl.cdiv(keys_start, BLOCK_N) * BLOCK_N",
        ),
    ),
    # Attention: forward.
    _fwd(
        "one query of 16 scaled by 0.97",
        "some tokens a little too small, which no loss curve shows",
        (
            "out_MD = acc_MD * (normalise / l_M)[:, None]",
            "out_MD = acc_MD * (tl.where(rows % 16 == 5, 0.97, 1.0) * normalise / l_M)[:, None]",
        ),
    ),
    _fwd(
        "output not rescaled to a new maximum",
        "wrong weights between the blocks of long sequences",
        ("acc_MD = acc_MD * rescale_M[:, None]", "acc_MD = acc_MD"),
    ),
    _fwd(
        "softmax normalised after dropout",
        "dropout that keeps the sum of the weights, as no other implementation does",
        ("    l_M = l_M * rescale_M + tl.sum(p_MN, 1)\n", ""),
        (
            "        p_MN = tl.where(keep, p_MN, 0.0)\n",
            "        p_MN = tl.where(keep, p_MN, 0.0)\n"
            "    l_M = l_M * rescale_M + tl.sum(p_MN, 1)\n",
        ),
    ),
    _fwd(
        "queries without keys divided by zero",
        "NaN in the first rows of a causal batch",
        ("l_M = tl.where(empty, 1.0, l_M)", "l_M = l_M"),
    ),
    _fwd(
        "lse without its maximum",
        "wrong lse, and with it a wrong backward",
        ("lse_M = m_M + tl.log(l_M)", "lse_M = tl.log(l_M)"),
    ),
    _fwd(
        "wrong key head for a group",
        "grouped-query models read another head's keys",
        (
            "(head // group).to(tl.int64)",
            "(head % (heads // group)).to(tl.int64)",
        ),
    ),
    _fwd(
        "dropout without the sequence's offset",
        "every rank drops the same elements",
        ("stream_keys(seed_ptr, b + sequence_offset, head)", "stream_keys(seed_ptr, b, head)"),
    ),
    # Attention: backward.
    _dq(
        "dq without scale",
        "queries learn sqrt(D) too fast",
        ("dq_MD * scale, rows", "dq_MD, rows"),
    ),
    _dq(
        "dq drops nothing",
        "dropped scores receive a gradient",
        ("dp_MN = tl.where(keep, dp_MN * keep_scale, 0.0)", "dp_MN = dp_MN * keep_scale"),
    ),
    _dq(
        "delta missing in dq",
        "the gradient of an unnormalised exponential",
        ("dx_MN = p_MN * (dp_MN - delta_M[:, None])", "dx_MN = p_MN * dp_MN"),
    ),
    _dq(
        "lse gradient dropped for many keys",
        "losses that use lse train nothing",
        ("out_MD.to(tl.float32), 1) - dlse_M", "out_MD.to(tl.float32), 1)"),
    ),
    _dq(
        "softcap's derivative missing in dq",
        "saturated scores receive a full gradient",
        ("        dx_MN *= 1 - tanh_MN * tanh_MN", "        dx_MN *= 1"),
    ),
    _dkdv(
        "dk without scale",
        "keys learn sqrt(D) too fast",
        ("dk_ND * scale, 0.0)", "dk_ND, 0.0)"),
    ),
    _dkdv(
        "dq of few keys without scale",
        "queries of short sequences learn sqrt(D) too fast",
        ("dq_MD * scale, rows", "dq_MD, rows"),
    ),
    _dkdv(
        "dk drops nothing",
        "dropped scores receive a gradient",
        ("dp_NM = tl.where(keep, dp_NM * keep_scale, 0.0)", "dp_NM = dp_NM * keep_scale"),
    ),
    _dkdv(
        "dv drops nothing",
        "dropped values receive a gradient",
        ("kept_NM = tl.where(keep, p_NM, 0.0)", "kept_NM = p_NM"),
    ),
    _dkdv(
        "dv without dropout's scale",
        "values learn too slowly by the keep rate",
        ("dv_ND = dv_ND * keep_scale", "dv_ND = dv_ND"),
    ),
    _dkdv(
        "lse gradient dropped for few keys",
        "losses that use lse train nothing",
        ("        if DLSE:\n            delta_M -=", "        if False:\n            delta_M -="),
    ),
    _dkdv(
        "softcap's derivative missing in dk",
        "saturated scores receive a full gradient",
        ("        dx_NM *= 1 - tanh_NM * tanh_NM", "        dx_NM *= 1"),
    ),
    _dkdv(
        "first head of a group only",
        "shared keys are trained by one of their query heads",
        ("head = key_head * group + member", "head = key_head * group"),
        times=2,
    ),
    _dkdv(
        "queries past the window counted",
        "the gradient of keys that were not attended to",
        (
            "end = tl.minimum(len_q, tl.maximum(last_key - low + 1, 0))",
            "end = tl.minimum(len_q, tl.maximum(last_key - low, 0))",
        ),
    ),
    _dbias(
        "bias gradient drops nothing",
        "dropped scores train the bias",
        ("dp_MN = tl.where(keep, dp_MN * keep_scale, 0.0)", "dp_MN = dp_MN * keep_scale"),
    ),
    _dbias(
        "bias gradient past the mask",
        "masked scores train the bias",
        (
            "allowed = allowed & in_band(rows[:, None], cols[None, :], low, high, LOW, HIGH)",
            "allowed = allowed",
        ),
    ),
    _call(
        "bias gradient not summed over the batch",
        "a shared bias is trained by the first sequence of a batch",
        ("SUM_BATCH=over[0]", "SUM_BATCH=False"),
    ),
    _call(
        "bias gradient not summed over heads",
        "a shared bias is trained by the first head",
        ("SUM_HEADS=over[1]", "SUM_HEADS=False"),
    ),
    _call(
        "window_right ignored under causal",
        "a causal window that sees the future",
        ("            window_right = 0\n", "            window_right = max(window_right, 0)\n"),
    ),
    # Decoding.
    _decode(
        "decoding window one too wide",
        "a window wider than the training's",
        ("tl.maximum(end - 1 - window_left, 0)", "tl.maximum(end - 2 - window_left, 0)"),
    ),
    _decode(
        "one key of the cache's slack read",
        "whatever the cache held before, NaN perhaps",
        ("(keys >= first) & (keys < end)", "(keys >= first) & (keys <= end)"),
    ),
    _decode(
        "last split forgotten under a window",
        "the newest keys are not attended to",
        (
            "used = tl.cdiv(end, KEYS) - first // KEYS",
            "used = tl.cdiv(end - first, KEYS)",
        ),
    ),
    _decode(
        "splits not rescaled to a common maximum",
        "wrong weights between the splits of a long cache",
        (
            "total = total * rescale + tl.sum(total_C * w_C, 0)",
            "total = total + tl.sum(total_C, 0)",
        ),
    ),
    _decode(
        "second block of a group's heads reads the first",
        "more than 16 query heads a key head answer alike",
        ("first_head = head_k * GROUP + first_in_group", "first_head = head_k * GROUP"),
    ),
)

# What `make test` runs: one each of row kernels, attention forward and attention backward.
SAMPLE = (
    "statistics in fp16",
    "causal mask one too few",
    "dq drops nothing",
)
