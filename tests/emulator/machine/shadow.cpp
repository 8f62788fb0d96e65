#include "machine/shadow.h"

#include <algorithm>

namespace bertkern::emulator {
namespace {

bool covers(const Access& access, const Access& earlier) {
  return (earlier.mask & ~access.mask) == 0;
}

bool same_thread(const Access& a, const Access& b) {
  return a.component == b.component && a.cluster == b.cluster;
}

// The access of a list that races with `access`; those that it makes superfluous are forgotten.
template <typename Order>
const Access* pass(Accesses& list, const Access& access, const Order& order, bool forget) {
  for (uint32_t i = 0; i < list.count;) {
    Access& earlier = list.first[i];
    if ((earlier.mask & access.mask) != 0) {
      const bool before = order.has_before(earlier);
      if (!before && !(earlier.atomic && access.atomic)) return &earlier;
      if (forget && before && covers(access, earlier)) {
        earlier = list.first[--list.count];
        continue;
      }
    }
    ++i;
  }
  return nullptr;
}

void append(Accesses& list, const Access& access, Pool& pool) {
  if (list.count == list.room) {
    const uint32_t room = list.room == 0 ? 2 : 2 * list.room;
    Access* larger = pool.take(room);
    std::copy_n(list.first, list.count, larger);
    list.first = larger;
    list.room = room;
  }
  list.first[list.count++] = access;
}

// Reads do not race with each other, so most of them need no look at those before.
template <typename Order>
void append_read(Accesses& list, const Access& access, const Order& order, Pool& pool) {
  if (list.count != 0) {
    Access& last = list.first[list.count - 1];
    if (same_thread(last, access)) {
      if (last.time == access.time && covers(last, access)) return;
      if (covers(access, last) && order.has_before(last)) {
        last = access;
        return;
      }
    }
  }
  if (list.count == list.room) {
    for (uint32_t i = 0; i < list.count;) {
      const Access& earlier = list.first[i];
      if (same_thread(earlier, access) && covers(access, earlier) && order.has_before(earlier)) {
        list.first[i] = list.first[--list.count];
      } else {
        ++i;
      }
    }
  }
  append(list, access, pool);
}

}  // namespace

Access* Pool::take(uint32_t count) {
  if (count > kChunk) {
    large_.push_back(std::make_unique<Access[]>(count));
    return large_.back().get();
  }
  if (used_ + count > kChunk) {
    if (++next_ > chunks_.size()) chunks_.push_back(std::make_unique<Access[]>(kChunk));
    used_ = 0;
  }
  Access* taken = chunks_[next_ - 1].get() + used_;
  used_ += count;
  return taken;
}

void Pool::reset() {
  large_.clear();
  next_ = 0;
  used_ = kChunk;
}

template <typename Order>
std::optional<Race> touch(Cell& cell, const Access& access, bool write, const Order& order,
                          Pool& pool) {
  if (const Access* race = pass(cell.writes, access, order, write)) return Race{*race, true};
  if (!write) {
    append_read(cell.reads, access, order, pool);
    return std::nullopt;
  }
  if (const Access* race = pass(cell.reads, access, order, true)) return Race{*race, false};
  append(cell.writes, access, pool);
  return std::nullopt;
}

template std::optional<Race> touch(Cell&, const Access&, bool, const ThreadOrder&, Pool&);
template std::optional<Race> touch(Cell&, const Access&, bool, const EngineOrder&, Pool&);
template std::optional<Race> touch(Cell&, const Access&, bool, const ProductOrder&, Pool&);

}  // namespace bertkern::emulator
