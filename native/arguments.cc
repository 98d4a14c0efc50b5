// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"

#include <climits>
#include <cmath>
#include <cstring>

#include "error.h"

namespace ambient {

void wrong_argument(const std::string &path, const std::string &expected) {
  throw ArgumentError{path + " must be " + expected};
}

bool to_boolean(Napi::Value value, const std::string &path) {
  if (!value.IsBoolean()) wrong_argument(path, "a boolean");
  return value.As<Napi::Boolean>().Value();
}

int64_t to_integer(Napi::Value value, const std::string &path, int64_t minimum, int64_t maximum) {
  double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!(number >= static_cast<double>(minimum) && number <= static_cast<double>(maximum)) ||
      number != std::trunc(number)) {
    wrong_argument(path, "an integer from " + std::to_string(minimum) + " to " + std::to_string(maximum));
  }
  return static_cast<int64_t>(number);
}

uint32_t to_u32(Napi::Value value, const std::string &path) {
  return static_cast<uint32_t>(to_integer(value, path, 0, UINT32_MAX));
}

uint64_t to_u64(Napi::Value value, const std::string &path) {
  bool lossless = false;
  uint64_t number = value.IsBigInt() ? value.As<Napi::BigInt>().Uint64Value(&lossless) : 0;
  if (!lossless) wrong_argument(path, "a bigint from 0 to 18446744073709551615");
  return number;
}

std::string to_text(Napi::Value value, const std::string &path, size_t limit) {
  if (!value.IsString()) wrong_argument(path, "a string");
  std::string text = value.As<Napi::String>().Utf8Value();
  if (text.size() > limit || text.find('\0') != std::string::npos) {
    wrong_argument(path, "at most " + std::to_string(limit) + " bytes without NUL");
  }
  return text;
}

std::string to_path(Napi::Value value, const std::string &path) {
  std::string text = to_text(value, path, PATH_MAX - 1);
  if (text.empty()) wrong_argument(path, "a path, not an empty string");
  return text;
}

void to_bytes(Napi::Value value, const std::string &path, void *out, size_t size) {
  bool right = value.IsTypedArray() && value.As<Napi::TypedArray>().TypedArrayType() == napi_uint8_array;
  if (!right || value.As<Napi::Uint8Array>().ElementLength() != size) {
    wrong_argument(path, "a Uint8Array of " + std::to_string(size) + " bytes");
  }
  memcpy(out, value.As<Napi::Uint8Array>().Data(), size);
}

void to_mac(Napi::Value value, const std::string &path, uint8_t out[6]) {
  std::string text = value.IsString() ? value.As<Napi::String>().Utf8Value() : "";
  bool right = text.size() == 17;
  for (size_t i = 0; right && i < 17; i++) {
    char c = text[i];
    if (i % 3 == 2) right = c == ':';
    else right = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
  }
  if (!right) wrong_argument(path, "a MAC address such as \"02:00:5e:10:00:01\"");
  for (int i = 0; i < 6; i++) out[i] = static_cast<uint8_t>(strtoul(text.c_str() + 3 * i, nullptr, 16));
}

uint32_t to_word(Napi::Value value, const std::string &path, const Name *names) {
  const Name *found = value.IsString() ? name_of(names, value.As<Napi::String>().Utf8Value().c_str()) : nullptr;
  if (found) return found->number;
  std::string words;
  for (const Name *name = names; name->word; name++) words += std::string(words.empty() ? "" : ", ") + "\"" + name->word + "\"";
  wrong_argument(path, "one of " + words);
}

int to_fd(Napi::Value value, const std::string &path) {
  double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!(number >= 0 && number <= INT_MAX) || number != std::trunc(number)) wrong_argument(path, "a file descriptor");
  return static_cast<int>(number);
}

int to_netns(Napi::Value value, const std::string &path) {
  if (value.IsNumber() && value.As<Napi::Number>().DoubleValue() == -1) return -1;
  double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!(number >= 0 && number <= INT_MAX) || number != std::trunc(number)) {
    wrong_argument(path, "a file descriptor or HOST (-1)");
  }
  return static_cast<int>(number);
}

uint32_t to_ifindex(Napi::Value value, const std::string &path) {
  return static_cast<uint32_t>(to_integer(value, path, 1, INT_MAX));
}

uint16_t to_port(Napi::Value value, const std::string &path) {
  return static_cast<uint16_t>(to_integer(value, path, 0, UINT16_MAX));
}

std::vector<Napi::Value> to_array(Napi::Value value, const std::string &path, size_t limit) {
  if (!value.IsArray()) wrong_argument(path, "an array");
  Napi::Array array = value.As<Napi::Array>();
  if (array.Length() > limit) wrong_argument(path, "an array of at most " + std::to_string(limit) + " elements");
  std::vector<Napi::Value> elements;
  for (uint32_t i = 0; i < array.Length(); i++) elements.push_back(array.Get(i));
  return elements;
}

Fields::Fields(Napi::Value value, std::string path) : path_(std::move(path)) {
  if (!value.IsObject() || value.IsFunction() || value.IsArray()) wrong_argument(path_, "an object");
  object_ = value.As<Napi::Object>();
}

void Fields::text(const char *name, char *out, size_t size) const {
  std::string value = text(name, size - 1);
  memset(out, 0, size);
  memcpy(out, value.data(), value.size());
}

std::vector<Napi::Value> Fields::array(const char *name, size_t limit) const {
  return to_array(at(name), path(name), limit);
}

}  // namespace ambient
