#include "memory.h"

#include "block.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kRedZone = 128;
constexpr int kMaxArrays = 64;
constexpr unsigned char kUnset = 0xff;  // NaN, and a bool that UBSan refuses
constexpr unsigned char kZoneByte = 0xc5;

struct Array {
  const void* key;
  const char* name;
  char* begin;
  size_t bytes;
};

char* arena;
size_t arena_used;
size_t static_bytes;
Array arrays[kMaxArrays];
int num_arrays;
const char dynamic_key = 0;

// Sanitizers intercept memset; a plain loop through a volatile pointer stays out of their sight.
void fill(char* begin, size_t bytes, unsigned char value) {
  const uint64_t pattern = 0x0101010101010101u * value;
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) *reinterpret_cast<volatile uint64_t*>(begin + i) = pattern;
  for (; i < bytes; ++i) *reinterpret_cast<volatile unsigned char*>(begin + i) = value;
}

void check_zone(const Array& array, const char* begin, const char* end) {
  for (const char* byte = begin; byte < end; ++byte) {
    if (static_cast<unsigned char>(*byte) != kZoneByte) {
      fail("shared array %s of %zu bytes: a write at byte %td lies outside", array.name,
           array.bytes, byte - array.begin);
    }
  }
}

char* end_with_zone(const Array& array) {
  const size_t padded = (array.bytes + 15) / 16 * 16;
  return array.begin + padded + kRedZone;
}

char* add_array(const void* key, size_t bytes, const char* name) {
  if (num_arrays == kMaxArrays) fail("more than %d shared arrays in one kernel", kMaxArrays);
  Array& array = arrays[num_arrays++];
  array = {key, name, arena + arena_used + kRedZone, bytes};
  char* const end = end_with_zone(array);
  if (end > arena + kSharedArenaBytes) fail("out of shared memory at %s", name);
  fill(arena + arena_used, end - arena - arena_used, kZoneByte);
  fill(array.begin, bytes, kUnset);
  unpoison(array.begin, bytes);
  arena_used = end - arena;
  return array.begin;
}

}  // namespace

void begin_shared_memory(char* memory, size_t dynamic_bytes) {
  arena = memory;
  arena_used = 0;
  static_bytes = 0;
  num_arrays = 0;
  poison(arena, kSharedArenaBytes);
  if (dynamic_bytes > 0) add_array(&dynamic_key, dynamic_bytes, "of the launch");
}

void end_shared_memory() {
  for (int i = 0; i < num_arrays; ++i) {
    check_zone(arrays[i], arrays[i].begin - kRedZone, arrays[i].begin);
    check_zone(arrays[i], arrays[i].begin + arrays[i].bytes, end_with_zone(arrays[i]));
  }
}

void* shared_array(const void* key, size_t bytes, const char* name) {
  for (int i = 0; i < num_arrays; ++i) {
    if (arrays[i].key == key) return arrays[i].begin;
  }
  static_bytes += bytes;
  if (static_bytes > kMaxStaticBytes) fail("%zu bytes of static shared memory", static_bytes);
  return add_array(key, bytes, name);
}

void* dynamic_shared() {
  if (num_arrays == 0 || arrays[0].key != &dynamic_key) fail("the launch has no dynamic memory");
  return arrays[0].begin;
}

}  // namespace cuda_on_cpu
