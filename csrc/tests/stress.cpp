// Many threads use, replace, evict and drop what is prepared, without torch: run under thread and address sanitizers.
//
//     stress SECONDS [defect]
//
// Exit status 0: no plan was used after it was dropped, and no two different calls share a key. With a defect (free-early,
// share-keys) the program must fail; a test shows that it does.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../keys.h"

namespace {

using namespace semisparse;

constexpr int64_t kAlive = 0x600d, kFreed = 0xdead;
constexpr int kThreads = 6, kSizes = 12;
constexpr size_t kMost = 64;  // so that tables overflow often

struct Shared {
  Prepared prepared;
  Table<Product, kMost> products;
  Table<Launch, kMost> launches;
};

struct Plan {
  std::atomic<int64_t> state{kAlive};
  void* bias = nullptr;
  int64_t uses = 0, last_use = 0;
};

std::atomic<int64_t> products_started{0}, used_after_drop{0}, wrong_addresses{0};
std::atomic<bool> stopped{false};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::_Exit(1);
}

int matmul(const void*, const void* plan, const void*, const void*, const void*, const void*, const void*, void*, void*,
           void**, int32_t) {
  const Plan* used = static_cast<const Plan*>(plan);
  for (int look = 0; look < 3; ++look) {
    if (used->state.load() != kAlive) used_after_drop++;
    std::this_thread::yield();  // so that a drop() that does not wait comes in between
  }
  products_started++;
  return 0;
}

int set_attribute(const void*, void*, int attribute, const void* value, size_t bytes) {
  if (attribute != 8 || value == nullptr || bytes != sizeof(void*)) wrong_addresses++;
  return 0;
}

int launch_kernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void** parameters,
                  void**) {
  // Each launch was given two addresses, one behind the other, and then the number 7.
  int64_t words[3];
  for (int n = 0; n < 3; ++n) std::memcpy(&words[n], parameters[n], sizeof(int64_t));
  if (words[1] != words[0] + 16 || words[2] != 7) wrong_addresses++;
  return 0;
}

Functions functions() {
  Functions given{};
  given.matmul = matmul;
  given.set_attribute = set_attribute;
  given.launch_kernel = launch_kernel;
  return given;
}

// Threads share keys here, unlike in the library, so that one drops what another one is using.
Key shared_key(int size) { return {0, 0, size, 0, 0, 0, 0, 1}; }

std::shared_ptr<Product> product_with(Plan* plan) {
  ProductFacts facts{};
  facts.plan = plan;
  facts.descriptor = plan;
  facts.bias = &plan->bias;
  facts.uses = &plan->uses;
  facts.last_use = &plan->last_use;
  facts.bias_follows = 1;
  return std::make_shared<Product>(facts);
}

std::shared_ptr<Launch> launch() {
  LaunchFacts facts{};
  facts.parameter_count = 3;
  facts.source[1] = 1;
  facts.source[2] = -1;
  facts.value[2] = 7;
  return std::make_shared<Launch>(facts);
}

// Prepares plans, uses its own and others', and frees its own after their drop.
void work(Shared& shared, int seed, bool early) {
  shared.prepared.connect(functions());
  std::mt19937 random(static_cast<unsigned>(seed));
  std::vector<std::unique_ptr<Plan>> own, freed;
  while (!stopped.load()) {
    const int size = static_cast<int>(random() % kSizes);
    const Key key = shared_key(size);
    switch (random() % 8) {
      case 0:
        own.push_back(std::make_unique<Plan>());
        shared.products.insert(key, product_with(own.back().get()));
        shared.launches.insert(key, launch());
        break;
      case 1: {
        if (own.empty()) break;
        auto plan = std::move(own.back());
        own.pop_back();
        if (early) plan->state = kFreed;  // defect
        shared.products.erase([&](const Product& product) { return product.facts.plan == plan.get(); });
        plan->state = kFreed;
        if (early) freed.push_back(std::move(plan));  // else its memory goes, for the address sanitizer
        break;
      }
      case 2:
        if (random() % 16 == 0) shared.products.erase([](const Product&) { return true; });
        break;
      default: {
        char memory[32];
        if (auto found = shared.products.find(key)) {
          found->start(shared.prepared.functions, memory, memory, memory, memory + random() % 2 * 16, nullptr, nullptr);
        }
        if (auto found = shared.launches.find(key)) {
          found->start(shared.prepared.functions, std::array<void*, 2>{memory, memory + 16}, nullptr);
        }
      }
    }
  }
  for (auto& plan : own) {
    shared.products.erase([&](const Product& product) { return product.facts.plan == plan.get(); });
    plan->state = kFreed;
  }
}

// Fills a table past its limit again and again while another thread uses and frees its plans.
void evict(Shared& shared) {
  Plan plan;
  int64_t number = 1000;
  while (!stopped.load()) {
    shared.products.insert({0, 0, ++number, 0, 0, 0, 0, 1}, product_with(&plan));
    if (number % 512 == 0) std::this_thread::yield();
  }
  shared.products.erase([&](const Product& product) { return product.facts.plan == &plan; });
}

// Every pair of calls that differ in one thing differs in key.
void check_keys(bool shared) {
  std::set<Key> keys;
  size_t made = 0;
  const auto add = [&](const Key& key) {
    keys.insert(key);
    ++made;
  };
  for (int32_t device : {-1, 0, 1, 127})
    for (int32_t dtype : {5, 6, 15})
      for (int64_t tokens : {1, 2, 1 << 20})
        for (int64_t out_features : {16, 32})
          for (int64_t in_features : {16, 32})
            for (const char* backend : {"auto", "cusparselt", "dense"})
              for (bool bias : {false, true})
                for (auto kind : {ProductKind::weight, ProductKind::tokens, ProductKind::grad_weight, ProductKind::fp8})
                  add(product_key(kind, shared ? 0 : device, dtype, tokens, out_features, in_features, bias, backend));
  const Key here = product_key(ProductKind::weight, 0, 5, 1, 16, 16, false, "auto");
  std::thread([&] { add(product_key(ProductKind::weight, 0, 5, 1, 16, 16, false, "auto")); }).join();
  if (here != product_key(ProductKind::weight, 0, 5, 1, 16, 16, false, "auto")) fail("one thread has two numbers");
  for (int32_t device : {-1, 0, 1, 127})
    for (int32_t read : {0, 5, 6, 15})
      for (int32_t written : {5, 15})
        for (const char* mask : {"", "transposable", "row", "soft", "greedy", "signed_greedy"})
          for (int64_t rows : {16, 32})
            for (int64_t columns : {16, 32})
              for (int64_t stride : {0, 16, 32})
                for (bool codes : {false, true})
                  for (bool scale : {false, true})
                    for (auto kind :
                         {LaunchKind::pack, LaunchKind::pack_tokens, LaunchKind::unpack, LaunchKind::add_bias,
                          LaunchKind::rescale})
                      add(launch_key(kind, device, read, written, mask, rows, columns, stride, codes, scale));
  if (keys.size() != made) fail(std::to_string(made - keys.size()) + " keys are shared by different calls");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) fail("usage: stress SECONDS [free-early | share-keys]");
  const std::string defect = count > 2 ? arguments[2] : "";
  check_keys(defect == "share-keys");
  Shared shared;
  std::vector<std::thread> threads;
  for (int n = 0; n < kThreads; ++n) threads.emplace_back(work, std::ref(shared), n, defect == "free-early");
  threads.emplace_back(evict, std::ref(shared));
  std::this_thread::sleep_for(std::chrono::duration<double>(std::atof(arguments[1])));
  stopped = true;
  for (auto& thread : threads) thread.join();
  if (used_after_drop > 0) fail(std::to_string(used_after_drop) + " uses of a plan that was dropped");
  if (wrong_addresses > 0) fail("wrong addresses reached a function");
  if (products_started == 0) fail("no product was started");
  if (shared.products.size() != 0) fail("entries of dropped plans are left");
  std::printf("%lld products\n", static_cast<long long>(products_started));
  return 0;
}
