// The rows of word, position and type that a token names, and their sum in registers.
#pragma once

#include <limits>

#include "cuda/sm80/layer_norm_row.cuh"

namespace bertkern::sm80 {

// `ids` of one table.
BERTKERN_DEVICE int64_t token_id(const EmbeddingIds& ids, int table, int64_t token) {
  const void* data = ids.data[table];
  if (data == nullptr) return 0;
  return ids.wide[table] ? static_cast<const int64_t*>(data)[token]
                         : static_cast<const int32_t*>(data)[token];
}

// The row of a table that is nearest to an id: to refuse one that the table does not have, the host
// would have to wait for it.
BERTKERN_DEVICE int nearest_row(int64_t id, int size) {
  return id < 0 ? 0 : id < size ? static_cast<int>(id) : size - 1;
}

template <typename T, typename Tile>
BERTKERN_DEVICE void load_table_row(Raw<T> (&raw)[Tile::kVectors], const EmbeddingTables& tables,
                                    int table, int row, const RowThread<Tile>& thread,
                                    const NormRows& rows) {
  load_row(raw, static_cast<const T*>(tables.data[table]) + row * tables.stride[table], thread,
           rows.cols, rows.aligned);
}

// z = (word + position) + type, not rounded to T.
template <typename T, int kVectors>
BERTKERN_DEVICE void add_rows(const Raw<T> (&word)[kVectors], const Raw<T> (&position)[kVectors],
                              const Raw<T> (&type)[kVectors], float (&z)[kVectors][kVector]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float p[kVector], t[kVector];
    unpack(word[i], z[i]);
    unpack(position[i], p);
    unpack(type[i], t);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[i][j] = (z[i][j] + p[j]) + t[j];
  }
}

}  // namespace bertkern::sm80
