// What was prepared, by key: safe under concurrent look-up, insertion and eviction.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace semisparse {

// Everything that a prepared product or launch depends on, addresses aside, as eight integers (ops.h fills them in).
using Key = std::array<int64_t, 8>;

struct KeyHash {
  size_t operator()(const Key& key) const noexcept {
    uint64_t hash = 0x9e3779b97f4a7c15ull;
    for (int64_t field : key) {
      hash = (hash ^ static_cast<uint64_t>(field)) * 0xff51afd7ed558ccdull;
      hash ^= hash >> 32;
    }
    return static_cast<size_t>(hash);
  }
};

// Entries are shared with the calls that use them, so eviction never takes one away from a call. An entry that leaves the
// table, for whatever reason, is dropped (Entry::drop) before the table can be seen without it: who finds that an entry
// is gone may free what it points to.
template <class Entry, size_t most = 16384>
class Table {
 public:
  std::shared_ptr<Entry> find(const Key& key) const {
    std::shared_lock lock(mutex_);
    auto found = entries_.find(key);
    return found == entries_.end() ? nullptr : found->second;
  }

  // Where the table holds its most already, all entries are forgotten, and prepared again when they are asked for.
  void insert(const Key& key, std::shared_ptr<Entry> entry) {
    std::unique_lock lock(mutex_);
    if (entries_.size() >= most) {
      for (auto& [_, evicted] : entries_) evicted->drop();
      entries_.clear();
    }
    std::shared_ptr<Entry>& place = entries_[key];
    if (place != nullptr) place->drop();
    place = std::move(entry);
  }

  // Forgets the entries that unwanted() names. Returns their number.
  template <class Unwanted>
  int64_t erase(Unwanted unwanted) {
    std::unique_lock lock(mutex_);
    return static_cast<int64_t>(std::erase_if(entries_, [&](const auto& entry) {
      if (!unwanted(*entry.second)) return false;
      entry.second->drop();
      return true;
    }));
  }

  size_t size() const {
    std::shared_lock lock(mutex_);
    return entries_.size();
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<Entry>, KeyHash> entries_;
};

}  // namespace semisparse
