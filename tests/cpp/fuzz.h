// One input of the fuzzer, also without it: the tests replay the corpus.
#pragma once

#include <string>

// Empty where the readers loaded the folder, or refused it as they should; else what is wrong.
std::string try_folder(const std::string& input);
