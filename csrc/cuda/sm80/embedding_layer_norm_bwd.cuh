// Gradients of BERT's input up to the sum of the three rows; those of the tables follow from them
// in embedding_layer_norm_tables.cuh.
//
//   forward:  z = word[id] + position[p] + type[t],  y = dropout(x̂ · weight + bias)
//   d = dropout'(dy),  g = d · weight,  dz = rstd · (g − mean(g) − x̂ · mean(g · x̂))
//   dweight = Σ_tokens d · x̂,  dbias = Σ_tokens d
//
// z is gathered again. The blocks walk over the tokens as those of layer_norm_bwd do over rows; the
// next token's rows are on their way while one is worked on.
#pragma once

#include "cuda/sm80/embedding_layer_norm_row.cuh"
#include "cuda/sm80/layer_norm_sums.cuh"

namespace bertkern::sm80 {

// T: of dy, the tables and dz.
template <typename T, typename Tile>
BERTKERN_KERNEL((layer_norm_bwd_bound<T, Tile>()))
embedding_layer_norm_bwd_kernel(const EmbeddingGradKernelArguments a) {
  constexpr int kVectors = Tile::kVectors;
  constexpr bool kLoadEarly = sizeof(T) == 2;  // as in layer_norm_bwd_kernel
  const NormRows& rows = a.rows;
  const RowThread<Tile> thread(rows);
  const bool drops = a.dropout.threshold != 0;
  const DropoutStream stream = drops ? hidden_stream(a.dropout) : DropoutStream{};
  ColumnSums<Tile> sums;

  Raw<T> dy[kVectors], word[kVectors];
  float mean = 0.0f, rstd = 0.0f;
  const auto load_keys = [&](int32_t (&key)[kTables], int64_t token) {
    if (token >= rows.count) return;
#pragma unroll
    for (int table = 0; table < kTables; ++table) key[table] = a.keys[table * rows.count + token];
  };
  // What comes from far away; position and type are small enough to stay in a cache.
  const auto load = [&](const int32_t (&key)[kTables], int64_t token) {
    if (token >= rows.count) return;
    load_row(dy, static_cast<const T*>(a.dy) + token * a.dy_stride, thread, rows.cols,
             rows.aligned);
    load_table_row(word, a.tables, 0, key[0], thread, rows);
    mean = a.mean[token];
    rstd = a.rstd[token];
  };

  const int64_t step = thread.row_step();
  int32_t key[kTables] = {}, next_key[kTables] = {};
  load_keys(key, thread.first_row());
  load_keys(next_key, thread.first_row() + step);
  if constexpr (kLoadEarly) load(key, thread.first_row());
  for (int64_t token = thread.first_row(); token < rows.count; token += step) {
    if constexpr (!kLoadEarly) load(key, token);
    float x_hat[kVectors][kVector], g[kVectors][kVector];
    {
      Raw<T> position[kVectors], type[kVectors];
      load_table_row(position, a.tables, 1, key[1] - a.tables.size[0], thread, rows);
      load_table_row(type, a.tables, 2, key[2] - a.tables.size[0] - a.tables.size[1], thread, rows);
      add_rows(word, position, type, x_hat);
    }
    const float this_mean = mean, this_rstd = rstd;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack(dy[i], g[i]);
    if constexpr (kLoadEarly) load(next_key, token + step);
#pragma unroll
    for (int table = 0; table < kTables; ++table) key[table] = next_key[table];
    load_keys(next_key, token + 2 * step);
    DropoutRow dropout_keys{};
    if (drops) dropout_keys = hidden_row(a.dropout, stream, token);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = thread.column(i);
      fill_past_end(x_hat[i], column, rows.cols, this_mean);
#pragma unroll
      for (int j = 0; j < kVector; ++j) x_hat[i][j] = (x_hat[i][j] - this_mean) * this_rstd;
      if (drops) drop_vector(g[i], dropout_keys, column, a.dropout);
    }
    sums.add(x_hat, g);
    layer_norm_bwd_row<T>(x_hat, g, this_rstd, a.weight, rows, thread, sums.row_buffer());
    T* dz = static_cast<T*>(a.dz) + token * a.dz_stride;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      store_vector(dz, thread.column(i), static_cast<int>(a.dz_stride), true, pack_vector<T>(g[i]));
    }
  }
  if (a.partial != nullptr) sums.store(a.partial, rows.cols, thread);
}

}  // namespace bertkern::sm80
