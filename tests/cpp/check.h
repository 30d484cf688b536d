// Checks that report and go on, and the table of tests that use them.
#pragma once

#include <sstream>
#include <string>
#include <typeinfo>

namespace check {

// Prints a failure of the running test; may be called from any thread.
void fail(const char* file, int line, const std::string& what);

// Of the running test, so far.
int failures();

// Adds a test to the table that main() runs.
bool add(const char* name, void (*body)());

template <typename A, typename B>
void equal(const A& a, const B& b, const char* file, int line, const char* what) {
  if (a == b) return;
  std::ostringstream text;
  text << what << ": " << a << " against " << b;
  fail(file, line, text.str());
}

// The expression must throw exactly this c10 error, in one line that holds the words.
template <typename Error, typename Body>
void throws(Body body, const std::string& words, const char* file, int line) {
  try {
    body();
    fail(file, line, "nothing thrown, expected: " + words);
  } catch (const Error& error) {
    const std::string text = error.what_without_backtrace();
    if (typeid(error) != typeid(Error) || text.find(words) == std::string::npos ||
        text.find('\n') != std::string::npos)
      fail(file, line,
           std::string(typeid(error).name()) + " says: " + text + "\n    expected: " + words);
  } catch (const std::exception& error) {
    fail(file, line,
         std::string("expected: ") + words + "\n    got " + typeid(error).name() + ": " +
             error.what());
  }
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const bool added_##name = check::add(#name, &name); \
  static void name()

#define EXPECT(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, #condition))
#define EXPECT_EQUAL(a, b) check::equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define EXPECT_THROWS(Error, words, ...) \
  check::throws<Error>([&] { __VA_ARGS__; }, (words), __FILE__, __LINE__)
