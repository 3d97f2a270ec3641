// What was prepared, by key: safe under concurrent look-up, insertion and eviction.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

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
// table is told by drop(), after no look-up can find it.
template <class Entry>
class Table {
 public:
  // Past this many entries all are forgotten, and prepared again when they are asked for.
  static constexpr size_t kMost = 16384;

  std::shared_ptr<Entry> find(const Key& key) const {
    std::shared_lock lock(mutex_);
    auto found = entries_.find(key);
    return found == entries_.end() ? nullptr : found->second;
  }

  void insert(const Key& key, std::shared_ptr<Entry> entry) {
    if (size() >= kMost) {
      erase([](const Entry&) { return true; });
    }
    std::shared_ptr<Entry> replaced;
    {
      std::unique_lock lock(mutex_);
      auto& place = entries_[key];
      replaced = std::exchange(place, std::move(entry));
    }
    if (replaced != nullptr) replaced->drop();
  }

  // Forgets the entries that unwanted() names; returns how many.
  template <class Unwanted>
  int64_t erase(Unwanted unwanted) {
    std::vector<std::shared_ptr<Entry>> gone;
    {
      std::unique_lock lock(mutex_);
      for (auto at = entries_.begin(); at != entries_.end();) {
        if (unwanted(*at->second)) {
          gone.push_back(std::move(at->second));
          at = entries_.erase(at);
        } else {
          ++at;
        }
      }
    }
    for (auto& entry : gone) entry->drop();
    return static_cast<int64_t>(gone.size());
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
