// Integers that follow from the dynamic dimensions of a call.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <string>
#include <vector>

namespace splitpoint::runner {

// How long the dynamic dimensions of a call are: its size, where that is the one.
using Lengths = c10::SmallVector<int64_t, 4>;

// An expression in postfix: numbers, lengths ("s" for the first, "s1" for the next), and operators,
// separated by spaces.
struct Expression {
  struct Token {
    char what;  // 'n' for a number, 's' for a length, or an operator
    int64_t number;
  };
  std::vector<Token> tokens;
  size_t lengths = 0;  // how many a call needs to have

  explicit Expression(const std::string& text) {
    int64_t depth = 0;
    for (size_t at = 0; at <= text.size();) {
      size_t end = text.find(' ', at);
      if (end == std::string::npos) end = text.size();
      const std::string word = text.substr(at, end - at);
      int64_t number = 0;
      const char* last = word.data() + word.size();
      const auto is_whole = [&](const std::from_chars_result& read) {
        return read.ec == std::errc() && read.ptr == last;
      };
      if (word == "s") {
        add_length(0);
      } else if (word.size() > 1 && word[0] == 's' &&
                 is_whole(std::from_chars(word.data() + 1, last, number)) && number > 0 &&
                 number < kMostLengths) {
        add_length(number);
      } else if (const auto read = std::from_chars(word.data(), last, number);
                 is_whole(read)) {
        tokens.push_back({'n', number});
      } else {
        TORCH_CHECK_VALUE(word.size() == 1 && std::string("+-*/%<>").find(word) < 7,
                          "an expression has '", word, "': ", text);
        tokens.push_back({word[0], 0});
        depth -= 2;
        TORCH_CHECK_VALUE(depth >= 0, "an expression lacks a value: ", text);
      }
      ++depth;
      at = end + 1;
    }
    TORCH_CHECK_VALUE(depth == 1 && tokens.size() <= kDeepest, "not an expression: ", text);
  }

  static constexpr size_t kDeepest = 256;
  static constexpr int64_t kMostLengths = 16;

  void add_length(int64_t index) {
    tokens.push_back({'s', index});
    lengths = std::max(lengths, static_cast<size_t>(index) + 1);
  }

  // As Python computes it: division rounds down, and a remainder has the divisor's sign.
  int64_t operator()(const Lengths& given) const {
    std::array<int64_t, kDeepest> stack;
    size_t top = 0;
    for (const Token& token : tokens) {
      if (token.what == 'n' || token.what == 's') {
        stack[top++] = token.what == 'n' ? token.number : given[token.number];
        continue;
      }
      const int64_t b = stack[--top], a = stack[--top];
      int64_t& result = stack[top++];
      bool wide = false;
      switch (token.what) {
        case '+': wide = __builtin_add_overflow(a, b, &result); break;
        case '-': wide = __builtin_sub_overflow(a, b, &result); break;
        case '*': wide = __builtin_mul_overflow(a, b, &result); break;
        case '<': result = std::min(a, b); break;
        case '>': result = std::max(a, b); break;
        default: {
          TORCH_CHECK(b != 0, "integer division or modulo by zero in a size");
          // The one quotient that 64 bits do not hold traps.
          if (b == -1) {
            result = 0;
            wide = token.what == '/' && __builtin_sub_overflow(int64_t{0}, a, &result);
            break;
          }
          int64_t quotient = a / b;
          if (a % b != 0 && (a < 0) != (b < 0)) --quotient;
          result = token.what == '/' ? quotient : a - quotient * b;
        }
      }
      TORCH_CHECK(!wide, "an integer that follows from the size ", given[0],
                  " has more than 64 bits");
    }
    return stack[0];
  }
};

}  // namespace splitpoint::runner
