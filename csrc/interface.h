// What Python calls by ctypes (native/interface.py), as C functions. Defined once for each library, for its Device.
#pragma once

#include "register.h"

// Raised whenever a structure, a signature below or the list of ops (register.h) changes, so that Python never uses a
// library of another version.
#define SEMISPARSE_INTERFACE 9

#define SEMISPARSE_EXPORT extern "C" __attribute__((visibility("default")))

#define SEMISPARSE_DEFINE_INTERFACE(Device)                                                                          \
  SEMISPARSE_EXPORT int32_t semisparse_interface() { return SEMISPARSE_INTERFACE; }                                  \
  SEMISPARSE_EXPORT void semisparse_register() { semisparse::register_ops<Device>(); }                               \
  SEMISPARSE_EXPORT void semisparse_connect(const semisparse::Functions* functions) {                                \
    Device::prepared().connect(*functions);                                                                          \
  }                                                                                                                  \
  SEMISPARSE_EXPORT void semisparse_add_product(int64_t kind, int32_t device, int32_t dtype, int64_t tokens,         \
                                                int64_t out_features, int64_t in_features, int32_t bias,             \
                                                const char* backend, const semisparse::ProductFacts* facts) {        \
    Device::prepared().products.insert(                                                                              \
        semisparse::product_key(static_cast<semisparse::ProductKind>(kind), device, dtype, tokens, out_features,     \
                                in_features, bias != 0, backend),                                                    \
        std::make_shared<semisparse::Product>(*facts));                                                              \
  }                                                                                                                  \
  SEMISPARSE_EXPORT void semisparse_add_launch(int64_t kind, int32_t device, int32_t read_dtype,                     \
                                               int32_t written_dtype, const char* mask, int64_t rows,                \
                                               int64_t columns, int64_t stride, int32_t first, int32_t second,        \
                                               const semisparse::LaunchFacts* facts) {                               \
    Device::prepared().launches.insert(                                                                              \
        semisparse::launch_key(static_cast<semisparse::LaunchKind>(kind), device, read_dtype, written_dtype, mask,   \
                               rows, columns, stride, first != 0, second != 0),                                       \
        std::make_shared<semisparse::Launch>(*facts));                                                               \
  }                                                                                                                  \
  SEMISPARSE_EXPORT int64_t semisparse_drop_plan(const void* plan) {                                                 \
    return Device::prepared().products.erase(                                                                        \
        [plan](const semisparse::Product& product) { return product.facts.plan == plan; });                          \
  }                                                                                                                  \
  SEMISPARSE_EXPORT int64_t semisparse_forget_products() {                                                           \
    return Device::prepared().products.erase([](const semisparse::Product&) { return true; });                       \
  }                                                                                                                  \
  SEMISPARSE_EXPORT int64_t semisparse_prepared() {                                                                  \
    return static_cast<int64_t>(Device::prepared().products.size() + Device::prepared().launches.size());            \
  }                                                                                                                  \
  SEMISPARSE_EXPORT int64_t semisparse_started() { return Device::prepared().started.load(); }                       \
  SEMISPARSE_EXPORT int64_t semisparse_started_dense() { return Device::prepared().started_dense.load(); }           \
  SEMISPARSE_EXPORT void semisparse_watch(int64_t more) { Device::prepared().watchers.fetch_add(more); }
