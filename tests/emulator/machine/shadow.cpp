#include "machine/shadow.h"

#include <algorithm>

namespace bertkern::emulator {
namespace {

bool is_before(const Access& earlier, const Access& access, const Clock& clock) {
  return earlier.block == access.block && clock.knows(earlier.component, earlier.time);
}

bool covers(const Access& access, const Access& earlier) {
  return (earlier.mask & ~access.mask) == 0;
}

// The access of a list that races with `access`; those that it makes superfluous are forgotten.
const Access* pass(Accesses& list, const Access& access, const Clock& clock, bool forget) {
  for (uint32_t i = 0; i < list.count;) {
    Access& earlier = list.first[i];
    if ((earlier.mask & access.mask) != 0) {
      if (!is_before(earlier, access, clock)) return &earlier;
      if (forget && covers(access, earlier)) {
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
void append_read(Accesses& list, const Access& access, const Clock& clock, Pool& pool) {
  if (list.count != 0) {
    Access& last = list.first[list.count - 1];
    if (last.component == access.component && last.block == access.block) {
      if (last.time == access.time && covers(last, access)) return;
      if (covers(access, last) && is_before(last, access, clock)) {
        last = access;
        return;
      }
    }
  }
  if (list.count == list.room) {
    for (uint32_t i = 0; i < list.count;) {
      const Access& earlier = list.first[i];
      if (covers(access, earlier) && is_before(earlier, access, clock)) {
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

std::optional<Race> touch(Cell& cell, const Access& access, bool write, const Clock& clock,
                          Pool& pool) {
  if (const Access* race = pass(cell.writes, access, clock, write)) return Race{*race, true};
  if (!write) {
    append_read(cell.reads, access, clock, pool);
    return std::nullopt;
  }
  if (const Access* race = pass(cell.reads, access, clock, true)) return Race{*race, false};
  append(cell.writes, access, pool);
  return std::nullopt;
}

}  // namespace bertkern::emulator
