// Gradients of the tables word, position and type: a row receives the sum of dz over the tokens
// that read it, added in fp32 and in a fixed order, without atomics.
//
// Every token has three keys, its rows of the three tables counted as one (norm_params.h). The host
// sorts the 3 · tokens keys, stably; equal keys, a segment, then stand side by side in the order of
// the tokens. table_grad cuts the sorted keys into chunks of 64, whatever the segments: a warp adds
// 256 columns of a chunk's rows of dz, one after the other. A segment inside a chunk is finished;
// one that crosses chunks leaves in each its partial sum, and table_grad_join adds these. So a word
// that is half of the text costs its warps no more than rare ones. Other blocks of table_grad clear
// the rows that no token read: each row is written once.
#pragma once

#include "cuda/sm80/embedding_layer_norm_row.cuh"
#include "cuda/sm80/layer_norm_sums.cuh"

namespace bertkern::sm80 {

constexpr int kKeyThreads = 256;

inline int64_t embedding_key_blocks(int64_t tokens) {
  return (tokens + kKeyThreads - 1) / kKeyThreads;
}

BERTKERN_KERNEL(kKeyThreads)
embedding_key_kernel(const EmbeddingKeyArguments a) {
  const int64_t token =
      static_cast<int64_t>(ptx::block_index()) * kKeyThreads + ptx::thread_index();
  if (token >= a.tokens) return;
  int before = 0;
#pragma unroll
  for (int table = 0; table < kTables; ++table) {
    const int64_t id = token_id(a.ids, table, token);
    a.keys[table * a.tokens + token] = before + nearest_row(id, a.size[table]);
    before += a.size[table];
  }
}

constexpr int kChunk = 64;                           // sorted keys
constexpr int kStrip = ptx::kWarpThreads * kVector;  // columns
constexpr int kTableWarps = 4, kTableThreads = kTableWarps * ptx::kWarpThreads;
constexpr int kTableSharedBytes = kTableWarps * kStrip * 4;  // of table_grad_join

inline int64_t table_chunks(int64_t tokens) { return (kTables * tokens + kChunk - 1) / kChunk; }
constexpr int table_strips(int cols) { return (cols + kStrip - 1) / kStrip; }
inline int64_t table_sum_blocks(int64_t tokens, int cols) {
  return (table_chunks(tokens) * table_strips(cols) + kTableWarps - 1) / kTableWarps;
}
inline int64_t table_clear_blocks(const int (&size)[kTables]) {
  return (static_cast<int64_t>(size[0]) + size[1] + size[2] + kTableThreads - 1) / kTableThreads;
}

BERTKERN_DEVICE int table_of(const TableGradArguments& a, int key) {
  return key < a.size[0] ? 0 : key < a.size[0] + a.size[1] ? 1 : 2;
}

// A row of gradient; `sum` of the columns from `column` on.
template <typename T>
BERTKERN_DEVICE void store_gradient(const TableGradArguments& a, int key, int column,
                                    const float (&sum)[kVector]) {
  const int table = table_of(a, key);
  const int row = key - (table > 0 ? a.size[0] : 0) - (table > 1 ? a.size[1] : 0);
  T* gradient = static_cast<T*>(table == 0   ? a.gradient[0]
                                : table == 1 ? a.gradient[1]
                                             : a.gradient[2]);
  store_vector(gradient + static_cast<int64_t>(row) * a.cols, column, a.cols, a.aligned,
               pack_vector<T>(sum));
}

// Where a chunk leaves the sum of a segment that it shares: of one that began before it, and of one
// that goes on after it (a segment that does both is of the first kind).
BERTKERN_DEVICE float* shared_sum(const TableGradArguments& a, int64_t chunk, bool began_before,
                                  int column) {
  return a.partial + (2 * chunk + (began_before ? 0 : 1)) * a.dz_stride + column;
}

BERTKERN_DEVICE void add_four(float (&sum)[kVector], const float* address) {
#pragma unroll
  for (int j = 0; j < kVector; j += 4) {
    const Four four = *reinterpret_cast<const Four*>(address + j);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[j + k] += four.value[k];
  }
}

BERTKERN_DEVICE void store_four(const float (&sum)[kVector], float* address) {
#pragma unroll
  for (int j = 0; j < kVector; j += 4) {
    *reinterpret_cast<Four*>(address + j) = Four{{sum[j], sum[j + 1], sum[j + 2], sum[j + 3]}};
  }
}

// The rows of dz that the keys of a chunk name, a warp's strip of columns.
template <typename T>
BERTKERN_DEVICE void add_chunk(const TableGradArguments& a, int64_t chunk, int strip) {
  constexpr int kBatch = 8;  // rows whose loads are on their way together
  const int lane = ptx::thread_index() % ptx::kWarpThreads;
  const int column = strip * kStrip + lane * kVector;
  const int64_t count = kTables * a.tokens, first = chunk * kChunk;
  const int64_t last = first + kChunk < count ? first + kChunk : count;

  int segment = a.keys[first];
  bool began_before = first > 0 && a.keys[first - 1] == segment;
  float sum[kVector] = {};
  const auto finish = [&](bool ends_here) {
    if (segment == a.padding_row || column >= a.cols) return;
    if (!began_before && ends_here) {
      store_gradient<T>(a, segment, column, sum);
    } else {
      store_four(sum, shared_sum(a, chunk, began_before, column));
    }
  };
  for (int64_t start = first; start < last; start += ptx::kWarpThreads) {
    const int64_t mine = start + lane;  // each lane fetches one key and its token for all
    const int my_key = mine < last ? a.keys[mine] : -1;
    const int64_t my_token = mine < last ? a.order[mine] - table_of(a, my_key) * a.tokens : 0;
#pragma unroll 1
    for (int batch = 0; batch < ptx::kWarpThreads && start + batch < last; batch += kBatch) {
      int key[kBatch];
      Raw<T> dz[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        key[u] = static_cast<int>(ptx::shuffle_index(static_cast<uint32_t>(my_key), batch + u));
        const int64_t token = ptx::shuffle_index(static_cast<uint32_t>(my_token), batch + u);
        const bool wanted = key[u] >= 0 && key[u] != a.padding_row;
        dz[u] = load_vector(static_cast<const T*>(a.dz) + token * a.dz_stride, column,
                            wanted ? a.cols : 0, true);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (key[u] < 0) continue;  // past the last chunk's end
        if (key[u] != segment) {
          finish(true);
          segment = key[u];
          began_before = false;
#pragma unroll
          for (int j = 0; j < kVector; ++j) sum[j] = 0.0f;
        }
        float values[kVector];
        unpack(dz[u], values);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum[j] += values[j];
      }
    }
  }
  finish(last == count || a.keys[last] != segment);
}

// Whether some token reads a row of the tables: its key is among the sorted ones of its table.
BERTKERN_DEVICE bool is_read(const TableGradArguments& a, int key) {
  int64_t low = table_of(a, key) * a.tokens, high = low + a.tokens;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < kTables * a.tokens && a.keys[low] == key;
}

// Of 32 rows from `first` on, zeros in those that no token read, and in the padding row.
template <typename T>
BERTKERN_DEVICE void clear_rows(const TableGradArguments& a, int64_t first) {
  const int lane = ptx::thread_index() % ptx::kWarpThreads;
  const int64_t rows = static_cast<int64_t>(a.size[0]) + a.size[1] + a.size[2];
  const int64_t mine = first + lane;
  const bool clear = mine < rows && (mine == a.padding_row || !is_read(a, static_cast<int>(mine)));
  const float zeros[kVector] = {};
#pragma unroll 1
  for (int other = 0; other < ptx::kWarpThreads; ++other) {
    if (ptx::shuffle_index(clear ? 1 : 0, other) == 0) continue;
    for (int column = lane * kVector; column < a.cols; column += kStrip) {
      store_gradient<T>(a, static_cast<int>(first) + other, column, zeros);
    }
  }
}

// T: of dz and the gradients.
template <typename T>
BERTKERN_KERNEL(kTableThreads)
table_grad_kernel(const TableGradArguments a) {
  // Fewer than 2^31 keys, and so than 2^30 warps (32 strips at most): an int holds them.
  const int in_block = ptx::thread_index() / ptx::kWarpThreads;
  if (ptx::block_index() < a.sum_blocks) {
    const int strips = table_strips(a.cols);
    const int warp = ptx::block_index() * kTableWarps + in_block;
    const int64_t chunk = warp / strips;
    if (chunk * kChunk >= kTables * a.tokens) return;
    add_chunk<T>(a, chunk, warp % strips);
  } else {
    const int warp = (ptx::block_index() - a.sum_blocks) * kTableWarps + in_block;
    clear_rows<T>(a, static_cast<int64_t>(warp) * ptx::kWarpThreads);
  }
}

// A block for each chunk and strip of columns: the sum of the segment that begins in this chunk and
// goes on after it, if there is one. Each warp adds every fourth chunk, in order, and the first
// warp adds the warps.
template <typename T>
BERTKERN_KERNEL(kTableThreads)
table_grad_join_kernel(const TableGradArguments a) {
  const int strips = table_strips(a.cols);
  const int64_t chunk = ptx::block_index() / strips, count = kTables * a.tokens;
  const int64_t first = chunk * kChunk, last = first + kChunk;
  if (last >= count) return;
  const int segment = a.keys[last];
  const bool goes_on = a.keys[last - 1] == segment;
  const bool began_before = first > 0 && a.keys[first - 1] == segment;
  if (!goes_on || began_before || segment == a.padding_row) return;
  // The last chunk that has some of it, all of whose predecessors begin with it.
  int64_t end = chunk + 1, beyond = (count + kChunk - 1) / kChunk;
  while (beyond - end > 1) {
    const int64_t middle = (end + beyond) / 2;
    (a.keys[middle * kChunk] == segment ? end : beyond) = middle;
  }

  const int lane = ptx::thread_index() % ptx::kWarpThreads;
  const int warp = ptx::thread_index() / ptx::kWarpThreads;
  const int in_strip = lane * kVector;
  const int column = ptx::block_index() % strips * kStrip + in_strip;
  const bool inside = column < a.cols;
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
  float sum[kVector] = {};
  if (inside) {
    if (warp == 0) add_four(sum, shared_sum(a, chunk, false, column));
#pragma unroll 4
    for (int64_t other = chunk + 1 + warp; other <= end; other += kTableWarps) {
      add_four(sum, shared_sum(a, other, true, column));
    }
  }
  store_four(sum, shared + warp * kStrip + in_strip);
  ptx::block_barrier();
  if (warp != 0 || !inside) return;
#pragma unroll
  for (int other = 1; other < kTableWarps; ++other) {
    add_four(sum, shared + other * kStrip + in_strip);
  }
  store_gradient<T>(a, segment, column, sum);
}

}  // namespace bertkern::sm80
