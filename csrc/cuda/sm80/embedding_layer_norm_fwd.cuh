// BERT's input (Devlin et al. 2018): three gathered rows are added, normalised and dropped in
// registers; y alone is written.
//
//   z = word[id] + position[p] + type[t],  y = dropout((z − mean) · rstd · weight + bias)
//
// A token with an id that its table does not have has z = NaN, and so NaN in y, mean and rstd.
#pragma once

#include "cuda/sm80/embedding_layer_norm_row.cuh"
#include "cuda/sm80/layer_norm_fwd.cuh"

namespace bertkern::sm80 {

// T: of the tables and y.
template <typename T, typename Tile>
BERTKERN_KERNEL((layer_norm_fwd_bound<T, Tile>()))
embedding_layer_norm_fwd_kernel(const EmbeddingKernelArguments a) {
  constexpr int kVectors = Tile::kVectors;
  const NormRows& rows = a.rows;
  const RowThread<Tile> thread(rows);
  const int64_t token = thread.first_row();
  if (token >= rows.count) return;  // as in layer_norm_fwd_kernel

  int row[kTables];
  bool exist = true;
#pragma unroll
  for (int table = 0; table < kTables; ++table) {
    const int64_t id = token_id(a.ids, table, token);
    row[table] = nearest_row(id, a.tables.size[table]);
    exist = exist && row[table] == id;
  }
  float z[kVectors][kVector];
  {
    Raw<T> word[kVectors], position[kVectors], type[kVectors];
    load_table_row(word, a.tables, 0, row[0], thread, rows);
    load_table_row(position, a.tables, 1, row[1], thread, rows);
    load_table_row(type, a.tables, 2, row[2], thread, rows);
    add_rows(word, position, type, z);
  }
  if (!exist) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) z[i][j] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  const bool drops = a.dropout.threshold != 0;
  DropoutRow keys{};
  if (drops) keys = hidden_row(a.dropout, hidden_stream(a.dropout), token);
  normalise_row<T>(z, token, a.eps, a.weight, a.bias, a.y, a.mean, a.rstd, rows, thread,
                   [&](float (&y)[kVector], int column) {
                     if (drops) drop_vector(y, keys, column, a.dropout);
                   });
}

}  // namespace bertkern::sm80
